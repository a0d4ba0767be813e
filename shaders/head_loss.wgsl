// Statistics of each row of logits, then the losses of the row and their gradient in place of the student's logits.
//
// With the scaled logits s of the student and t of the teacher, the statistics are max s, Σ exp(s − max s), max t,
// Σ exp(t − max t), Σ exp(s − max s)(s − t), Σ exp(t − max t)(t − s), s[label]. With p = softmax(s), q = softmax(t):
// KL(p ‖ q) = Σ p (s − t) − lse s + lse t with the gradient p (s − t − lse s + lse t − KL); that of KL(q ‖ p) is p − q; that
// of −ln p[label] is p − onehot(label).
//
// A workgroup of 256 takes a row; its lanes take every 256th column, and a tree sums the lanes.

override TEACHER: bool = false;
override LABELS: bool = false;
override GRADIENT: bool = false;

const LANES: u32 = 256u;

struct Statistics {
    student: vec2<u32>,
    teacher: vec2<u32>,
    labels: vec2<u32>,
    statistics: vec2<u32>,
    rows: u32,
    vocabulary: u32,
    student_scale: f32,
    teacher_scale: f32,
}

struct Gradient {
    teacher: vec2<u32>,
    labels: vec2<u32>,
    statistics: vec2<u32>,
    row_weights: vec2<u32>,
    student: vec2<u32>,
    losses: vec2<u32>,
    rows: u32,
    vocabulary: u32,
    student_scale: f32,
    teacher_scale: f32,
    reverse_kl: f32,
    forward_kl: f32,
    cross_entropy: f32,
}

@group(0) @binding(0) var<storage, read> student: array<f32>; // [rows, vocabulary]
@group(0) @binding(1) var<storage, read> teacher: array<f32>; // [rows, vocabulary]
@group(0) @binding(2) var<storage, read> labels: array<u32>; // [1, rows]
@group(0) @binding(3) var<storage, read_write> statistics: array<f32>; // [rows, 7]
@group(1) @binding(0) var<uniform> p: Statistics;

@group(0) @binding(0) var<storage, read> of_teacher: array<f32>; // [rows, vocabulary]
@group(0) @binding(1) var<storage, read> of_labels: array<u32>; // [1, rows]
@group(0) @binding(2) var<storage, read> of_rows: array<f32>; // [rows, 7]: the statistics
@group(0) @binding(3) var<storage, read> row_weights: array<f32>; // [1, rows]
@group(0) @binding(4) var<storage, read_write> logits: array<f32>; // [rows, vocabulary]: the student's, then the gradient
@group(0) @binding(5) var<storage, read_write> losses: array<f32>; // [rows, 3]
@group(1) @binding(0) var<uniform> g: Gradient;

var<workgroup> pairs: array<vec2<f32>, LANES>;
var<workgroup> sums: array<vec4<f32>, LANES>;

/// The larger of each pair over all lanes.
fn largest_of_lanes(value: vec2<f32>, lane: u32) -> vec2<f32> {
    pairs[lane] = value;
    workgroupBarrier();
    for (var width = LANES / 2u; width > 0u; width /= 2u) {
        if lane < width {
            pairs[lane] = max(pairs[lane], pairs[lane + width]);
        }
        workgroupBarrier();
    }
    let all = pairs[0];
    workgroupBarrier();
    return all;
}

/// The sums of all lanes' values, for lane 0.
fn sums_of_lanes(value: vec4<f32>, lane: u32) -> vec4<f32> {
    sums[lane] = value;
    workgroupBarrier();
    for (var width = LANES / 2u; width > 0u; width /= 2u) {
        if lane < width {
            sums[lane] += sums[lane + width];
        }
        workgroupBarrier();
    }
    return sums[0];
}

@compute @workgroup_size(LANES)
fn statistics_of_rows(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var row = group.x; row < p.rows; row += groups.x) {
        var most = vec2(-3.40282e38);
        for (var col = lane; col < p.vocabulary; col += LANES) {
            let s = student[at(p.student, row, col)] * p.student_scale;
            var t = 0.0;
            if TEACHER {
                t = teacher[at(p.teacher, row, col)] * p.teacher_scale;
            }
            most = max(most, vec2(s, t));
        }
        most = largest_of_lanes(most, lane);
        // Σ exp(s − max), Σ exp(t − max), Σ exp(s − max)(s − t), Σ exp(t − max)(t − s).
        var sum = vec4(0.0);
        for (var col = lane; col < p.vocabulary; col += LANES) {
            let s = student[at(p.student, row, col)] * p.student_scale;
            let by_student = exponential(s - most.x);
            sum.x += by_student;
            if TEACHER {
                let t = teacher[at(p.teacher, row, col)] * p.teacher_scale;
                let by_teacher = exponential(t - most.y);
                sum.y += by_teacher;
                sum.z = fma(by_student, s - t, sum.z);
                sum.w = fma(by_teacher, t - s, sum.w);
            }
        }
        sum = sums_of_lanes(sum, lane);
        if lane == 0u {
            var of_label = 0.0;
            if LABELS {
                let label = labels[p.labels.x + row];
                if label < p.vocabulary {
                    of_label = student[at(p.student, row, label)] * p.student_scale;
                }
            }
            let to = at(p.statistics, row, 0u);
            statistics[to] = most.x;
            statistics[to + 1u] = sum.x;
            statistics[to + 2u] = select(0.0, most.y, TEACHER);
            statistics[to + 3u] = sum.y;
            statistics[to + 4u] = sum.z;
            statistics[to + 5u] = sum.w;
            statistics[to + 6u] = of_label;
        }
        workgroupBarrier();
    }
}

@compute @workgroup_size(LANES)
fn gradient_of_rows(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var row = group.x; row < g.rows; row += groups.x) {
        let from_row = at(g.statistics, row, 0u);
        let student_max = of_rows[from_row];
        let student_sum = of_rows[from_row + 1u];
        let teacher_max = of_rows[from_row + 2u];
        let teacher_sum = of_rows[from_row + 3u];
        var label = g.vocabulary;
        if LABELS {
            label = of_labels[g.labels.x + row];
        }
        let labelled = label < g.vocabulary;
        // lse t − lse s, with what is of one size together.
        var gap = 0.0;
        var reverse = 0.0;
        var forward = 0.0;
        if TEACHER {
            gap = (teacher_max - student_max) + (logarithm(teacher_sum) - logarithm(student_sum));
            reverse = of_rows[from_row + 4u] / student_sum + gap;
            forward = of_rows[from_row + 5u] / teacher_sum - gap;
        }
        if lane == 0u {
            let cross_entropy = (student_max - of_rows[from_row + 6u]) + logarithm(student_sum);
            let to = at(g.losses, row, 0u);
            losses[to] = reverse;
            losses[to + 1u] = forward;
            losses[to + 2u] = select(0.0, cross_entropy, labelled);
        }
        if GRADIENT {
            let weight = row_weights[g.row_weights.x + row] * g.student_scale;
            let of_label = select(0.0, g.cross_entropy, labelled);
            for (var col = lane; col < g.vocabulary; col += LANES) {
                let i = at(g.student, row, col);
                var gradient = 0.0;
                if weight != 0.0 {
                    let s = logits[i] * g.student_scale;
                    let p_of = exponential(s - student_max) / student_sum;
                    if TEACHER {
                        let t = of_teacher[at(g.teacher, row, col)] * g.teacher_scale;
                        gradient = p_of * fma(g.reverse_kl, s - t + (gap - reverse), g.forward_kl + of_label);
                        if g.forward_kl != 0.0 {
                            gradient -= g.forward_kl * exponential(t - teacher_max) / teacher_sum;
                        }
                    } else {
                        gradient = p_of * of_label;
                    }
                    gradient = weight * select(gradient, gradient - of_label, col == label);
                }
                logits[i] = gradient;
            }
        }
    }
}

// The losses at the head, a block a row of logits: their statistics, then the gradient, which may take their place.
//
// With the scaled logits s, t of student and teacher, p = softmax(s), q = softmax(t), lse the log of the sum of
// exponentials: KL(p ‖ q) = Σ p (s − t) − lse s + lse t, its gradient p ((s − t) − lse s + lse t − KL); that of
// KL(q ‖ p) is p − q, that of −ln p[label] is p − onehot(label). A null teacher or null labels are none.
#include "h1.cuh"

enum { STUDENT_MAX, STUDENT_SUM, TEACHER_MAX, TEACHER_SUM, REVERSE, FORWARD, LABEL, STATISTICS };

// The largest of some logits, and of exp(logit − max) the sum, and the sum weighted by the gap to the other model.
struct Part {
    float max, sum, gap;
};

H1_DEVICE void take(Part& part, const float (&logits)[8], const float (&gaps)[8]) {
    float most = part.max;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, logits[i]);
    if (most > part.max) {
        float factor = expf(part.max - most);
        part = {most, part.sum * factor, part.gap * factor};
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float weight = expf(logits[i] - part.max);
        part.sum += weight;
        part.gap += weight * gaps[i];
    }
}

H1_DEVICE Part merge(Part a, Part b) {
    float most = fmaxf(a.max, b.max);
    // Two parts of nothing have no largest.
    float of_a = a.max == most ? 1.0f : expf(a.max - most), of_b = b.max == most ? 1.0f : expf(b.max - most);
    return {most, a.sum * of_a + b.sum * of_b, a.gap * of_a + b.gap * of_b};
}

H1_DEVICE Part warp_merge(Part part) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        Part other = {__shfl_down_sync(WHOLE_WARP, part.max, offset), __shfl_down_sync(WHOLE_WARP, part.sum, offset),
                      __shfl_down_sync(WHOLE_WARP, part.gap, offset)};
        part = merge(part, other);
    }
    return part;
}

// The whole block's, in the first thread.
H1_DEVICE Part block_merge(Part part, Part* shared) {
    part = warp_merge(part);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = part;
    __syncthreads();
    Part none = {-INFINITE, 0, 0};
    return warp_merge(threadIdx.x % WARP < blockDim.x / WARP ? shared[threadIdx.x % WARP] : none);
}

extern "C" __global__ void head_loss(Rows<const float> student, Rows<const float> teacher, const unsigned* labels,
                                     float student_scale, float teacher_scale, Rows<float> statistics,
                                     long long vocabulary) {
    after_earlier();
    __shared__ Part shared[WARP];
    long long r = blockIdx.x;
    const float *s_row = student.row(r), *t_row = teacher.data ? teacher.row(r) : nullptr;
    Part of_student = {-INFINITE, 0, 0}, of_teacher = of_student;
    bool wide = aligned(student) && aligned(teacher);
    for (long long v = 8 * threadIdx.x; v < vocabulary; v += 8 * blockDim.x) {
        float s[8], t[8], gap[8];
        load_eight(s, s_row + v, vocabulary - v, wide);
        if (t_row) load_eight(t, t_row + v, vocabulary - v, wide);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            bool there = v + i < vocabulary;
            s[i] = there ? s[i] * student_scale : -INFINITE;
            t[i] = there && t_row ? t[i] * teacher_scale : s[i];
            gap[i] = there ? s[i] - t[i] : 0.0f;
        }
        take(of_student, s, gap);
        if (!t_row) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) gap[i] = -gap[i];
        take(of_teacher, t, gap);
    }
    of_student = block_merge(of_student, shared);
    of_teacher = block_merge(of_teacher, shared);
    if (threadIdx.x > 0) return;
    float* out = statistics.row(r);
    out[STUDENT_MAX] = of_student.max;
    out[STUDENT_SUM] = of_student.sum;
    out[TEACHER_MAX] = t_row ? of_teacher.max : 0.0f;
    out[TEACHER_SUM] = of_teacher.sum;
    out[REVERSE] = of_student.gap;
    out[FORWARD] = of_teacher.gap;
    out[LABEL] = labels && labels[r] < vocabulary ? s_row[labels[r]] * student_scale : 0.0f;
}

extern "C" __global__ void head_loss_gradient(Rows<const float> student, Rows<T_OUT> out, Rows<const float> teacher,
                                              const unsigned* labels, float student_scale, float teacher_scale, Rows<const float> statistics,
                                              const float* row_weights, int with_gradient, float reverse_weight,
                                              float forward_weight, float label_weight, Rows<float> losses,
                                              long long vocabulary) {
    after_earlier();
    __shared__ float shared_shift;
    long long r = blockIdx.x;
    const float* found = statistics.row(r);
    bool labelled = labels && labels[r] < vocabulary;
    if (threadIdx.x == 0) {
        // Differences of logarithms, in f64.
        double student_lse = found[STUDENT_MAX] + log((double)found[STUDENT_SUM]), gap = 0, reverse = 0, forward = 0;
        if (teacher.data) {
            gap = found[TEACHER_MAX] + log((double)found[TEACHER_SUM]) - student_lse;
            reverse = (double)found[REVERSE] / found[STUDENT_SUM] + gap;
            forward = (double)found[FORWARD] / found[TEACHER_SUM] - gap;
        }
        float* out = losses.row(r);
        out[0] = (float)reverse;
        out[1] = (float)forward;
        out[2] = labelled ? (float)(student_lse - found[LABEL]) : 0.0f;
        shared_shift = (float)(gap - reverse);
    }
    __syncthreads();
    if (!with_gradient) return;

    const float* s_row = student.row(r);
    float weight = row_weights[r] * student_scale, shift = shared_shift;
    float of_label = labelled ? weight * label_weight : 0.0f, of_reverse = weight * reverse_weight;
    float of_q = teacher.data ? weight * forward_weight : 0.0f, of_p = of_q + of_label;
    float p_factor = 1.0f / found[STUDENT_SUM], q_factor = teacher.data ? 1.0f / found[TEACHER_SUM] : 0.0f;
    long long label = labelled ? (long long)labels[r] : -1;
    float student_max = found[STUDENT_MAX], teacher_max = found[TEACHER_MAX];
    bool wide = aligned(student) && aligned(teacher) && aligned(out);
    for (long long v = 8 * threadIdx.x; v < vocabulary; v += 8 * blockDim.x) {
        float gradient[8] = {}, s[8], t[8] = {};
        if (weight != 0) {
            load_eight(s, s_row + v, vocabulary - v, wide);
            if (teacher.data) load_eight(t, teacher.row(r) + v, vocabulary - v, wide);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                s[i] *= student_scale;
                t[i] *= teacher_scale;
                float p = expf(s[i] - student_max) * p_factor;
                float gap = teacher.data ? (s[i] - t[i] + shift) * of_reverse : 0.0f;
                gradient[i] = p * (gap + of_p);
                if (of_q != 0) gradient[i] -= expf(t[i] - teacher_max) * q_factor * of_q;
                if (v + i == label) gradient[i] -= of_label;
            }
        }
        store_eight(out.row(r) + v, gradient, vocabulary - v, wide);
    }
}

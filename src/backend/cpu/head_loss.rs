//! The losses at the head: statistics of each row of logits, then their gradient in place.
//!
//! With the scaled logits s, t of student and teacher, p = softmax(s), q = softmax(t), lse the log of the sum of exponentials:
//! KL(p ‖ q) = Σ p (s − t) − lse s + lse t, its gradient p ((s − t) − lse s + lse t − KL); that of KL(q ‖ p) is p − q, that of
//! `−ln p[label]` is p − onehot(label). Sums go in blocks to f64, in an order that the vocabulary alone fixes.

use super::lines::{Sum, load, store};
use super::math::{exp, ln};
use super::matrix::{Rows, RowsMut};
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::work::parallel;
use crate::backend::ops::LossWeights;

/// Values whose sum goes to f64 at once.
const BLOCK: usize = 64 * LANES;

/// What logits are multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct Scales {
    /// The student's.
    pub student: f32,
    /// The teacher's.
    pub teacher: f32,
}

/// Statistics `[rows, 7]` of logits `[rows, vocabulary]`, in the columns of [`crate::backend::ops::STATISTICS`]. A label outside
/// the vocabulary is none.
pub fn head_loss(
    simd: Simd,
    student: Rows<'_>,
    teacher: Option<Rows<'_>>,
    labels: Option<&[u32]>,
    scales: Scales,
    statistics: &RowsMut<'_>,
) {
    let cost = if teacher.is_some() { 4 } else { 2 };
    parallel(student.rows(), student.rows() * student.cols() * cost, |row| {
        let (student, teacher) = (student.row(row), teacher.map(|teacher| teacher.row(row)));
        let label = labels.and_then(|labels| student.get(labels[row] as usize));
        let found = simd.run(Statistics { student, teacher, scales });
        // SAFETY: the row belongs to this task.
        let out = unsafe { statistics.shared_row(row) };
        out[..6].copy_from_slice(&found);
        out[6] = label.map_or(0.0, |logit| logit * scales.student);
    });
}

struct Statistics<'a> {
    student: &'a [f32],
    teacher: Option<&'a [f32]>,
    scales: Scales,
}

impl Kernel for Statistics<'_> {
    type Output = [f32; 6];

    #[inline(always)]
    fn run<L: Lanes>(self) -> [f32; 6] {
        let scale = [L::splat(self.scales.student), L::splat(self.scales.teacher)];
        let student_max = largest::<L>(self.student, scale[0]);
        let Some(teacher) = self.teacher else {
            let [sum] = sums(self.student.len(), |i| {
                let s = load::<L>(self.student, i) * scale[0];
                [(exp(s - L::splat(student_max)), L::splat(1.0))]
            });
            return [student_max, sum as f32, 0.0, 0.0, 0.0, 0.0];
        };
        let teacher_max = largest::<L>(teacher, scale[1]);
        let [student_sum, teacher_sum, reverse, forward] = sums(self.student.len(), |i| {
            let (s, t) = (load::<L>(self.student, i) * scale[0], load::<L>(teacher, i) * scale[1]);
            let (p, q) = (exp(s - L::splat(student_max)), exp(t - L::splat(teacher_max)));
            [(p, L::splat(1.0)), (q, L::splat(1.0)), (p, s - t), (q, t - s)]
        });
        [student_max, student_sum as f32, teacher_max, teacher_sum as f32, reverse as f32, forward as f32]
    }
}

/// The largest scaled value.
#[inline(always)]
fn largest<L: Lanes>(values: &[f32], scale: L) -> f32 {
    let whole = values.len() / LANES * LANES;
    let mut most = L::splat(f32::NEG_INFINITY);
    for i in (0..whole).step_by(LANES) {
        most = (load::<L>(values, i) * scale).max(most);
    }
    let scale = scale.to_array()[0];
    values[whole..].iter().fold(most.max_lane(), |most, value| most.max(value * scale))
}

/// Sums over `0..len` of products that `terms` gives for 16 indices at a time; those past the end do not count.
#[inline(always)]
fn sums<L: Lanes, const N: usize>(len: usize, terms: impl Fn(usize) -> [(L, L); N]) -> [f64; N] {
    let mut totals = [0.0; N];
    for first in (0..len).step_by(BLOCK) {
        let mut block = [Sum::<L>::new(); N];
        for i in (first..len.min(first + BLOCK)).step_by(LANES) {
            let there = len - i;
            for (sum, (a, b)) in block.iter_mut().zip(terms(i)) {
                let (a, b) = if there >= LANES { (a, b) } else { (front(a, there), front(b, there)) };
                sum.mul_add(i, a, b);
            }
        }
        totals.iter_mut().zip(block).for_each(|(total, sum)| *total += f64::from(sum.total()));
    }
    totals
}

/// The first `n` lanes, and zeros.
#[inline(always)]
fn front<L: Lanes>(value: L, n: usize) -> L {
    let mut lanes = value.to_array();
    lanes[n..].fill(0.0);
    L::from_array(lanes)
}

/// What a gradient is made of.
#[derive(Clone, Copy)]
pub struct Gradient<'a> {
    /// `[rows, vocabulary]`.
    pub teacher: Option<Rows<'a>>,
    /// `[rows]`.
    pub labels: Option<&'a [u32]>,
    /// What logits are multiplied by.
    pub scales: Scales,
    /// `[rows, 7]`.
    pub statistics: Rows<'a>,
    /// `[rows]`: the weight of each row.
    pub row_weights: &'a [f32],
    /// The weights of the losses; `None` for no gradient.
    pub weights: Option<LossWeights>,
}

/// The losses `[rows, 3]` of each row (reverse KL, forward KL, cross-entropy), and logits `[rows, vocabulary]` into the gradient of
/// their weighted sum.
pub fn head_loss_gradient(simd: Simd, student: &RowsMut<'_>, given: Gradient<'_>, losses: &RowsMut<'_>) {
    parallel(student.rows(), student.rows() * student.cols() * 4, |row| {
        // SAFETY: the rows belong to this task.
        let (logits, losses) = unsafe { (student.shared_row(row), losses.shared_row(row)) };
        simd.run(Row { logits, losses, row, given });
    });
}

struct Row<'a> {
    logits: &'a mut [f32],
    losses: &'a mut [f32],
    row: usize,
    given: Gradient<'a>,
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Gradient { teacher, labels, scales, statistics, row_weights, weights } = self.given;
        let found = statistics.row(self.row);
        let label = labels.map(|labels| labels[self.row] as usize).filter(|label| *label < self.logits.len());
        let log_sum = |max: f32, sum: f32| f64::from(max) + f64::from(ln(L::splat(sum)).to_array()[0]);
        let student_lse = log_sum(found[0], found[1]);
        let (mut reverse, mut forward, mut gap) = (0.0, 0.0, 0.0);
        if teacher.is_some() {
            gap = log_sum(found[2], found[3]) - student_lse;
            reverse = f64::from(found[4]) / f64::from(found[1]) + gap;
            forward = f64::from(found[5]) / f64::from(found[3]) - gap;
        }
        let cross_entropy = label.map_or(0.0, |_| student_lse - f64::from(found[6]));
        self.losses.copy_from_slice(&[reverse as f32, forward as f32, cross_entropy as f32]);

        let Some(weights) = weights else { return };
        let weight = row_weights[self.row] * scales.student;
        if weight == 0.0 {
            self.logits.fill(0.0);
            return;
        }
        let of_label = label.map_or(0.0, |_| weights.cross_entropy);
        let (p_max, p_scale) = (L::splat(found[0]), L::splat(1.0 / found[1]));
        let student_scale = L::splat(scales.student);
        let Some(teacher) = teacher else {
            let factor = L::splat(weight * of_label);
            for i in (0..self.logits.len()).step_by(LANES) {
                let p = exp(load::<L>(self.logits, i) * student_scale - p_max) * p_scale;
                store(p * factor, self.logits, i);
            }
            self.subtract_label(label, weight * of_label);
            return;
        };
        let teacher = teacher.row(self.row);
        let (q_max, q_scale, teacher_scale) = (L::splat(found[2]), L::splat(1.0 / found[3]), L::splat(scales.teacher));
        // p (reverse (s − t + shift) + forward + label) − q forward.
        let shift = L::splat((gap - reverse) as f32);
        let of_reverse = L::splat(weight * weights.reverse_kl);
        let of_p = L::splat(weight * (weights.forward_kl + of_label));
        let of_q = L::splat(weight * weights.forward_kl);
        for i in (0..self.logits.len()).step_by(LANES) {
            let s = load::<L>(self.logits, i) * student_scale;
            let t = load::<L>(teacher, i) * teacher_scale;
            let p = exp(s - p_max) * p_scale;
            let mut gradient = p * (s - t + shift).mul_add(of_reverse, of_p);
            if weights.forward_kl != 0.0 {
                let q = exp(t - q_max) * q_scale;
                gradient = q.neg_mul_add(of_q, gradient);
            }
            store(gradient, self.logits, i);
        }
        self.subtract_label(label, weight * of_label);
    }
}

impl Row<'_> {
    fn subtract_label(self, label: Option<usize>, amount: f32) {
        if let Some(label) = label {
            self.logits[label] -= amount;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Grid, everywhere};
    use super::*;
    use crate::random;
    use h1_reference as reference;
    use proptest::prelude::*;
    use rand::RngExt;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn losses_and_gradients_are_those_of_the_reference(
            seed in any::<u64>(),
            rows in 1usize..5,
            vocabulary in prop::sample::select(vec![1, 2, 15, 16, 17, 63, 65, 1023, 1024, 1025, 2100]),
            with_teacher in any::<bool>(),
            (reverse_kl, forward_kl, cross_entropy) in (0..2u8, 0..2u8, 0..2u8),
            temperature in prop::sample::select(vec![1.0f32, 2.0, 0.7]),
        ) {
            let rng = &mut random::stream(seed, "head loss");
            let student = Grid::random(rng, rows, vocabulary, 8.0);
            let teacher = with_teacher.then(|| Grid::random(rng, rows, vocabulary, 8.0));
            let labels: Vec<u32> = (0..rows).map(|_| rng.random_range(0..vocabulary as u32 + 2)).collect();
            let row_weights: Vec<f32> = (0..rows).map(|row| if row == 1 { 0.0 } else { rng.random_range(0.1..1.0) }).collect();
            let weights = LossWeights {
                reverse_kl: reverse_kl.into(),
                forward_kl: forward_kl.into(),
                cross_entropy: 0.5 * f32::from(cross_entropy),
            };
            let scales = Scales { student: 1.5, teacher: 1.5 / temperature };
            let outputs = everywhere(|simd| {
                let mut statistics = Grid::poisoned(rows, crate::backend::ops::STATISTICS);
                let (mut logits, mut losses) = (student.clone(), Grid::poisoned(rows, 3));
                let view = teacher.as_ref().map(Grid::view);
                head_loss(simd, student.view(), view, Some(&labels), scales, &statistics.view_mut());
                let statistics_view = statistics.view();
                let given = Gradient {
                    teacher: view,
                    labels: Some(&labels),
                    scales,
                    statistics: statistics_view,
                    row_weights: &row_weights,
                    weights: Some(weights),
                };
                head_loss_gradient(simd, &logits.view_mut(), given, &losses.view_mut());
                vec![logits.values(), losses.values()]
            });

            let op = reference::HeadLoss {
                weights: reference::LossWeights {
                    reverse_kl: weights.reverse_kl.into(),
                    forward_kl: weights.forward_kl.into(),
                    cross_entropy: weights.cross_entropy.into(),
                },
                logits_scale: 1.5,
                temperature: f64::from(temperature),
                spelling: reference::Temperature::TeacherOnly,
                vocab_start: 0,
            };
            let labels: Vec<Option<u32>> =
                labels.iter().map(|label| Some(*label).filter(|label| (*label as usize) < vocabulary)).collect();
            let mut logits = student.f64();
            let teacher = teacher.map(|teacher| teacher.f64());
            let teacher = teacher.as_ref().map(|teacher| teacher.view());
            let statistics = reference::head_loss_statistics(logits.view(), teacher, &labels, &op);
            let row_weights: Vec<f64> = row_weights.iter().map(|weight| f64::from(*weight)).collect();
            reference::head_loss_gradient(logits.view_mut(), teacher, &labels, &statistics, &row_weights, &op);
            let losses = statistics.iter().zip(&labels).map(|(row, label)| row.losses(label.is_some()));
            let expected: Vec<f64> =
                losses.flat_map(|row| [row.reverse_kl, row.forward_kl, row.cross_entropy]).collect();
            // What a difference of two scaled logits of up to 12 loses, whatever is left of it.
            let rounding = 4.0 * 12.0 * f64::from(f32::EPSILON);
            for (found, expected) in outputs[0].iter().zip(&logits).chain(outputs[1].iter().zip(&expected)) {
                prop_assert!((f64::from(*found) - expected).abs() <= rounding, "{found} for {expected}");
            }
        }
    }
}

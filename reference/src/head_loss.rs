//! The losses at the head of a model: reverse KL, forward KL and cross-entropy of rows of logits, in two calls.
//!
//! The first call sums each row's statistics, the second turns logits into their gradient. A vocabulary that is split over
//! several holders is summed by each over its own part and [merged](RowStatistics::merge) in between.

use ndarray::{Array1, ArrayView1, ArrayView2, ArrayViewMut2};

use crate::Real;

/// What the temperature divides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Temperature {
    /// Student and teacher logits, as the formula of the Apriel-H1 paper.
    Both,
    /// The teacher's logits only, as Fast-LLM (`fast_llm/functional/entropy_loss.py`).
    TeacherOnly,
}

/// Weights of the three losses in their sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossWeights {
    /// Of KL(student ‖ teacher).
    pub reverse_kl: f64,
    /// Of KL(teacher ‖ student).
    pub forward_kl: f64,
    /// Of the cross-entropy with the row's label.
    pub cross_entropy: f64,
}

/// How logits become distributions, and distributions a loss. Student `p = softmax(student_scale * logits)`, teacher
/// `q = softmax(teacher_scale * logits)`, where `teacher_scale = logits_scale / temperature`, and `student_scale` is the same or
/// `logits_scale` alone. Without a teacher both KLs are 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadLoss {
    /// What is summed into the gradient.
    pub weights: LossWeights,
    /// Multiplies the logits of both models.
    pub logits_scale: f64,
    /// Above 0.
    pub temperature: f64,
    /// Which logits the temperature divides.
    pub spelling: Temperature,
    /// The token id of the first column; 0 where the vocabulary is whole.
    pub vocab_start: usize,
}

impl HeadLoss {
    fn student_scale<T: Real>(&self) -> T {
        match self.spelling {
            Temperature::Both => self.teacher_scale(),
            Temperature::TeacherOnly => T::of(self.logits_scale),
        }
    }

    fn teacher_scale<T: Real>(&self) -> T {
        T::of(self.logits_scale / self.temperature)
    }

    /// The scaled logits of student and teacher in one row.
    fn scaled_row<T: Real>(
        &self,
        student: ArrayView1<T>,
        teacher: Option<ArrayView2<T>>,
        row: usize,
    ) -> (Array1<T>, Option<Array1<T>>) {
        let t = teacher.map(|teacher| teacher.row(row).mapv(|logit| logit * self.teacher_scale()));
        (student.mapv(|logit| logit * self.student_scale()), t)
    }

    /// The column of a label, if it lies in this part of the vocabulary.
    fn column(&self, label: Option<u32>, columns: usize) -> Option<usize> {
        label.and_then(|label| (label as usize).checked_sub(self.vocab_start)).filter(|&column| column < columns)
    }
}

/// The sums over a row's vocabulary, or over a part of it, that its losses and its gradient need, with the scaled logits `s` of
/// the student and `t` of the teacher. What is the teacher's is 0 without one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowStatistics<T> {
    /// `max s`.
    pub student_max: T,
    /// `Σ exp(s - max s)`.
    pub student_sum: T,
    /// `max t`.
    pub teacher_max: T,
    /// `Σ exp(t - max t)`.
    pub teacher_sum: T,
    /// `Σ exp(s - max s) (s - t)`.
    pub reverse_cross: T,
    /// `Σ exp(t - max t) (t - s)`.
    pub forward_cross: T,
    /// `s` of the row's label; 0 where the label lies in another part, or the row has none.
    pub label_logit: T,
}

/// The losses of one row, in nats, none of them weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowLosses<T> {
    /// KL(student ‖ teacher) `= Σ p (ln p - ln q)`.
    pub reverse_kl: T,
    /// KL(teacher ‖ student) `= Σ q (ln q - ln p)`.
    pub forward_kl: T,
    /// `-ln p[label]`; 0 for a row without a label.
    pub cross_entropy: T,
}

impl<T: Real> RowStatistics<T> {
    fn of_row(s: ArrayView1<T>, t: Option<ArrayView1<T>>, label_logit: T) -> Self {
        let (student_max, student_sum) = max_and_sum(s);
        let mut statistics = Self {
            student_max,
            student_sum,
            teacher_max: T::zero(),
            teacher_sum: T::zero(),
            reverse_cross: T::zero(),
            forward_cross: T::zero(),
            label_logit,
        };
        if let Some(t) = t {
            let (teacher_max, teacher_sum) = max_and_sum(t);
            let pairs = || s.iter().zip(t.iter());
            statistics.teacher_max = teacher_max;
            statistics.teacher_sum = teacher_sum;
            statistics.reverse_cross = pairs().map(|(&s, &t)| (s - student_max).exp() * (s - t)).sum();
            statistics.forward_cross = pairs().map(|(&s, &t)| (t - teacher_max).exp() * (t - s)).sum();
        }
        statistics
    }

    /// The statistics of two parts of a row's vocabulary together: sums are rescaled to the larger maximum and added.
    /// Commutative, and associative but for rounding.
    pub fn merge(&self, other: &Self) -> Self {
        let student_max = self.student_max.max(other.student_max);
        let teacher_max = self.teacher_max.max(other.teacher_max);
        let by_student =
            |a: T, b: T| (self.student_max - student_max).exp() * a + (other.student_max - student_max).exp() * b;
        let by_teacher =
            |a: T, b: T| (self.teacher_max - teacher_max).exp() * a + (other.teacher_max - teacher_max).exp() * b;
        Self {
            student_max,
            student_sum: by_student(self.student_sum, other.student_sum),
            teacher_max,
            teacher_sum: by_teacher(self.teacher_sum, other.teacher_sum),
            reverse_cross: by_student(self.reverse_cross, other.reverse_cross),
            forward_cross: by_teacher(self.forward_cross, other.forward_cross),
            label_logit: self.label_logit + other.label_logit,
        }
    }

    /// `ln Σ exp(s)`.
    fn student_lse(&self) -> T {
        self.student_max + self.student_sum.ln()
    }

    /// `ln Σ exp(t)`.
    fn teacher_lse(&self) -> T {
        self.teacher_max + self.teacher_sum.ln()
    }

    /// The row's losses, from the statistics of its whole vocabulary.
    ///
    /// `reverse_kl = reverse_cross / student_sum - lse(s) + lse(t)`, forward_kl the same with the roles changed,
    /// `cross_entropy = lse(s) - label_logit`.
    pub fn losses(&self, has_label: bool) -> RowLosses<T> {
        let mut losses = RowLosses { reverse_kl: T::zero(), forward_kl: T::zero(), cross_entropy: T::zero() };
        if self.teacher_sum > T::zero() {
            let log_ratio = self.teacher_lse() - self.student_lse();
            losses.reverse_kl = self.reverse_cross / self.student_sum + log_ratio;
            losses.forward_kl = self.forward_cross / self.teacher_sum - log_ratio;
        }
        if has_label {
            losses.cross_entropy = self.student_lse() - self.label_logit;
        }
        losses
    }
}

/// `max x` and `Σ exp(x - max x)`.
fn max_and_sum<T: Real>(x: ArrayView1<T>) -> (T, T) {
    let max = x.iter().copied().fold(T::neg_infinity(), T::max);
    (max, x.iter().map(|&x| (x - max).exp()).sum())
}

/// The statistics of each row over the columns that are given.
///
/// Logits of student and teacher `[rows, columns]`, finite, at least one column; labels `[rows]`, token ids of the whole
/// vocabulary, None for a row that has no cross-entropy.
pub fn head_loss_statistics<T: Real>(
    student: ArrayView2<T>,
    teacher: Option<ArrayView2<T>>,
    labels: &[Option<u32>],
    op: &HeadLoss,
) -> Vec<RowStatistics<T>> {
    assert_eq!(labels.len(), student.nrows(), "head_loss: one label a row");
    let statistics = |(row, &label)| {
        let (s, t) = op.scaled_row(student.row(row), teacher, row);
        let label_logit = op.column(label, s.len()).map_or(T::zero(), |column| s[column]);
        RowStatistics::of_row(s.view(), t.as_ref().map(|t| t.view()), label_logit)
    };
    labels.iter().enumerate().map(statistics).collect()
}

/// Turns the student's logits `[rows, columns]` in place into the gradient of
/// `Σ row_weight * (reverse_kl * KL(p‖q) + forward_kl * KL(q‖p) + cross_entropy * -ln p[label])`, with the factors of
/// [`LossWeights`], statistics and row_weights `[rows]`; mask and divisor are in the row weights.
///
/// By the scaled logits: `p (ln p - ln q - KL(p‖q))`, `p - q`, `p - onehot(label)`; then times student_scale.
pub fn head_loss_gradient<T: Real>(
    mut student: ArrayViewMut2<T>,
    teacher: Option<ArrayView2<T>>,
    labels: &[Option<u32>],
    statistics: &[RowStatistics<T>],
    row_weights: &[T],
    op: &HeadLoss,
) {
    let rows = student.nrows();
    assert!(labels.len() == rows && statistics.len() == rows && row_weights.len() == rows, "head_loss: a row each");
    let weights = op.weights;
    let (reverse, forward) = (T::of(weights.reverse_kl), T::of(weights.forward_kl));
    for (row, of_row) in statistics.iter().enumerate() {
        let (s, t) = op.scaled_row(student.row(row), teacher, row);
        let kl = of_row.losses(false).reverse_kl;
        let label = op.column(labels[row], s.len());
        for column in 0..s.len() {
            let log_p = s[column] - of_row.student_lse();
            let p = log_p.exp();
            let mut by_scaled = T::zero();
            if let Some(t) = &t {
                let log_q = t[column] - of_row.teacher_lse();
                by_scaled += reverse * p * (log_p - log_q - kl) + forward * (p - log_q.exp());
            }
            if labels[row].is_some() {
                let target = if label == Some(column) { T::one() } else { T::zero() };
                by_scaled += T::of(weights.cross_entropy) * (p - target);
            }
            student[[row, column]] = row_weights[row] * op.student_scale() * by_scaled;
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, Axis, s};
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    const ALL: LossWeights = LossWeights { reverse_kl: 0.7, forward_kl: 0.4, cross_entropy: 0.3 };
    const PLAIN: HeadLoss =
        HeadLoss { weights: ALL, logits_scale: 1.0, temperature: 1.0, spelling: Temperature::Both, vocab_start: 0 };

    fn losses(
        student: &Array2<f64>,
        teacher: Option<&Array2<f64>>,
        labels: &[Option<u32>],
        op: &HeadLoss,
    ) -> Vec<RowLosses<f64>> {
        let teacher = teacher.map(|teacher| teacher.view());
        let statistics = head_loss_statistics(student.view(), teacher, labels, op);
        statistics.iter().zip(labels).map(|(row, label)| row.losses(label.is_some())).collect()
    }

    fn assert_near(got: f64, want: f64) {
        assert!((got - want).abs() <= 1e-12 * want.abs().max(1.0), "{got} {want}");
    }

    /// Rows of logits of a student and a teacher, and labels, some of them absent.
    fn rows(rows: usize, vocab: usize, seed: u64) -> (Array2<f64>, Array2<f64>, Vec<Option<u32>>) {
        let mut noise = Noise(seed);
        let (student, teacher) = (noise.array((rows, vocab)) * 2.0, noise.array((rows, vocab)) * 2.0);
        let labels = (0..rows).map(|_| (noise.below(4) > 0).then(|| noise.below(vocab) as u32)).collect();
        (student, teacher, labels)
    }

    fn settings() -> impl Strategy<Value = HeadLoss> {
        let weights = prop::sample::select(vec![
            LossWeights { reverse_kl: 1.0, forward_kl: 0.0, cross_entropy: 0.0 },
            LossWeights { reverse_kl: 0.0, forward_kl: 1.0, cross_entropy: 0.0 },
            LossWeights { reverse_kl: 0.0, forward_kl: 0.0, cross_entropy: 1.0 },
            ALL,
        ]);
        let spelling = prop::sample::select(vec![Temperature::Both, Temperature::TeacherOnly]);
        (weights, 0.5..2.0, 0.5..2.0, spelling).prop_map(|(weights, logits_scale, temperature, spelling)| HeadLoss {
            weights,
            logits_scale,
            temperature,
            spelling,
            vocab_start: 0,
        })
    }

    proptest! {
        #[test]
        fn gradient_is_certified(
            n in 0..4usize, vocab in size(), op in settings(), has_teacher: bool, seed: u64,
        ) {
            let (student, teacher, labels) = rows(n, vocab, seed);
            let teacher = has_teacher.then_some(&teacher);
            let row_weights: Vec<f64> = Noise(!seed).array(n).to_vec();
            let mut gradient = student.clone();
            let teacher_view = teacher.map(|teacher| teacher.view());
            let statistics = head_loss_statistics(student.view(), teacher_view, &labels, &op);
            head_loss_gradient(gradient.view_mut(), teacher_view, &labels, &statistics, &row_weights, &op);
            assert_gradient("dstudent", &student, &gradient, |student| {
                let weighted = |losses: &RowLosses<f64>| {
                    op.weights.reverse_kl * losses.reverse_kl
                        + op.weights.forward_kl * losses.forward_kl
                        + op.weights.cross_entropy * losses.cross_entropy
                };
                let losses = losses(student, teacher, &labels, &op);
                losses.iter().zip(&row_weights).map(|(losses, weight)| weight * weighted(losses)).sum()
            });
        }

        #[test]
        fn losses_are_the_textbook_sums(vocab in size(), op in settings(), seed: u64) {
            let (student, teacher, labels) = rows(3, vocab, seed);
            let softmax = |logits: &Array2<f64>, scale: f64, row: usize| {
                let exp = logits.row(row).mapv(|logit| (logit * scale).exp());
                &exp / exp.sum()
            };
            let teacher_scale = op.logits_scale / op.temperature;
            let student_scale = if op.spelling == Temperature::Both { teacher_scale } else { op.logits_scale };
            for (row, losses) in losses(&student, Some(&teacher), &labels, &op).iter().enumerate() {
                let (p, q) = (softmax(&student, student_scale, row), softmax(&teacher, teacher_scale, row));
                assert_near(losses.reverse_kl, (&p * (&p / &q).ln()).sum());
                assert_near(losses.forward_kl, (&q * (&q / &p).ln()).sum());
                assert_near(losses.cross_entropy, labels[row].map_or(0.0, |label| -p[label as usize].ln()));
            }
        }

        #[test]
        fn divergences_are_not_negative_and_zero_at_equality(vocab in size(), seed: u64) {
            let (student, teacher, labels) = rows(3, vocab, seed);
            for losses in losses(&student, Some(&teacher), &labels, &PLAIN) {
                assert!(losses.reverse_kl >= -1e-14 && losses.forward_kl >= -1e-14);
                assert!(vocab == 1 || losses.reverse_kl > 0.0 && losses.forward_kl > 0.0);
            }
            for teacher in [Some(&student), None] {
                for losses in losses(&student, teacher, &labels, &PLAIN) {
                    assert_eq!((losses.reverse_kl, losses.forward_kl), (0.0, 0.0));
                }
            }
        }

        #[test]
        fn a_shift_of_logits_changes_nothing(
            vocab in size(), op in settings(), by_student in -50.0..50.0, by_teacher in -50.0..50.0, seed: u64,
        ) {
            let (student, teacher, labels) = rows(3, vocab, seed);
            let shifted = losses(&(&student + by_student), Some(&(&teacher + by_teacher)), &labels, &op);
            for (got, want) in shifted.iter().zip(losses(&student, Some(&teacher), &labels, &op)) {
                assert_near(got.reverse_kl, want.reverse_kl);
                assert_near(got.forward_kl, want.forward_kl);
                assert_near(got.cross_entropy, want.cross_entropy);
            }
        }

        #[test]
        fn reverse_kl_is_forward_kl_with_the_roles_changed(vocab in size(), seed: u64) {
            let (student, teacher, labels) = rows(3, vocab, seed);
            let changed = losses(&teacher, Some(&student), &labels, &PLAIN);
            for (one, other) in losses(&student, Some(&teacher), &labels, &PLAIN).iter().zip(changed) {
                assert_near(one.reverse_kl, other.forward_kl);
                assert_near(one.forward_kl, other.reverse_kl);
            }
        }

        #[test]
        fn a_split_vocabulary_merged_equals_the_whole(
            vocab in 2..12usize, at in 0..100usize, op in settings(), has_teacher: bool, seed: u64,
        ) {
            let at = 1 + at % (vocab - 1);
            let (student, teacher, labels) = rows(3, vocab, seed);
            let row_weights = [0.5, 0.0, 2.0];
            let part = |x: &Array2<f64>, from: usize, to: usize| x.slice(s![.., from..to]).to_owned();
            let statistics = |from: usize, to: usize| {
                let (student, teacher) = (part(&student, from, to), part(&teacher, from, to));
                let op = HeadLoss { vocab_start: from, ..op };
                head_loss_statistics(student.view(), has_teacher.then_some(teacher.view()), &labels, &op)
            };
            let gradient = |from: usize, to: usize, statistics: &[RowStatistics<f64>]| {
                let (mut student, teacher) = (part(&student, from, to), part(&teacher, from, to));
                let op = HeadLoss { vocab_start: from, ..op };
                let teacher = has_teacher.then_some(teacher.view());
                head_loss_gradient(student.view_mut(), teacher, &labels, statistics, &row_weights, &op);
                student
            };
            let whole = statistics(0, vocab);
            let merge = |a: Vec<RowStatistics<f64>>, b: Vec<RowStatistics<f64>>| -> Vec<_> {
                a.iter().zip(&b).map(|(a, b)| a.merge(b)).collect()
            };
            let merged = merge(statistics(0, at), statistics(at, vocab));
            assert_eq!(merged, merge(statistics(at, vocab), statistics(0, at)));
            for (got, want) in merged.iter().zip(&whole) {
                assert_eq!((got.student_max, got.teacher_max), (want.student_max, want.teacher_max));
                assert_eq!(got.label_logit, want.label_logit);
                assert_near(got.student_sum, want.student_sum);
                assert_near(got.teacher_sum, want.teacher_sum);
                assert_near(got.reverse_cross, want.reverse_cross);
                assert_near(got.forward_cross, want.forward_cross);
            }
            let halves = [gradient(0, at, &merged), gradient(at, vocab, &merged)];
            let joined = ndarray::concatenate(Axis(1), &[halves[0].view(), halves[1].view()]).unwrap();
            assert_close("gradient", &joined, &gradient(0, vocab, &whole), 1e-12);
        }
    }

    #[test]
    fn far_apart_peaks_stay_finite_in_f32() {
        let student = ndarray::array![[300.0f32, 0.0, -300.0]];
        let teacher = ndarray::array![[-300.0f32, 0.0, 300.0]];
        let statistics = head_loss_statistics(student.view(), Some(teacher.view()), &[Some(2)], &PLAIN);
        let losses = statistics[0].losses(true);
        assert_eq!((losses.reverse_kl, losses.forward_kl, losses.cross_entropy), (600.0, 600.0, 600.0));
        let mut gradient = student.clone();
        head_loss_gradient(gradient.view_mut(), Some(teacher.view()), &[Some(2)], &statistics, &[1.0], &PLAIN);
        assert!(gradient.iter().all(|value| value.is_finite()));
    }
}

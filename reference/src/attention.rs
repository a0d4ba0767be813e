//! Causal grouped-query attention over segments (Vaswani et al., arXiv:1706.03762; groups: Ainslie et al., arXiv:2305.13245).

use std::ops::RangeInclusive;

use ndarray::{Array2, ArrayView2, s};

use crate::{Real, Segment, kv_starts};

/// The sizes and switches of attention. The numbers of query and key heads follow from the widths of q and k.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Width of a head.
    pub head_dim: usize,
    /// Sliding window in tokens, at least 1: a query at position `p` sees the keys at `p - window + 1 ..= p`.
    pub window: Option<usize>,
    /// What q·k is multiplied with; `head_dim^-0.5` in the models of h1.
    pub scale: f64,
}

impl Attention {
    /// Positions of the keys that a query at `position` sees.
    fn visible(&self, position: usize) -> RangeInclusive<usize> {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))..=position
    }
}

/// One query row and head, with the key rows and the key head that it sees.
struct Query {
    row: usize,
    head: usize,
    /// First column of the head in q and out.
    q_column: usize,
    /// First column of the head in k and v.
    kv_column: usize,
    keys: RangeInclusive<usize>,
}

fn queries(q_width: usize, kv_width: usize, segments: &[Segment], op: &Attention) -> Vec<Query> {
    let (query_heads, kv_heads) = (q_width / op.head_dim, kv_width / op.head_dim);
    assert_eq!(query_heads % kv_heads, 0, "attention: query heads in whole groups");
    let group = query_heads / kv_heads;
    let mut queries = Vec::new();
    for (segment, kv_start) in segments.iter().zip(kv_starts(segments)) {
        for (i, row) in segment.rows().enumerate() {
            let visible = op.visible(segment.past + i);
            for head in 0..query_heads {
                queries.push(Query {
                    row,
                    head,
                    q_column: head * op.head_dim,
                    kv_column: head / group * op.head_dim,
                    keys: kv_start + visible.start()..=kv_start + visible.end(),
                });
            }
        }
    }
    queries
}

/// (out `[tokens, Hq * Dh]`, lse `[tokens, Hq]`) of q `[tokens, Hq * Dh]`, k and v `[kv_tokens, Hk * Dh]`.
///
/// Segment `s` owns `past + len` rows of k and v from [`kv_starts`]`[s]` on, its past ones first; its query `i` sits at position
/// `past + i` and sees the keys up to itself, at most `window` of them. Query head `h` reads key head `h / (Hq / Hk)`.
/// `out = Σ_j p_j v_j` with `p_j = exp(scale * q·k_j - lse)` and `lse = ln Σ_j exp(scale * q·k_j)`, which backward needs.
pub fn attention<T: Real>(
    q: ArrayView2<T>,
    k: ArrayView2<T>,
    v: ArrayView2<T>,
    segments: &[Segment],
    op: &Attention,
) -> (Array2<T>, Array2<T>) {
    let mut out = Array2::zeros(q.dim());
    let mut lse = Array2::zeros((q.nrows(), q.ncols() / op.head_dim));
    for query in queries(q.ncols(), k.ncols(), segments, op) {
        let (q_columns, kv_columns) = columns(&query, op);
        let q_head = q.slice(s![query.row, q_columns.clone()]);
        let scores: Vec<T> =
            query.keys.clone().map(|key| T::of(op.scale) * q_head.dot(&k.slice(s![key, kv_columns.clone()]))).collect();
        let max = scores.iter().copied().fold(T::neg_infinity(), T::max);
        let sum = scores.iter().map(|&score| (score - max).exp()).sum::<T>();
        lse[[query.row, query.head]] = max + sum.ln();
        let mut out_head = out.slice_mut(s![query.row, q_columns]);
        for (&score, key) in scores.iter().zip(query.keys) {
            out_head.scaled_add((score - max).exp() / sum, &v.slice(s![key, kv_columns.clone()]));
        }
    }
    (out, lse)
}

/// (dq, dk, dv), of all keys, from the forward's inputs and outputs and dout `[tokens, Hq * Dh]`.
///
/// With `D = dout · out` and `ds_j = p_j (dout·v_j - D)`: `dq = scale Σ_j ds_j k_j`, `dk_j = scale Σ ds_j q`, `dv_j = Σ p_j dout`,
/// the latter two summed over the queries, and the heads of the group, that see key `j` (Dao et al., arXiv:2205.14135, appendix B).
#[expect(clippy::too_many_arguments, reason = "what FlashAttention's backward takes: inputs, outputs, dout")]
pub fn attention_backward<T: Real>(
    q: ArrayView2<T>,
    k: ArrayView2<T>,
    v: ArrayView2<T>,
    out: ArrayView2<T>,
    lse: ArrayView2<T>,
    dout: ArrayView2<T>,
    segments: &[Segment],
    op: &Attention,
) -> (Array2<T>, Array2<T>, Array2<T>) {
    let scale = T::of(op.scale);
    let mut dq = Array2::zeros(q.dim());
    let mut dk = Array2::zeros(k.dim());
    let mut dv = Array2::zeros(v.dim());
    for query in queries(q.ncols(), k.ncols(), segments, op) {
        let (q_columns, kv_columns) = columns(&query, op);
        let q_head = q.slice(s![query.row, q_columns.clone()]);
        let dout_head = dout.slice(s![query.row, q_columns.clone()]);
        let inner = dout_head.dot(&out.slice(s![query.row, q_columns.clone()]));
        for key in query.keys {
            let k_head = k.slice(s![key, kv_columns.clone()]);
            let p = (scale * q_head.dot(&k_head) - lse[[query.row, query.head]]).exp();
            let ds = p * (dout_head.dot(&v.slice(s![key, kv_columns.clone()])) - inner);
            dq.slice_mut(s![query.row, q_columns.clone()]).scaled_add(scale * ds, &k_head);
            dk.slice_mut(s![key, kv_columns.clone()]).scaled_add(scale * ds, &q_head);
            dv.slice_mut(s![key, kv_columns.clone()]).scaled_add(p, &dout_head);
        }
    }
    (dq, dk, dv)
}

fn columns(query: &Query, op: &Attention) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
    (query.q_column..query.q_column + op.head_dim, query.kv_column..query.kv_column + op.head_dim)
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Axis, concatenate};
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    /// Attention of random sizes with all of its inputs.
    #[derive(Clone, Debug)]
    struct Case {
        q: Array2<f64>,
        k: Array2<f64>,
        v: Array2<f64>,
        segments: Vec<Segment>,
        op: Attention,
    }

    impl Case {
        fn run(&self) -> (Array2<f64>, Array2<f64>) {
            attention(self.q.view(), self.k.view(), self.v.view(), &self.segments, &self.op)
        }

        fn kv_rows(&self, index: usize) -> std::ops::Range<usize> {
            let start = kv_starts(&self.segments)[index];
            start..start + self.segments[index].kv_len()
        }

        /// Tokens `from..to` of segment `index`, with the keys up to `to`, as a call of their own.
        fn part(&self, index: usize, from: usize, to: usize) -> Self {
            let segment = self.segments[index];
            let keys = self.kv_rows(index).start..self.kv_rows(index).start + segment.past + to;
            Self {
                q: self.q.slice(s![segment.start + from..segment.start + to, ..]).to_owned(),
                k: self.k.slice(s![keys.clone(), ..]).to_owned(),
                v: self.v.slice(s![keys, ..]).to_owned(),
                segments: vec![Segment { start: 0, len: to - from, past: segment.past + from }],
                op: self.op,
            }
        }
    }

    fn cases() -> impl Strategy<Value = Case> {
        let heads = (prop::sample::select(vec![1, 2]), prop::sample::select(vec![1, 2, 3]));
        let window = prop::option::of(1..=4usize);
        (segments(), heads, prop::sample::select(vec![1, 2, 5]), window, any::<u64>()).prop_map(
            |(segments, (kv_heads, group), head_dim, window, seed)| {
                let mut noise = Noise(seed);
                let kv_tokens = segments.iter().map(Segment::kv_len).sum();
                Case {
                    q: noise.array((tokens(&segments), kv_heads * group * head_dim)),
                    k: noise.array((kv_tokens, kv_heads * head_dim)),
                    v: noise.array((kv_tokens, kv_heads * head_dim)),
                    segments,
                    op: Attention { head_dim, window, scale: noise.uniform(0.2, 1.0) },
                }
            },
        )
    }

    /// Multi-head attention of one whole sequence as the paper writes it, with a matrix of scores a head.
    fn multi_head(q: &Array2<f64>, k: &Array2<f64>, v: &Array2<f64>, op: &Attention) -> (Array2<f64>, Array2<f64>) {
        let heads = q.ncols() / op.head_dim;
        let (mut outs, mut sums) = (Vec::new(), Vec::new());
        for head in 0..heads {
            let of_head = |x: &Array2<f64>| x.slice(s![.., head * op.head_dim..(head + 1) * op.head_dim]).to_owned();
            let mut weights = of_head(q).dot(&of_head(k).t()) * op.scale;
            for ((i, j), weight) in weights.indexed_iter_mut() {
                let seen = j <= i && op.window.is_none_or(|window| i - j < window);
                *weight = if seen { weight.exp() } else { 0.0 };
            }
            let sum: Array1<f64> = weights.sum_axis(Axis(1));
            outs.push(weights.dot(&of_head(v)) / sum.clone().insert_axis(Axis(1)));
            sums.push(sum.ln().insert_axis(Axis(1)));
        }
        let join = |parts: &[Array2<f64>]| {
            concatenate(Axis(1), &parts.iter().map(|part| part.view()).collect::<Vec<_>>()).unwrap()
        };
        (join(&outs), join(&sums))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn gradients_are_certified(case in cases(), seed: u64) {
            let dout = Noise(seed).array(case.q.dim());
            let (out, lse) = case.run();
            let (dq, dk, dv) = attention_backward(
                case.q.view(),
                case.k.view(),
                case.v.view(),
                out.view(),
                lse.view(),
                dout.view(),
                &case.segments,
                &case.op,
            );
            let objective = |case: Case| project(&case.run().0, &dout);
            assert_gradient("dq", &case.q, &dq, |q| objective(Case { q: q.clone(), ..case.clone() }));
            assert_gradient("dk", &case.k, &dk, |k| objective(Case { k: k.clone(), ..case.clone() }));
            assert_gradient("dv", &case.v, &dv, |v| objective(Case { v: v.clone(), ..case.clone() }));
        }

        #[test]
        fn equals_multi_head_attention_when_groups_are_one(
            len in size(),
            heads in 1..=3usize,
            head_dim in size(),
            window in prop::option::of(1..=4usize),
            seed: u64,
        ) {
            let mut noise = Noise(seed);
            let mut x = || noise.array((len, heads * head_dim));
            let op = Attention { head_dim, window, scale: (head_dim as f64).powf(-0.5) };
            let case = Case { q: x(), k: x(), v: x(), segments: whole(len), op };
            let (out, lse) = case.run();
            let (want_out, want_lse) = multi_head(&case.q, &case.k, &case.v, &case.op);
            assert_close("out", &out, &want_out, 1e-12);
            assert_close("lse", &lse, &want_lse, 1e-12);
        }

        #[test]
        fn groups_equal_key_heads_written_out(case in cases()) {
            let group = case.q.ncols() / case.k.ncols();
            let dim = case.op.head_dim;
            let columns: Vec<usize> =
                (0..case.q.ncols()).map(|column| column / dim / group * dim + column % dim).collect();
            let expand = |x: &Array2<f64>| x.select(Axis(1), &columns);
            assert_eq!(Case { k: expand(&case.k), v: expand(&case.v), ..case.clone() }.run(), case.run());
        }

        #[test]
        fn a_segment_never_sees_another(case in cases()) {
            let (out, lse) = case.run();
            for (index, segment) in case.segments.iter().enumerate() {
                let (alone_out, alone_lse) = case.part(index, 0, segment.len).run();
                assert_eq!(alone_out, out.slice(s![segment.rows(), ..]));
                assert_eq!(alone_lse, lse.slice(s![segment.rows(), ..]));
            }
        }

        #[test]
        fn a_sequence_equals_its_parts_with_the_keys_handed_on(case in cases(), cut in 0..100usize) {
            let out = case.run().0;
            for (index, segment) in case.segments.iter().enumerate() {
                let cut = cut % (segment.len + 1);
                let parts =
                    concatenate![Axis(0), case.part(index, 0, cut).run().0, case.part(index, cut, segment.len).run().0];
                assert_eq!(parts, out.slice(s![segment.rows(), ..]));
            }
        }

        #[test]
        fn a_key_reaches_the_queries_of_its_window_only(case in cases(), at in 0..100usize) {
            let out = case.run().0;
            for (index, segment) in case.segments.iter().enumerate().filter(|(_, segment)| segment.len > 0) {
                let position = at % segment.kv_len();
                let mut changed = case.clone();
                changed.v.row_mut(case.kv_rows(index).start + position).fill(9.0);
                let new = changed.run().0;
                for (i, row) in segment.rows().enumerate() {
                    let query = segment.past + i;
                    let seen = position <= query && case.op.window.is_none_or(|window| position + window > query);
                    assert_eq!(new.row(row) != out.row(row), seen, "query {query}, key {position}");
                }
            }
        }

        #[test]
        fn output_is_a_convex_combination_of_the_values(case in cases()) {
            let ones = Case { v: Array2::ones(case.v.dim()), ..case.clone() };
            assert_close("weights", &ones.run().0, &Array2::ones(case.q.dim()), 1e-12);
            let group = case.q.ncols() / case.k.ncols();
            let out = case.run().0;
            for (index, segment) in case.segments.iter().enumerate() {
                let values = case.v.slice(s![case.kv_rows(index), ..]);
                for ((t, column), &value) in out.indexed_iter() {
                    if segment.rows().contains(&t) {
                        let source = column / case.op.head_dim / group * case.op.head_dim + column % case.op.head_dim;
                        let low = values.column(source).iter().copied().fold(f64::INFINITY, f64::min);
                        let high = values.column(source).iter().copied().fold(f64::NEG_INFINITY, f64::max);
                        assert!(low - 1e-12 <= value && value <= high + 1e-12);
                    }
                }
            }
        }
    }

    #[test]
    fn scores_that_overflow_exp_are_no_trouble() {
        let x = ndarray::array![[1000.0f32], [1001.0]];
        let op = Attention { head_dim: 1, window: None, scale: 1.0 };
        let (out, lse) = attention(x.view(), x.view(), x.view(), &whole(2), &op);
        assert_eq!(out, x);
        assert_eq!(lse, ndarray::array![[1e6], [1001.0 * 1001.0]]);
    }
}

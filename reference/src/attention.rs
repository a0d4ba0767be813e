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

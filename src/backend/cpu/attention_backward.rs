//! The gradients of [attention](super::attention), from its outputs.
//!
//! With `p_j = exp(s_j − lse)`, `D = dout · out` and `ds_j = p_j (dout·v_j − D)`: `dq = scale Σ_j ds_j k_j`, and of a key
//! `dk_j = scale Σ ds_j q` and `dv_j = Σ p_j dout` over the queries that see it and the heads of its group (Dao et al.,
//! arXiv:2205.14135, appendix B).
//!
//! p and ds are made for a block of queries and a tile of keys at a time: two products, and with each tile one more adds to dq and
//! two add to dk and dv. All gradients of a key head in one task are these five. Where that would leave threads without work the blocks
//! of queries are tasks of their own, for dq, and the tiles of keys too, for dk and dv, at the price of making p and ds twice.
//! Either way a value is the same chain: dq over the keys in order, dk and dv over the queries in order and the heads in order.

use super::attention::{Blocks, Queries, Sight, TILE, VECTORS, task_positions, work};
use super::blocks::{Left, Product, Right, as_columns, copy, split, transpose};
use super::lines::{Sum, load, store};
use super::math::exp;
use super::matrix::{PANEL, Rows, RowsMut};
use super::scratch::with_scratch;
use super::segment::Segment;
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::tile::TILE_ROWS;
use super::work::parallel_in_order;
use crate::backend::ops::AttentionShape;
use std::ops::Range;

/// Keys of a task for dk and dv alone.
const TASK_KEYS: usize = 2 * TILE;
/// The longest sequence whose dk and dv one task holds at once.
const MOST_KEYS: usize = 16 * 1024;

/// What the gradients of attention are made from.
#[derive(Clone, Copy)]
pub struct AttentionGradient<'a> {
    /// The heads.
    pub shape: AttentionShape,
    /// `[tokens, heads·head_dim]`.
    pub q: Rows<'a>,
    /// `[keys, kv_heads·head_dim]`: `past + len` rows a segment, from the row that it says.
    pub k: Rows<'a>,
    /// `[keys, kv_heads·head_dim]`.
    pub v: Rows<'a>,
    /// Who belongs to whom: in the order of their rows and of their keys, of which none lies in two.
    pub segments: &'a [Segment],
    /// `[tokens, heads·head_dim]`, from forward.
    pub out: Rows<'a>,
    /// `[tokens, heads]`, from forward.
    pub lse: Rows<'a>,
    /// `[tokens, heads·head_dim]`.
    pub dout: Rows<'a>,
}

/// Where the gradients go. Keys that no query sees have a gradient of 0.
#[derive(Clone, Copy)]
pub struct AttentionGradients<'a> {
    /// `[tokens, heads·head_dim]`.
    pub dq: &'a RowsMut<'a>,
    /// `[keys, kv_heads·head_dim]`.
    pub dk: &'a RowsMut<'a>,
    /// `[keys, kv_heads·head_dim]`.
    pub dv: &'a RowsMut<'a>,
}

/// Replaces what `to` holds.
///
/// # Panics
/// When a segment leads outside of a matrix, or its keys begin before those of the segment before it end.
pub fn attention_backward(simd: Simd, inputs: &AttentionGradient<'_>, to: &AttentionGradients<'_>) {
    let plan = Plan::new(&inputs.shape, inputs.segments, rayon::current_num_threads());
    clear_unseen(if inputs.shape.heads > 0 { inputs.segments } else { &[] }, to);
    parallel_in_order(plan.tasks(), 3 * work(&inputs.shape, inputs.segments), |task| {
        let Some(part) = plan.part(task) else { return };
        let lengths = part.lengths(&inputs.shape);
        with_scratch(lengths.iter().sum(), |scratch| {
            simd.run(Backward { inputs, part, to, scratch: split(scratch, lengths) });
        });
    });
}

/// The key rows of a segment.
fn key_rows(segment: &Segment) -> Range<usize> {
    segment.keys as usize..segment.keys as usize + segment.total()
}

/// Clears the rows of dk and dv that are no keys of a segment with rows.
fn clear_unseen(segments: &[Segment], to: &AttentionGradients<'_>) {
    let clear = |rows: Range<usize>| {
        for row in rows {
            // SAFETY: no task runs yet.
            unsafe {
                to.dk.shared_row(row).fill(0.0);
                to.dv.shared_row(row).fill(0.0);
            }
        }
    };
    let mut next = 0;
    for keys in segments.iter().filter(|segment| segment.len > 0).map(key_rows) {
        assert!(next <= keys.start, "keys of a segment from row {}, others up to {next}", keys.start);
        clear(next..keys.start);
        next = keys.end;
    }
    clear(next..to.dk.rows());
}

/// The work in tasks: of the first key heads a task makes all gradients of one segment; of the rest some tasks make dk and dv of
/// a few keys, and some dq of a few queries.
struct Plan<'a> {
    shape: &'a AttentionShape,
    segments: &'a [Segment],
    /// Key heads of the first kind.
    whole: usize,
    keys: Blocks<'a>,
    queries: Blocks<'a>,
}

/// The queries and the keys of one task.
struct Part {
    segment: Segment,
    kv_head: usize,
    /// Rows of the segment, from its first: from a multiple of [`task_positions`].
    queries: Range<usize>,
    /// Positions from a multiple of [`TILE`].
    keys: Range<usize>,
    /// Whether dq is made.
    dq: bool,
    /// Whether dk and dv are made.
    dkv: bool,
}

impl<'a> Plan<'a> {
    fn new(shape: &'a AttentionShape, segments: &'a [Segment], threads: usize) -> Self {
        let keys = Blocks::new(segments, TASK_KEYS, key_rows);
        let whole = if shape.heads > 0 { whole_heads(shape, segments, threads) } else { 0 };
        Self { shape, segments, whole, keys, queries: Blocks::of_queries(shape, segments) }
    }

    /// The tasks of each kind.
    fn counts(&self) -> [usize; 3] {
        let heads = if self.shape.heads > 0 { self.shape.kv_heads } else { 0 };
        let split = heads - self.whole;
        [self.segments.len() * self.whole, self.keys.count() * split, self.queries.count() * split]
    }

    fn tasks(&self) -> usize {
        self.counts().iter().sum()
    }

    /// The longest first: whole heads; the first keys, which the most queries see; the last queries.
    fn part(&self, task: usize) -> Option<Part> {
        let (whole, split) = (self.whole, self.shape.kv_heads - self.whole);
        let [of_heads, of_keys, of_queries] = self.counts();
        if task < of_heads {
            let segment = self.segments[task / whole];
            let (queries, keys) = (0..segment.len as usize, 0..segment.total());
            let part = Part { segment, kv_head: task % whole, queries, keys, dq: true, dkv: true };
            return (segment.len > 0).then_some(part);
        }
        let task = task - of_heads;
        let kv_head = whole + task % split;
        if task < of_keys {
            let (segment, keys) = self.keys.get(task / split)?;
            return Some(Part { segment, kv_head, queries: 0..segment.len as usize, keys, dq: false, dkv: true });
        }
        let (segment, queries) = self.queries.get((of_keys + of_queries - 1 - task) / split)?;
        Some(Part { segment, kv_head, queries, keys: 0..segment.total(), dq: true, dkv: false })
    }
}

/// How many key heads had better be done whole, at five products a tile: as long as their tasks end evenly, or the seven of the
/// other heads' smaller tasks fill the time.
fn whole_heads(shape: &AttentionShape, segments: &[Segment], threads: usize) -> usize {
    if segments.iter().any(|segment| segment.total() > MOST_KEYS) {
        return 0;
    }
    let pairs = segments.iter().map(|segment| segment.len as f64 * (segment.past as f64 + 0.5 * segment.len as f64));
    let (all, longest) = pairs.fold((0.0, 0.0), |(all, longest), pairs| (all + pairs, f64::max(longest, pairs)));
    let used = segments.iter().filter(|segment| segment.len > 0).count();
    let (heads, threads) = (shape.kv_heads as f64, threads as f64);
    let time = |&whole: &usize| {
        let rounds = (whole * used) as f64 / threads;
        let n = whole as f64;
        let last = (n * all / threads + longest * (1.0 - 1.0 / threads)).min(rounds.ceil() * longest);
        f64::max(5.0 * last, (5.0 * n + 7.0 * (heads - n)) * all / threads)
    };
    (0..=shape.kv_heads).min_by(|a, b| time(a).total_cmp(&time(b))).unwrap_or(0)
}

impl Part {
    /// How much of a thread's scratch the task takes: see [`Backward::run`].
    fn lengths(&self, shape: &AttentionShape) -> [usize; 14] {
        let (dim, padded) = (shape.head_dim, shape.head_dim.next_multiple_of(PANEL));
        let rows = task_positions(shape).min(self.queries.len()) * (shape.heads / shape.kv_heads);
        let slabs = rows.div_ceil(TILE_ROWS);
        let (slab, rows) = (slabs * LANES * dim, slabs * TILE_ROWS);
        let if_dq = |len| if self.dq { len } else { 0 };
        let if_dkv = |len| if self.dkv { len } else { 0 };
        let (of_rows, of_keys) = (if_dkv(rows * padded), if_dkv(self.keys.len().next_multiple_of(TILE) * padded));
        let scalars = rows.next_multiple_of(LANES);
        let weights = rows * TILE;
        let keys = TILE * dim;
        let [k_rows, dq] = [TILE, rows].map(|rows| if_dq(rows * padded));
        [slab, slab, of_rows, of_rows, scalars, scalars, weights, weights, keys, keys, k_rows, dq, of_keys, of_keys]
    }
}

struct Backward<'a> {
    inputs: &'a AttentionGradient<'a>,
    part: Part,
    to: &'a AttentionGradients<'a>,
    scratch: [&'a mut [f32]; 14],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Backward { inputs, part, to, scratch } = self;
        let [q_slabs, dout_slabs, q_rows, dout_rows, lse, inner, weights, gradients, rest @ ..] = scratch;
        let [k_panels, v_panels, k_rows, dq, dk, dv] = rest;
        let (shape, segment) = (&inputs.shape, &part.segment);
        let (dim, column) = (shape.head_dim, part.kv_head * shape.head_dim);
        let padded = dim.next_multiple_of(PANEL);
        dk.fill(0.0);
        dv.fill(0.0);
        let positions = task_positions(shape);
        for first in part.queries.clone().step_by(positions) {
            let rows = first..part.queries.end.min(first + positions);
            let queries = Queries::new(shape, *segment, rows, part.kv_head);
            let seen = queries.keys();
            let keys = part.keys.start.max(seen.start / TILE * TILE)..part.keys.end.min(seen.end);
            if keys.is_empty() {
                continue;
            }
            for slab in 0..queries.slabs() {
                let [q, out, dout] = [inputs.q, inputs.out, inputs.dout].map(|x| queries.heads(x, slab));
                let packed = slab * LANES * dim..(slab + 1) * LANES * dim;
                transpose::<L, f32>(q, dim, shape.scale, &mut q_slabs[packed.clone()], LANES);
                transpose::<L, f32>(dout, dim, 1.0, &mut dout_slabs[packed], LANES);
                for (i, r) in queries.of_slab(slab).enumerate() {
                    if part.dkv {
                        copy::<L, f32>(q[i], shape.scale, &mut q_rows[r * padded..(r + 1) * padded]);
                        copy::<L, f32>(dout[i], 1.0, &mut dout_rows[r * padded..(r + 1) * padded]);
                    }
                    let (token, head) = queries.place(r);
                    lse[r] = inputs.lse.part(token, head, 1)[0];
                    inner[r] = dot::<L>(out[i], dout[i]);
                }
            }
            dq.fill(0.0);
            for start in keys.step_by(TILE) {
                let count = TILE.min(seen.end - start);
                let place = |i| segment.keys as usize + start + i;
                as_columns::<L, f32>(count, dim, |i| inputs.k.part(place(i), column, dim), k_panels);
                as_columns::<L, f32>(count, dim, |i| inputs.v.part(place(i), column, dim), v_panels);
                if part.dq {
                    for (i, to) in k_rows.chunks_exact_mut(padded).enumerate().take(count) {
                        copy::<L, f32>(inputs.k.part(place(i), column, dim), 1.0, to);
                    }
                }
                // The rows that see the tile: those of neighbouring slabs.
                let mut rows = queries.len()..0;
                let mut end = 0;
                for slab in 0..queries.slabs() {
                    let sight = queries.sight(slab, start);
                    if sight.is_empty() {
                        continue;
                    }
                    let of_slab = queries.of_slab(slab);
                    rows = rows.start.min(of_slab.start)..of_slab.end;
                    end = end.max(sight.end());
                    let (weights, gradients) =
                        (&mut weights[of_slab.start * TILE..], &mut gradients[of_slab.start * TILE..]);
                    for (slabs, panels, to) in
                        [(&*q_slabs, &*k_panels, &mut *weights), (&*dout_slabs, &*v_panels, &mut *gradients)]
                    {
                        let product = Product {
                            rows: sight.rows,
                            panels: sight.end().div_ceil(PANEL),
                            steps: dim,
                            left: Left { values: &slabs[slab * LANES * dim..], row: 1, step: LANES },
                            right: Right { values: panels, panel: PANEL * dim, step: PANEL },
                            resume: false,
                        };
                        product.run::<L>(to, TILE);
                    }
                    softmax_backward::<L>(&sight, &lse[of_slab.clone()], &inner[of_slab.clone()], weights, gradients);
                    if part.dq {
                        let product = Product {
                            rows: sight.rows,
                            panels: padded / PANEL,
                            steps: sight.end(),
                            left: Left { values: gradients, row: TILE, step: 1 },
                            right: Right { values: k_rows, panel: PANEL, step: padded },
                            resume: true,
                        };
                        product.run::<L>(&mut dq[of_slab.start * padded..], padded);
                    }
                }
                if part.dkv {
                    let sums = (start - part.keys.start) * padded;
                    for (values, rows_of, sums) in
                        [(&*weights, &*dout_rows, &mut dv[sums..]), (&*gradients, &*q_rows, &mut dk[sums..])]
                    {
                        let product = Product {
                            rows: end,
                            panels: padded / PANEL,
                            steps: rows.len(),
                            left: Left { values: &values[rows.start * TILE..], row: 1, step: TILE },
                            right: Right { values: &rows_of[rows.start * padded..], panel: PANEL, step: padded },
                            resume: true,
                        };
                        product.run::<L>(sums, padded);
                    }
                }
            }
            if part.dq {
                for r in 0..queries.len() {
                    let (token, head) = queries.place(r);
                    // SAFETY: the heads of a group in the rows of a part belong to one task that makes dq.
                    let to = unsafe { to.dq.part(token, head * dim, dim) };
                    for j in (0..dim).step_by(LANES) {
                        store(load::<L>(&dq[r * padded..], j) * L::splat(shape.scale), to, j);
                    }
                }
            }
        }
        if part.dkv {
            for (i, position) in part.keys.clone().enumerate() {
                for (sums, to) in [(&*dk, to.dk), (&*dv, to.dv)] {
                    // SAFETY: a key head of the keys of a part belongs to one task that makes dk and dv.
                    let to = unsafe { to.part(segment.keys as usize + position, column, dim) };
                    for j in (0..dim).step_by(LANES) {
                        store(load::<L>(&sums[i * padded..], j), to, j);
                    }
                }
            }
        }
    }
}

/// `Σ a ⊙ b`.
#[inline(always)]
fn dot<L: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = Sum::<L>::new();
    for j in (0..a.len()).step_by(LANES) {
        sum.mul_add(j, load(a, j), load(b, j));
    }
    sum.total()
}

/// From the scores of a slab and `dout·v`, in `gradients`, makes p and ds in their places, 0 for keys that a row does not see.
#[inline(always)]
fn softmax_backward<L: Lanes>(sight: &Sight, lse: &[f32], inner: &[f32], weights: &mut [f32], gradients: &mut [f32]) {
    let full = sight.is_full();
    let rows = weights.chunks_exact_mut(TILE).zip(gradients.chunks_exact_mut(TILE));
    for (i, ((weights, gradients), (&lse, &inner))) in rows.zip(lse.iter().zip(inner)).enumerate() {
        for vector in 0..VECTORS {
            let weight = exp(sight.score::<L>(full, weights, i, vector) - L::splat(lse));
            let gradient = weight * (L::load(&gradients[vector * LANES..]) - L::splat(inner));
            let gradient = if full { gradient } else { sight.keep(i, vector, gradient, 0.0) };
            weight.store(&mut weights[vector * LANES..]);
            gradient.store(&mut gradients[vector * LANES..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention::Keys;
    use super::super::attention::tests::{Case, lengths, sizes, window};
    use super::super::testing::{Grid, everywhere, reference_segments};
    use super::*;
    use proptest::prelude::*;

    /// Where a query sees one key its gradients cancel, and what rounding leaves is of the terms' size, not the sum's.
    fn close<'a>(name: &str, got: &[f32], expected: impl IntoIterator<Item = &'a f64>) {
        let expected: Vec<f64> = expected.into_iter().copied().collect();
        assert_eq!(got.len(), expected.len(), "{name}: lengths");
        let rms = |sum: f64| (sum / got.len().max(1) as f64).sqrt();
        let error = rms(got.iter().zip(&expected).map(|(got, expected)| (f64::from(*got) - expected).powi(2)).sum());
        let size = rms(expected.iter().map(|expected| expected * expected).sum());
        assert!(error <= 3e-6 * size.max(0.3), "{name}: {error:.2e} beside {size:.2e}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// With threads enough for whole heads and without, so of tasks of every kind.
        #[test]
        fn gradients_follow_the_formula(
            seed: u64, sizes in sizes(), window in window(), lengths in lengths(), beyond in 0usize..3,
        ) {
            let case = Case::new(seed, sizes, window, &lengths);
            let dout = Grid::random(&mut crate::random::stream(seed, "dout"), case.q.view().rows(), case.shape.q_cols(), 1.0);
            let keys = case.k.view().rows();
            let outputs = everywhere(|simd| {
                let (out, lse) = case.run(simd, Keys::Rows { k: case.k.view(), v: case.v.view() });
                let mut dq = Grid::poisoned(case.q.view().rows(), case.shape.q_cols());
                let mut dk = Grid::poisoned(keys + beyond, case.shape.kv_cols());
                let mut dv = dk.clone();
                let inputs = AttentionGradient {
                    shape: case.shape,
                    q: case.q.view(),
                    k: case.k.view(),
                    v: case.v.view(),
                    segments: &case.segments,
                    out: out.view(),
                    lse: lse.view(),
                    dout: dout.view(),
                };
                let to = AttentionGradients { dq: &dq.view_mut(), dk: &dk.view_mut(), dv: &dv.view_mut() };
                attention_backward(simd, &inputs, &to);
                vec![dq.values(), dk.values(), dv.values()]
            });
            let (q, k, v, dout) = (case.q.f64(), case.k.f64(), case.v.f64(), dout.f64());
            let (segments, shape) = (reference_segments(&case.segments), case.reference_shape());
            let (out, lse) = h1_reference::attention(q.view(), k.view(), v.view(), &segments, &shape);
            let (dq, dk, dv) = h1_reference::attention_backward(
                q.view(), k.view(), v.view(), out.view(), lse.view(), dout.view(), &segments, &shape,
            );
            close("dq", &outputs[0], &dq);
            let inside = keys * case.shape.kv_cols();
            for (name, output, expected) in [("dk", &outputs[1], dk), ("dv", &outputs[2], dv)] {
                close(name, &output[..inside], &expected);
                prop_assert!(output[inside..].iter().all(|&value| value == 0.0));
            }
        }
    }

    #[test]
    fn heads_are_done_whole_where_they_fill_the_threads() {
        let shape = |kv_heads| AttentionShape { heads: kv_heads, kv_heads, head_dim: 1, scale: 1.0, window: None };
        let segment = Segment { start: 0, len: 512, past: 0, slot: 0, keys: 0 };
        for (kv_heads, segments, threads, whole) in
            [(3, 1, 1, 3), (3, 1, 2, 2), (8, 1, 2, 8), (8, 1, 16, 0), (3, 8, 2, 3)]
        {
            assert_eq!(whole_heads(&shape(kv_heads), &vec![segment; segments], threads), whole);
        }
    }
}

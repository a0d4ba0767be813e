//! Causal grouped-query attention with an online softmax (Milakov and Gimelshein, arXiv:1805.02867; in tiles: Dao et al.,
//! arXiv:2205.14135), forward.
//!
//! The keys of a sequence are cut into tiles at multiples of `TILE` positions. For each query and head, tile after tile:
//! `m' = max(m, max_j s_j)`, `p_j = exp(s_j − m')`, `a = exp(m − m')`, `l ← a·l + Σ_j p_j`, `o ← a·o + Σ_j p_j v_j`; then
//! `out = o / l` and `lse = m + ln l`. Scores are chains over the head, `o` is a chain over the keys that the query sees, and
//! maximum and sum of a tile have one shape, in which a key that is not seen counts as −∞ and as 0. A tile of which a query
//! sees nothing leaves its bits as they are. So nothing shows how a sequence was cut into calls, or where its keys lie.
//!
//! A task takes the heads of one group at some positions, so that a packed tile serves all of them.

use super::blocks::{Left, Product, Right, as_columns, copy, split, transpose};
use super::lines::{load, store};
use super::math::{exp, ln};
use super::matrix::{PANEL, Rows, RowsMut};
use super::scratch::with_scratch;
use super::segment::Segment;
use super::simd::{Element, Kernel, LANES, Lanes, Mask, Simd};
use super::tile::TILE_ROWS;
use super::work::parallel_in_order;
use crate::backend::ops::AttentionShape;
use std::array::from_fn;
use std::ops::Range;

/// Positions of a tile of keys.
pub(super) const TILE: usize = 64;
/// Vectors of a row of scores.
pub(super) const VECTORS: usize = TILE / LANES;
/// Queries times heads that one task takes, if it is more than one position.
const TASK_ROWS: usize = 96;

/// Where keys and values lie, each row `[kv_heads·head_dim]`.
#[derive(Clone, Copy)]
pub enum Keys<'a, T = f32> {
    /// `past + len` rows a segment, from the row that it says.
    Rows {
        /// `[keys, kv_heads·head_dim]`.
        k: Rows<'a, T>,
        /// `[keys, kv_heads·head_dim]`.
        v: Rows<'a, T>,
    },
    /// Position p of slot s in row `pages[s, p / page_size]·page_size + p % page_size`.
    Pages {
        /// `[page count · page_size, kv_heads·head_dim]`.
        k: Rows<'a, T>,
        /// `[page count · page_size, kv_heads·head_dim]`.
        v: Rows<'a, T>,
        /// `[slots, pages a slot]`.
        pages: Rows<'a, u32>,
        /// Tokens of a page.
        page_size: usize,
    },
}

impl<'a, T> Keys<'a, T> {
    /// The row of a position.
    fn row(&self, segment: &Segment, position: usize) -> usize {
        match self {
            Keys::Rows { .. } => segment.keys as usize + position,
            Keys::Pages { pages, page_size, .. } => {
                let page = pages.part(segment.slot as usize, position / page_size, 1)[0];
                page as usize * page_size + position % page_size
            }
        }
    }

    fn k_and_v(&self) -> (&Rows<'a, T>, &Rows<'a, T>) {
        let (Keys::Rows { k, v } | Keys::Pages { k, v, .. }) = self;
        (k, v)
    }
}

/// What attention reads.
#[derive(Clone, Copy)]
pub struct AttentionInputs<'a, T = f32> {
    /// The heads.
    pub shape: AttentionShape,
    /// `[tokens, heads·head_dim]`.
    pub q: Rows<'a>,
    /// Keys and values, those of the segments' own rows included.
    pub keys: Keys<'a, T>,
    /// Who belongs to whom: in the order of their rows, of which none lies in two.
    pub segments: &'a [Segment],
}

/// out `[tokens, heads·head_dim]` and the log-sum-exp of the scaled scores, lse `[tokens, heads]`.
///
/// # Panics
/// When a segment, or a page, leads outside of a matrix.
pub fn attention<T: Element>(
    simd: Simd,
    inputs: &AttentionInputs<'_, T>,
    out: &RowsMut<'_>,
    lse: Option<&RowsMut<'_>>,
) {
    let AttentionShape { heads, kv_heads, .. } = inputs.shape;
    let blocks = Blocks::of_queries(&inputs.shape, inputs.segments);
    if heads == 0 {
        return;
    }
    let count = blocks.count() * kv_heads;
    parallel_in_order(count, work(&inputs.shape, inputs.segments), |task| {
        // The last rows of a sequence see the most keys, so their tasks begin first.
        let block = blocks.get((count - 1 - task) / kv_heads);
        let Some((segment, rows)) = block else { return };
        let queries = Queries::new(&inputs.shape, segment, rows, task % kv_heads);
        let lengths = lengths(&queries);
        with_scratch(lengths.iter().sum(), |scratch| {
            simd.run(Forward { inputs, queries, out, lse, scratch: split(scratch, lengths) });
        });
    });
}

/// How much of a thread's scratch a task takes: see [`Forward::run`].
fn lengths(queries: &Queries) -> [usize; 7] {
    let (dim, slabs) = (queries.head_dim, queries.slabs());
    let padded = dim.next_multiple_of(PANEL);
    let of_rows = slabs * LANES;
    [TILE * dim, TILE * padded, TILE * TILE_ROWS, of_rows * dim, of_rows, of_rows, slabs * TILE_ROWS * padded]
}

/// Lane-wise operations of attention over `segments`, for [`parallel_in_order`].
pub(super) fn work(shape: &AttentionShape, segments: &[Segment]) -> usize {
    let pairs = segments.iter().map(|segment| segment.len as usize * segment.total()).sum::<usize>();
    pairs.saturating_mul(shape.heads * shape.head_dim.div_ceil(8))
}

/// Positions of which one task takes the heads of a group.
pub(super) fn task_positions(shape: &AttentionShape) -> usize {
    (TASK_ROWS / (shape.heads / shape.kv_heads).max(1)).max(1)
}

/// The ranges that segments have on one axis, cut into blocks. A block's number comes from where its segment's range starts, so
/// that no list is needed; some numbers stand for no block.
pub(super) struct Blocks<'a> {
    segments: &'a [Segment],
    size: usize,
    range: fn(&Segment) -> Range<usize>,
}

impl<'a> Blocks<'a> {
    /// Blocks of `size` of the `range` of each segment that has rows.
    pub fn new(segments: &'a [Segment], size: usize, range: fn(&Segment) -> Range<usize>) -> Self {
        let used = segments.iter().rposition(|segment| segment.len > 0).map_or(0, |last| last + 1);
        Self { segments: &segments[..used], size, range }
    }

    /// The rows of each segment, as many as a task takes.
    pub fn of_queries(shape: &AttentionShape, segments: &'a [Segment]) -> Self {
        Self::new(segments, task_positions(shape), Segment::rows)
    }

    /// The first number of a segment: its blocks are at most its range's length over `size`, and one.
    fn first(&self, segment: usize) -> usize {
        (self.range)(&self.segments[segment]).start / self.size + segment
    }

    /// One more than the last number.
    pub fn count(&self) -> usize {
        let last = self.segments.last().map(|last| (self.range)(last).len().div_ceil(self.size));
        last.map_or(0, |blocks| self.first(self.segments.len() - 1) + blocks)
    }

    /// The segment of a block and the block's part of its range, counted from the range's start.
    pub fn get(&self, number: usize) -> Option<(Segment, Range<usize>)> {
        let (mut low, mut high) = (0, self.segments.len());
        while high - low > 1 {
            let middle = (low + high) / 2;
            if self.first(middle) <= number { low = middle } else { high = middle }
        }
        let segment = self.segments[low];
        let start = (number - self.first(low)) * self.size;
        let end = (self.range)(&segment).len().min(start + self.size);
        (segment.len > 0 && start < end).then_some((segment, start..end))
    }
}

/// The heads of one group at some rows of a segment: row r of these is head `r % group` of the group at row `r / group`.
pub(super) struct Queries {
    pub segment: Segment,
    pub kv_head: usize,
    pub head_dim: usize,
    group: usize,
    /// Rows of the segment, from its first.
    rows: Range<usize>,
    window: Option<usize>,
}

impl Queries {
    /// The heads that read `kv_head` at some rows of a segment, counted from its first.
    pub fn new(shape: &AttentionShape, segment: Segment, rows: Range<usize>, kv_head: usize) -> Self {
        let &AttentionShape { heads, kv_heads, head_dim, window, .. } = shape;
        Self { segment, kv_head, head_dim, group: heads / kv_heads, rows, window }
    }

    pub fn len(&self) -> usize {
        self.rows.len() * self.group
    }

    /// How many slabs of [`TILE_ROWS`] rows they are.
    pub fn slabs(&self) -> usize {
        self.len().div_ceil(TILE_ROWS)
    }

    /// Rows of a slab.
    pub fn of_slab(&self, slab: usize) -> Range<usize> {
        slab * TILE_ROWS..self.len().min((slab + 1) * TILE_ROWS)
    }

    /// The row of the call and the head.
    pub fn place(&self, r: usize) -> (usize, usize) {
        (self.segment.start as usize + self.rows.start + r / self.group, self.kv_head * self.group + r % self.group)
    }

    /// The heads of a slab, the lacking ones empty.
    #[inline(always)]
    pub fn heads<'a>(&self, x: Rows<'a>, slab: usize) -> [&'a [f32]; LANES] {
        let mut heads: [&[f32]; LANES] = [&[]; LANES];
        for (to, r) in heads.iter_mut().zip(self.of_slab(slab)) {
            let (token, head) = self.place(r);
            *to = x.part(token, head * self.head_dim, self.head_dim);
        }
        heads
    }

    /// The first position that a query at `position` sees.
    fn sees_from(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    fn position(&self, r: usize) -> usize {
        self.segment.past as usize + self.rows.start + r / self.group
    }

    /// The positions that some row sees.
    pub fn keys(&self) -> Range<usize> {
        self.sees_from(self.position(0))..self.position(self.len() - 1) + 1
    }

    /// What a slab sees of the tile of keys at `start`.
    pub fn sight(&self, slab: usize, start: usize) -> Sight {
        let rows = self.of_slab(slab);
        let mut sight = Sight { rows: rows.len(), from: [0; TILE_ROWS], to: [0; TILE_ROWS] };
        let inside = |position: usize| position.saturating_sub(start).min(TILE);
        for (i, r) in rows.enumerate() {
            let position = self.position(r);
            (sight.from[i], sight.to[i]) = (inside(self.sees_from(position)), inside(position + 1));
        }
        sight
    }
}

/// What the rows of a slab see of a tile: row i its keys `from[i]..to[i]`.
pub(super) struct Sight {
    pub rows: usize,
    from: [usize; TILE_ROWS],
    to: [usize; TILE_ROWS],
}

impl Sight {
    /// Whether no row sees a key.
    pub fn is_empty(&self) -> bool {
        self.from.iter().zip(&self.to).all(|(from, to)| from >= to)
    }

    /// Whether every row sees every key.
    pub fn is_full(&self) -> bool {
        (0..self.rows).all(|i| self.from[i] == 0 && self.to[i] == TILE)
    }

    /// One more than the last key that a row sees.
    pub fn end(&self) -> usize {
        self.to.into_iter().max().unwrap_or(0)
    }

    /// The scores of row i and the keys of vector `vector`, −∞ where it does not see them; `full` is [`Sight::is_full`].
    #[inline(always)]
    pub fn score<L: Lanes>(&self, full: bool, row: &[f32], i: usize, vector: usize) -> L {
        let score = L::load(&row[vector * LANES..]);
        if full { score } else { self.keep(i, vector, score, f32::NEG_INFINITY) }
    }

    /// `value` where row i sees the keys of vector `vector`, and `hidden` elsewhere.
    #[inline(always)]
    pub fn keep<L: Lanes>(&self, i: usize, vector: usize, value: L, hidden: f32) -> L {
        let key = L::from_array(from_fn(|lane| lane as f32)) + L::splat((vector * LANES) as f32);
        let seen = L::splat(self.from[i] as f32).le(key).and(key.lt(L::splat(self.to[i] as f32)));
        L::select(seen, value, L::splat(hidden))
    }

    /// The tile's keys in runs `(first row, rows, keys)` such that each row meets the keys that it sees, each once, in order: those
    /// that all rows see in one run.
    fn runs(&self) -> impl Iterator<Item = (usize, usize, Range<usize>)> {
        let start = self.from[..self.rows].iter().copied().max().unwrap_or(0);
        let end = self.to[..self.rows].iter().copied().min().unwrap_or(0).max(start);
        let before = (0..self.rows).map(move |i| (i, 1, self.from[i]..self.to[i].min(start)));
        let after = (0..self.rows).map(move |i| (i, 1, self.from[i].max(end)..self.to[i]));
        before.chain(std::iter::once((0, self.rows, start..end))).chain(after).filter(|(.., keys)| !keys.is_empty())
    }
}

struct Forward<'a, T> {
    inputs: &'a AttentionInputs<'a, T>,
    queries: Queries,
    out: &'a RowsMut<'a>,
    lse: Option<&'a RowsMut<'a>>,
    scratch: [&'a mut [f32]; 7],
}

impl<T: Element> Kernel for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Forward { inputs, queries, out, lse, scratch } = self;
        let [k_panels, v_rows, scores, q_slabs, maxima, totals, sums] = scratch;
        let (dim, slabs) = (queries.head_dim, queries.slabs());
        let padded = dim.next_multiple_of(PANEL);
        let ((k, v), column) = (inputs.keys.k_and_v(), queries.kv_head * dim);

        for (slab, to) in q_slabs.chunks_exact_mut(LANES * dim).enumerate() {
            transpose::<L, _>(queries.heads(inputs.q, slab), dim, inputs.shape.scale, to, LANES);
        }
        maxima.fill(f32::MIN);
        totals.fill(0.0);
        sums.fill(0.0);
        let seen = queries.keys();
        for start in (seen.start / TILE * TILE..seen.end).step_by(TILE) {
            let count = TILE.min(seen.end - start);
            let mut places = [0; TILE];
            for (i, place) in places[..count].iter_mut().enumerate() {
                *place = inputs.keys.row(&queries.segment, start + i);
            }
            as_columns::<L, T>(count, dim, |i| k.part(places[i], column, dim), k_panels);
            for (&place, to) in places[..count].iter().zip(v_rows.chunks_exact_mut(padded)) {
                copy::<L, T>(v.part(place, column, dim), 1.0, to);
            }
            for slab in 0..slabs {
                let sight = queries.sight(slab, start);
                if sight.is_empty() {
                    continue;
                }
                let product = Product {
                    rows: sight.rows,
                    panels: sight.end().div_ceil(PANEL),
                    steps: dim,
                    left: Left { values: &q_slabs[slab * LANES * dim..], row: 1, step: LANES },
                    right: Right { values: k_panels, panel: PANEL * dim, step: PANEL },
                    resume: false,
                };
                product.run::<L>(scores, TILE);
                let of_rows = slab * LANES..(slab + 1) * LANES;
                let (maxima, totals) = (&mut maxima[of_rows.clone()], &mut totals[of_rows]);
                let factors = online_softmax::<L>(scores, &sight, maxima, totals).to_array();
                let sums = &mut sums[slab * TILE_ROWS * padded..][..sight.rows * padded];
                for (sums, factor) in sums.chunks_exact_mut(padded).zip(factors) {
                    for sums in sums.chunks_exact_mut(LANES) {
                        (L::load(sums) * L::splat(factor)).store(sums);
                    }
                }
                for (row, rows, keys) in sight.runs() {
                    let product = Product {
                        rows,
                        panels: padded / PANEL,
                        steps: keys.len(),
                        left: Left { values: &scores[row * TILE + keys.start..], row: TILE, step: 1 },
                        right: Right { values: &v_rows[keys.start * padded..], panel: PANEL, step: padded },
                        resume: true,
                    };
                    product.run::<L>(&mut sums[row * padded..], padded);
                }
            }
        }

        for slab in 0..slabs {
            let total = L::load(&totals[slab * LANES..]);
            let of_rows = (L::load(&maxima[slab * LANES..]) + ln(total)).to_array();
            let of_rows = total.to_array().into_iter().zip(of_rows);
            for (r, (total, of_row)) in queries.of_slab(slab).zip(of_rows) {
                let (token, head) = queries.place(r);
                // SAFETY: the heads of a group in the rows of a block belong to this task.
                let out = unsafe { out.part(token, head * dim, dim) };
                for j in (0..dim).step_by(LANES) {
                    store(load::<L>(&sums[r * padded..], j) / L::splat(total), out, j);
                }
                if let Some(lse) = lse {
                    // SAFETY: as above.
                    unsafe { lse.part(token, head, 1)[0] = of_row };
                }
            }
        }
    }
}

/// One tile of the recurrence for up to 16 rows: turns their scores into `p`, brings their maxima and totals up to date, and
/// gives the factors `a`.
#[inline(always)]
fn online_softmax<L: Lanes>(scores: &mut [f32], sight: &Sight, maxima: &mut [f32], totals: &mut [f32]) -> L {
    let full = sight.is_full();
    let mut of_tile = [f32::MIN; LANES];
    for (i, row) in scores.chunks_exact(TILE).enumerate().take(sight.rows) {
        let mut max = L::splat(f32::NEG_INFINITY);
        for vector in 0..VECTORS {
            max = max.max(sight.score(full, row, i, vector));
        }
        of_tile[i] = max.max_lane();
    }
    let old = L::load(maxima);
    let new = old.max(L::from_array(of_tile));
    new.store(maxima);
    let mut of_tile = [0.0; LANES];
    for (i, row) in scores.chunks_exact_mut(TILE).enumerate().take(sight.rows) {
        let max = L::splat(maxima[i]);
        let mut sums = [L::zero(); VECTORS];
        for (vector, sum) in sums.iter_mut().enumerate() {
            *sum = exp(sight.score::<L>(full, row, i, vector) - max);
            sum.store(&mut row[vector * LANES..]);
        }
        let [a, b, c, d] = sums;
        of_tile[i] = ((a + b) + (c + d)).sum();
    }
    let factors = exp(old - new);
    L::load(totals).mul_add(factors, L::from_array(of_tile)).store(totals);
    factors
}

#[cfg(test)]
pub(super) mod tests;

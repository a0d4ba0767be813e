//! The loops around the register tile: blocks that fit the caches, and parts for the threads.

use super::super::matrix::{PANEL, RowsMut};
use super::super::scratch::with_scratch;
use super::super::simd::{Kernel, LANES, Lanes, Simd, prefetch};
use super::super::tile::{Left, TILE_ROWS, Target, Tile, even_parts};
use super::factor::Factor;
use super::split;
use std::ops::Range;

// None of these sizes shows in a result, so tests make them small to cross every boundary.

/// Most steps of a chain between two rests in memory: 32 columns of them are a quarter of a small second-level cache.
const BLOCK_STEPS: usize = if cfg!(test) { 64 } else { 1024 };

/// Most values of the left factor that are gone over again and again, for the second-level cache.
const BLOCK_VALUES: usize = if cfg!(test) { 1 } else { 200 * 1024 };

/// The multiply-adds (of 32 columns, and as if 4 rows more, for reading the weight) that are worth a thread.
const WORTH_A_THREAD: usize = if cfg!(test) { 1 } else { 256 * 1024 };

/// Where the values of a product go: row i of panel p lies at `ptr + i·row + p·panel`.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub ptr: *mut f32,
    pub row: usize,
    pub panel: usize,
}

impl Output {
    /// The rows of `y`.
    pub fn rows(y: &RowsMut<'_>) -> Self {
        Output { ptr: y.at(0, 0), row: y.stride(), panel: PANEL }
    }
}

/// `output = left·factor (+ bias)`, or added to what the output holds.
pub(super) struct Product<'a, F> {
    pub rows: usize,
    pub left: Left,
    pub factor: F,
    pub output: Output,
    pub bias: Option<&'a [f32]>,
    /// Add what the output held, last.
    pub add: bool,
    /// The chains go on from what the output holds (then not `add`).
    pub resume: bool,
}

// SAFETY: parts read what `left` and the factor name, and write disjoint parts of the output.
unsafe impl<F: Sync> Sync for Product<'_, F> {}

impl<F: Factor> Product<'_, F> {
    /// Computes it on the threads of the current pool.
    ///
    /// # Safety
    /// The addresses that `left`, `factor` and `output` name are valid for the product's sizes, and nobody else touches the
    /// output meanwhile.
    pub unsafe fn run(&self, simd: Simd) {
        let panels = self.factor.cols().div_ceil(PANEL);
        let work = panels * PANEL * self.factor.steps() * (self.rows + 4);
        let parts = (work / WORTH_A_THREAD).clamp(1, 2 * rayon::current_num_threads());
        split(0..self.rows, 0..panels, parts, &|rows, panels| simd.run(Part { product: self, rows, panels }));
    }
}

/// Some rows and panels of a product, on one thread.
struct Part<'a, F> {
    product: &'a Product<'a, F>,
    rows: Range<usize>,
    panels: Range<usize>,
}

impl<F: Factor> Kernel for Part<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Part { product: &Product { left, factor, output, bias, add, resume, .. }, rows, panels } = self;
        let steps = factor.steps();
        // A few rows read the factor once, so it had better be from end to end.
        let block_steps =
            if rows.len() <= TILE_ROWS && factor.scratch(1) == 0 { steps } else { steps.min(BLOCK_STEPS) }.max(1);
        let blocks = steps.div_ceil(block_steps).max(1);
        let block_rows = (BLOCK_VALUES / block_steps).max(4 * TILE_ROWS);
        // What is added to waits for the end, so the partial chains rest elsewhere.
        let apart = add && blocks > 1;
        let resting = if apart { block_rows.min(rows.len()) * panels.len() * PANEL } else { 0 };
        let packed = factor.scratch(block_steps.next_multiple_of(PANEL)).next_multiple_of(LANES);

        with_scratch(packed + resting, |scratch| {
            let (packed, resting) = scratch.split_at_mut(packed);
            for rows in even_parts(rows, block_rows) {
                let rest = if apart {
                    Output { ptr: resting.as_mut_ptr(), row: panels.len() * PANEL, panel: PANEL }
                } else {
                    Output { ptr: at(output, rows.start, panels.start), ..output }
                };
                for block in 0..blocks {
                    let from = block * block_steps;
                    let block_steps = from..(from + block_steps).min(steps);
                    let (first, last) = (block == 0, block + 1 == blocks);
                    for panel in panels.clone() {
                        let cols = (factor.cols() - panel * PANEL).min(PANEL);
                        // SAFETY: the scratch has the size that the factor asked for.
                        let right = unsafe { factor.block::<L>(panel, block_steps.clone(), packed.as_mut_ptr()) };
                        let ahead =
                            if panel + 1 < panels.end { factor.ahead(panel + 1, block_steps.clone()) } else { &[] };
                        let mut ahead = ahead.chunks(ahead.len().div_ceil(rows.len().div_ceil(TILE_ROWS)).max(1));
                        for tile in even_parts(rows.clone(), TILE_ROWS) {
                            for line in ahead.next().unwrap_or_default().chunks(LANES) {
                                prefetch(line.as_ptr());
                            }
                            let end = at(output, tile.start, panel);
                            let resting = at(rest, tile.start - rows.start, panel - panels.start);
                            let start = if first {
                                resume.then_some((end.cast_const(), output.row))
                            } else {
                                Some((resting.cast_const(), rest.row))
                            };
                            let (end, end_row) = if last { (end, output.row) } else { (resting, rest.row) };
                            let bias = if last { bias.map(|bias| bias[panel * PANEL..].as_ptr()) } else { None };
                            let left = Left {
                                ptr: left.ptr.wrapping_add(tile.start * left.row + block_steps.start * left.step),
                                ..left
                            };
                            let target = Target { start, end, end_row, cols, bias, add: add && last };
                            // SAFETY: as the caller of `Product::run` promises; the partial values lie in the output
                            // or in scratch for as many rows and panels.
                            L::call(unsafe { Tile::new(tile.len(), block_steps.len(), left, right, target) });
                        }
                    }
                }
            }
        });
    }
}

/// The first value of a row and panel of an output.
#[inline(always)]
fn at(output: Output, row: usize, panel: usize) -> *mut f32 {
    output.ptr.wrapping_add(row * output.row + panel * output.panel)
}

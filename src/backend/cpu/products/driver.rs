//! The loops around the register tile: blocks that fit the caches, and parts for the threads.

use super::super::matrix::{PANEL, RowsMut};
use super::super::pack;
use super::super::scratch::with_scratch;
use super::super::simd::{Kernel, LANES, Lanes, Simd, prefetch};
use super::super::tile::{Left, Right, TILE_ROWS, Target, Tile, even_parts};
use super::factor::{Factor, NEAR};
use super::split;
use std::ops::Range;

// None of these sizes shows in a result, so tests make them small to cross every boundary.

/// Most steps of a chain between two rests in memory: 32 columns of them are a quarter of a small second-level cache.
const BLOCK_STEPS: usize = if cfg!(test) { 64 } else { 1024 };

/// Most values of the left factor that are gone over again and again, for the second-level cache.
const BLOCK_VALUES: usize = if cfg!(test) { 1 } else { 200 * 1024 };

/// Panels whose blocks of the right factor are made together.
const GROUP: usize = if cfg!(test) { 2 } else { 16 };

/// Rows that share them.
const MANY_ROWS: usize = if cfg!(test) { 100 } else { 1024 };

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
    /// The first value of a row and panel.
    #[inline(always)]
    fn at(self, row: usize, panel: usize) -> *mut f32 {
        self.ptr.wrapping_add(row * self.row + panel * self.panel)
    }

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
        split(0..self.rows, 0..panels, parts, &|rows, panels| {
            let blocks = Blocks::new(self, rows.len(), panels.len());
            with_scratch(blocks.scratch(), |scratch| {
                simd.run(Part { product: self, rows, panels, blocks, scratch });
            });
        });
    }
}

/// How a part is cut, and the scratch that it needs.
struct Blocks {
    /// Steps of a block.
    steps: usize,
    /// Rows of a block.
    rows: usize,
    /// Panels of a group.
    panels: usize,
    /// Values of scratch for a block of one panel of the right factor.
    right: usize,
    /// Values of scratch for a block of the left factor.
    left: usize,
    /// Values of scratch for partial chains that can't rest in the output, which still holds what they will be added to.
    rest: usize,
}

impl Blocks {
    fn new<F: Factor>(product: &Product<'_, F>, rows: usize, panels: usize) -> Self {
        let (factor, left) = (product.factor, product.left);
        let right = |steps: usize| factor.scratch(steps).next_multiple_of(LANES);
        // A few rows read the factor once, so it had better be from end to end.
        let whole = rows <= TILE_ROWS && right(1) == 0;
        let steps = if whole { factor.steps() } else { factor.steps().min(BLOCK_STEPS) }.max(1);
        let block_rows = (BLOCK_VALUES / steps).max(4 * TILE_ROWS);
        let panels = panels.min(GROUP);
        let apart = product.add && steps < factor.steps();
        Blocks {
            steps,
            rows: block_rows,
            panels,
            right: right(steps),
            left: if left.row == 1 && left.step > NEAR { block_rows.min(rows) * steps } else { 0 },
            rest: if apart { rows.min(MANY_ROWS) * panels * PANEL } else { 0 },
        }
    }

    fn scratch(&self) -> usize {
        self.right * self.panels + self.left.next_multiple_of(LANES) + self.rest
    }
}

/// Some rows and panels of a product, on one thread.
struct Part<'a, F> {
    product: &'a Product<'a, F>,
    rows: Range<usize>,
    panels: Range<usize>,
    blocks: Blocks,
    scratch: &'a mut [f32],
}

impl<F: Factor> Kernel for Part<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Part { product, rows, panels, blocks, scratch } = self;
        let &Product { left, factor, output, bias, add, resume, .. } = product;
        let (right_scratch, scratch) = scratch.split_at_mut(blocks.right * blocks.panels);
        let (left_scratch, rest_scratch) = scratch.split_at_mut(blocks.left.next_multiple_of(LANES));
        let count = factor.steps().div_ceil(blocks.steps).max(1);
        let mut rights = [Right { ptr: std::ptr::null(), step: 0 }; GROUP];
        for rows in even_parts(rows, MANY_ROWS) {
            for group in even_parts(panels.clone(), blocks.panels) {
                let rest = if blocks.rest > 0 {
                    Output { ptr: rest_scratch.as_mut_ptr(), row: group.len() * PANEL, panel: PANEL }
                } else {
                    Output { ptr: output.at(rows.start, group.start), ..output }
                };
                for block in 0..count {
                    let steps = block * blocks.steps..factor.steps().min((block + 1) * blocks.steps);
                    let (first, last) = (block == 0, block + 1 == count);
                    for (i, panel) in group.clone().enumerate() {
                        let scratch = right_scratch.as_mut_ptr().wrapping_add(i * blocks.right);
                        // SAFETY: the scratch of a panel has the size that the factor asked for.
                        rights[i] = unsafe { factor.block::<L>(panel, steps.clone(), scratch) };
                    }
                    for rows_now in even_parts(rows.clone(), blocks.rows) {
                        let packed = blocks.left > 0;
                        if packed {
                            for tile in even_parts(rows_now.clone(), TILE_ROWS) {
                                let to = &mut left_scratch[(tile.start - rows_now.start) * steps.len()..];
                                let from = left.ptr.wrapping_add(tile.start + steps.start * left.step);
                                // SAFETY: the left factor's rows of these steps, and scratch for as many.
                                unsafe { pack::narrow::<L>(from, left.step, steps.len(), tile.len(), to.as_mut_ptr()) };
                            }
                        }
                        for (i, panel) in group.clone().enumerate() {
                            let cols = (factor.cols() - panel * PANEL).min(PANEL);
                            let bias = bias.filter(|_| last).map(|bias| bias[panel * PANEL..].as_ptr());
                            let right = rights[i];
                            let tiles = rows_now.len().div_ceil(TILE_ROWS);
                            let next = if i + 1 < group.len() { rights[i + 1] } else { right };
                            let fetch = (steps.len() * PANEL).div_ceil(tiles);
                            for (t, tile) in even_parts(rows_now.clone(), TILE_ROWS).enumerate() {
                                if next.ptr != right.ptr && next.step == PANEL {
                                    for line in (t * fetch..(t + 1) * fetch).step_by(64 / size_of::<F::Read>()) {
                                        prefetch(next.ptr.wrapping_add(line));
                                    }
                                }
                                let out = output.at(tile.start, panel);
                                let rest_ptr = rest.at(tile.start - rows.start, panel - group.start);
                                let start = match first {
                                    true => resume.then_some((out.cast_const(), output.row)),
                                    false => Some((rest_ptr.cast_const(), rest.row)),
                                };
                                let (end, end_row) = if last { (out, output.row) } else { (rest_ptr, rest.row) };
                                let left = if packed {
                                    Left {
                                        ptr: left_scratch[(tile.start - rows_now.start) * steps.len()..].as_ptr(),
                                        row: 1,
                                        step: tile.len(),
                                    }
                                } else {
                                    let ptr = left.ptr.wrapping_add(tile.start * left.row + steps.start * left.step);
                                    Left { ptr, ..left }
                                };
                                let target = Target { start, end, end_row, cols, bias, add: add && last };
                                // SAFETY: as the caller of `Product::run` promises; the partial values lie in the
                                // output or in scratch for as many rows and panels.
                                L::call(unsafe { Tile::new(tile.len(), steps.len(), left, right, target) });
                            }
                        }
                    }
                }
            }
        }
    }
}

//! Small products over packed blocks, for attention.

use super::lines::load;
use super::matrix::PANEL;
use super::simd::{LANES, Lanes};
use super::tile::{self, TILE_ROWS, Target, Tile, even_parts};
use std::array::from_fn;

/// A product of `rows` rows and `panels` panels of columns over `steps` steps, each value one chain over the steps in order.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub rows: usize,
    pub panels: usize,
    pub steps: usize,
    pub left: Left<'a>,
    pub right: Right<'a>,
    /// Whether the chains go on from what the output holds, or begin at 0.
    pub resume: bool,
}

/// The left factor: its value of row i and step s is `values[i·row + s·step]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub values: &'a [f32],
    pub row: usize,
    pub step: usize,
}

/// The right factor: the values of panel p and step s start at `values[p·panel + s·step]`.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub values: &'a [f32],
    pub panel: usize,
    pub step: usize,
}

impl Product<'_> {
    /// The product into `out`, whose rows lie `stride` values apart.
    ///
    /// # Panics
    /// When a slice is too short.
    #[inline(always)]
    pub fn run<L: Lanes>(&self, out: &mut [f32], stride: usize) {
        let Product { rows, panels, steps, left, right, resume } = *self;
        if rows == 0 || panels == 0 || steps == 0 {
            return;
        }
        assert!((rows - 1) * stride + panels * PANEL <= out.len(), "a product outside its output");
        assert!((rows - 1) * left.row + (steps - 1) * left.step < left.values.len(), "a left factor too short");
        let end = (panels - 1) * right.panel + (steps - 1) * right.step + PANEL;
        assert!(end <= right.values.len(), "a right factor too short");
        for panel in 0..panels {
            for rows in even_parts(0..rows, TILE_ROWS) {
                let left =
                    tile::Left { ptr: left.values[rows.start * left.row..].as_ptr(), row: left.row, step: left.step };
                let right = tile::Right { ptr: right.values[panel * right.panel..].as_ptr(), step: right.step };
                let end = out[rows.start * stride + panel * PANEL..].as_mut_ptr();
                let start = resume.then_some((end.cast_const(), stride));
                let target = Target { start, end, end_row: stride, cols: PANEL, bias: None, add: false };
                // SAFETY: the slices hold what all rows, panels and steps read and write.
                L::call(unsafe { Tile::new(rows.len(), steps, left, right, target) });
            }
        }
    }
}

/// Up to 16 rows of `width` values times `factor`, an empty row as zeros, transposed: value d of row i to `to[d·step + i]`.
#[inline(always)]
pub(super) fn transpose<L: Lanes>(rows: [&[f32]; LANES], width: usize, factor: f32, to: &mut [f32], step: usize) {
    let factor = L::splat(factor);
    for first in (0..width).step_by(LANES) {
        let values = from_fn(|i| if rows[i].is_empty() { L::zero() } else { load::<L>(rows[i], first) * factor });
        let columns = to[first * step..].chunks_mut(step).take(width - first);
        for (column, to) in L::transpose(values).into_iter().zip(columns) {
            column.store(to);
        }
    }
}

/// A row times `factor`, filled up with zeros to the length of `to`, a multiple of 16; an empty row is all zeros.
#[inline(always)]
pub(super) fn copy<L: Lanes>(row: &[f32], factor: f32, to: &mut [f32]) {
    for (i, to) in to.chunks_exact_mut(LANES).enumerate() {
        let values = if i * LANES < row.len() { load::<L>(row, i * LANES) * L::splat(factor) } else { L::zero() };
        values.store(to);
    }
}

/// The first `len` values of what is left of a thread's scratch.
pub(super) fn take<'a>(scratch: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (taken, rest) = std::mem::take(scratch).split_at_mut(len);
    *scratch = rest;
    taken
}

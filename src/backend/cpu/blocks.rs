//! Small products over packed blocks, for attention.

use super::matrix::PANEL;
use super::simd::{Element, LANES, Lanes};
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

/// The values from `i` on, widened, then zeros where the row ends within 16.
#[inline(always)]
fn load<L: Lanes, T: Element>(row: &[T], i: usize) -> L {
    let rest = row.get(i..).unwrap_or_default();
    if rest.len() >= LANES {
        // SAFETY: 16 values are there.
        return unsafe { T::load_ptr(rest.as_ptr()) };
    }
    let mut values = [0.0; LANES];
    for (value, rest) in values.iter_mut().zip(rest) {
        *value = rest.widen();
    }
    L::from_array(values)
}

/// Up to 16 rows of `width` values times `factor`, an empty row as zeros, transposed: value d of row i to `to[d·step + i]`.
#[inline(always)]
pub(super) fn transpose<L: Lanes, T: Element>(
    rows: [&[T]; LANES],
    width: usize,
    factor: f32,
    to: &mut [f32],
    step: usize,
) {
    let factor = L::splat(factor);
    for first in (0..width).step_by(LANES) {
        let values = from_fn(|i| load::<L, T>(rows[i], first) * factor);
        let columns = to[first * step..].chunks_mut(step).take(width - first);
        for (column, to) in L::transpose(values).into_iter().zip(columns) {
            column.store(to);
        }
    }
}

/// `count` rows of `width` values as the columns of a right factor, `[⌈count / PANEL⌉][width][PANEL]`. Of columns beyond, those
/// within 16 of the last are zeros and others stay as they are.
#[inline(always)]
pub(super) fn as_columns<'a, L: Lanes, T: Element>(
    count: usize,
    width: usize,
    row: impl Fn(usize) -> &'a [T],
    to: &mut [f32],
) {
    for first in (0..count).step_by(LANES) {
        let rows = from_fn(|i| if first + i < count { row(first + i) } else { &[] });
        transpose::<L, T>(rows, width, 1.0, &mut to[first / PANEL * PANEL * width + first % PANEL..], PANEL);
    }
}

/// A row times `factor`, filled up with zeros to the length of `to`, a multiple of 16; an empty row is all zeros.
#[inline(always)]
pub(super) fn copy<L: Lanes, T: Element>(row: &[T], factor: f32, to: &mut [f32]) {
    for (i, to) in to.chunks_exact_mut(LANES).enumerate() {
        (load::<L, T>(row, i * LANES) * L::splat(factor)).store(to);
    }
}

/// Cuts a thread's scratch into pieces of the given lengths.
pub(super) fn split<const N: usize>(mut scratch: &mut [f32], lengths: [usize; N]) -> [&mut [f32]; N] {
    lengths.map(|len| {
        let (piece, rest) = std::mem::take(&mut scratch).split_at_mut(len);
        scratch = rest;
        piece
    })
}

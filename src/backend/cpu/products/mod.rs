//! The products of a linear layer: forward, the input's gradient, the weight's gradient.
//!
//! The law of the same bits: a value of a product is one chain of fused multiply-adds over the inner index in ascending
//! order; then the bias is added, then what the output held. Rows, chunks, threads and instruction set decide only which chains
//! run side by side. Where the chain is cut into blocks its partial value rests in memory as the f32 that it is.

mod driver;
mod factor;
#[cfg(test)]
mod tests;

use super::matrix::{PANEL, Panels, Rows, RowsMut, panels_len};
use super::simd::{Element, Kernel, LANES, Lanes, Simd};
use super::tile::{Left, TILE_ROWS};
use driver::{Output, Product};
use factor::{Columns, Stored, Transposed, Widened};
use std::ops::Range;

/// Rows for which a weight is read where it lies. For more it pays to copy a block, widened, to where all rows find it near.
const FEW_ROWS: usize = 4 * TILE_ROWS;

/// `y = x·wᵀ (+ bias)`, or added to what y holds.
///
/// x is `[rows, inputs]`, y `[rows, outputs]`, the bias one value an output. A value starts its chain at 0.
///
/// # Panics
/// When the sizes differ.
pub fn forward<T: Element>(
    simd: Simd,
    x: Rows<'_>,
    w: Panels<'_, T>,
    bias: Option<&[f32]>,
    add: bool,
    y: &mut RowsMut<'_>,
) {
    assert_eq!(x.cols(), w.inputs(), "inputs");
    assert_eq!((y.rows(), y.cols()), (x.rows(), w.outputs()), "rows and outputs");
    assert!(bias.is_none_or(|bias| bias.len() == w.outputs()), "a bias for each output");
    let (left, output) = (by_rows(x), Output::rows(y));
    // SAFETY: the sizes agree, and the views vouch for their addresses.
    unsafe {
        if x.rows() <= FEW_ROWS {
            Product { rows: x.rows(), left, factor: Stored(w), output, bias, add, resume: false }.run(simd);
        } else {
            Product { rows: x.rows(), left, factor: Widened(w), output, bias, add, resume: false }.run(simd);
        }
    }
}

/// `dx = dy·w`, or added to what dx holds.
///
/// dy is `[rows, outputs]`, dx `[rows, inputs]`. A value starts its chain over the outputs at 0.
///
/// # Panics
/// When the sizes differ.
pub fn input_gradient<T: Element>(simd: Simd, dy: Rows<'_>, w: Panels<'_, T>, add: bool, dx: &mut RowsMut<'_>) {
    assert_eq!(dy.cols(), w.outputs(), "outputs");
    assert_eq!((dx.rows(), dx.cols()), (dy.rows(), w.inputs()), "rows and inputs");
    let (left, output) = (by_rows(dy), Output::rows(dx));
    // SAFETY: the sizes agree, and the views vouch for their addresses.
    unsafe {
        Product { rows: dy.rows(), left, factor: Transposed(w), output, bias: None, add, resume: false }.run(simd);
    }
}

/// `dw += dyᵀ·x`, in panels, and `db += Σ dy` over the rows.
///
/// x is `[rows, inputs]`, dy `[rows, outputs]`. Every chain runs over the rows and goes on from what dw and db hold, so rows given in
/// several calls leave the same bits as in one. Padding outputs are not touched.
///
/// # Panics
/// When the sizes differ.
pub fn weight_gradient(simd: Simd, x: Rows<'_>, dy: Rows<'_>, dw: &mut [f32], db: Option<&mut [f32]>) {
    let (inputs, outputs) = (x.cols(), dy.cols());
    assert_eq!(x.rows(), dy.rows(), "rows");
    assert_eq!(dw.len(), panels_len(outputs, inputs), "panels of a weight [{outputs}, {inputs}]");
    let left = Left { ptr: x.at(0, 0), row: 1, step: x.stride() };
    let output = Output { ptr: dw.as_mut_ptr(), row: PANEL, panel: inputs * PANEL };
    // SAFETY: the sizes agree, and the views vouch for their addresses.
    unsafe {
        Product { rows: inputs, left, factor: Columns(dy), output, bias: None, add: false, resume: true }.run(simd);
    }
    if let Some(db) = db {
        assert_eq!(db.len(), outputs, "a bias for each output");
        simd.run(ColumnSums { dy, db });
    }
}

/// The left factor whose rows are the rows of `x`.
fn by_rows(x: Rows<'_>) -> Left {
    Left { ptr: x.at(0, 0), row: x.stride(), step: 1 }
}

/// `db[j] += Σ dy[i, j]`, row after row.
struct ColumnSums<'a> {
    dy: Rows<'a>,
    db: &'a mut [f32],
}

impl Kernel for ColumnSums<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (part, db) in self.db.chunks_mut(LANES).enumerate() {
            let mut sum = L::load_first(db);
            for row in 0..self.dy.rows() {
                sum = sum + L::load_first(&self.dy.row(row)[part * LANES..]);
            }
            sum.store_first(db);
        }
    }
}

/// Cuts rows × panels into about `parts` parts of one size and calls `leaf` on each, in parallel.
fn split(rows: Range<usize>, panels: Range<usize>, parts: usize, leaf: &(impl Fn(Range<usize>, Range<usize>) + Sync)) {
    let half = parts / 2;
    // Cutting rows makes blocks of the right factor anew in each part, so columns are cut where they are many.
    let by_panels = panels.len() >= parts && (panels.len() * PANEL >= rows.len() || rows.len() < parts * TILE_ROWS);
    if parts <= 1 || !by_panels && rows.len() < 2 * TILE_ROWS {
        leaf(rows, panels);
    } else if by_panels {
        let middle = panels.start + panels.len() * half / parts;
        rayon::join(
            || split(rows.clone(), panels.start..middle, half, leaf),
            || split(rows.clone(), middle..panels.end, parts - half, leaf),
        );
    } else {
        let middle = rows.start + (rows.len() * half / parts).next_multiple_of(TILE_ROWS);
        rayon::join(
            || split(rows.start..middle, panels.clone(), half, leaf),
            || split(middle..rows.end, panels.clone(), parts - half, leaf),
        );
    }
}

//! Between row-major weights and panels, and blocks of panels the other way round.

use super::matrix::{PANEL, Panels, Rows, RowsMut, panels_len};
use super::simd::{Element, LANES, Lanes, prefetch};
use std::ops::Range;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Writes the weight `[outputs, inputs]` in `rows` into `panels`, the missing outputs of the last panel as zeros.
///
/// # Panics
/// When `panels` has not [`panels_len`] values.
pub fn pack<T: Copy + Default>(rows: Rows<'_, T>, panels: &mut [T]) {
    let (outputs, inputs) = (rows.rows(), rows.cols());
    assert_eq!(panels.len(), panels_len(outputs, inputs), "panels of a weight [{outputs}, {inputs}]");
    for (index, panel) in panels.chunks_exact_mut((inputs * PANEL).max(1)).enumerate() {
        for j in 0..PANEL {
            let output = index * PANEL + j;
            if output < outputs {
                for (column, &value) in panel.chunks_exact_mut(PANEL).zip(rows.row(output)) {
                    column[j] = value;
                }
            } else {
                panel.chunks_exact_mut(PANEL).for_each(|column| column[j] = T::default());
            }
        }
    }
}

/// Writes the weight `[outputs, inputs]` in `panels` into `rows`.
///
/// # Panics
/// When the sizes differ.
pub fn unpack<T: Copy>(panels: Panels<'_, T>, rows: &mut RowsMut<'_, T>) {
    let (outputs, inputs) = (panels.outputs(), panels.inputs());
    assert_eq!((rows.rows(), rows.cols()), (outputs, inputs), "rows of a weight [{outputs}, {inputs}]");
    for output in 0..outputs {
        let panel = panels.panel(output / PANEL);
        for (value, column) in rows.row(output).iter_mut().zip(panel.chunks_exact(PANEL)) {
            *value = column[output % PANEL];
        }
    }
}

/// Widens the values of `from` into `to`.
///
/// # Safety
/// `to` is writable for as many values, a multiple of 16.
#[inline(always)]
pub(super) unsafe fn widen<L: Lanes, T: Element>(from: &[T], to: *mut f32) {
    for i in (0..from.len()).step_by(LANES) {
        // SAFETY: as the caller promises.
        unsafe { T::load_ptr::<L>(from.as_ptr().add(i)).store_ptr(to.add(i)) };
    }
}

/// The first `cols` values (at most [`PANEL`]) of `rows` rows, as `[rows][PANEL]` with zeros after them.
///
/// # Safety
/// The rows at `from`, `stride` values apart, are readable, and `to` is writable for `rows` times [`PANEL`] values.
#[inline(always)]
pub(super) unsafe fn gather<L: Lanes>(from: *const f32, stride: usize, rows: usize, cols: usize, to: *mut f32) {
    for row in 0..rows {
        for col in (0..PANEL).step_by(LANES) {
            let cols = cols.saturating_sub(col).min(LANES);
            // SAFETY: as the caller promises.
            unsafe {
                L::load_first_ptr(from.wrapping_add(row * stride + col), cols).store_ptr(to.add(row * PANEL + col));
            }
        }
    }
}

/// The first `cols` values (at most 16) of `rows` rows, as `[rows][cols]`.
///
/// # Safety
/// The rows at `from`, `stride` values apart, are readable, and `to` is writable for `rows` times `cols` values.
#[inline(always)]
pub(super) unsafe fn narrow<L: Lanes>(from: *const f32, stride: usize, rows: usize, cols: usize, to: *mut f32) {
    for row in 0..rows {
        // SAFETY: as the caller promises.
        unsafe { L::load_first_ptr(from.wrapping_add(row * stride), cols).store_first_ptr(to.add(row * cols), cols) };
    }
}

/// Of a weight in panels, the outputs `outputs` (whole panels, but for the end of the weight) of [`PANEL`] inputs from
/// `input`, as `[outputs][PANEL]`: inputs beyond the last as zeros.
///
/// # Safety
/// `to` is writable for the outputs rounded up to whole panels times [`PANEL`] values.
#[inline(always)]
pub(super) unsafe fn transposed<L: Lanes, T: Element>(
    panels: Panels<'_, T>,
    outputs: Range<usize>,
    input: usize,
    to: *mut f32,
) {
    debug_assert!(outputs.start.is_multiple_of(PANEL));
    for first in outputs.clone().step_by(PANEL) {
        let panel = panels.panel(first / PANEL);
        let to = to.wrapping_add((first - outputs.start) * PANEL);
        // The same inputs of the next panel lie too far on for the machine to foresee.
        let next = panel.as_ptr().wrapping_add(panel.len() + input * PANEL);
        for line in (0..PANEL * PANEL).step_by(LINE / size_of::<T>()) {
            prefetch(next.wrapping_add(line));
        }
        for i in (0..PANEL).step_by(LANES) {
            for j in (0..PANEL).step_by(LANES) {
                // 16 inputs from i times 16 outputs from j.
                let mut block = [L::zero(); LANES];
                for (row, values) in block.iter_mut().enumerate() {
                    let at = (input + i + row) * PANEL + j;
                    if at < panel.len() {
                        // SAFETY: the 16 values lie in one row of the panel.
                        *values = unsafe { T::load_ptr::<L>(panel.as_ptr().add(at)) };
                    }
                }
                for (row, values) in L::transpose(block).into_iter().enumerate() {
                    // SAFETY: as the caller promises.
                    unsafe { values.store_ptr(to.add((j + row) * PANEL + i)) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn packing_and_unpacking_give_the_weight_back_and_pad_with_zeros() {
        for (outputs, inputs) in [(1, 1), (31, 7), (32, 5), (33, 16), (64, 3), (70, 17), (0, 4), (4, 0)] {
            let stride = inputs + 3;
            let weight: Vec<bf16> = (0..outputs * stride).map(|i| bf16::from_f32(1.0 + i as f32)).collect();
            let mut panels = vec![bf16::from_f32(-1.0); panels_len(outputs, inputs)];
            pack(Rows::new(&weight, outputs, inputs, stride), &mut panels);
            for (i, &value) in panels.iter().enumerate() {
                let (panel, input, output) = (i / (inputs * PANEL), i / PANEL % inputs, i % PANEL);
                let output = panel * PANEL + output;
                let expected = if output < outputs { weight[output * stride + input] } else { bf16::ZERO };
                assert_eq!(value, expected, "output {output}, input {input} of [{outputs}, {inputs}]");
            }
            let mut back = vec![bf16::ZERO; outputs * stride];
            unpack(Panels::new(&panels, outputs, inputs), &mut RowsMut::new(&mut back, outputs, inputs, stride));
            for (i, (&back, &value)) in back.iter().zip(&weight).enumerate() {
                assert_eq!(back, if i % stride < inputs { value } else { bf16::ZERO });
            }
        }
    }
}

//! Rows moved, filled, scaled and summed.

use super::call::Call;
use super::elementwise::{COLUMNS, grid, parts};
use super::scratch::Slot;
use super::shaders;
use crate::backend::{DType, Out, Result, View, ops};

/// Rows that one workgroup of a sum over rows adds up.
pub(super) const RUN: usize = 128;

pub(super) fn copy(call: &mut Call, op: &ops::Copy) -> Result<()> {
    let parts = parts(call, [op.src, op.out.view])?;
    parts.into_iter().try_for_each(|[src, out]| copy_part(call, src, Out { view: out, ..op.out }))
}

/// Copies what bindings can show.
pub(super) fn copy_part(call: &mut Call, src: View, Out { view: out, add }: Out) -> Result<()> {
    let kernel = shaders::COPY.kernel("copy", &[src.dtype, out.dtype]).with("ADD", add);
    call.dispatch(kernel).read(src).write(out).size(out.rows).size(out.cols).grid(grid(out))
}

pub(super) fn fill(call: &mut Call, op: &ops::Fill) -> Result<()> {
    // Rounded here: how a shader rounds to f16 is the driver's.
    let value = if op.out.dtype == DType::F16 { half::f16::from_f32(op.value).to_f32() } else { op.value };
    for [out] in parts(call, [op.out])? {
        let kernel = shaders::FILL.kernel("fill", &[out.dtype]);
        call.dispatch(kernel).write(out).size(out.rows).size(out.cols).factor(value).grid(grid(out))?;
    }
    Ok(())
}

pub(super) fn scale(call: &mut Call, op: &ops::Scale) -> Result<()> {
    for [x] in parts(call, [op.x])? {
        let kernel = shaders::SCALE.kernel("scale", &[x.dtype]);
        call.dispatch(kernel).write(x).size(x.rows).size(x.cols).factor(op.factor).grid(grid(x))?;
    }
    Ok(())
}

/// `out[i] = src[rows[i]]`, with `src` and `out` in parts that fit into a binding.
pub(super) fn gather_rows(call: &mut Call, src: View, rows: View, out: View) -> Result<()> {
    call.check([src, rows, out])?;
    if src.rows == 0 {
        return Ok(());
    }
    let total = src.rows;
    for (row, n) in call.row_blocks(&[out]) {
        let (rows, out) = (rows.col_range(row, n)?, out.row_range(row, n)?);
        for (first, count) in call.row_blocks(&[src]) {
            call.dispatch(shaders::GATHER.kernel("gather", &[src.dtype, out.dtype]))
                .read(src.row_range(first, count)?)
                .read(rows)
                .write(out)
                .size(first)
                .size(count)
                .size(total)
                .size(n)
                .size(out.cols)
                .grid(grid(out))?;
        }
    }
    Ok(())
}

pub(super) fn gather(call: &mut Call, op: &ops::Gather) -> Result<()> {
    gather_rows(call, op.src, op.rows, op.out)
}

pub(super) fn scatter_add(call: &mut Call, op: &ops::ScatterAdd) -> Result<()> {
    let dtype = call.dtype(&[op.src, op.out])?;
    call.check([op.src, op.rows, op.out])?;
    for (row, n) in call.row_blocks(&[op.src]) {
        let (src, rows) = (op.src.row_range(row, n)?, op.rows.col_range(row, n)?);
        for (first, count) in call.row_blocks(&[op.out]) {
            call.dispatch(shaders::SCATTER_ADD.kernel("scatter_add", &[dtype]))
                .read(src)
                .read(rows)
                .write(op.out.row_range(first, count)?)
                .size(n)
                .size(src.cols)
                .size(first)
                .size(count)
                .grid(grid(src))?;
        }
    }
    Ok(())
}

pub(super) fn page_write(call: &mut Call, op: &ops::PageWrite) -> Result<()> {
    let ([keys, values], [all_keys, all_values]) = (op.rows, op.out);
    call.check([keys, values, op.segments.table, op.segments.positions, op.pages, all_keys, all_values])?;
    write_pages(call, op, keys, all_keys)?;
    write_pages(call, op, values, all_values)
}

fn write_pages(call: &mut Call, op: &ops::PageWrite, all: View, out: View) -> Result<()> {
    for (token, count) in call.row_blocks(&[all]) {
        let rows = all.row_range(token, count)?;
        for (row, n) in call.row_blocks(&[out]) {
            call.dispatch(shaders::PAGE_WRITE.kernel("page_write", &[rows.dtype, out.dtype]))
                .read(rows)
                .read(op.segments.table)
                .read(op.pages)
                .write(out.row_range(row, n)?)
                .size(all.rows)
                .size(rows.cols)
                .size(op.segments.table.rows)
                .size(op.pages.rows)
                .size(op.pages.cols)
                .size(op.page_size)
                .size(out.rows)
                .size(token)
                .size(count)
                .size(row)
                .size(n)
                .grid(grid(rows))?;
        }
    }
    Ok(())
}

pub(super) fn weighted_sum(call: &mut Call, op: &ops::WeightedSum) -> Result<()> {
    column_sums(call, op.values, Some(op.weights), op.out)
}

/// `out[c] += Σ_r weights[r]·values[r, c]`, all weights 1 where there are none.
pub(super) fn column_sums(call: &mut Call, values: View, weights: Option<View>, out: View) -> Result<()> {
    call.check([values, out].into_iter().chain(weights))?;
    for (first, count) in call.row_blocks(&[values]) {
        let weights = weights.map(|weights| weights.col_range(first, count)).transpose()?;
        add_up(call, values.row_range(first, count)?, weights, out, [Slot::Partials, Slot::Totals])?;
    }
    Ok(())
}

/// The scratch of a sum over so many rows of so many columns.
pub(super) fn sums(rows: usize, cols: usize) -> [(Slot, usize); 2] {
    let runs = rows.div_ceil(RUN);
    [(Slot::Partials, runs.saturating_mul(cols)), (Slot::Totals, runs.div_ceil(RUN).saturating_mul(cols))]
}

/// Runs of rows into one row each, in the slots by turns, until one run is left, which adds to out.
pub(super) fn add_up(
    call: &mut Call,
    values: View,
    weights: Option<View>,
    out: View,
    [slot, other]: [Slot; 2],
) -> Result<()> {
    let runs = values.rows.div_ceil(RUN);
    let last = runs <= 1;
    let to = if last { out } else { call.scratch(slot, runs, values.cols)? };
    let kernel = shaders::COLUMN_SUMS.kernel("column_sums", &[values.dtype]);
    call.dispatch(kernel.with("ADD", last).with("WEIGHTED", weights.is_some()))
        .read(values)
        .maybe_read(weights)
        .write(to)
        .size(values.rows)
        .size(values.cols)
        .grid([values.cols.div_ceil(COLUMNS), runs, 1])?;
    if last { Ok(()) } else { add_up(call, to, None, out, [other, slot]) }
}

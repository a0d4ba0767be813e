//! Rows moved, filled, scaled and summed, and the optimiser's step: launches of their kernels.

use super::call::{Call, Place, blocks, each, each_eight};
use super::driver::{Arguments, Pointer};
use super::source;
use crate::backend::{DType, Largest, Result, ops};

/// Rows whose sum is a partial one, at least; and how many partial sums there are, at most.
const CHUNK_ROWS: usize = 32;
const CHUNKS: usize = 512;
/// Threads of a block of `column_totals`, 32·WARPS there.
const TOTALS_THREADS: u32 = 1024;
/// Threads of a block that goes over a flat space.
const THREADS: u32 = 512;
/// Blocks that go over a flat space, at most.
const FLAT_BLOCKS: usize = 1024;

/// Bytes of scratch that calls of these sizes take.
pub(super) fn scratch_bytes(largest: &Largest) -> usize {
    let (_, chunks) = chunk_of_rows(largest.tokens);
    (4 * chunks * largest.width).max(4 * FLAT_BLOCKS)
}

/// Rows of a partial sum over `rows`, and how many of these there are.
fn chunk_of_rows(rows: usize) -> (usize, usize) {
    let chunk = rows.div_ceil(CHUNKS).max(CHUNK_ROWS);
    (chunk, rows.div_ceil(chunk))
}

/// `out[c] += Σ_chunk partials[chunk, c]`.
pub(super) fn column_totals(c: &mut Call, partials: Pointer, chunks: usize, out: &Place) -> Result<()> {
    let arguments = Arguments::new().pointer(partials).pointer(out.start).size(chunks).size(out.cols);
    c.launch((&source::COLUMNS, "column_totals"), &[], blocks(out.cols.div_ceil(32), TOTALS_THREADS), &arguments)
}

/// `out[c] += Σ_r weights[r]·values[r, c]`, each row once without weights.
pub(super) fn column_sums(c: &mut Call, values: &Place, weights: Option<Place>, out: &Place) -> Result<()> {
    let (chunk, chunks) = chunk_of_rows(values.rows);
    let [partials] = c.scratch([4 * chunks * values.cols])?;
    let arguments = Arguments::new().place(values).maybe(weights).pointer(partials);
    let arguments = arguments.size(values.rows).size(values.cols).int(c.int("rows", chunk)?);
    let shape = each(chunks, values.cols);
    c.launch((&source::COLUMNS, "column_partials"), &[("T_X", values.of())], shape, &arguments)?;
    column_totals(c, partials, chunks, out)
}

/// `out = src`, or added to it.
pub(super) fn cast(c: &mut Call, src: &Place, out: &Place, add: bool) -> Result<()> {
    let arguments = Arguments::new().place(src).place(out).int(add.into()).size(src.rows).size(src.cols);
    let defines = [("T_X", src.of()), ("T_OUT", out.of())];
    c.launch((&source::MEMORY, "copy"), &defines, each_eight(src.rows, src.cols), &arguments)
}

pub(super) fn gather(c: &mut Call, op: &ops::Gather) -> Result<()> {
    let (src, rows, out) = (c.floats("src", op.src)?, c.ids("rows", op.rows)?, c.floats("out", op.out)?);
    gather_rows(c, &src, &rows, &out)
}

/// `out[i] = src[rows[i]]`, NaN for a row that is not there.
pub(super) fn gather_rows(c: &mut Call, src: &Place, rows: &Place, out: &Place) -> Result<()> {
    let arguments = Arguments::new().place(src).size(src.rows).pointer(rows.start).place(out);
    let arguments = arguments.size(out.rows).size(out.cols);
    let defines = [("T_X", src.of()), ("T_OUT", out.of())];
    c.launch((&source::ROWS, "gather"), &defines, each_eight(out.rows, out.cols), &arguments)
}

pub(super) fn scatter_add(c: &mut Call, op: &ops::ScatterAdd) -> Result<()> {
    let (src, rows, out) = (c.floats("src", op.src)?, c.ids("rows", op.rows)?, c.floats("out", op.out)?);
    let arguments = Arguments::new().place(&src).pointer(rows.start).place(&out).size(out.rows);
    let arguments = arguments.size(src.rows).size(src.cols);
    let defines = [("T_X", src.of()), ("T_OUT", out.of())];
    c.launch((&source::ROWS, "scatter_add"), &defines, each_eight(src.rows, src.cols), &arguments)
}

pub(super) fn copy(c: &mut Call, op: &ops::Copy) -> Result<()> {
    if op.src.dtype == DType::U32 {
        let (src, out) = (c.ids("src", op.src)?, c.ids("out", op.out.view)?);
        let arguments = Arguments::new().place(&src).place(&out).size(src.rows).size(src.cols);
        return c.launch((&source::MEMORY, "copy_ids"), &[], each(src.rows, src.cols), &arguments);
    }
    let (src, out) = (c.floats("src", op.src)?, c.floats("out", op.out.view)?);
    cast(c, &src, &out, op.out.add)
}

pub(super) fn fill(c: &mut Call, op: &ops::Fill) -> Result<()> {
    let out = c.floats("out", op.out)?;
    let arguments = Arguments::new().float(op.value).place(&out).size(out.rows).size(out.cols);
    c.launch((&source::MEMORY, "fill"), &[("T_OUT", out.of())], each_eight(out.rows, out.cols), &arguments)
}

pub(super) fn scale(c: &mut Call, op: &ops::Scale) -> Result<()> {
    let x = c.floats("x", op.x)?;
    let arguments = Arguments::new().float(op.factor).place(&x).size(x.rows).size(x.cols);
    c.launch((&source::MEMORY, "scale"), &[("T_OUT", x.of())], each_eight(x.rows, x.cols), &arguments)
}

pub(super) fn weighted_sum(c: &mut Call, op: &ops::WeightedSum) -> Result<()> {
    let (values, weights) = (c.floats("values", op.values)?, c.f32("weights", op.weights)?);
    let out = c.f32("out", op.out)?;
    column_sums(c, &values, Some(weights), &out)
}

pub(super) fn squared_norm(c: &mut Call, op: &ops::SquaredNorm) -> Result<()> {
    let (x, out) = (c.f32("x", op.x)?, c.f32("out", op.out)?);
    let chunk = x.cols.div_ceil(FLAT_BLOCKS).next_multiple_of(THREADS as usize);
    let count = x.cols.div_ceil(chunk.max(1));
    let [partials] = c.scratch([4 * FLAT_BLOCKS])?;
    let arguments = Arguments::new().pointer(x.start).pointer(partials).size(x.cols).size(chunk);
    c.launch((&source::OPTIMISER, "squared_norm_partials"), &[], blocks(count, THREADS), &arguments)?;
    let arguments = Arguments::new().pointer(partials).pointer(out.start).int(c.int("blocks", count)?);
    c.launch((&source::OPTIMISER, "squared_norm_total"), &[], blocks(1, THREADS), &arguments)
}

pub(super) fn clip_factor(c: &mut Call, op: &ops::ClipFactor) -> Result<()> {
    let (squared_norm, control) = (c.f32("squared_norm", op.squared_norm)?, c.f32("control", op.control)?);
    let arguments = Arguments::new().pointer(squared_norm.start).float(op.max_norm).pointer(control.start);
    c.launch((&source::OPTIMISER, "clip_factor"), &[], blocks(1, 1), &arguments)
}

pub(super) fn adamw(c: &mut Call, op: &ops::AdamW) -> Result<()> {
    let (param, grad) = (c.f32("param", op.param)?, c.f32("grad", op.grad)?);
    let (moment1, moment2) = (c.f32("moment1", op.moment1)?, c.f32("moment2", op.moment2)?);
    let (stored, control) = (c.maybe_floats("stored", op.stored)?, c.f32("control", op.control)?);
    let arguments = Arguments::new().pointer(param.start).pointer(grad.start).pointer(moment1.start);
    let arguments = arguments.pointer(moment2.start).maybe(stored).pointer(control.start).float(op.beta1);
    let arguments = arguments.float(op.beta2).float(op.eps).float(op.weight_decay).size(param.cols);
    let defines = [("T_OUT", stored.unwrap_or(param).of())];
    let count = param.cols.div_ceil(THREADS as usize);
    c.launch((&source::OPTIMISER, "adamw"), &defines, blocks(count, THREADS), &arguments)
}

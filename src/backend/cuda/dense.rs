//! Embedding, norm, gated activation, rotary positions, pages: launches of their kernels.

use super::call::{Call, Place, SegmentsPlace, blocks, each, each_eight};
use super::driver::{Arguments, Shape};
use super::memory::{column_totals, gather_rows};
use super::source::{self, Value};
use crate::backend::{Largest, Result, ops};

/// Values of a row that a thread of `rms_norm.cu` keeps: 8·HELD there.
const NORM_VALUES: usize = 16;
/// Threads of a block of the norm's backward, BACKWARD_THREADS there, and blocks, at most: they have rows in turn, and a partial
/// sum each.
const NORM_BACKWARD_THREADS: usize = 512;
const NORM_BACKWARD_BLOCKS: usize = 512;
/// Rows of a block of `page_write.cu`, a warp each.
const PAGE_ROWS: usize = 8;

/// Bytes of scratch that calls of these sizes take.
pub(super) fn scratch_bytes(largest: &Largest) -> usize {
    let partials = 4 * largest.tokens.min(NORM_BACKWARD_BLOCKS) * largest.width;
    partials.max(2 * (4 * largest.tokens).next_multiple_of(256))
}

pub(super) fn embed(c: &mut Call, op: &ops::Embed) -> Result<()> {
    let (ids, weight, out) = (c.ids("ids", op.ids)?, c.floats("weight", op.weight)?, c.floats("out", op.out)?);
    gather_rows(c, &weight, &ids, &out)
}

pub(super) fn embed_backward(c: &mut Call, op: &ops::EmbedBackward) -> Result<()> {
    let (ids, dout, dweight) = (c.ids("ids", op.ids)?, c.floats("dout", op.dout)?, c.f32("dweight", op.dweight)?);
    let tokens = c.int("tokens", dout.rows)?;
    let [first, next] = c.scratch([4 * dout.rows; 2])?;
    let defines = [("T_X", dout.of())];
    let links = Arguments::new().pointer(ids.start).pointer(first).pointer(next).int(tokens);
    c.launch((&source::EMBED, "embed_links"), &defines, blocks(dout.rows.div_ceil(8), 256), &links)?;
    let arguments = Arguments::new().pointer(ids.start).pointer(first).pointer(next).place(&dout).place(&dweight);
    let arguments = arguments.size(dweight.rows).int(tokens).size(dout.cols);
    c.launch((&source::EMBED, "embed_backward"), &defines, each(dout.rows, dout.cols), &arguments)
}

/// Blocks of a norm, with as many threads as keep a row, up to some.
fn norm_blocks(blocks_of_rows: usize, width: usize, most: usize) -> Shape {
    blocks(blocks_of_rows, width.div_ceil(NORM_VALUES).next_multiple_of(32).clamp(32, most) as u32)
}

pub(super) fn rms_norm(c: &mut Call, op: &ops::RmsNorm) -> Result<()> {
    let (x, weight, out) = (c.floats("x", op.x)?, c.floats("weight", op.weight)?, c.floats("out", op.out)?);
    let inv_rms = c.maybe_f32("inv_rms", op.inv_rms)?;
    let arguments = Arguments::new().place(&x).pointer(weight.start).float(op.eps).place(&out).maybe(inv_rms);
    let arguments = arguments.size(x.rows).int(c.int("width", x.cols)?);
    let defines = [("T_X", x.of()), ("T_W", weight.of()), ("T_OUT", out.of())];
    c.launch((&source::RMS_NORM, "rms_norm"), &defines, norm_blocks(x.rows, x.cols, 1024), &arguments)
}

pub(super) fn rms_norm_backward(c: &mut Call, op: &ops::RmsNormBackward) -> Result<()> {
    let (x, weight, inv_rms) = (c.floats("x", op.x)?, c.floats("weight", op.weight)?, c.f32("inv_rms", op.inv_rms)?);
    let dout = c.floats("dout", op.dout)?;
    let (dx, dweight) = (c.like("dx", op.dx.view, &dout)?, c.maybe_f32("dweight", op.dweight)?);
    let width = c.int("width", x.cols)?;
    let defines = [("T_X", x.of()), ("T_W", weight.of()), ("T_OUT", dx.of())];
    let row_blocks = x.rows.min(NORM_BACKWARD_BLOCKS);
    let partials = if dweight.is_some() { c.scratch([4 * row_blocks * x.cols])?[0] } else { 0 };
    let arguments = Arguments::new().place(&x).pointer(weight.start).pointer(inv_rms.start).place(&dout).place(&dx);
    let arguments = arguments.int(op.dx.add.into()).size(x.rows).int(width).pointer(partials);
    let shape = norm_blocks(row_blocks, x.cols, NORM_BACKWARD_THREADS);
    c.launch((&source::RMS_NORM, "rms_norm_backward"), &defines, shape, &arguments)?;
    dweight.map_or(Ok(()), |dweight| column_totals(c, partials, row_blocks, &dweight))
}

pub(super) fn swiglu(c: &mut Call, op: &ops::Swiglu) -> Result<()> {
    let gate = c.floats("gate", op.gate)?;
    let (up, out) = (c.like("up", op.up, &gate)?, c.like("out", op.out, &gate)?);
    let arguments = Arguments::new().place(&gate).place(&up).place(&out).size(out.rows).size(out.cols);
    c.launch((&source::SWIGLU, "swiglu"), &[("T_X", gate.of())], each_eight(out.rows, out.cols), &arguments)
}

pub(super) fn swiglu_backward(c: &mut Call, op: &ops::SwigluBackward) -> Result<()> {
    let gate = c.floats("gate", op.gate)?;
    let (up, dout) = (c.like("up", op.up, &gate)?, c.like("dout", op.dout, &gate)?);
    let (dgate, dup) = (c.like("dgate", op.dgate, &gate)?, c.like("dup", op.dup, &gate)?);
    let arguments = Arguments::new().place(&gate).place(&up).place(&dout).place(&dgate).place(&dup);
    let arguments = arguments.size(gate.rows).size(gate.cols);
    c.launch((&source::SWIGLU, "swiglu_backward"), &[("T_X", gate.of())], each_eight(gate.rows, gate.cols), &arguments)
}

/// The rotation's arguments, and the shape of its blocks, which have a row each and take `eights` more values of it.
fn rotation(c: &Call, op: &ops::Rope, x: &Place, eights: usize) -> Result<(Arguments, Shape)> {
    let (positions, inv_freq) = (c.ids("positions", op.positions)?, c.f32("inv_freq", op.inv_freq)?);
    let (heads, half) = (x.cols / op.head_dim, op.head_dim / 2);
    let sign = if op.inverse { -1.0 } else { 1.0 };
    let arguments = Arguments::new().place(x).pointer(positions.start).pointer(inv_freq.start).float(sign);
    let arguments = arguments.size(x.rows).int(c.int("heads", heads)?).int(c.int("head_dim", half)?);
    let threads = (heads * half.div_ceil(8) + eights).next_multiple_of(32).clamp(32, 256) as u32;
    Ok((arguments, Shape { shared_bytes: c.int("head_dim", 8 * half)?, ..blocks(x.rows, threads) }))
}

pub(super) fn rope(c: &mut Call, op: &ops::Rope) -> Result<()> {
    let x = c.floats("x", op.x)?;
    let (arguments, shape) = rotation(c, op, &x, 0)?;
    c.launch((&source::ROPE, "rope"), &[("T_X", x.of())], shape, &arguments)
}

/// Where keys and values come from and go to.
struct Paged {
    rows: [Place; 2],
    out: [Place; 2],
    segments: SegmentsPlace,
    pages: Place,
    page_size: u32,
}

impl Paged {
    fn new(c: &Call, op: &ops::PageWrite) -> Result<Self> {
        let (keys, all_keys) = (c.floats("keys", op.rows[0])?, c.floats("all_keys", op.out[0])?);
        let (values, all_values) = (c.like("values", op.rows[1], &keys)?, c.like("all_values", op.out[1], &all_keys)?);
        let segments = c.segments(&op.segments)?;
        c.int("segments", segments.capacity)?;
        let (pages, page_size) = (c.table("pages", op.pages)?, c.int("page", op.page_size)?);
        Ok(Paged { rows: [keys, values], out: [all_keys, all_values], segments, pages, page_size })
    }

    /// The parameters PAGE_TABLES of the kernels, and where values go.
    fn arguments(&self, arguments: Arguments) -> Arguments {
        let (segments, pages, [keys, values]) = (&self.segments, &self.pages, &self.out);
        let arguments = arguments.pointer(segments.table).int(segments.capacity as u32).pointer(pages.start);
        let arguments = arguments.size(pages.rows).size(pages.cols).int(self.page_size);
        arguments.size(keys.rows).place(keys).place(values)
    }

    fn defines(&self) -> [(&'static str, Value); 2] {
        [("T_X", self.rows[0].of()), ("T_OUT", self.out[0].of())]
    }
}

pub(super) fn page_write(c: &mut Call, op: &ops::PageWrite) -> Result<()> {
    let paged = Paged::new(c, op)?;
    let [keys, values] = &paged.rows;
    let arguments = paged.arguments(Arguments::new().place(keys).place(values)).size(keys.rows).size(keys.cols);
    let mut shape = blocks(keys.rows.div_ceil(PAGE_ROWS), 32 * PAGE_ROWS as u32);
    shape.grid[1] = 2;
    c.launch((&source::PAGE_WRITE, "page_write"), &paged.defines(), shape, &arguments)
}

pub(super) fn rope_page_write(c: &mut Call, op: &ops::RopePageWrite) -> Result<()> {
    let (x, paged) = (c.floats("x", op.rope.x)?, Paged::new(c, &op.write)?);
    let [keys, values] = &paged.rows;
    let (arguments, shape) = rotation(c, &op.rope, &x, keys.cols.div_ceil(8))?;
    let first_key = c.int("heads", (x.cols - keys.cols) / op.rope.head_dim)?;
    let arguments = paged.arguments(arguments.int(first_key).place(values));
    c.launch((&source::ROPE_PAGE_WRITE, "rope_page_write"), &paged.defines(), shape, &arguments)
}

pub(super) fn neg_exp(c: &mut Call, op: &ops::NegExp) -> Result<()> {
    let (a_log, a) = (c.floats("a_log", op.a_log)?, c.f32("a", op.a)?);
    // Rows one after the other are one row, which fills blocks.
    let flat = a_log.stride == a.cols && a.stride == a.cols;
    let (rows, cols) = if flat { (1, a.rows * a.cols) } else { (a.rows, a.cols) };
    let arguments = Arguments::new().place(&a_log).place(&a).size(rows).size(cols);
    c.launch((&source::NEG_EXP, "neg_exp"), &[("T_X", a_log.of())], each(rows, cols), &arguments)
}

pub(super) fn neg_exp_backward(c: &mut Call, op: &ops::NegExpBackward) -> Result<()> {
    let (a, da, da_log) = (c.f32("a", op.a)?, c.f32("da", op.da)?, c.f32("da_log", op.da_log)?);
    let arguments = Arguments::new().place(&a).place(&da).place(&da_log).size(a.rows).size(a.cols);
    c.launch((&source::NEG_EXP, "neg_exp_backward"), &[], each(a.rows, a.cols), &arguments)
}

//! Attention's launches: `kernels/attention.cu` and `kernels/attention_backward.cu`.

use crate::backend::cuda::call::Call;
use crate::backend::cuda::driver::{Arguments, Limits, Shape};
use crate::backend::cuda::source::{self, Value};
use crate::backend::{Largest, Result, ops};

/// Warps of a block of the plain kernels, WARPS there; each has a row.
const WARPS: usize = 4;

/// Bytes of scratch that calls of these sizes take.
pub(super) fn scratch_bytes(_limits: &Limits, largest: &Largest) -> usize {
    largest.tokens.saturating_mul(largest.heads).saturating_mul(4)
}

/// A warp a row and head.
fn by_rows(c: &Call, rows: usize, heads: usize) -> Result<Shape> {
    if heads > 65535 {
        return Err(c.unsupported("attention", format!("{heads} heads")));
    }
    let grid = [c.int("rows", rows.div_ceil(WARPS))?, heads as u32, 1];
    Ok(Shape { grid, block: [32 * WARPS as u32, 1, 1], shared_bytes: 0 })
}

/// The window as kernels take it: 0 is none.
fn window(shape: &ops::AttentionShape) -> usize {
    shape.window.map_or(0, |window| window.min(1 << 40))
}

pub(in crate::backend::cuda) fn attention(c: &mut Call, op: &ops::Attention) -> Result<()> {
    let shape = &op.shape;
    let (ops::Keys::Rows { k, v } | ops::Keys::Pages { k, v, .. }) = op.keys;
    let (q, k) = (c.floats("q", op.q)?, c.floats("k", k)?);
    let (v, segments) = (c.like("v", v, &k)?, c.segments(&op.segments)?);
    let (out, lse) = (c.floats("out", op.out)?, c.maybe_f32("lse", op.lse)?);
    let (pages, slots, a_slot, page_size) = match op.keys {
        ops::Keys::Rows { .. } => (0, 0, 0, 1),
        ops::Keys::Pages { pages, page_size, .. } => {
            let table = c.table("pages", pages)?;
            (table.start, table.rows, table.cols, page_size)
        }
    };
    let (head_dim, group) = (c.int("head", shape.head_dim)?, c.int("group", shape.heads / shape.kv_heads)?);
    let arguments = Arguments::new().place(&q).place(&k).place(&v).size(k.rows).pointer(pages).size(slots);
    let arguments = arguments.size(a_slot).int(c.int("page", page_size)?).pointer(segments.table);
    let arguments = arguments.int(c.int("segments", segments.capacity)?).size(q.rows).int(group).float(shape.scale);
    let arguments = arguments.size(window(shape)).place(&out).maybe_place(lse);
    let defines = [("T_Q", q.of()), ("T_KV", k.of()), ("T_OUT", out.of()), ("HEAD_DIM", Value::Number(head_dim))];
    c.launch((&source::ATTENTION, "attention"), &defines, by_rows(c, q.rows, shape.heads)?, &arguments)
}

pub(in crate::backend::cuda) fn attention_backward(c: &mut Call, op: &ops::AttentionBackward) -> Result<()> {
    let shape = &op.shape;
    let (q, k, out) = (c.floats("q", op.q)?, c.floats("k", op.k)?, c.floats("out", op.out)?);
    let (v, segments, lse) = (c.like("v", op.v, &k)?, c.segments(&op.segments)?, c.f32("lse", op.lse)?);
    let (dout, dq, dk) = (c.floats("dout", op.dout)?, c.floats("dq", op.dq)?, c.floats("dk", op.dk)?);
    let dv = c.like("dv", op.dv, &dk)?;
    let (head_dim, group) = (c.int("head", shape.head_dim)?, c.int("group", shape.heads / shape.kv_heads)?);
    let heads = c.int("heads", shape.heads)?;
    let defines = [
        ("T_Q", q.of()),
        ("T_KV", k.of()),
        ("T_OUT", out.of()),
        ("T_DOUT", dout.of()),
        ("T_DQ", dq.of()),
        ("T_DKV", dk.of()),
        ("HEAD_DIM", Value::Number(head_dim)),
    ];
    let [delta] = c.scratch([4 * q.rows * shape.heads])?;
    let source = &source::ATTENTION_BACKWARD;

    let arguments = Arguments::new().place(&out).place(&dout).size(q.rows).int(heads).pointer(delta);
    c.launch((source, "attention_delta"), &defines, by_rows(c, q.rows * shape.heads, 1)?, &arguments)?;

    let inputs = Arguments::new().place(&q).place(&k).place(&v).size(k.rows).pointer(segments.table);
    let inputs = inputs.int(c.int("segments", segments.capacity)?).size(q.rows).int(heads).int(group);
    let inputs = inputs.float(shape.scale).size(window(shape)).place(&lse).pointer(delta).place(&dout);
    let arguments = inputs.clone().place(&dq);
    c.launch((source, "attention_dq"), &defines, by_rows(c, q.rows, shape.heads)?, &arguments)?;
    let arguments = inputs.place(&dk).place(&dv);
    c.launch((source, "attention_dkv"), &defines, by_rows(c, k.rows, shape.kv_heads)?, &arguments)
}

//! Attention, the convolution and the scan.

use super::call::Call;
use super::shaders;
use crate::backend::{DType, Error, Result, View, ops};

/// Rows of queries that a workgroup of `attention.wgsl` takes.
const QUERY_ROWS: usize = 64;
/// Vectors of four columns that an invocation of the attention shaders holds at most.
const PART: usize = 16;

fn missing(call: &Call) -> Error {
    Error::Unsupported { backend: "wgpu", op: call.op, what: "no shader".into() }
}

/// The dtype that views have in common.
fn common(call: &Call, views: &[View]) -> Result<DType> {
    let dtype = views.first().map_or(DType::F32, |view| view.dtype);
    match views.iter().find(|view| view.dtype != dtype) {
        None => Ok(dtype),
        Some(other) => {
            let what = format!("{} beside {dtype}", other.dtype);
            Err(Error::Unsupported { backend: "wgpu", op: call.op, what })
        }
    }
}

/// That views are f32.
fn f32s(call: &Call, views: impl IntoIterator<Item = View>) -> Result<()> {
    views.into_iter().try_for_each(|view| match view.dtype {
        DType::F32 => Ok(()),
        other => Err(Error::Unsupported { backend: "wgpu", op: call.op, what: format!("{other} where f32 is kept") }),
    })
}

/// The most chunks of `length` rows that `tokens` rows of `segments` segments can be.
fn chunks(tokens: usize, segments: usize, length: usize) -> usize {
    tokens / length + segments.min(tokens)
}

/// A head's columns as equal parts of vectors of four: (vectors a part, parts).
fn parts(head_dim: usize, most: usize) -> (u32, u32) {
    let vectors = head_dim.div_ceil(4);
    let parts = vectors.div_ceil(most);
    (vectors.div_ceil(parts) as u32, parts as u32)
}

pub(super) fn attention(call: &mut Call, op: &ops::Attention) -> Result<()> {
    let (shape, table, tokens) = (&op.shape, op.segments.table, op.q.rows);
    let (k, v, pages, page_size) = match op.keys {
        ops::Keys::Rows { k, v } => (k, v, None, 1),
        ops::Keys::Pages { k, v, pages, page_size } => (k, v, Some(pages), page_size),
    };
    f32s(call, op.lse)?;
    let types = [common(call, &[op.q, op.out])?, common(call, &[k, v])?];
    call.check([op.segments.positions])?;
    let (width, parts) = parts(shape.head_dim, PART);
    let kernel = shaders::ATTENTION
        .kernel("forward", &types)
        .with("WIDTH", width)
        .with("PARTS", parts)
        .with("PAGED", pages.is_some())
        .with("LSE", op.lse.is_some());
    let has_keys = k.rows > 0 && pages.is_none_or(|pages| !pages.is_empty());
    call.dispatch(kernel)
        .read(table)
        .read(op.q)
        .read(k)
        .read(v)
        .maybe_read(pages)
        .write(op.out)
        .maybe_write(op.lse)
        .size(table.rows)
        .size(tokens)
        .size(shape.heads)
        .size(shape.heads / shape.kv_heads)
        .size(shape.head_dim)
        .size(k.rows)
        .size(pages.map_or(0, |pages| pages.rows))
        .size(pages.map_or(0, |pages| pages.cols))
        .size(page_size)
        .size(shape.window.unwrap_or(0))
        .factor(shape.scale)
        .grid([if has_keys { chunks(tokens, table.rows, QUERY_ROWS) } else { 0 }, shape.heads, 1])
}

pub(super) fn attention_backward(call: &mut Call, _op: &ops::AttentionBackward) -> Result<()> {
    Err(missing(call))
}

pub(super) fn conv1d(call: &mut Call, _op: &ops::Conv1d) -> Result<()> {
    Err(missing(call))
}

pub(super) fn conv1d_backward(call: &mut Call, _op: &ops::Conv1dBackward) -> Result<()> {
    Err(missing(call))
}

pub(super) fn selective_scan(call: &mut Call, _op: &ops::SelectiveScan) -> Result<()> {
    Err(missing(call))
}

pub(super) fn selective_scan_backward(call: &mut Call, _op: &ops::SelectiveScanBackward) -> Result<()> {
    Err(missing(call))
}

//! Attention.

use super::call::Call;
use super::cooperative;
use super::mixers::{chunks, common, f32s, flag};
use super::scratch::Slot;
use super::shaders::{self, Kernel};
use crate::backend::{DType, Error, Result, View, ops};

/// Vectors of four columns that an invocation of the attention shaders holds at most.
const PART: usize = 8;
/// Keys of a tile of `attention.wgsl`.
const KEYS: usize = 8;
/// Invocations of a workgroup of `attention.wgsl` and of `attention_backward.wgsl` at most, and its bytes of workgroup memory.
const FORWARD_LANES: usize = 256;
const BACKWARD_LANES: usize = 128;
const ATTENTION_BYTES: usize = 32 * 1024 - 256;
/// Rows of a workgroup at most.
const MOST_ROWS: usize = 64;
/// Columns of a head that `attention_subgroup.wgsl` and `attention_backward_subgroup.wgsl` have room for.
const MOST_COLUMNS: usize = 256;
/// Rows of a workgroup of `attention_cooperative.wgsl`, and matrices of 16 columns of a head at most.
const COOPERATIVE_ROWS: usize = 64;
const MOST_MATRICES: usize = 8;

/// How the attention shaders cut a head and the rows.
struct Tiles {
    /// Vectors of four columns of a part of a head, and parts.
    width: usize,
    parts: usize,
    /// Rows of a workgroup.
    rows: usize,
    /// Rows of a tile of what passes by.
    tile: usize,
}

impl Tiles {
    /// For a head of `head_dim` columns in workgroups of up to `lanes`, where parts meet in `exchanged` bytes of a row of a
    /// tile; of tiles of at least `least` rows.
    fn new(call: &Call, head_dim: usize, lanes: usize, exchanged: usize, least: usize) -> Result<Self> {
        let vectors = head_dim.div_ceil(4);
        let parts = vectors.div_ceil(PART);
        // Few widths, so that few pipelines are made.
        let width = vectors.div_ceil(parts).next_multiple_of(4);
        let rows = (lanes / parts).min(MOST_ROWS);
        let bytes = |tile: usize| tile * parts * (2 * 16 * width + rows * exchanged);
        let tile = [16, 8, 4, 2, 1].into_iter().find(|tile| bytes(*tile) <= ATTENTION_BYTES);
        match tile {
            Some(tile) if rows > 0 && tile >= least => Ok(Tiles { width, parts, rows, tile }),
            _ => {
                let what = format!("heads of {head_dim} columns");
                Err(Error::Unsupported { backend: "wgpu", op: call.op, what })
            }
        }
    }

    fn kernel(&self, kernel: Kernel) -> Kernel {
        kernel.with("WIDTH", self.width as u32).with("PARTS", self.parts as u32).with("ROWS", self.rows as u32)
    }
}

/// The lanes of a workgroup where the kernels of adapters that are a CPU take heads of so many columns.
fn simd_lanes(call: &Call, head_dim: usize) -> Option<usize> {
    call.gpu.abilities.simd_lanes().filter(|_| head_dim <= MOST_COLUMNS)
}

/// The window as the shaders take it: 0 is none, and one longer than all positions is as good.
fn window(shape: &ops::AttentionShape) -> usize {
    shape.window.map_or(0, |window| window.min(1 << 30))
}

/// Whether cooperative matrices can take it: everything f16, in heads of whole matrices and rows of whole vectors.
fn fits_cooperative(op: &ops::Attention) -> bool {
    let (ops::Keys::Rows { k, v } | ops::Keys::Pages { k, v, .. }) = op.keys;
    let whole = |view: View| view.dtype == DType::F16 && view.offset.is_multiple_of(4) && view.stride.is_multiple_of(4);
    let head_dim = op.shape.head_dim;
    [op.q, k, v, op.out].into_iter().all(whole) && head_dim.is_multiple_of(16) && head_dim <= MOST_MATRICES * 16
}

/// The kernel of the forward pass, and the rows that a workgroup of it takes.
fn forward_kernel(call: &Call, head_dim: usize, types: &[DType; 2], matrices: bool) -> Result<(Kernel, usize)> {
    if matrices {
        let kernel = shaders::ATTENTION_COOPERATIVE.kernel("forward", &[]);
        return Ok((kernel.with("WIDTH", (head_dim / 16) as u32), COOPERATIVE_ROWS));
    }
    if let Some(lanes) = simd_lanes(call, head_dim) {
        return Ok((shaders::ATTENTION_SUBGROUP.kernel("forward", types).with("LANES", lanes as u32), lanes));
    }
    let tiles = Tiles::new(call, head_dim, FORWARD_LANES, 4, KEYS)?;
    Ok((tiles.kernel(shaders::ATTENTION.kernel("forward", types)), tiles.rows))
}

pub(super) fn attention(call: &mut Call, op: &ops::Attention) -> Result<()> {
    let matrices = fits_cooperative(op) && cooperative::trusted(call);
    attention_with(call, op, matrices)
}

/// By cooperative matrices or without.
pub(super) fn attention_with(call: &mut Call, op: &ops::Attention, matrices: bool) -> Result<()> {
    let (shape, table, tokens) = (&op.shape, op.segments.table, op.q.rows);
    let (k, v, pages, page_size) = match op.keys {
        ops::Keys::Rows { k, v } => (k, v, None, 0),
        ops::Keys::Pages { k, v, pages, page_size } => (k, v, Some(pages), page_size),
    };
    f32s(call, op.lse)?;
    let types = [common(call, &[op.q, op.out])?, common(call, &[k, v])?];
    call.check([op.segments.positions])?;
    let (kernel, rows) = forward_kernel(call, shape.head_dim, &types, matrices)?;
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
        .size(window(shape))
        .size(flag(op.lse.is_some()))
        .factor(shape.scale)
        .grid([if has_keys { chunks(tokens, table.rows, rows) } else { 0 }, shape.heads, 1])
}

pub(super) fn attention_backward(call: &mut Call, op: &ops::AttentionBackward) -> Result<()> {
    let (shape, table, tokens, keys) = (&op.shape, op.segments.table, op.q.rows, op.k.rows);
    f32s(call, [op.lse])?;
    let dtype = common(call, &[op.q, op.k, op.v, op.out, op.dout, op.dq, op.dk, op.dv])?;
    call.check([table, op.segments.positions, op.q, op.k, op.v, op.out, op.lse, op.dout, op.dq, op.dk, op.dv])?;
    let lanes = simd_lanes(call, shape.head_dim);
    let tiles = if lanes.is_none() { Some(Tiles::new(call, shape.head_dim, BACKWARD_LANES, 8, 1)?) } else { None };
    let rows = lanes.or(tiles.as_ref().map(|tiles| tiles.rows)).unwrap_or(1);
    let kernel_of = |entry| match &tiles {
        Some(tiles) => {
            tiles.kernel(shaders::ATTENTION_BACKWARD.kernel(entry, &[dtype])).with("TILE", tiles.tile as u32)
        }
        None => shaders::ATTENTION_BACKWARD_SUBGROUP.kernel(entry, &[dtype]).with("LANES", rows as u32),
    };
    let inner = call.scratch(Slot::Partials, tokens, shape.heads)?;
    let passes = [
        (
            "queries",
            [op.out, op.dq, inner],
            [if keys > 0 { chunks(tokens, table.rows, rows) } else { 0 }, shape.heads, 1],
        ),
        ("keys", [inner, op.dk, op.dv], [chunks(keys, table.rows + 1, rows), shape.kv_heads, 1]),
    ];
    for (entry, own, grid) in passes {
        call.dispatch(kernel_of(entry))
            .read(table)
            .read(op.q)
            .read(op.k)
            .read(op.v)
            .read(op.lse)
            .read(op.dout)
            .read(own[0])
            .write(own[1])
            .write(own[2])
            .size(table.rows)
            .size(tokens)
            .size(shape.heads / shape.kv_heads)
            .size(shape.head_dim)
            .size(keys)
            .size(window(shape))
            .factor(shape.scale)
            .grid(grid)?;
    }
    Ok(())
}

//! Attention's launches on an H100: `kernels/attention_wgmma.cu` and `kernels/attention_backward_wgmma.cu`.

use super::{Backward, Forward, along, on_tensor_cores, window};
use crate::backend::cuda::call::{Call, Place, each};
use crate::backend::cuda::driver::{Arguments, Boxes, Limits, Pointer, Region, Shape, TensorMap};
use crate::backend::cuda::mixers::H100;
use crate::backend::cuda::source::{self, ModuleKey, Value};
use crate::backend::{DType, Result};

/// Rows of a block of queries, ROWS of the kernels.
const ROWS: usize = 192;
/// Rows of a tile of queries of `attention_dkv_wgmma`, QUERY_ROWS there.
const QUERY_ROWS: usize = 64;
/// Tiles of a ring, SLOTS of the kernels.
const SLOTS: usize = 8;
/// Shared memory for barriers and what a block's warps tell each other.
const BARRIER_BYTES: usize = 1024;
/// Bytes of keys and values that may lie in the cache at once: half of an H100's, which is in two halves.
const CACHED_BYTES: usize = 32 << 20;
/// The counter from which blocks take their tiles.
pub(super) const COUNTER_BYTES: usize = 256;

/// Keys of a tile by the width of a head, KEYS_A_SLOT of `attention_wgmma.cu`; of those in pages a number that one page or
/// a few have.
fn keys_a_slot(head_dim: usize, paged: bool) -> usize {
    match (head_dim, paged) {
        (64, _) => 128,
        (_, true) => 64,
        (_, false) => 80,
    }
}

/// Of `attention_backward_wgmma.cu` by the width of a head: KEYS_A_SLOT, KEYS_A_BLOCK and STAGES.
fn backward_sizes(head_dim: usize) -> (usize, usize, usize) {
    if head_dim == 64 { (80, 192, 6) } else { (64, 128, 4) }
}

/// The most parts of the queries that see a tile of keys.
const MOST_QUERY_PARTS: usize = 8;

/// Into how many parts the queries are split for the gradients of keys: as many as let few tiles of keys fill the card.
fn query_parts(limits: &Limits, keys: usize, kv_heads: usize, head_dim: usize) -> usize {
    let (_, a_block, _) = backward_sizes(head_dim);
    (limits.multiprocessors / (keys.div_ceil(a_block) * kv_heads).max(1)).clamp(1, MOST_QUERY_PARTS)
}

/// Bytes of sums of parts of a call of so many keys.
pub(super) fn partial_bytes(limits: &Limits, keys: usize, kv_heads: usize, head_dim: usize) -> usize {
    let parts = query_parts(limits, keys, kv_heads, head_dim);
    if parts == 1 { 0 } else { parts * 2 * keys * kv_heads * head_dim * 4 }
}

/// The most such bytes, of however many keys.
pub(super) fn most_partial_bytes(limits: &Limits, tokens: usize, kv_heads: usize, head_dim: usize) -> usize {
    if !matches!(head_dim, 64 | 128) || limits.capability != H100 {
        return 0;
    }
    let (_, a_block, _) = backward_sizes(head_dim);
    let few = tokens.saturating_mul(kv_heads).saturating_mul(MOST_QUERY_PARTS);
    (limits.multiprocessors * a_block).min(few).saturating_mul(head_dim * 8)
}

/// The module of the forward kernel.
pub(in crate::backend::cuda::mixers) fn forward_module(dtype: Value, head_dim: usize, paged: bool) -> ModuleKey {
    ModuleKey::new(&source::ATTENTION_WGMMA, &forward_defines(dtype, head_dim, paged))
}

fn forward_defines(dtype: Value, head_dim: usize, paged: bool) -> [(&'static str, Value); 3] {
    let [of_x, of_head] = defines(dtype, head_dim);
    [of_x, of_head, ("KEYS_A_SLOT", Value::Number(keys_a_slot(head_dim, paged) as u32))]
}

/// The module of the backward kernels.
pub(super) fn backward_module(dtype: Value, head_dim: usize) -> ModuleKey {
    ModuleKey::new(&source::ATTENTION_BACKWARD_WGMMA, &defines(dtype, head_dim))
}

fn defines(dtype: Value, head_dim: usize) -> [(&'static str, Value); 2] {
    [("T_X", dtype), ("HEAD_DIM", Value::Number(head_dim as u32))]
}

/// Whether the card has the instructions, and rows and keys are in 31 bits.
fn fits(c: &Call, q: &Place, k: &Place) -> bool {
    let counts = |place: &Place| place.rows > 0 && place.rows <= i32::MAX as usize;
    c.limits().capability == H100 && counts(q) && counts(k)
}

/// Keys of one copy: all of a tile, or so many that they lie in one page; whole groups of eight rows are copied.
fn box_rows(call: &Forward) -> usize {
    let keys = keys_a_slot(call.shape.head_dim, call.pages.is_some());
    call.pages.map_or(keys, |pages| 1 << (pages.page_size | keys).trailing_zeros())
}

/// Whether a call is one for these kernels: not a step of decoding.
pub(super) fn takes(c: &Call, call: &Forward) -> bool {
    let Forward { q, k, v, out, pages, .. } = call;
    let table = pages.map_or(0, |pages| pages.slots.saturating_mul(pages.a_slot).saturating_mul(pages.page_size));
    fits(c, q, k)
        && !call.decodes()
        && on_tensor_cores(&call.shape, ROWS, &[q, k, v, out])
        && table <= i32::MAX as usize
        && box_rows(call).is_multiple_of(8)
}

/// Whether a backward call is one for these kernels.
pub(super) fn takes_backward(c: &Call, call: &Backward) -> bool {
    let Backward { q, k, v, dout, dq, dk, dv, .. } = call;
    fits(c, q, k) && on_tensor_cores(&call.shape, QUERY_ROWS, &[q, k, v, dout, dq, dk, dv])
}

/// Boxes of `box_rows` rows and `box_heads` heads of rows of heads.
fn boxes(c: &Call, place: &Place, head_dim: usize, box_heads: usize, box_rows: usize) -> Result<TensorMap> {
    debug_assert!(matches!(place.dtype, DType::Bf16 | DType::F16));
    // Of one row the stride is anything.
    let row_bytes = 2 * if place.rows > 1 { place.stride } else { place.cols };
    let (rows, heads) = (c.int("rows", place.rows)?, c.int("heads", place.cols / head_dim)?);
    let (columns, box_rows, box_heads) = (head_dim as u32, box_rows as u32, box_heads as u32);
    c.driver.tensor_map(&Boxes { start: place.start, row_bytes, rows, heads, columns, box_rows, box_heads })
}

pub(super) fn forward(c: &mut Call, call: &Forward) -> Result<()> {
    let Forward { shape, q, k, v, segments, .. } = call;
    let (head_dim, group, paged, box_rows) = (shape.head_dim, call.group(), call.pages.is_some(), box_rows(call));
    let queries = ROWS / group;
    let [counter] = c.scratch([COUNTER_BYTES])?;
    c.driver.clear(Region { start: counter, width: 4, rows: 1, pitch: 4 })?;

    let arguments = Arguments::new().tensor_map(&boxes(c, q, head_dim, group, queries)?);
    let arguments = arguments.tensor_map(&boxes(c, k, head_dim, 1, box_rows)?);
    let arguments = arguments.tensor_map(&boxes(c, v, head_dim, 1, box_rows)?).int(c.int("keys", k.rows)?);
    let arguments = match call.pages {
        None => arguments.pointer(0).int(0).int(0).int(0).int(1),
        Some(pages) => arguments
            .pointer(pages.table)
            .int(c.int("slots", pages.slots)?)
            .int(c.int("pages", pages.a_slot)?)
            .int(c.int("pages", k.rows / pages.page_size)?)
            .int(c.int("page", pages.page_size)?),
    };
    let tiles = q.rows / queries + segments.capacity;
    let together = (CACHED_BYTES / (4 * head_dim * k.rows)).clamp(1, shape.kv_heads);
    let all = c.int("tiles of queries", tiles.saturating_mul(shape.kv_heads))?;
    let arguments = arguments.int(box_rows as u32).pointer(segments.table).int(c.int("segments", segments.capacity)?);
    let arguments = arguments.size(q.rows).int(c.int("heads", shape.kv_heads)?).int(c.int("group", group)?);
    let arguments = arguments.int(c.int("tiles", tiles)?).int(c.int("heads", together)?).float(shape.scale);
    let arguments = arguments.size(window(shape)).pointer(counter).place(&call.out).maybe_place(call.lse);
    let grid = [all.min(c.int("multiprocessors", c.limits().multiprocessors)?), 1, 1];
    let shared_bytes = ((ROWS + SLOTS * keys_a_slot(head_dim, paged)) * head_dim * 2 + BARRIER_BYTES) as u32;
    let blocks = Shape { grid, block: [2 * ROWS as u32 + 128, 1, 1], shared_bytes };
    let defines = forward_defines(q.of(), head_dim, paged);
    c.launch((&source::ATTENTION_WGMMA, "attention_wgmma"), &defines, blocks, &arguments)
}

/// The gradients, once δ is made, with room for `partial_bytes`.
///
/// `plain` are the macros of `attention_backward.cu`, which sums parts.
pub(super) fn backward(
    c: &mut Call,
    call: &Backward,
    [delta, partials]: [Pointer; 2],
    plain: &[(&'static str, Value)],
) -> Result<()> {
    let Backward { shape, q, k, v, segments, dout, dq, dk, dv, .. } = call;
    let (head_dim, group) = (shape.head_dim, call.group());
    let (keys_a_slot, keys_a_block, stages) = backward_sizes(head_dim);
    let inputs = |rows: usize, keys: usize| {
        let arguments = Arguments::new().tensor_map(&boxes(c, q, head_dim, group, rows / group)?);
        let arguments = arguments.tensor_map(&boxes(c, k, head_dim, 1, keys)?);
        let arguments = arguments.tensor_map(&boxes(c, v, head_dim, 1, keys)?);
        call.sizes(c, arguments.tensor_map(&boxes(c, dout, head_dim, group, rows / group)?), delta)
    };
    let of_dq = inputs(ROWS, keys_a_slot)?.place(dq);
    let parts = query_parts(c.limits(), k.rows, shape.kv_heads, head_dim);
    let partials = if parts > 1 { partials } else { 0 };
    let of_dkv = inputs(QUERY_ROWS, keys_a_block)?.place(dk).place(dv).pointer(partials);
    let kv_heads = c.int("heads", shape.kv_heads)?;
    let query_tiles = along(c, "tiles of queries", q.rows / (ROWS / group) + segments.capacity)?;
    let key_tiles = along(c, "tiles of keys", k.rows / keys_a_block + segments.capacity)?;
    let blocks = |tiles, rows: usize, tile_rows: usize, more: usize| Shape {
        grid: [kv_heads, tiles, 1],
        block: [2 * rows as u32 + 128, 1, 1],
        shared_bytes: (tile_rows * head_dim * 2 + more + BARRIER_BYTES) as u32,
    };
    let (source, defines) = (&source::ATTENTION_BACKWARD_WGMMA, defines(q.of(), head_dim));
    let by_queries = blocks(query_tiles, ROWS, 2 * ROWS + SLOTS * keys_a_slot, 0);
    c.launch((source, "attention_dq_wgmma"), &defines, by_queries, &of_dq)?;
    let sums = 8 * stages * QUERY_ROWS;
    let mut by_keys = blocks(key_tiles, keys_a_block, 2 * (keys_a_block + stages * QUERY_ROWS), sums);
    by_keys.grid[2] = parts as u32;
    c.launch((source, "attention_dkv_wgmma"), &defines, by_keys, &of_dkv)?;
    if parts == 1 {
        return Ok(());
    }
    let arguments = Arguments::new().pointer(partials).int(parts as u32).size(k.rows).int(c.int("columns", dk.cols)?);
    let arguments = arguments.place(dk).place(dv);
    c.launch((&source::ATTENTION_BACKWARD, "attention_dkv_sum"), plain, each(2 * k.rows, dk.cols), &arguments)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However many keys a call has, up to its tokens, sums of parts fit into what is reserved.
        #[test]
        fn sums_of_parts_fit_into_the_scratch(
            (multiprocessors, kv_heads, head_dim) in (1usize..200, 1usize..17, prop_oneof![Just(64usize), Just(128)]),
            (keys, more) in (1usize..40_000, 0usize..1000),
        ) {
            let (name, shared_bytes) = (String::new(), 0);
            let limits =
                Limits { name, capability: H100, multiprocessors, shared_bytes, memory_bytes: 0, launch_ns: 0 };
            let taken = partial_bytes(&limits, keys, kv_heads, head_dim);
            let reserved = most_partial_bytes(&limits, keys + more, kv_heads, head_dim);
            prop_assert!(taken <= reserved, "{taken} of {reserved} bytes");
        }
    }
}

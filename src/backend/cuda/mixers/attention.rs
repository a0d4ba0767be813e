//! Attention's launches: on an H100 those of [`wgmma`], on other tensor cores `kernels/attention_mma.cu` and
//! `kernels/attention_backward_mma.cu`, for other head sizes and storage `kernels/attention.cu` and
//! `kernels/attention_backward.cu`.

mod trust;
mod wgmma;

pub(in crate::backend::cuda) use trust::AGREES;
pub(super) use wgmma::forward_module;

use super::RESERVED_BYTES;
use crate::backend::cuda::call::{Call, Place, SegmentsPlace, padded};
use crate::backend::cuda::driver::{Arguments, Limits, Pointer, Shape};
use crate::backend::cuda::source::{self, Value};
use crate::backend::{DType, Largest, Result, ops};

/// Warps of a block of the kernels in which each has a row and head, WARPS there.
const WARPS: usize = 4;
/// Warps of a block of `attention_combine`, and parts that a warp asks for at once: WARPS and AHEAD there.
const COMBINE_WARPS: usize = 8;
const PARTS_AHEAD: usize = 8;
/// Rows of a block of the plain kernels, ROWS there: many, or few where there are no more or shared memory is scarce.
pub(super) const PLAIN_ROWS: [usize; 2] = [64, 16];
/// Threads of a block of the plain kernels, THREADS there.
const PLAIN_THREADS: u32 = 128;
/// The largest head of which a block has many rows.
const MANY_ROWS_HEAD: usize = 128;
/// Keys of a tile, KEYS_A_TILE of the kernels.
const KEYS: usize = 64;
/// Rows of a block of `attention_dq_mma`, ROWS there.
const DQ_ROWS: usize = 128;
/// The most parts into which one query's keys are split.
const MOST_PARTS: usize = 64;
/// The most blocks that a multiprocessor holds, as parts are counted.
const MOST_BLOCKS: usize = 8;

/// Queries a segment, at most, in a step of decoding.
const QUERIES_DECODED: usize = 2;
/// Times that a step of decoding fills the card with blocks, at most.
const WAVES: usize = 4;
/// Tiles of keys whose time a block takes to start.
const TILES_TO_START: usize = 1;

/// Bytes of scratch that calls of these sizes take.
pub(super) fn scratch_bytes(limits: &Limits, largest: &Largest) -> usize {
    let delta = largest.tokens.saturating_mul(largest.heads).saturating_mul(4);
    let head_dim = largest.query_width / largest.heads.max(1);
    let sums = wgmma::most_partial_bytes(limits, largest.tokens, largest.kv_heads, head_dim);
    let backward: usize = padded([delta, sums]).iter().sum();
    let (room, kv_heads) = (limits.multiprocessors * MOST_BLOCKS, largest.kv_heads.max(1));
    // The more segments, the fewer parts: together they fill the card WAVES times at most.
    let parts = largest.segments.saturating_mul(MOST_PARTS).min(WAVES * room / kv_heads);
    let decoded = partial_bytes(QUERIES_DECODED * parts, largest.heads, largest.query_width);
    backward.max(padded(decoded).iter().sum()).max(wgmma::COUNTER_BYTES)
}

/// Bytes of out and of lse of so many rows in all parts, whose out has `width` columns.
fn partial_bytes(rows: usize, heads: usize, width: usize) -> [usize; 2] {
    [width, heads].map(|cols| rows.saturating_mul(cols).saturating_mul(4))
}

/// Blocks of so much shared memory that a card holds at once.
fn room(limits: &Limits, shared_bytes: usize) -> usize {
    limits.multiprocessors * (limits.shared_bytes / shared_bytes).clamp(1, MOST_BLOCKS)
}

/// The most parts of the keys in a step of decoding of so many blocks a part, of which the card holds `room` at once.
fn most_parts(room: usize, blocks: usize, keys: usize) -> usize {
    (WAVES * room / blocks).min(keys.div_ceil(4 * KEYS)).clamp(1, MOST_PARTS)
}

/// As many parts as let the card be done soonest, where a block takes the time of its tiles, and of one more to start.
fn parts(room: usize, blocks: usize, keys: usize) -> usize {
    let time = |&parts: &usize| (blocks * parts).div_ceil(room) * (keys.div_ceil(KEYS * parts) + TILES_TO_START);
    (1..=most_parts(room, blocks, keys)).min_by_key(time).unwrap_or(1)
}

/// A warp a row and head.
fn by_rows(c: &Call, rows: usize, heads: usize) -> Result<Shape> {
    let grid = [c.int("rows", rows.div_ceil(WARPS))?, along(c, "heads", heads)?, 1];
    Ok(Shape { grid, block: [32 * WARPS as u32, 1, 1], shared_bytes: 0 })
}

/// Blocks along the second axis of a grid.
fn along(c: &Call, what: &str, blocks: usize) -> Result<u32> {
    u32::try_from(blocks)
        .ok()
        .filter(|&blocks| blocks <= 65535)
        .ok_or_else(|| c.unsupported("attention", format!("{blocks} {what}")))
}

/// The window as kernels take it: 0 is none.
fn window(shape: &ops::AttentionShape) -> usize {
    shape.window.map_or(0, |window| window.min(1 << 40))
}

/// Whether the tensor-core kernels take these, of which rows are read or written 16 bytes at a time.
fn on_tensor_cores(shape: &ops::AttentionShape, rows: usize, places: &[&Place]) -> bool {
    let dtype = places[0].dtype;
    let fits = |place: &&Place| place.dtype == dtype && place.alignment() >= 16;
    matches!(shape.head_dim, 64 | 128)
        && matches!(dtype, DType::Bf16 | DType::F16)
        && shape.heads / shape.kv_heads <= rows
        && places.iter().all(fits)
}

/// Pages of keys and values: the table `[slots, a_slot]`.
#[derive(Clone, Copy)]
struct Pages {
    table: Pointer,
    slots: usize,
    a_slot: usize,
    page_size: usize,
}

/// Tiles of the plain kernels: `rows` of a block's own, `cols` of those that it goes over, `row_bytes` from one to the next.
struct PlainTiles {
    rows: usize,
    cols: usize,
    row_bytes: usize,
}

impl PlainTiles {
    /// Those of heads of `head_dim`, of which a block holds `own` times its rows and two times the others.
    fn new(c: &Call, head_dim: usize, own: usize, few: bool) -> Result<Self> {
        let cols = if head_dim > 64 { 32 } else { 64 };
        let row_bytes = head_dim.next_multiple_of(32).saturating_add(4).saturating_mul(4);
        let sizes = PLAIN_ROWS.map(|rows| PlainTiles { rows, cols, row_bytes });
        let fits = |tiles: &PlainTiles| {
            (tiles.rows == PLAIN_ROWS[1] || !few && head_dim <= MANY_ROWS_HEAD)
                && tiles.shared_bytes(own) + RESERVED_BYTES <= c.limits().shared_bytes
        };
        sizes.into_iter().find(fits).ok_or_else(|| c.unsupported("attention", format!("heads of {head_dim}")))
    }

    fn shared_bytes(&self, own: usize) -> usize {
        let tiles = (own * self.rows + 2 * self.cols).saturating_mul(self.row_bytes);
        tiles.saturating_add(4 * (self.rows * (self.cols + 4) + 2 * self.cols))
    }

    fn define(&self) -> (&'static str, Value) {
        ("ROWS", Value::Number(self.rows as u32))
    }

    /// Blocks of key heads and tiles of rows, for backward.
    fn blocks(&self, c: &Call, kv_heads: usize, tiles: usize) -> Result<Shape> {
        let grid = [c.int("heads", kv_heads)?, along(c, "tiles of rows", tiles)?, 1];
        Ok(Shape { grid, block: [PLAIN_THREADS, 1, 1], shared_bytes: self.shared_bytes(2) as u32 })
    }
}

/// What a forward call works on, each where it lies.
struct Forward {
    shape: ops::AttentionShape,
    q: Place,
    k: Place,
    v: Place,
    pages: Option<Pages>,
    segments: SegmentsPlace,
    out: Place,
    lse: Option<Place>,
}

impl Forward {
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// A step of decoding has about a row a segment: few rows a block, and the keys split over many blocks.
    fn decodes(&self) -> bool {
        self.q.rows <= QUERIES_DECODED * self.segments.capacity
    }

    /// The arguments of the kernels that run on all cards.
    fn arguments(&self, c: &Call) -> Result<Arguments> {
        let none = Pages { table: 0, slots: 0, a_slot: 0, page_size: 1 };
        let Pages { table, slots, a_slot, page_size } = self.pages.unwrap_or(none);
        let arguments = Arguments::new().place(&self.q).place(&self.k).place(&self.v).size(self.k.rows).pointer(table);
        let arguments = arguments.size(slots).size(a_slot).int(c.int("page", page_size)?).pointer(self.segments.table);
        let arguments = arguments.int(c.int("segments", self.segments.capacity)?).size(self.q.rows);
        let arguments = arguments.int(c.int("group", self.group())?).float(self.shape.scale);
        Ok(arguments.size(window(&self.shape)).place(&self.out).maybe_place(self.lse))
    }
}

pub(in crate::backend::cuda) fn attention(c: &mut Call, op: &ops::Attention) -> Result<()> {
    let (ops::Keys::Rows { k, v } | ops::Keys::Pages { k, v, .. }) = op.keys;
    let (q, k) = (c.floats("q", op.q)?, c.floats("k", k)?);
    let (v, segments) = (c.like("v", v, &k)?, c.segments(&op.segments)?);
    let (out, lse) = (c.floats("out", op.out)?, c.maybe_f32("lse", op.lse)?);
    let pages = match op.keys {
        ops::Keys::Rows { .. } => None,
        ops::Keys::Pages { pages, page_size, .. } => {
            let table = c.table("pages", pages)?;
            Some(Pages { table: table.start, slots: table.rows, a_slot: table.cols, page_size })
        }
    };
    let call = Forward { shape: op.shape, q, k, v, pages, segments, out, lse };
    if wgmma::takes(c, &call) && trust::forward_agrees(c, &call) {
        return wgmma::forward(c, &call);
    }
    forward(c, &call)
}

/// Forward on any card.
fn forward(c: &mut Call, call: &Forward) -> Result<()> {
    let Forward { shape, q, k, v, out, .. } = call;
    let arguments = call.arguments(c)?;
    let head_dim = ("HEAD_DIM", Value::Number(c.int("head", shape.head_dim)?));
    let decoding = call.decodes();
    let (warps, m_tiles) = if decoding { (1, 1) } else { (4, 2) };
    let rows = warps * m_tiles * 16;
    let number = |value: usize| Value::Number(value as u32);
    let (kernel, defines, threads, tiles, shared_bytes) = if on_tensor_cores(shape, rows, &[q, k, v, out]) {
        let defines = vec![("T_X", q.of()), head_dim, ("WARPS", number(warps)), ("M_TILES", number(m_tiles))];
        let shared_bytes = (rows + 4 * KEYS) * shape.head_dim * 2;
        let tiles = q.rows / (rows / call.group());
        ((&source::ATTENTION_MMA, "attention_mma"), defines, 32 * warps as u32, tiles, shared_bytes)
    } else {
        let plain = PlainTiles::new(c, shape.head_dim, 1, decoding)?;
        let defines = vec![("T_Q", q.of()), ("T_KV", k.of()), ("T_OUT", out.of()), head_dim, plain.define()];
        let tiles = q.rows * call.group() / plain.rows;
        ((&source::ATTENTION, "attention"), defines, PLAIN_THREADS, tiles, plain.shared_bytes(1))
    };
    let keys = call.pages.map_or(k.rows, |pages| pages.a_slot.saturating_mul(pages.page_size));
    let room = room(c.limits(), shared_bytes);
    let blocks = call.segments.capacity.max(1) * shape.kv_heads;
    let parts = if decoding { parts(room, blocks, keys) } else { 1 };
    let rows = if parts > 1 { parts * q.rows } else { 0 };
    let [partial_out, partial_lse] = c.scratch(partial_bytes(rows, shape.heads, shape.heads * shape.head_dim))?;
    let arguments = arguments.pointer(partial_out).pointer(partial_lse);
    let tiles = along(c, "tiles of queries", tiles + call.segments.capacity)?;
    let grid = [c.int("heads", shape.kv_heads)?, tiles, parts as u32];
    let blocks = Shape { grid, block: [threads, 1, 1], shared_bytes: shared_bytes as u32 };
    c.launch(kernel, &defines, blocks, &arguments)?;
    if parts == 1 {
        return Ok(());
    }
    let warps_a_row = parts.div_ceil(PARTS_AHEAD).next_power_of_two().min(COMBINE_WARPS);
    let arguments = Arguments::new().pointer(partial_out).pointer(partial_lse).int(parts as u32);
    let arguments = arguments.int(warps_a_row as u32).size(q.rows).int(c.int("heads", shape.heads)?);
    let arguments = arguments.place(out).maybe_place(call.lse);
    let blocks = c.int("rows", (q.rows * shape.heads).div_ceil(COMBINE_WARPS / warps_a_row))?;
    let shape = Shape { grid: [blocks, 1, 1], block: [32 * COMBINE_WARPS as u32, 1, 1], shared_bytes: 0 };
    c.launch((&source::ATTENTION_COMBINE, "attention_combine"), &[("T_OUT", out.of()), head_dim], shape, &arguments)
}

/// What a backward call works on, each where it lies.
struct Backward {
    shape: ops::AttentionShape,
    q: Place,
    k: Place,
    v: Place,
    segments: SegmentsPlace,
    out: Place,
    lse: Place,
    dout: Place,
    dq: Place,
    dk: Place,
    dv: Place,
}

impl Backward {
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// The arguments of the kernels between those of the factors and of the gradients.
    fn sizes(&self, c: &Call, arguments: Arguments, delta: Pointer) -> Result<Arguments> {
        let arguments = arguments.size(self.k.rows).pointer(self.segments.table);
        let arguments = arguments.int(c.int("segments", self.segments.capacity)?).size(self.q.rows);
        let arguments = arguments.int(c.int("heads", self.shape.heads)?).int(c.int("group", self.group())?);
        let arguments = arguments.float(self.shape.scale).size(window(&self.shape)).place(&self.lse);
        Ok(arguments.pointer(delta))
    }
}

pub(in crate::backend::cuda) fn attention_backward(c: &mut Call, op: &ops::AttentionBackward) -> Result<()> {
    let (q, k, out) = (c.floats("q", op.q)?, c.floats("k", op.k)?, c.floats("out", op.out)?);
    let (v, segments, lse) = (c.like("v", op.v, &k)?, c.segments(&op.segments)?, c.f32("lse", op.lse)?);
    let (dout, dq, dk) = (c.floats("dout", op.dout)?, c.floats("dq", op.dq)?, c.floats("dk", op.dk)?);
    let dv = c.like("dv", op.dv, &dk)?;
    let call = Backward { shape: op.shape, q, k, v, segments, out, lse, dout, dq, dk, dv };
    let on_h100 = wgmma::takes_backward(c, &call) && trust::backward_agrees(c, &call);
    backward(c, &call, on_h100)
}

/// Backward, the products on any card or as an H100 alone makes them.
fn backward(c: &mut Call, call: &Backward, on_h100: bool) -> Result<()> {
    let Backward { shape, q, k, v, segments, out, dout, dq, dk, dv, .. } = call;
    let head_dim = ("HEAD_DIM", Value::Number(c.int("head", shape.head_dim)?));
    let types = [("T_Q", q.of()), ("T_KV", k.of()), ("T_OUT", out.of()), ("T_DOUT", dout.of()), ("T_DQ", dq.of())];
    let mut defines = types.to_vec();
    let plain_tiles = PlainTiles::new(c, shape.head_dim, 2, false)?;
    defines.extend([("T_DKV", dk.of()), head_dim, plain_tiles.define()]);
    let sums = if on_h100 { wgmma::partial_bytes(c.limits(), k.rows, shape.kv_heads, shape.head_dim) } else { 0 };
    let [delta, partials] = c.scratch([4 * q.rows * shape.heads, sums])?;

    let plain = &source::ATTENTION_BACKWARD;
    let heads = c.int("heads", shape.heads)?;
    let arguments = Arguments::new().place(out).place(dout).size(q.rows).int(heads).pointer(delta);
    c.launch((plain, "attention_delta"), &defines, by_rows(c, q.rows * shape.heads, 1)?, &arguments)?;

    let inputs = call.sizes(c, Arguments::new().place(q).place(k).place(v), delta)?.place(dout);
    let (of_dq, of_dkv) = (inputs.clone().place(dq), inputs.place(dk).place(dv));
    if !on_tensor_cores(shape, KEYS, &[q, k, v, dout, dq, dk, dv]) {
        let tiles = q.rows * call.group() / plain_tiles.rows + segments.capacity;
        let by_queries = plain_tiles.blocks(c, shape.kv_heads, tiles)?;
        c.launch((plain, "attention_dq"), &defines, by_queries, &of_dq)?;
        let tiles = k.rows / plain_tiles.rows + segments.capacity;
        let by_keys = plain_tiles.blocks(c, shape.kv_heads, tiles)?;
        c.launch((plain, "attention_dkv"), &defines, by_keys, &of_dkv)?;
    } else if on_h100 {
        wgmma::backward(c, call, [delta, partials], &defines)?;
    } else {
        let (source, defines) = (&source::ATTENTION_BACKWARD_MMA, [("T_X", q.of()), head_dim]);
        let kv_heads = c.int("heads", shape.kv_heads)?;
        let query_tiles = along(c, "tiles of queries", q.rows / (DQ_ROWS / call.group()) + segments.capacity)?;
        let key_tiles = along(c, "tiles of keys", k.rows / KEYS + segments.capacity)?;
        let blocks = |tiles, threads, shared_bytes: usize| Shape {
            grid: [kv_heads, tiles, 1],
            block: [threads, 1, 1],
            shared_bytes: shared_bytes as u32,
        };
        let by_queries = blocks(query_tiles, 256, (2 * DQ_ROWS + 4 * KEYS) * shape.head_dim * 2);
        c.launch((source, "attention_dq_mma"), &defines, by_queries, &of_dq)?;
        let by_keys = blocks(key_tiles, 128, 6 * KEYS * shape.head_dim * 2 + 4 * KEYS * 4);
        c.launch((source, "attention_dkv_mma"), &defines, by_keys, &of_dkv)?;
    }
    let capacity = c.int("segments", segments.capacity)?;
    let rest = Arguments::new().pointer(segments.table).int(capacity).size(k.rows).int(c.int("columns", dk.cols)?);
    let few = Shape { grid: [64, 1, 1], block: [128, 1, 1], shared_bytes: 0 };
    c.launch((plain, "attention_no_keys"), &defines, few, &rest.place(dk).place(dv))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the keys and however few of the segments a step has, its parts fit into what is reserved.
        #[test]
        fn parts_of_keys_fit_into_the_scratch(
            (multiprocessors, shared_bytes) in (1usize..200, 1usize..300_000),
            (segments, kv_heads, group, head_dim) in (1usize..100, 1usize..9, 1usize..9, 1usize..129),
            (of_a_block, keys) in (1usize..200_000, 1usize..200_000),
        ) {
            let (name, capability) = (String::new(), (9, 0));
            let limits = Limits { name, capability, multiprocessors, shared_bytes, memory_bytes: 0, launch_ns: 0 };
            let (heads, query_width) = (kv_heads * group, kv_heads * group * head_dim);
            let sizes = Largest { tokens: 1, segments, heads, kv_heads, query_width, ..Largest::default() };
            let reserved = scratch_bytes(&limits, &sizes);
            for few in 1..=segments {
                let parts = parts(room(&limits, of_a_block), few * kv_heads, keys);
                let rows = if parts > 1 { parts * few * QUERIES_DECODED } else { 0 };
                let taken: usize = padded(partial_bytes(rows, heads, query_width)).iter().sum();
                prop_assert!(taken <= reserved, "{few} segments in {parts} parts take {taken} of {reserved} bytes");
            }
        }
    }
}

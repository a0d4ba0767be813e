//! Whether cooperative matrices can be trusted: they are experimental in wgpu and in drivers, so the first product that could
//! or attention that could use them first compares some with plain arithmetic.

use std::sync::{Mutex, PoisonError};

use half::f16;

use super::attention;
use super::call::Call;
use super::memory::Memory;
use super::products::Product;
use super::scratch::row;
use crate::backend::{BufferId, DType, HostSlice, Result, SEGMENT_FIELDS, Segments, SegmentsView, View, ops};

/// Adapters by name, and whether theirs can be trusted.
static KNOWN: Mutex<Vec<(String, bool)>> = Mutex::new(Vec::new());

/// Whether the adapter has cooperative matrices whose products are right. Asked for the first time it waits for them.
pub(super) fn trusted(call: &mut Call) -> bool {
    if !call.gpu.abilities.cooperative {
        return false;
    }
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, trusted)) = known.iter().find(|(name, _)| *name == call.gpu.name) {
        return *trusted;
    }
    // A driver that refuses them has none.
    let trusted = truly(call, products_are_right) && truly(call, attention_is_right);
    known.push((call.gpu.name.clone(), trusted));
    trusted
}

/// Whether a comparison that is really made, also while calls are only planned, finds no difference.
fn truly(call: &mut Call, compare: fn(&mut Call) -> Result<bool>) -> bool {
    let (plan, scratch) = (call.gpu.plan.take(), call.gpu.scratch.take());
    let planning = std::mem::replace(&mut call.gpu.memory.planning, false);
    let right = compare(call).unwrap_or(false);
    call.gpu.memory.planning = planning;
    call.gpu.scratch.put_back(scratch, &mut call.gpu.memory);
    call.gpu.plan = plan;
    right
}

/// [m, n, k] of the products that are compared: tiles that are whole and tiles that are not.
const SIZES: [[usize; 3]; 2] = [[128, 192, 160], [76, 60, 100]];

/// A matrix of the comparison.
fn matrix(memory: &mut Memory, dtype: DType, rows: usize, cols: usize) -> Result<View> {
    let buffer: BufferId = memory.alloc("a matrix", dtype, rows * cols)?;
    Ok(View { rows, cols, stride: cols, ..row(buffer, dtype, rows * cols) })
}

/// Multiples of 1/16 up to 1, so that every sum of their products is exact in f32.
fn values(seed: usize, count: usize) -> Vec<f16> {
    let value = |i: usize| ((i * 7919 + seed * 104_729) % 1009 % 33) as f32 / 16.0 - 1.0;
    (0..count).map(|i| f16::from_f32(value(i))).collect()
}

fn free(call: &mut Call, views: &[View]) {
    for view in views {
        call.gpu.recorder.forget(view.buffer);
        call.gpu.memory.free(view.buffer);
    }
}

/// Whether products of all kinds are the same bits in both ways.
fn products_are_right(call: &mut Call) -> Result<bool> {
    let mut right = true;
    for [m, n, k] in SIZES {
        for (a_transposed, b_transposed) in [(false, true), (false, false), (true, false)] {
            let memory = &mut call.gpu.memory;
            let (rows, cols) = if a_transposed { (k, m) } else { (m, k) };
            let a = matrix(memory, DType::F16, rows, cols)?;
            let (rows, cols) = if b_transposed { (n, k) } else { (k, n) };
            let b = matrix(memory, DType::F16, rows, cols)?;
            let both = [matrix(memory, DType::F32, m, n)?, matrix(memory, DType::F32, m, n)?];
            call.gpu.write(HostSlice::F16(&values(1, m * k)), a)?;
            call.gpu.write(HostSlice::F16(&values(2, k * n)), b)?;
            let mut results = Vec::new();
            for (c, matrices) in both.into_iter().zip([false, true]) {
                let product = Product { a, a_transposed, b, b_transposed, bias: None, c, add: true, k };
                product.in_tiles(call, matrices)?;
                results.push(call.gpu.read(c)?.wait()?);
            }
            right &= results[0] == results[1] && results[0].iter().any(|value| *value != 0.0);
            free(call, &[a, b, both[0], both[1]]);
        }
    }
    Ok(right)
}

/// Tokens of the attention that is compared, heads, columns of a head: more than one tile of each.
const TOKENS: usize = 70;
const HEADS: usize = 2;
const HEAD_DIM: usize = 48;
/// What may lie between two ways of it with values of up to 1: the rounding of shares and of results to f16.
const NEAR: f32 = 1.0 / 256.0;

/// Whether attention is the same in both ways but for rounding.
fn attention_is_right(call: &mut Call) -> Result<bool> {
    let width = HEADS * HEAD_DIM;
    let memory = &mut call.gpu.memory;
    let [q, k, v] = [width, HEAD_DIM, HEAD_DIM].map(|cols| matrix(memory, DType::F16, TOKENS, cols));
    let [q, k, v] = [q?, k?, v?];
    let both = [matrix(memory, DType::F16, TOKENS, width)?, matrix(memory, DType::F16, TOKENS, width)?];
    let segments = Segments::documents([TOKENS])?;
    let (mut of_table, mut of_positions) = (Vec::new(), Vec::new());
    segments.table(1, &mut of_table);
    segments.positions(&mut of_positions);
    let table = matrix(memory, DType::U32, 1, SEGMENT_FIELDS)?;
    let positions = matrix(memory, DType::U32, 1, TOKENS)?;
    for (seed, view) in [(3, q), (4, k), (5, v)] {
        call.gpu.write(HostSlice::F16(&values(seed, view.len())), view)?;
    }
    call.gpu.write(HostSlice::U32(&of_table), table)?;
    call.gpu.write(HostSlice::U32(&of_positions), positions)?;
    let scale = (HEAD_DIM as f32).sqrt().recip();
    let shape = ops::AttentionShape { heads: HEADS, kv_heads: 1, head_dim: HEAD_DIM, scale, window: None };
    let mut results = Vec::new();
    for (out, matrices) in both.into_iter().zip([false, true]) {
        let segments = SegmentsView { table, positions };
        let op = ops::Attention { shape, segments, q, keys: ops::Keys::Rows { k, v }, out, lse: None };
        attention::attention_with(call, &op, matrices)?;
        results.push(call.gpu.read(out)?.wait()?);
    }
    free(call, &[q, k, v, both[0], both[1], table, positions]);
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= NEAR;
    Ok(results[0].iter().zip(&results[1]).all(near) && results[0].iter().any(|value| *value != 0.0))
}

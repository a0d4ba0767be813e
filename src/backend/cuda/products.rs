//! Products: one row through a kernel of our own, the others through the driver's library.

use super::call::{Call, Place, blocks, type_number};
use super::dense::swiglu;
use super::driver::{Arguments, Matrix, Product, Shape};
use super::memory::{cast, column_sums};
use super::source::{self, Value};
use super::variants::VECTORS;
use crate::backend::{DType, Error, Largest, Result, ops};

/// Outputs of a block of `gemv.cu`, a warp each.
const GEMV_WARPS: usize = 8;

/// Bytes of scratch that calls of these sizes take.
pub(super) fn scratch_bytes(largest: &Largest) -> usize {
    largest.converted.saturating_mul(4)
}

fn rows_of(place: &Place) -> Matrix {
    Matrix { start: place.start, dtype: place.dtype, stride: place.stride, transposed: false }
}

fn transposed(place: &Place) -> Matrix {
    Matrix { transposed: true, ..rows_of(place) }
}

/// Where a copy of `place` in another dtype goes: without gaps.
fn copy_of(place: &Place, start: u64, dtype: DType) -> Place {
    Place { start, dtype, stride: place.cols, ..*place }
}

/// `out = a·b (+ bias) (+ out)` where dtypes may differ: narrower factors are widened, and an output that the library does not
/// write, and a bias that it does not read (of another dtype than the output, or not on a border of 16 bytes), take a copy.
/// The two factors say how they are taken.
fn product(
    c: &mut Call,
    [(a, a_transposed), (b, b_transposed)]: [(Place, bool); 2],
    bias: Option<Place>,
    (out, add): (Place, bool),
) -> Result<()> {
    let dtype = if a.dtype == b.dtype { a.dtype } else { DType::F32 };
    let directly = out.dtype == dtype || out.dtype == DType::F32;
    let bytes =
        |place: &Place, needed: bool, dtype: DType| if needed { place.rows * place.cols * dtype.size() } else { 0 };
    let of_out = if directly { out.dtype } else { DType::F32 };
    let bias_copied = bias.filter(|bias| bias.dtype != of_out || !bias.start.is_multiple_of(16));
    let sizes = [
        bytes(&a, a.dtype != dtype, dtype),
        bytes(&b, b.dtype != dtype, dtype),
        bytes(&out, !directly, DType::F32),
        bias_copied.map_or(0, |bias| bytes(&bias, true, of_out)),
    ];
    let starts = if sizes.iter().any(|&size| size > 0) { c.scratch(sizes)? } else { [0; 4] };
    let mut factor = |place: Place, start, taken_transposed: bool| -> Result<Matrix> {
        let place = if place.dtype == dtype {
            place
        } else {
            let copy = copy_of(&place, start, dtype);
            cast(c, &place, &copy, false)?;
            copy
        };
        Ok(if taken_transposed { transposed(&place) } else { rows_of(&place) })
    };
    let (m, k) = if a_transposed { (a.cols, a.rows) } else { (a.rows, a.cols) };
    let n = if b_transposed { b.rows } else { b.cols };
    let (a, b) = (factor(a, starts[0], a_transposed)?, factor(b, starts[1], b_transposed)?);
    if k == 0 && m > 0 && n > 0 {
        return Err(Error::Argument { op: c.op, what: "a product over no input".into() });
    }
    let bias = match bias_copied {
        Some(other) => {
            let copy = copy_of(&other, starts[3], of_out);
            cast(c, &other, &copy, false)?;
            Some(copy)
        }
        None => bias,
    };
    let bias = bias.map_or(0, |bias| bias.start);
    if directly {
        return c.product(&Product { m, n, k, a, b, out: rows_of(&out), bias, add });
    }
    let wide = copy_of(&out, starts[2], DType::F32);
    c.product(&Product { m, n, k, a, b, out: rows_of(&wide), bias, add: false })?;
    cast(c, &wide, &out, add)
}

/// The macros of `gemv.cu`.
fn gemv_defines(x: &Place, weight: &Place, out: &Place) -> [(&'static str, Value); 4] {
    let vector = VECTORS.into_iter().find(|&vector| {
        let vector = vector as usize;
        let aligned = |place: &Place| place.start.is_multiple_of((vector * place.dtype.size()) as u64);
        let fits = vector * x.dtype.size().max(weight.dtype.size()) <= 16;
        fits && x.cols.is_multiple_of(vector) && aligned(x) && aligned(weight)
    });
    [("T_X", x.of()), ("T_W", weight.of()), ("T_OUT", out.of()), ("VECTOR", Value::Number(vector.unwrap_or(1)))]
}

/// Its blocks for so many outputs.
fn gemv_blocks(outputs: usize) -> Shape {
    blocks(outputs.div_ceil(GEMV_WARPS), 32 * GEMV_WARPS as u32)
}

/// One row times a weight.
fn gemv(c: &mut Call, x: &Place, weight: &Place, bias: Option<Place>, (out, add): (Place, bool)) -> Result<()> {
    let arguments = Arguments::new().pointer(x.start).pointer(weight.start).maybe(bias);
    let arguments = arguments.int(type_number(bias.map_or(DType::F32, |bias| bias.dtype))).pointer(out.start);
    let arguments = arguments.int(add.into()).size(weight.rows).size(weight.cols);
    let defines = gemv_defines(x, weight, &out);
    c.launch((&source::GEMV, "gemv"), &defines, gemv_blocks(weight.rows), &arguments)
}

pub(super) fn linear(c: &mut Call, op: &ops::Linear) -> Result<()> {
    let (x, weight) = (c.floats("x", op.x)?, c.floats("weight", op.weight)?);
    let (bias, out) = (c.maybe_floats("bias", op.bias)?, (c.floats("out", op.out.view)?, op.out.add));
    if x.rows == 1 {
        return gemv(c, &x, &weight, bias, out);
    }
    product(c, [(x, false), (weight, true)], bias, out)
}

pub(super) fn linear_swiglu(c: &mut Call, op: &ops::LinearSwiglu) -> Result<()> {
    let ops::LinearSwiglu { linear: product, swiglu: gated, keeps } = op;
    let (both, out) = (product.out.view, gated.out);
    let columns = [gated.gate, gated.up].map(|view| view.col_in(both));
    if let ([Some(gate), Some(up)], None, false) = (columns, product.bias, *keeps)
        && product.x.rows == 1
    {
        let (x, weight) = (c.floats("x", product.x)?, c.floats("weight", product.weight)?);
        let out = c.like("out", out, &c.floats("gate and up", both)?)?;
        let arguments = Arguments::new().pointer(x.start).pointer(weight.start).pointer(out.start).size(out.cols);
        let arguments = arguments.size(weight.cols).size(gate).size(up);
        let defines = gemv_defines(&x, &weight, &out);
        return c.launch((&source::GEMV, "gemv_swiglu"), &defines, gemv_blocks(out.cols), &arguments);
    }
    linear(c, product)?;
    swiglu(c, gated)
}

pub(super) fn linear_backward_input(c: &mut Call, op: &ops::LinearBackwardInput) -> Result<()> {
    let (dout, weight) = (c.floats("dout", op.dout)?, c.floats("weight", op.weight)?);
    let dx = (c.floats("dx", op.dx.view)?, op.dx.add);
    product(c, [(dout, false), (weight, false)], None, dx)
}

pub(super) fn linear_backward_weight(c: &mut Call, op: &ops::LinearBackwardWeight) -> Result<()> {
    let (x, dout, dweight) = (c.floats("x", op.x)?, c.floats("dout", op.dout)?, c.f32("dweight", op.dweight)?);
    let dbias = c.maybe_f32("dbias", op.dbias)?;
    if x.rows == 0 {
        return Ok(());
    }
    product(c, [(dout, true), (x, false)], None, (dweight, true))?;
    dbias.map_or(Ok(()), |dbias| column_sums(c, &dout, None, &dbias))
}

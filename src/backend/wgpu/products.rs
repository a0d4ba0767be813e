//! The products of a linear layer.
//!
//! A matrix that is larger than a binding comes in blocks of its rows: outputs of the weight, or tokens.

use super::call::{Call, blocks};
use super::rows;
use super::shaders;
use crate::backend::{DType, Order, Result, View, ops};

/// Rows up to which a product is a vector times a matrix, several times.
const FEW_ROWS: usize = 4;
/// Workgroups from which the large tile pays: a tile a multiprocessor of a large GPU.
const MANY_TILES: usize = 128;

/// `C = A·B (+ C) (+ bias)` as `products.wgsl` takes it.
struct Product {
    a: View,
    a_transposed: bool,
    b: View,
    b_transposed: bool,
    bias: Option<View>,
    c: View,
    add: bool,
    k: usize,
}

impl Product {
    fn dispatch(self, call: &mut Call) -> Result<()> {
        let Product { a, a_transposed, b, b_transposed, bias, c, add, k } = self;
        let tiles = |side: usize| c.rows.div_ceil(side) * c.cols.div_ceil(side);
        let large = tiles(128) >= MANY_TILES && !call.batch_invariant();
        let tile: usize = if large { 128 } else { 64 };
        let types = [a.dtype, b.dtype, bias.map_or(DType::F32, |bias| bias.dtype), c.dtype];
        let kernel = shaders::PRODUCTS
            .kernel("product", &types)
            .with("TILE", tile as u32)
            .with("INVOCATIONS", (tile / 8 * tile / 8) as u32)
            .with("A_TRANSPOSED", a_transposed)
            .with("B_TRANSPOSED", b_transposed)
            .with("ADD", add)
            .with("BIAS", bias.is_some());
        call.dispatch(kernel).read(a).read(b).maybe_read(bias).write(c).size(c.rows).size(c.cols).size(k).grid([
            c.cols.div_ceil(tile),
            c.rows.div_ceil(tile),
            1,
        ])
    }
}

/// Rows `first..first + count` of a weight, which lie here as plain rows.
fn outputs_of(weight: View, (first, count): (usize, usize)) -> Result<View> {
    View { order: Order::Rows, ..weight }.row_range(first, count)
}

pub(super) fn linear(call: &mut Call, op: &ops::Linear) -> Result<()> {
    call.check([op.x, op.weight, op.out.view].into_iter().chain(op.bias))?;
    let (outputs, k) = (op.weight.rows, op.weight.cols);
    let outputs_at_once = call.rows_at_once(&[op.weight]);
    let tokens_at_once = call.rows_at_once(&[op.x, op.out.view]);
    for block in blocks(outputs, outputs_at_once) {
        let weight = outputs_of(op.weight, block)?;
        let bias = op.bias.map(|bias| bias.col_range(block.0, block.1)).transpose()?;
        for (first, count) in blocks(op.x.rows, tokens_at_once) {
            let x = op.x.row_range(first, count)?;
            let out = op.out.view.row_range(first, count)?.col_range(block.0, block.1)?;
            if count <= FEW_ROWS && !call.batch_invariant() {
                let types = [x.dtype, weight.dtype, bias.map_or(DType::F32, |bias| bias.dtype), out.dtype];
                let kernel = shaders::GEMV.kernel("gemv", &types);
                call.dispatch(kernel.with("ADD", op.out.add).with("BIAS", bias.is_some()))
                    .read(x)
                    .read(weight)
                    .maybe_read(bias)
                    .write(out)
                    .size(block.1)
                    .size(k)
                    .grid([block.1.div_ceil(8), count, 1])?;
            } else {
                let (b_transposed, add) = (true, op.out.add);
                Product { a: x, a_transposed: false, b: weight, b_transposed, bias, c: out, add, k }.dispatch(call)?;
            }
        }
    }
    Ok(())
}

pub(super) fn linear_backward_input(call: &mut Call, op: &ops::LinearBackwardInput) -> Result<()> {
    call.check([op.dout, op.weight, op.dx.view])?;
    if op.weight.rows == 0 {
        // A sum of nothing.
        return if op.dx.add { Ok(()) } else { rows::fill(call, &ops::Fill { value: 0.0, out: op.dx.view }) };
    }
    let outputs_at_once = call.rows_at_once(&[op.weight]);
    let tokens_at_once = call.rows_at_once(&[op.dout, op.dx.view]);
    for block in blocks(op.weight.rows, outputs_at_once) {
        let b = outputs_of(op.weight, block)?;
        for (first, count) in blocks(op.dout.rows, tokens_at_once) {
            let a = op.dout.row_range(first, count)?.col_range(block.0, block.1)?;
            let c = op.dx.view.row_range(first, count)?;
            // The outputs of the first block replace or add, those of the others add.
            let (add, k) = (op.dx.add || block.0 > 0, block.1);
            Product { a, a_transposed: false, b, b_transposed: false, bias: None, c, add, k }.dispatch(call)?;
        }
    }
    Ok(())
}

pub(super) fn linear_backward_weight(call: &mut Call, op: &ops::LinearBackwardWeight) -> Result<()> {
    call.check([op.x, op.dout, op.dweight].into_iter().chain(op.dbias))?;
    let outputs_at_once = call.rows_at_once(&[op.dweight]);
    let tokens_at_once = call.rows_at_once(&[op.x, op.dout]);
    for block in blocks(op.dweight.rows, outputs_at_once) {
        let c = outputs_of(op.dweight, block)?;
        for (first, count) in blocks(op.x.rows, tokens_at_once) {
            let a = op.dout.row_range(first, count)?.col_range(block.0, block.1)?;
            let b = op.x.row_range(first, count)?;
            let product = Product { a, a_transposed: true, b, b_transposed: false, bias: None, c, add: true, k: count };
            product.dispatch(call)?;
        }
    }
    op.dbias.map_or(Ok(()), |dbias| rows::column_sums(call, op.dout, None, dbias))
}

//! The products of a linear layer.
//!
//! A matrix that is larger than a binding comes in blocks of its rows: outputs of the weight, or tokens.

use super::call::Call;
use super::scratch::Slot;
use super::shaders::{self, Kernel, Shader};
use super::{cooperative, rows};
use crate::backend::{DType, Order, Result, View, ops};

/// Rows up to which a product is a vector times a matrix, several times.
const FEW_ROWS: usize = 4;
/// Workgroups from which a large tile of cooperative matrices pays: a tile a multiprocessor of a large GPU.
const MANY_TILES: usize = 128;
/// Workgroups that a product is spread over if k can be split: two a multiprocessor.
const WORKGROUPS: usize = 256;
/// Values of k that a workgroup sums at least, of split k.
const LEAST_SPAN: usize = 64;
/// Columns of each lane in `products_subgroup.wgsl`, and rows; and where columns are rows of a weight so many bytes apart
/// that all fall into one set of the first cache, which has room for eight.
const GROUPS: usize = 2;
const ROWS: usize = 8;
const ONE_SET_GROUPS: usize = 1;
const ONE_SET_ROWS: usize = 16;
const ONE_SET_BYTES: usize = 4096;

/// `C = A·B (+ C) (+ bias)` as the shaders of products take it.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub a: View,
    pub a_transposed: bool,
    pub b: View,
    pub b_transposed: bool,
    pub bias: Option<View>,
    pub c: View,
    pub add: bool,
    pub k: usize,
}

impl Product {
    fn dispatch(self, call: &mut Call) -> Result<()> {
        match call.gpu.abilities.simd_lanes() {
            Some(lanes) => self.by_subgroup(call, lanes),
            None => {
                let matrices = self.fits_cooperative() && cooperative::trusted(call);
                self.in_tiles(call, matrices)
            }
        }
    }

    fn kernel(&self, shader: &'static Shader, types: &[DType]) -> Kernel {
        shader
            .kernel("product", types)
            .with("A_TRANSPOSED", self.a_transposed)
            .with("B_TRANSPOSED", self.b_transposed)
            .with("ADD", self.add)
            .with("BIAS", self.bias.is_some())
    }

    fn bias_and_out(&self) -> [DType; 2] {
        [self.bias.map_or(DType::F32, |bias| bias.dtype), self.c.dtype]
    }

    /// Sums of `span` values of k, by a grid of workgroups.
    fn run(&self, call: &mut Call, kernel: Kernel, span: usize, grid: [usize; 3]) -> Result<()> {
        call.dispatch(kernel)
            .read(self.a)
            .read(self.b)
            .maybe_read(self.bias)
            .write(self.c)
            .size(self.c.rows / grid[2].max(1))
            .size(self.c.cols)
            .size(self.k)
            .size(span)
            .grid(grid)
    }

    /// By the kernel of adapters that are a CPU.
    fn by_subgroup(self, call: &mut Call, lanes: usize) -> Result<()> {
        let one_set = self.b_transposed && (self.b.stride * self.b.dtype.size()).is_multiple_of(ONE_SET_BYTES);
        let (rows, groups) = if one_set { (ONE_SET_ROWS, ONE_SET_GROUPS) } else { (ROWS, GROUPS) };
        let rows = if self.c.rows == 1 && !self.a_transposed { 1 } else { rows.max(lanes) };
        let [bias, out] = self.bias_and_out();
        let kernel = self
            .kernel(&shaders::PRODUCTS_SUBGROUP, &[self.a.dtype, self.b.dtype, bias, out])
            .with("LANES", lanes as u32)
            .with("ROWS", rows as u32)
            .with("GROUPS", groups as u32);
        let grid = [self.c.cols.div_ceil(lanes * groups), self.c.rows.div_ceil(rows), 1];
        self.run(call, kernel, self.k, grid)
    }

    /// Whether cooperative matrices can take it: both factors f16, in rows of whole vectors.
    fn fits_cooperative(&self) -> bool {
        let whole = |view: View| {
            view.dtype == DType::F16 && [view.offset, view.stride, view.cols].iter().all(|n| n.is_multiple_of(4))
        };
        whole(self.a) && whole(self.b)
    }

    /// By a grid of tiles of C, with cooperative matrices or without. Where that is fewer workgroups than a GPU has room for,
    /// each sums a part of k.
    pub(super) fn in_tiles(self, call: &mut Call, matrices: bool) -> Result<()> {
        let (m, n) = (self.c.rows, self.c.cols);
        let tiles = |side: usize| m.div_ceil(side) * n.div_ceil(side);
        let large = !call.batch_invariant() && if matrices { tiles(128) >= MANY_TILES } else { m.min(n) > 64 };
        let tile: usize = if large { 128 } else { 64 };
        let room = call.gpu.memory.shown(DType::F32) / (m * n).max(1);
        let wanted = if call.batch_invariant() { 1 } else { WORKGROUPS / tiles(tile).max(1) };
        let splits = wanted.min(self.k / LEAST_SPAN).min(room).max(1);
        let span = self.k.div_ceil(splits).next_multiple_of(LEAST_SPAN / 2);
        let splits = self.k.div_ceil(span);
        let mut summed = self;
        if splits > 1 {
            let partial = call.scratch(Slot::Partials, splits * m, n)?;
            summed = Product { bias: None, c: partial, add: false, ..self };
        }
        let [bias, out] = summed.bias_and_out();
        let kernel = if matrices {
            summed.kernel(&shaders::PRODUCTS_COOPERATIVE, &[bias, out]).with("TILE", tile as u32).with("WIDE", large)
        } else {
            summed
                .kernel(&shaders::PRODUCTS, &[self.a.dtype, self.b.dtype, bias, out])
                .with("TILE", tile as u32)
                .with("INVOCATIONS", (tile / 8 * tile / 8) as u32)
        };
        summed.run(call, kernel, span, [n.div_ceil(tile), m.div_ceil(tile), splits])?;
        if splits == 1 {
            return Ok(());
        }
        let [bias, out] = self.bias_and_out();
        let kernel = shaders::PRODUCTS.kernel("add_splits", &[DType::F32, DType::F32, bias, out]);
        call.dispatch(kernel.with("ADD", self.add).with("BIAS", self.bias.is_some()))
            .read(summed.c)
            .read(summed.c)
            .maybe_read(self.bias)
            .write(self.c)
            .size(m)
            .size(n)
            .size(splits)
            .size(span)
            .grid([n.div_ceil(64), m, 1])
    }
}

/// Rows `first..first + count` of a weight, which lie here as plain rows.
fn outputs_of(weight: View, (first, count): (usize, usize)) -> Result<View> {
    View { order: Order::Rows, ..weight }.row_range(first, count)
}

pub(super) fn linear(call: &mut Call, op: &ops::Linear) -> Result<()> {
    call.check([op.x, op.weight, op.out.view].into_iter().chain(op.bias))?;
    let k = op.weight.cols;
    for block in call.row_blocks(&[op.weight]) {
        let weight = outputs_of(op.weight, block)?;
        let bias = op.bias.map(|bias| bias.col_range(block.0, block.1)).transpose()?;
        for (first, count) in call.row_blocks(&[op.x, op.out.view]) {
            let x = op.x.row_range(first, count)?;
            let out = op.out.view.row_range(first, count)?.col_range(block.0, block.1)?;
            if count <= FEW_ROWS && !call.batch_invariant() && call.gpu.abilities.simd_lanes().is_none() {
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
    for block in call.row_blocks(&[op.weight]) {
        let b = outputs_of(op.weight, block)?;
        for (first, count) in call.row_blocks(&[op.dout, op.dx.view]) {
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
    for block in call.row_blocks(&[op.dweight]) {
        let c = outputs_of(op.dweight, block)?;
        for (first, count) in call.row_blocks(&[op.x, op.dout]) {
            let a = op.dout.row_range(first, count)?.col_range(block.0, block.1)?;
            let b = op.x.row_range(first, count)?;
            let product = Product { a, a_transposed: true, b, b_transposed: false, bias: None, c, add: true, k: count };
            product.dispatch(call)?;
        }
    }
    op.dbias.map_or(Ok(()), |dbias| rows::column_sums(call, op.dout, None, dbias))
}

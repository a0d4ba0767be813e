//! Rows moved, filled, scaled and summed.

use crate::backend::check::{Check, Checked};
use crate::backend::{DeviceId, Order, Out, Result, View};

/// `out[i] = src[rows[i]]`.
#[derive(Clone, Copy, Debug)]
pub struct Gather {
    /// `[any, width]`.
    pub src: View,
    /// `[1, n]` u32, each below the rows of `src`.
    pub rows: View,
    /// `[n, width]`.
    pub out: View,
}

impl Checked for Gather {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("gather", device);
        check.input("src", self.src, self.src.rows, self.out.cols)?;
        check.ids("rows", self.rows, 1, self.out.rows)?;
        check.output("out", self.out, self.out.rows, self.out.cols)?;
        check.finish()
    }
}

/// `out[rows[i]] += src[i]`; no row comes twice.
#[derive(Clone, Copy, Debug)]
pub struct ScatterAdd {
    /// `[n, width]`.
    pub src: View,
    /// `[1, n]` u32, distinct, each below the rows of `out`.
    pub rows: View,
    /// `[any, width]`.
    pub out: View,
}

impl Checked for ScatterAdd {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("scatter_add", device);
        check.input("src", self.src, self.src.rows, self.src.cols)?;
        check.ids("rows", self.rows, 1, self.src.rows)?;
        check.output("out", self.out, self.out.rows, self.src.cols)?;
        check.finish()
    }
}

/// `out = src`, or added to what is there, from dtype to dtype.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    /// `[rows, cols]`.
    pub src: View,
    /// `[rows, cols]`, in the same order.
    pub out: Out,
}

impl Checked for Copy {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (rows, cols) = (self.src.rows, self.src.cols);
        let mut check = Check::new("copy", device);
        let same = self.src.order == self.out.view.order && self.src.dtype.is_float() == self.out.view.dtype.is_float();
        check.require(same, || "source and destination differ in order or kind".into())?;
        match (self.src.order, self.src.dtype.is_float()) {
            (Order::Weight, _) => {
                check.weight("src", self.src, rows, cols)?;
                check.weight_grad("out", self.out.view, rows, cols)?;
            }
            (Order::Rows, true) => {
                check.input("src", self.src, rows, cols)?;
                check.out("out", self.out, rows, cols)?;
            }
            (Order::Rows, false) => {
                check.ids("src", self.src, rows, cols)?;
                check.ids_output("out", self.out.view, rows, cols)?;
            }
        }
        check.finish()
    }
}

/// `out = value`.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    /// What to fill with.
    pub value: f32,
    /// Floats, in rows.
    pub out: View,
}

impl Checked for Fill {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("fill", device);
        check.output("out", self.out, self.out.rows, self.out.cols)?;
        check.finish()
    }
}

/// `x = factor·x`, in place.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// The factor.
    pub factor: f32,
    /// Floats, in rows; read and written.
    pub x: View,
}

impl Checked for Scale {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("scale", device);
        check.output("x", self.x, self.x.rows, self.x.cols)?;
        check.finish()
    }
}

/// `out[c] += Σ_r weights[r]·values[r, c]`, rows in order; rows of weight 0 are passed over.
#[derive(Clone, Copy, Debug)]
pub struct WeightedSum {
    /// `[rows, cols]`.
    pub values: View,
    /// `[1, rows]` f32.
    pub weights: View,
    /// `[1, cols]` f32; adds.
    pub out: View,
}

impl Checked for WeightedSum {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (rows, cols) = (self.values.rows, self.values.cols);
        let mut check = Check::new("weighted_sum", device);
        check.input("values", self.values, rows, cols)?;
        check.input("weights", self.weights, 1, rows)?;
        check.output("out", self.out, 1, cols)?;
        check.finish()
    }
}

//! Views: small copyable handles to a part of a device buffer, seen as a matrix.

use super::{Error, Result};

/// How a number is stored. Sums, softmax, norms, the scan and its state are f32 whatever the storage; f64 exists on
/// `reference` alone; u32 holds token ids, positions and tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// bfloat16: 8 bits of exponent, 7 of mantissa.
    Bf16,
    /// IEEE half: 5 bits of exponent, 10 of mantissa.
    F16,
    /// 64-bit float.
    F64,
    /// Unsigned integer.
    U32,
}

impl DType {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::F64 => 8,
        }
    }

    /// Whether the values are floating-point numbers.
    pub fn is_float(self) -> bool {
        self != DType::U32
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::F64 => "f64",
            DType::U32 => "u32",
        })
    }
}

impl std::str::FromStr for DType {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "f32" | "float32" => Ok(DType::F32),
            "bf16" | "bfloat16" => Ok(DType::Bf16),
            "f16" | "float16" => Ok(DType::F16),
            "f64" | "float64" => Ok(DType::F64),
            _ => Err(format!("unknown dtype '{name}': expected f32, bf16, f16 or f64")),
        }
    }
}

/// The order of a matrix in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Row after row, `stride` values apart.
    Rows,
    /// The backend's own order for a linear weight `[out, in]` and everything shaped like it (gradient, moments).
    /// It fills `padded_rows(out) × in` values; values of padding rows are 0. Only upload and download permute.
    Weight,
}

/// Rows of a weight are padded to a multiple of this in every flat space: the CPU's panel of outputs, and a whole
/// number of tensor-core tiles.
pub const WEIGHT_ROWS: usize = 32;

/// The rows that a weight of `rows` rows takes up.
pub fn padded_rows(rows: usize) -> usize {
    rows.div_ceil(WEIGHT_ROWS).saturating_mul(WEIGHT_ROWS)
}

/// A buffer of one device; ids are never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub u64);

/// The device that a view belongs to: a foreign handle is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceId(pub u32);

/// A matrix inside a buffer. Copyable, and checked against its buffer whenever an op uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The device it lies on.
    pub device: DeviceId,
    /// The buffer it lies in; a backend may keep one buffer in several pieces of device memory.
    pub buffer: BufferId,
    /// How its values are stored.
    pub dtype: DType,
    /// Their order.
    pub order: Order,
    /// First value, counted in values from the start of the buffer.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Values from one row to the next; `cols` for `Order::Weight`.
    pub stride: usize,
}

impl View {
    /// Number of values that the view shows.
    pub fn len(&self) -> usize {
        self.rows.saturating_mul(self.cols)
    }

    /// Whether it shows no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values from the first to one past the last that the view spans in its buffer, padding rows included;
    /// a view too large to count ends at `usize::MAX`, which lies in no buffer.
    pub fn span(&self) -> std::ops::Range<usize> {
        let values = match self.order {
            Order::Weight => padded_rows(self.rows).saturating_mul(self.cols),
            Order::Rows if self.is_empty() => 0,
            Order::Rows => (self.rows - 1).saturating_mul(self.stride).saturating_add(self.cols),
        };
        self.offset..self.offset.saturating_add(values)
    }

    /// The same matrix from row `first`, `rows` rows.
    ///
    /// # Errors
    /// When the rows do not lie in the view, or cut a weight inside a panel.
    pub fn row_range(&self, first: usize, rows: usize) -> Result<View> {
        let inside = first.checked_add(rows).is_some_and(|end| end <= self.rows);
        let whole = self.order == Order::Rows
            || (first.is_multiple_of(WEIGHT_ROWS) && (rows.is_multiple_of(WEIGHT_ROWS) || first + rows == self.rows));
        if !inside || !whole {
            return Err(Error::Range { what: "rows", first, count: rows, of: self.rows });
        }
        Ok(View { offset: self.offset.saturating_add(first.saturating_mul(self.stride)), rows, ..*self })
    }

    /// The columns from `first`, `cols` of them.
    ///
    /// # Errors
    /// When the columns do not lie in the view, or the view is a weight.
    pub fn col_range(&self, first: usize, cols: usize) -> Result<View> {
        let inside = first.checked_add(cols).is_some_and(|end| end <= self.cols);
        if !inside || self.order != Order::Rows {
            return Err(Error::Range { what: "columns", first, count: cols, of: self.cols });
        }
        Ok(View { offset: self.offset.saturating_add(first), cols, ..*self })
    }

    /// The column of `whole` where this view starts, if it is columns of it.
    pub fn col_in(&self, whole: View) -> Option<usize> {
        let first = self.offset.checked_sub(whole.offset)?;
        let alike = View { offset: whole.offset, cols: whole.cols, ..*self } == whole;
        let inside = first.checked_add(self.cols).is_some_and(|end| end <= whole.cols);
        (alike && inside && self.order == Order::Rows).then_some(first)
    }

    /// A matrix inside a contiguous view, `first` values from its start.
    ///
    /// # Errors
    /// When the view is not contiguous or too small.
    pub fn matrix(&self, first: usize, rows: usize, cols: usize, order: Order) -> Result<View> {
        let view = View { offset: self.offset.saturating_add(first), rows, cols, stride: cols, order, ..*self };
        let contiguous = self.order == Order::Rows && (self.rows <= 1 || self.stride == self.cols);
        if !contiguous || view.span().end > self.span().end {
            let count = view.span().len();
            return Err(Error::Range { what: "values", first, count, of: self.len() });
        }
        Ok(view)
    }
}

/// Where an activation or its gradient goes, and whether it replaces what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Out {
    /// The destination.
    pub view: View,
    /// Add to what is there, instead of replacing it.
    pub add: bool,
}

impl Out {
    /// Replaces what is there.
    pub fn assign(view: View) -> Self {
        Out { view, add: false }
    }

    /// Adds to what is there.
    pub fn add(view: View) -> Self {
        Out { view, add: true }
    }
}

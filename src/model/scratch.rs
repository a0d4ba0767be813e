//! Activation memory: planned once for the most rows a call will have, narrowed to the rows of each call.

use crate::backend::{Buffer, DType, Device, Result, View};

/// Rows of one activation.
#[derive(Debug)]
pub struct Rows(Buffer);

impl Rows {
    /// Room for `tokens` rows of `width` values.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(device: &Device, dtype: DType, tokens: usize, width: usize) -> Result<Self> {
        Ok(Rows(device.alloc(dtype, tokens, width)?))
    }

    /// The first `tokens` rows.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn of(&self, tokens: usize) -> Result<View> {
        self.0.rows(tokens)
    }

    /// The whole, as it was made.
    pub fn whole(&self) -> View {
        self.0.view()
    }
}

/// One number a token, `[1, tokens]`.
#[derive(Debug)]
pub struct Column(Buffer);

impl Column {
    /// Room for `tokens` numbers.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(device: &Device, dtype: DType, tokens: usize) -> Result<Self> {
        Ok(Column(device.alloc(dtype, 1, tokens)?))
    }

    /// The first `tokens` numbers.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn of(&self, tokens: usize) -> Result<View> {
        self.0.view().col_range(0, tokens)
    }

    /// Numbers `first..first + count`.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn range(&self, first: usize, count: usize) -> Result<View> {
        self.0.view().col_range(first, count)
    }
}

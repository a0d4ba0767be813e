//! Segments as they lie in the device's table.

use std::ops::Range;

/// One row of the table: rows `start..start + len` belong to a sequence that has seen `past` tokens.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Segment {
    /// First row.
    pub start: u32,
    /// Number of rows; 0 is legal.
    pub len: u32,
    /// Tokens of the sequence before the first row; at 0 it starts afresh, whatever its slot holds.
    pub past: u32,
    /// Its row in caches and states.
    pub slot: u32,
    /// The first of its `past + len` key rows, where keys lie one segment after the other.
    pub keys: u32,
}

impl Segment {
    /// Its rows.
    pub fn rows(&self) -> Range<usize> {
        self.start as usize..self.start as usize + self.len as usize
    }

    /// Tokens of the sequence with its rows.
    pub fn total(&self) -> usize {
        self.past as usize + self.len as usize
    }
}

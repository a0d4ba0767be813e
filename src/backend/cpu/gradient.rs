//! Where gradients of activations go.

use super::matrix::RowsMut;

/// A gradient of an activation, which replaces what is there or adds to it.
#[derive(Clone, Copy)]
pub struct Gradient<'a> {
    /// Where it goes.
    pub to: &'a RowsMut<'a>,
    /// Add to what is there.
    pub add: bool,
}

impl<'a> Gradient<'a> {
    /// Replaces what is there.
    pub fn assign(to: &'a RowsMut<'a>) -> Self {
        Self { to, add: false }
    }

    /// Adds to what is there.
    pub fn add(to: &'a RowsMut<'a>) -> Self {
        Self { to, add: true }
    }
}

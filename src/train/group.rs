//! The trainers of one model on several devices, each over batches of its own: what they tell each other. Weights begin
//! alike, and gradients, losses and counts are summed at each step, so that every member makes the same update.

use crate::backend::{Device, Result, View};

/// The members of a group, as one of them sees it. All of them make the same calls in the same order; sums have one order,
/// so that every member has the same bits.
pub trait Group: Send {
    /// Replaces a buffer of f32 by its sum over all members.
    ///
    /// # Errors
    /// When a member was lost.
    fn sum(&self, device: &Device, buffer: View) -> Result<()>;

    /// Replaces a buffer by the first member's.
    ///
    /// # Errors
    /// When a member was lost.
    fn broadcast(&self, device: &Device, buffer: View) -> Result<()>;

    /// The sum of a number over all members.
    ///
    /// # Errors
    /// When a member was lost.
    fn count(&self, number: usize) -> Result<usize>;
}

/// A trainer by itself: a sum is what it has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Group for Alone {
    fn sum(&self, _device: &Device, _buffer: View) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _device: &Device, _buffer: View) -> Result<()> {
        Ok(())
    }

    fn count(&self, number: usize) -> Result<usize> {
        Ok(number)
    }
}

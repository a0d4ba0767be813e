//! The right factors: where a block of steps of one panel of columns lies, or how it is made.

use super::super::matrix::{PANEL, Panels, Rows};
use super::super::pack;
use super::super::simd::{Element, Lanes};
use super::super::tile::Right;
use std::ops::Range;

/// A matrix `[steps, columns]` to multiply with, seen in panels of [`PANEL`] columns.
pub(super) trait Factor: Copy + Sync {
    /// What the tiles read.
    type Read: Element;

    /// Rows: the length of the chains.
    fn steps(&self) -> usize;

    /// Columns.
    fn cols(&self) -> usize;

    /// Values of scratch that [`Factor::block`] needs for blocks of `steps` steps.
    fn scratch(&self, steps: usize) -> usize;

    /// The steps `steps` of panel `panel`. The last panel's missing columns are readable.
    ///
    /// # Safety
    /// `scratch` is writable for as many values as said, and not used while the block is.
    unsafe fn block<L: Lanes>(&self, panel: usize, steps: Range<usize>, scratch: *mut f32) -> Right<Self::Read>;
}

/// The transpose of a weight in panels, as it lies.
#[derive(Clone, Copy)]
pub(super) struct Stored<'a, T>(pub Panels<'a, T>);

impl<T: Element> Factor for Stored<'_, T> {
    type Read = T;
    fn steps(&self) -> usize {
        self.0.inputs()
    }
    fn cols(&self) -> usize {
        self.0.outputs()
    }
    fn scratch(&self, _: usize) -> usize {
        0
    }
    #[inline(always)]
    unsafe fn block<L: Lanes>(&self, panel: usize, steps: Range<usize>, _: *mut f32) -> Right<T> {
        Right { ptr: self.0.panel(panel)[steps.start * PANEL..].as_ptr(), step: PANEL }
    }
}

/// The transpose of a weight in panels, widened once for all rows.
#[derive(Clone, Copy)]
pub(super) struct Widened<'a, T>(pub Panels<'a, T>);

impl<T: Element> Factor for Widened<'_, T> {
    type Read = f32;
    fn steps(&self) -> usize {
        self.0.inputs()
    }
    fn cols(&self) -> usize {
        self.0.outputs()
    }
    fn scratch(&self, steps: usize) -> usize {
        steps * PANEL
    }
    #[inline(always)]
    unsafe fn block<L: Lanes>(&self, panel: usize, steps: Range<usize>, scratch: *mut f32) -> Right<f32> {
        let values = &self.0.panel(panel)[steps.start * PANEL..steps.end * PANEL];
        // SAFETY: as the caller promises.
        unsafe { pack::widen::<L, T>(values, scratch) };
        Right { ptr: scratch, step: PANEL }
    }
}

/// A weight in panels: its outputs are the steps, its inputs the columns.
#[derive(Clone, Copy)]
pub(super) struct Transposed<'a, T>(pub Panels<'a, T>);

impl<T: Element> Factor for Transposed<'_, T> {
    type Read = f32;
    fn steps(&self) -> usize {
        self.0.outputs()
    }
    fn cols(&self) -> usize {
        self.0.inputs()
    }
    fn scratch(&self, steps: usize) -> usize {
        steps.next_multiple_of(PANEL) * PANEL
    }
    #[inline(always)]
    unsafe fn block<L: Lanes>(&self, panel: usize, steps: Range<usize>, scratch: *mut f32) -> Right<f32> {
        // SAFETY: as the caller promises.
        unsafe { pack::transposed::<L, T>(self.0, steps, panel * PANEL, scratch) };
        Right { ptr: scratch, step: PANEL }
    }
}

/// Rows as they are: row s holds the columns of step s.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a>(pub Rows<'a>);

/// Rows farther apart than this take a page of addresses each, which costs more than a copy that closes the gaps.
pub(super) const NEAR: usize = 512;

impl Factor for Columns<'_> {
    type Read = f32;
    fn steps(&self) -> usize {
        self.0.rows()
    }
    fn cols(&self) -> usize {
        self.0.cols()
    }
    fn scratch(&self, steps: usize) -> usize {
        steps * PANEL
    }
    #[inline(always)]
    unsafe fn block<L: Lanes>(&self, panel: usize, steps: Range<usize>, scratch: *mut f32) -> Right<f32> {
        let col = panel * PANEL;
        let cols = self.cols() - col;
        if cols >= PANEL && self.0.stride() <= NEAR {
            return Right { ptr: self.0.at(steps.start, col), step: self.0.stride() };
        }
        // SAFETY: as the caller promises.
        unsafe { pack::gather::<L>(self.0.at(steps.start, col), self.0.stride(), steps.len(), cols, scratch) };
        Right { ptr: scratch, step: PANEL }
    }
}

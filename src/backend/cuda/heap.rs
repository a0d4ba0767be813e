//! The memory of a card: an [`Arena`] over pieces that the driver gives.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUresult};

use super::arena::{Arena, Pieces};
use super::driver::Pointer;
use super::real::Context;
use crate::backend::{Error, Result};

/// Bytes that a plan leaves to the driver, for kernels and recorded steps.
const OF_DRIVER: usize = 256 << 20;

/// Memory of a card's one stream.
pub struct Heap {
    source: Source,
    arena: Mutex<Arena>,
}

/// The driver, as it gives whole pieces.
struct Source {
    context: Arc<Context>,
    /// Bytes of the card's memory.
    most: usize,
}

impl Pieces for Source {
    fn make(&self, bytes: usize) -> Result<Option<Pointer>> {
        if bytes > self.most {
            return Ok(None);
        }
        self.context.enter()?;
        let mut start = 0;
        // SAFETY: writes an address.
        match unsafe { sys::cuMemAlloc_v2(&mut start, bytes) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
            result => self.context.check("allocating memory", result).map(|()| Some(start)),
        }
    }

    fn take_back(&self, start: Pointer) -> Result<()> {
        self.context.synchronise()?;
        // SAFETY: made above, nothing of it is out, and the stream is done with what was.
        self.context.check("freeing memory", unsafe { sys::cuMemFree_v2(start) })
    }

    fn free_bytes(&self) -> Result<usize> {
        self.context.enter()?;
        let (mut free, mut all) = (0, 0);
        // SAFETY: writes two numbers; the context is current.
        let asked = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut all) };
        self.context.check("asking for free memory", asked).map(|()| free)
    }
}

impl Heap {
    /// No memory yet, of a card that has so many bytes.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Self {
        Heap { source: Source { context: context.clone(), most: bytes }, arena: Mutex::default() }
    }

    fn arena(&self) -> MutexGuard<'_, Arena> {
        self.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory, all 0.
    ///
    /// # Errors
    /// When there is no room.
    pub fn allocate(&self, bytes: usize, what: &str) -> Result<Pointer> {
        let context = &self.source.context;
        context.enter()?;
        let start = self.arena().allocate(bytes, &self.source)?.ok_or_else(|| self.none(bytes, what))?;
        // SAFETY: a range of a piece, which the arena handed out.
        let cleared = unsafe { sys::cuMemsetD8Async(start, 0, bytes.max(1), context.stream) };
        context.check("clearing memory", cleared).inspect_err(|_| self.free(start))?;
        Ok(start)
    }

    /// Takes memory back. It may be handed out again at once: whoever gets it uses it on the same stream, after all
    /// calls that were made so far.
    pub fn free(&self, start: Pointer) {
        self.arena().free(start);
    }

    /// Makes sure that so many bytes are free side by side, and that the driver has room beside them.
    ///
    /// # Errors
    /// When there is no room: says how much there is.
    pub fn reserve(&self, bytes: usize) -> Result<()> {
        if self.arena().reserve(bytes, OF_DRIVER, &self.source)? {
            return Ok(());
        }
        let what = "weights, activations and all else that the run takes";
        let free = self.source.free_bytes()?;
        let of_free = format!("{free} bytes are free, of which {OF_DRIVER} stay for kernels and recorded steps");
        Err(self.none(bytes, &format!("{what}; {of_free}")))
    }

    fn none(&self, bytes: usize, what: &str) -> Error {
        Error::OutOfMemory { device: self.source.context.name.clone(), what: what.into(), bytes }
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        let arena = self.arena.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Where the device failed there is nothing to give back.
        let _given_back = arena.starts().try_for_each(|start| self.source.take_back(start));
    }
}

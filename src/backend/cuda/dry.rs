//! A driver that does nothing and has no memory: it hands out addresses, and counts. What a run makes on it first is
//! what the run will take of a card.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::arena::{ALIGNMENT, Arena, rounded};
use super::driver::{
    Arguments, Boxes, Driver, Finish, Graph, Kernel, Limits, Pointer, Product, Region, Shape, TensorMap,
};
use super::mixers::AGREES;
use super::source::{KernelKey, ModuleKey};
use crate::backend::{Device, Error, Result};

/// Bytes of its one piece: more than any run takes.
const ENDLESS: usize = 1 << 62;

/// What was asked of a dry driver so far.
#[derive(Clone, Debug, Default)]
pub struct Counters(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    allocations: AtomicU64,
    peak_bytes: AtomicUsize,
    planned_bytes: AtomicUsize,
}

impl Counters {
    /// Allocations, those of scratch among them.
    pub fn allocations(&self) -> u64 {
        self.0.allocations.load(Ordering::Relaxed)
    }

    /// Bytes of a piece of memory that would have held all there was at any time.
    pub fn peak_bytes(&self) -> usize {
        self.0.peak_bytes.load(Ordering::Relaxed)
    }

    /// The most bytes that were planned.
    pub fn planned_bytes(&self) -> usize {
        self.0.planned_bytes.load(Ordering::Relaxed)
    }
}

/// A device over a dry driver with the limits of another one.
pub fn device(limits: &Limits) -> (Device, Counters) {
    let (mut arena, counters) = (Arena::default(), Counters::default());
    arena.add(ALIGNMENT as Pointer, ENDLESS);
    let driver = Dry { limits: limits.clone(), counters: counters.clone(), arena: Mutex::new(arena) };
    (super::over(Box::new(driver)), counters)
}

struct Dry {
    limits: Limits,
    counters: Counters,
    arena: Mutex<Arena>,
}

impl Driver for Dry {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Pointer> {
        let Counts { allocations, peak_bytes, .. } = &*self.counters.0;
        let start = self.arena.lock().unwrap_or_else(PoisonError::into_inner).take(bytes);
        let range = start.zip(rounded(bytes));
        let none = || Error::OutOfMemory { device: self.limits.name.clone(), what: what.into(), bytes };
        let (start, bytes) = range.ok_or_else(none)?;
        allocations.fetch_add(1, Ordering::Relaxed);
        peak_bytes.fetch_max(start as usize - ALIGNMENT + bytes, Ordering::Relaxed);
        Ok(start)
    }

    fn free(&self, start: Pointer) {
        self.arena.lock().unwrap_or_else(PoisonError::into_inner).free(start);
    }

    fn plan(&self, bytes: usize) -> Result<()> {
        self.counters.0.planned_bytes.fetch_max(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn clear(&self, _: Region) -> Result<()> {
        Ok(())
    }

    fn upload(&self, _: &[u8], _: Region) -> Result<()> {
        Ok(())
    }

    fn download(&self, from: Region) -> Result<Finish> {
        Ok(Box::new(move || Ok(vec![0; from.width * from.rows])))
    }

    fn load(&self, _: &KernelKey) -> Result<Kernel> {
        Ok(Kernel(0))
    }

    fn recall(&self, _: &ModuleKey) -> Option<Vec<u8>> {
        Some(AGREES.into())
    }

    fn remember(&self, _: &ModuleKey, _: &[u8]) {}

    fn tensor_map(&self, _: &Boxes) -> Result<TensorMap> {
        Ok([0; 16])
    }

    fn launch(&self, _: Kernel, _: Shape, _: &Arguments) -> Result<()> {
        Ok(())
    }

    fn product(&self, _: &Product) -> Result<()> {
        Ok(())
    }

    fn begin_recording(&self) -> Result<()> {
        Ok(())
    }

    fn end_recording(&self) -> Result<Graph> {
        Ok(Graph(0))
    }

    fn replay(&self, _: Graph) -> Result<()> {
        Ok(())
    }

    fn forget(&self, _: Graph) {}

    fn synchronise(&self) -> Result<()> {
        Ok(())
    }
}

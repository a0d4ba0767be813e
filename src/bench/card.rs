//! What a card can do at its best.

use std::time::Duration;

use serde::Serialize;

use super::kernels::{Options, rates};
use super::yardstick::{Limits, Whose};
use super::{Error, Result};
use crate::backend::{DType, Device};

/// A card that is known.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Card {
    /// Its name, as its driver says it.
    pub name: &'static str,
    /// GFLOP/s in f32 outside of the tensor cores.
    pub wide_gflops: f64,
    /// GFLOP/s of the tensor cores in bf16 and f16.
    pub narrow_gflops: f64,
    /// GB/s of its memory.
    pub gbytes: f64,
    /// Exponentials a second over 10⁹: 16 a multiprocessor and cycle.
    pub gexponentials: f64,
    /// GiB of memory that a program can have.
    pub gibibytes: f64,
}

/// The H100's products and memory are what they were measured to reach (8192³ in bf16; a copy); the rest, and the H200's, is
/// from the data sheet, without sparsity.
pub const CARDS: [Card; 2] = [
    Card {
        name: "NVIDIA H100 80GB HBM3",
        wide_gflops: 67e3,
        narrow_gflops: 798e3,
        gbytes: 3000.0,
        gexponentials: 132.0 * 16.0 * 1.755,
        gibibytes: 78.0,
    },
    Card {
        name: "NVIDIA H200",
        wide_gflops: 67e3,
        narrow_gflops: 989e3,
        gbytes: 4800.0,
        gexponentials: 132.0 * 16.0 * 1.755,
        gibibytes: 139.0,
    },
];

impl Card {
    /// GFLOP/s of products in a dtype.
    pub fn gflops(&self, dtype: DType) -> f64 {
        if dtype == DType::F32 { self.wide_gflops } else { self.narrow_gflops }
    }
}

/// Sizes that a card without a data sheet is measured at: of a square product, and values of a copy.
const SIZES: (usize, usize) = (2048, 1 << 25);

/// The limits that work on a device is held against, with matrices in `dtype`: the processor's where it computes on
/// `threads` of them, a known card's, or what an unknown card reaches within about `budget` each.
///
/// # Errors
/// When the threads cannot be started, or the device fails.
pub fn limits(device: &Device, dtype: DType, threads: usize, budget: Duration) -> Result<Limits> {
    if on_processor(device) {
        return Limits::measure(threads, budget);
    }
    let name = device.info().device.split(',').next().unwrap_or_default();
    let dtype = device.info().activations_beside(dtype);
    let card = |whose, gemm_gflops, gbytes| Limits {
        whose,
        threads: 0,
        gemm_gflops,
        copy_gbytes: gbytes,
        read_gbytes: gbytes,
    };
    if let Some(known) = CARDS.iter().find(|card| card.name == name) {
        return Ok(card(Whose::Known, known.gflops(dtype), known.gbytes));
    }
    let reached = rates(device, SIZES.1, Options { tokens: SIZES.0, dtype, budget })?;
    if !(reached.gemm_gflops > 0.0 && reached.copy_gbytes > 0.0) {
        return Err(Error::Options("the device gives no time".into()));
    }
    Ok(card(Whose::Card, reached.gemm_gflops, reached.copy_gbytes))
}

/// Whether a device computes on this machine's processor.
pub fn on_processor(device: &Device) -> bool {
    matches!(device.info().name, "cpu" | "reference")
}

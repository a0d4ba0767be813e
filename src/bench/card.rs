//! What a card can do at its best.

use std::time::Duration;

use super::kernels::{Options, rates};
use super::yardstick::{Limits, Whose};
use super::{Error, Result};
use crate::backend::{DType, Device};

/// A card by its maker's data sheet, without sparsity.
struct Card {
    name: &'static str,
    /// GFLOP/s in f32 outside of the tensor cores.
    wide_gflops: f64,
    /// GFLOP/s of the tensor cores in bf16 and f16.
    narrow_gflops: f64,
    /// GB/s of its memory.
    gbytes: f64,
}

const CARDS: [Card; 2] = [
    Card { name: "NVIDIA H100 80GB HBM3", wide_gflops: 67e3, narrow_gflops: 989e3, gbytes: 3350.0 },
    Card { name: "NVIDIA H200", wide_gflops: 67e3, narrow_gflops: 989e3, gbytes: 4800.0 },
];

/// Sizes that a card without a data sheet is measured at: of a square product, and values of a copy.
const SIZES: (usize, usize) = (2048, 1 << 25);

/// The limits that work on a device is held against, with matrices in `dtype`: the processor's where it computes on
/// `threads` of them, the card's by its data sheet, or what an unknown card reaches within about `budget` each.
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
        let gflops = if dtype == DType::F32 { known.wide_gflops } else { known.narrow_gflops };
        return Ok(card(Whose::DataSheet, gflops, known.gbytes));
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

//! Every op of a model's shape by itself, and its mixers, beside what the machine could do.

mod dense;
mod head;
mod layers;
mod mixers;

pub(super) use layers::mixer;

use std::time::Duration;

use serde::Serialize;

use super::shapes::{Shape, uniform};
use super::yardstick::{Gemm, Limits, Whose};
use super::{Clock, Result};
use crate::backend::{self, Buffer, DType, Device, HostSlice, Order, Segments, SegmentsBuffer, SegmentsView, View};
use crate::model::config::ModelConfig;

/// An op's time.
#[derive(Clone, Debug, Serialize)]
pub struct Kernel {
    /// The op.
    pub name: &'static str,
    /// Its sizes.
    pub sizes: String,
    /// Threads of the device; 0 for a card.
    pub threads: usize,
    /// Seconds of one call.
    pub seconds: f64,
    /// Operations a second over 10⁹, where they are what the op is about; an exponential counts as one.
    pub gflops: Option<f64>,
    /// Bytes a second over 10⁹ that it reads and writes at least, each once.
    pub gbytes: f64,
    /// The time that the machine's matrix products and memory would need at least, over its own.
    pub share: f64,
    /// GFLOP/s of the `gemm` crate at the same product and threads.
    pub gemm_gflops: Option<f64>,
}

/// The groups of ops.
pub const GROUPS: [&str; 8] = ["products", "row", "attention", "mamba", "head", "loss", "optimiser", "layers"];

/// How ops are timed.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Tokens of a call, in one segment.
    pub tokens: usize,
    /// How weights are stored; activations are as the device has them beside such.
    pub dtype: DType,
    /// Time for each op, about.
    pub budget: Duration,
}

/// What an op does at least.
#[derive(Clone, Copy)]
struct Work {
    /// Operations; 0 where bytes are all that matters.
    flops: f64,
    /// Bytes that are read or written, each once.
    bytes: usize,
}

/// A device with what is needed to time its ops.
struct Bench<'a> {
    device: &'a Device,
    clock: Clock,
    config: &'a ModelConfig,
    tokens: usize,
    dtype: DType,
    limits: Limits,
    budget: Duration,
    kernels: &'a mut Vec<Kernel>,
}

/// Times of the ops of some of the [`GROUPS`] of a shape on `device`; `limits` are those of the device. `progress` hears of
/// each op.
///
/// # Errors
/// When the device has no room, cannot do an op, or fails.
pub fn measure(
    device: &Device,
    config: &ModelConfig,
    (options, groups): (Options, &[&str]),
    limits: Limits,
    mut progress: impl FnMut(&Kernel),
) -> Result<Vec<Kernel>> {
    let mut kernels = Vec::new();
    let runs: [fn(&mut Bench<'_>) -> Result<()>; GROUPS.len()] = [
        dense::products,
        dense::row,
        mixers::attention,
        mixers::mamba,
        head::head,
        head::loss,
        head::optimiser,
        layers::layers,
    ];
    for (_, run) in GROUPS.iter().zip(runs).filter(|(name, _)| groups.contains(name)) {
        let before = kernels.len();
        run(&mut Bench::new(device, config, options, limits, &mut kernels)?)?;
        kernels[before..].iter().for_each(&mut progress);
    }
    Ok(kernels)
}

/// What a device reaches of the machine's limits.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rates {
    /// GFLOP/s of a square product.
    pub gemm_gflops: f64,
    /// GB/s of values being copied: read and written bytes together.
    pub copy_gbytes: f64,
}

/// A square product of `options.tokens` and a copy of `values` values on a device.
///
/// # Errors
/// When the device has no room, or fails.
pub fn rates(device: &Device, values: usize, options: Options) -> Result<Rates> {
    let (config, mut kernels) = (Shape::Arithmetic.config(), Vec::new());
    let limits = Limits { whose: Whose::Card, threads: 0, gemm_gflops: 1.0, copy_gbytes: 1.0, read_gbytes: 1.0 };
    dense::rates(&mut Bench::new(device, &config, options, limits, &mut kernels)?, values)?;
    let rate = |name: &str| kernels.iter().find(|kernel| kernel.name == name);
    Ok(Rates {
        gemm_gflops: rate("linear").and_then(|kernel| kernel.gflops).unwrap_or_default(),
        copy_gbytes: rate("copy").map_or(0.0, |kernel| kernel.gbytes),
    })
}

impl<'a> Bench<'a> {
    fn new(
        device: &'a Device,
        config: &'a ModelConfig,
        Options { tokens, dtype, budget }: Options,
        limits: Limits,
        kernels: &'a mut Vec<Kernel>,
    ) -> Result<Self> {
        device.reserve(&config.largest(tokens, 1))?;
        Ok(Bench { device, clock: Clock::new(device, budget)?, config, tokens, dtype, limits, budget, kernels })
    }

    /// Times `run` and keeps the result.
    fn op(
        &mut self,
        (name, sizes): (&'static str, String),
        work: Work,
        run: impl FnMut() -> backend::Result<()>,
    ) -> Result<()> {
        let seconds = self.clock.best(run)?;
        let bytes = work.bytes as f64;
        self.kernels.push(Kernel {
            name,
            sizes,
            threads: self.limits.threads,
            seconds,
            gflops: (work.flops > 0.0).then(|| work.flops / seconds / 1e9),
            gbytes: bytes / seconds / 1e9,
            share: self.limits.floor(work.flops, bytes) / seconds,
            gemm_gflops: None,
        });
        Ok(())
    }

    /// Sets the `gemm` crate beside the last op of the processor.
    fn beside_gemm(&mut self, sizes: [usize; 3]) -> Result<()> {
        if self.limits.whose != Whose::Processor {
            return Ok(());
        }
        let rate = Gemm::new(sizes, self.limits.threads)?.best_rate(self.budget);
        if let Some(kernel) = self.kernels.last_mut() {
            kernel.gemm_gflops = Some(rate);
        }
        Ok(())
    }

    /// How activations are stored.
    fn activations(&self) -> DType {
        self.device.info().activations_beside(self.dtype)
    }

    /// Random activations, `[rows, cols]`.
    fn values(&self, rows: usize, cols: usize) -> Result<Buffer> {
        self.random(self.activations(), rows, cols)
    }

    /// Memory for activations, `[rows, cols]`.
    fn room(&self, rows: usize, cols: usize) -> Result<Buffer> {
        Ok(self.device.alloc(self.activations(), rows, cols)?)
    }

    /// Random values that are f32 whatever activations are, `[rows, cols]`.
    fn numbers(&self, rows: usize, cols: usize) -> Result<Buffer> {
        self.random(DType::F32, rows, cols)
    }

    /// Memory for such.
    fn results(&self, rows: usize, cols: usize) -> Result<Buffer> {
        Ok(self.device.alloc(DType::F32, rows, cols)?)
    }

    fn random(&self, dtype: DType, rows: usize, cols: usize) -> Result<Buffer> {
        let buffer = self.device.alloc(dtype, rows, cols)?;
        self.device.write(HostSlice::F32(&uniform("values", rows * cols, 1.0)), buffer.view())?;
        Ok(buffer)
    }

    /// A linear weight of random values, `[out, in]`.
    fn weight(&self, out: usize, input: usize) -> Result<Weight> {
        self.matrix(self.dtype, out, input)
    }

    /// The gradient of one, f32.
    fn gradient(&self, out: usize, input: usize) -> Result<Weight> {
        self.matrix(DType::F32, out, input)
    }

    fn matrix(&self, dtype: DType, out: usize, input: usize) -> Result<Weight> {
        let buffer = self.device.alloc(dtype, 1, backend::padded_rows(out) * input)?;
        let view = buffer.view().matrix(0, out, input, Order::Weight)?;
        self.device.write(HostSlice::F32(&uniform("weight", out * input, 0.05)), view)?;
        Ok(Weight { _buffer: buffer, view })
    }

    /// Numbers below `bound`, one a token.
    fn ids(&self, bound: usize) -> Result<Buffer> {
        let ids: Vec<u32> = (0..self.tokens).map(|at| (at * 7919 % bound) as u32).collect();
        let buffer = self.device.alloc(DType::U32, 1, self.tokens)?;
        self.device.write(HostSlice::U32(&ids), buffer.view())?;
        Ok(buffer)
    }

    /// One segment of all tokens.
    fn segment(&self) -> Result<(SegmentsBuffer, SegmentsView)> {
        let mut buffer = self.device.alloc_segments(1, self.tokens)?;
        let view = buffer.write(self.device, &Segments::documents([self.tokens])?)?;
        Ok((buffer, view))
    }
}

/// A linear weight in a buffer of its own.
struct Weight {
    _buffer: Buffer,
    view: View,
}

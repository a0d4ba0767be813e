//! Products, softmax and causal attention of h1's WGSL backend beside burn-wgpu's: one process, one adapter, one table.
//!
//! `cargo run --release [-- MILLISECONDS]`: what is spent on each time, 1000 unless said. A time is the best of several runs of
//! at least 5 ms between two waits for the device, so both pay for what they record. The adapter is the first real GPU, or the
//! one whose name has `WGPU_ADAPTER_NAME`; burn takes `CUBECL_WGPU_DEFAULT_DEVICE` (`Cpu` for a software driver).

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use burn_tensor::ops::AttentionModuleOptions;
use burn_tensor::{DType as Kind, Device as Burn, DeviceKind, Distribution, Tensor, activation, module};
use h1::backend::ops::{Attention, AttentionShape, Keys, Linear};
use h1::backend::{Buffer, DType, Device, HostSlice, Order, Out, Segments, padded_rows, wgpu};
use h1::report::table::{Align, Table};

/// A run of the clock is so long at least.
const LEAST: Duration = Duration::from_millis(5);
/// Causal attention: heads, tokens, columns of a head.
const ATTENTION: [usize; 3] = [9, 512, 64];

/// Seconds of one `run`, the best of several after one that is not counted.
fn best(
    budget: Duration,
    mut run: impl FnMut() -> Result<()>,
    mut wait: impl FnMut() -> Result<()>,
) -> Result<f64> {
    // Kernels are compiled, and tuned where there is a choice.
    for _ in 0..3 {
        run()?;
        wait()?;
    }
    let (begun, mut best, mut count) = (Instant::now(), f64::INFINITY, 1_u32);
    loop {
        let start = Instant::now();
        for _ in 0..count {
            run()?;
        }
        wait()?;
        let taken = start.elapsed();
        if taken < LEAST {
            count *= 2;
            continue;
        }
        best = best.min(taken.as_secs_f64() / f64::from(count));
        if begun.elapsed() >= budget {
            return Ok(best);
        }
    }
}

/// h1's device, and a value whose reading waits for all that was launched.
struct Ours {
    device: Device,
    touch: Buffer,
    budget: Duration,
}

impl Ours {
    fn time(&self, mut run: impl FnMut(&Device) -> h1::backend::Result<()>) -> Result<f64> {
        let wait = || Ok(self.device.read(self.touch.view())?.wait().map(drop)?);
        best(self.budget, || Ok(run(&self.device)?), wait)
    }

    fn values(&self, dtype: DType, rows: usize, cols: usize) -> Result<Buffer> {
        let buffer = self.device.alloc(dtype, rows, cols)?;
        let values: Vec<f32> = (0..rows * cols).map(|at| (at * 7919 % 2003) as f32 / 1001.5 - 1.0).collect();
        self.device.write(HostSlice::F32(&values), buffer.view())?;
        Ok(buffer)
    }

    fn product(&self, dtype: DType, [m, k, n]: [usize; 3]) -> Result<f64> {
        let (x, weight) = (self.values(dtype, m, k)?, self.values(dtype, 1, padded_rows(n) * k)?);
        let out = self.device.alloc(dtype, m, n)?;
        let weight = weight.view().matrix(0, n, k, Order::Weight)?;
        let op = Linear { x: x.view(), weight, bias: None, out: Out::assign(out.view()) };
        self.time(|device| device.linear(&op))
    }

    fn attention(&self, dtype: DType, [heads, tokens, head_dim]: [usize; 3]) -> Result<f64> {
        let [q, k, v] = [(); 3].map(|()| self.values(dtype, tokens, heads * head_dim));
        let (q, k, v, out) = (q?, k?, v?, self.device.alloc(dtype, tokens, heads * head_dim)?);
        let mut segments = self.device.alloc_segments(1, tokens)?;
        let segments = segments.write(&self.device, &Segments::documents([tokens])?)?;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let op = Attention {
            shape: AttentionShape { heads, kv_heads: heads, head_dim, scale, window: None },
            q: q.view(),
            keys: Keys::Rows { k: k.view(), v: v.view() },
            segments,
            out: out.view(),
            lse: None,
        };
        self.time(|device| device.attention(&op))
    }
}

/// burn's device.
struct Theirs {
    device: Burn,
    budget: Duration,
}

impl Theirs {
    fn time<T>(&self, mut run: impl FnMut() -> T) -> Result<f64> {
        let wait = || self.device.sync().map_err(|error| anyhow::anyhow!("burn: {error:?}"));
        best(self.budget, || Ok(drop(run())), wait)
    }

    fn values<const D: usize>(&self, kind: Kind, shape: [usize; D]) -> Tensor<D> {
        Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), (&self.device, kind))
    }

    fn product(&self, kind: Kind, [m, k, n]: [usize; 3]) -> Result<f64> {
        let (x, weight) = (self.values(kind, [m, k]), self.values(kind, [k, n]));
        self.time(|| x.clone().matmul(weight.clone()))
    }

    fn softmax(&self, kind: Kind, [heads, tokens, _]: [usize; 3]) -> Result<f64> {
        let scores = self.values(kind, [heads, tokens, tokens]);
        self.time(|| activation::softmax(scores.clone(), 2))
    }

    fn attention(&self, kind: Kind, [heads, tokens, head_dim]: [usize; 3]) -> Result<f64> {
        let [q, k, v] = [(); 3].map(|()| self.values(kind, [1, heads, tokens, head_dim]));
        let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
        self.time(|| module::attention(q.clone(), k.clone(), v.clone(), None, None, options))
    }
}

fn main() -> Result<()> {
    let budget = std::env::args().nth(1).map_or(Ok(1000), |text| text.parse()).context("MILLISECONDS is no number")?;
    let budget = Duration::from_millis(budget);
    let device = wgpu::device()?;
    let ours = Ours { touch: device.alloc(DType::F32, 1, 1)?, device, budget };
    let theirs = Theirs { device: Burn::wgpu(DeviceKind::DefaultDevice), budget };
    let mut table = Table::new(&[
        ("kernel", Align::Left),
        ("dtype", Align::Left),
        ("h1 ms", Align::Right),
        ("burn ms", Align::Right),
        ("h1 GFLOP/s", Align::Right),
        ("burn GFLOP/s", Align::Right),
        ("h1 is faster by", Align::Right),
    ]);
    let mut row = |name: String, dtype: DType, flops: f64, h1: Option<f64>, burn: f64| {
        let words = |value: Option<f64>| value.map_or("–".into(), |value| format!("{value:.2}"));
        let rate = |seconds: f64| (flops > 0.0).then(|| flops / seconds / 1e9);
        table.row([
            name,
            dtype.to_string(),
            words(h1.map(|seconds| 1e3 * seconds)),
            words(Some(1e3 * burn)),
            words(h1.and_then(rate)),
            words(rate(burn)),
            words(h1.map(|seconds| burn / seconds)),
        ]);
    };
    for (dtype, kind) in [(DType::F32, Kind::F32), (DType::F16, Kind::F16)] {
        if !ours.device.info().dtypes.contains(&dtype) {
            continue;
        }
        for sizes @ [m, k, n] in [[1024; 3], [512, 576, 1536]] {
            let flops = 2.0 * (m * k * n) as f64;
            let times = (ours.product(dtype, sizes)?, theirs.product(kind, sizes)?);
            row(format!("product {m}×{k}×{n}"), dtype, flops, Some(times.0), times.1);
        }
        let [heads, tokens, head_dim] = ATTENTION;
        // What a causal mask leaves of two products; h1 has no softmax by itself.
        let flops = 2.0 * (heads * tokens * tokens * head_dim) as f64;
        let times = (ours.attention(dtype, ATTENTION)?, theirs.attention(kind, ATTENTION)?);
        row(format!("causal attention {heads}×{tokens}×{head_dim}"), dtype, flops, Some(times.0), times.1);
        row(format!("softmax {heads}×{tokens}×{tokens}"), dtype, 0.0, None, theirs.softmax(kind, ATTENTION)?);
    }
    println!("h1 on {}\nburn-wgpu 0.22\n\n{}", ours.device.info().device, table.text());
    Ok(())
}

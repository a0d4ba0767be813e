//! Products and causal attention of h1's WGSL backend beside burn-wgpu's: one process, one adapter, one table.
//!
//! `cargo run --release -- [--dtype f32|f16] [--budget-ms N] [--only TEXT]`, from this folder. Nothing is read from disk, so the program runs
//! wherever it is copied to.
//!
//! - Both sides have the same values, in the layout that each stores them in: a linear weight is `[n, k]` here and `[k, n]` there,
//!   heads lie side by side here and one after the other there.
//! - Each side warms up first, as burn tries its kernels against each other; then the results are compared, and only where they agree
//!   is there a time.
//! - The sides take turns. A turn is a window of many calls between two waits for the device, so both pay alike for recording and
//!   next to nothing for waiting. A time is the median of the turns.
//! - burn makes a call at once (no fusion), with the kernel that its autotuning takes, compiled through WGSL like ours. A second row of
//!   attention has burn's attention in parts (product, mask, softmax, product), should that be faster than its own fused one.
//! - burn's fused attention is tens of thousands of lines of WGSL: a software driver (lavapipe) compiles it for many minutes. There,
//!   take `--only product` and `--only parts`.
//!
//! h1 takes the first real GPU, or the adapter whose name has `WGPU_ADAPTER_NAME`; burn takes what wgpu thinks fastest, or
//! `CUBECL_WGPU_DEFAULT_DEVICE` (`Cpu`, `DiscreteGpu(0)`, …).

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use burn_tensor::ops::AttentionModuleOptions;
use burn_tensor::{DType as Kind, Device as Burn, Tensor, TensorData, module};
use clap::{Parser, ValueEnum};
use h1::backend::ops::{Attention, AttentionShape, Keys, Linear};
use h1::backend::{Buffer, DType, Device, HostSlice, Order, Out, Segments, View, padded_rows, wgpu};
use h1::bench::Clock;
use h1::report::table::{Align, Table};

/// Cargo.toml takes this version and no other.
const BURN: &str = "0.22.1";
/// Turns of each side.
const ROUNDS: u32 = 5;
/// Calls before anything is compared or timed, at least: kernels are compiled and chosen.
const WARM_UP: usize = 5;
/// Sizes of products: rows, columns of a row, outputs. The last is the head of SmolLM2 for one token.
const PRODUCTS: [[usize; 3]; 4] = [[1024, 1024, 1024], [512, 576, 1536], [512, 1536, 576], [1, 576, 49_152]];
/// Of causal attention: heads, tokens, columns of a head.
const ATTENTION: [usize; 3] = [9, 512, 64];

/// h1's kernels on WGSL beside burn-wgpu's.
#[derive(Parser)]
struct Arguments {
    /// How values are stored; both where the adapter has f16, unless said.
    #[arg(long)]
    dtype: Option<Storage>,
    /// Milliseconds of calls that are timed of each side of a row.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    budget_ms: u32,
    /// Only the rows whose op has this in its name.
    #[arg(long, default_value = "", value_name = "TEXT")]
    only: String,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Storage {
    F32,
    F16,
}

impl Storage {
    fn ours(self) -> DType {
        match self {
            Storage::F32 => DType::F32,
            Storage::F16 => DType::F16,
        }
    }

    fn burns(self) -> Kind {
        match self {
            Storage::F32 => Kind::F32,
            Storage::F16 => Kind::F16,
        }
    }

    /// What two results may differ by, as `difference` counts: a term of a sum of 1024 that is left out makes 3e-2.
    fn tolerance(self) -> f64 {
        match self {
            Storage::F32 => 1e-5,
            Storage::F16 => 1e-2,
        }
    }
}

/// Root of the squared differences over the squares.
fn difference(ours: &[f32], burns: &[f32]) -> f64 {
    let squares = |value: &dyn Fn(f64, f64) -> f64| -> f64 {
        ours.iter().zip(burns).map(|(ours, burns)| value(f64::from(*ours), f64::from(*burns)).powi(2)).sum()
    };
    (squares(&|ours, burns| ours - burns) / squares(&|_, burns| burns)).sqrt()
}

/// `count` values in ±1 without a pattern, others for another `seed` (SplitMix64).
fn values(seed: u64, count: usize) -> Vec<f32> {
    let value = |at: u64| {
        let state = (seed << 32 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    (1..=count as u64).map(value).collect()
}

/// How one side makes a call, and how it waits for all that it made.
struct Side<'s> {
    call: &'s dyn Fn() -> Result<()>,
    wait: &'s dyn Fn() -> Result<()>,
}

impl Side<'_> {
    /// Calls for `window`, [`WARM_UP`] at least; gives the number of calls that a window has room for.
    fn warm_up(&self, window: Duration) -> Result<u32> {
        let (begun, mut calls) = (Instant::now(), 0);
        while calls < WARM_UP || begun.elapsed() < window {
            (self.call)()?;
            (self.wait)()?;
            calls += 1;
        }
        let mut count = 1;
        loop {
            let seconds = self.seconds(count)?;
            let room = window.as_secs_f64() / seconds;
            if room < f64::from(2 * count) {
                return Ok((room as u32).max(1));
            }
            count *= 2;
        }
    }

    /// Seconds of one of `count` calls in a row.
    fn seconds(&self, count: u32) -> Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            (self.call)()?;
        }
        (self.wait)()?;
        Ok(start.elapsed().as_secs_f64() / f64::from(count))
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// What a call does: its name and sizes, and operations or bytes over 10⁹, in words what they are a second.
struct Work {
    name: &'static str,
    sizes: String,
    amount: f64,
    unit: &'static str,
}

struct Bench {
    device: Device,
    clock: Clock,
    burn: Burn,
    storage: Storage,
    window: Duration,
    only: String,
    table: Table,
    wrong: usize,
}

impl Bench {
    fn alloc(&self, rows: usize, cols: usize) -> Result<Buffer> {
        Ok(self.device.alloc(self.storage.ours(), rows, cols)?)
    }

    fn ours(&self, values: &[f32], rows: usize, cols: usize) -> Result<Buffer> {
        let buffer = self.alloc(rows, cols)?;
        self.device.write(HostSlice::F32(values), buffer.view())?;
        Ok(buffer)
    }

    fn burns<const D: usize>(&self, values: &[f32], shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), (&self.burn, self.storage.burns()))
    }

    /// A view of a tensor as a tensor of its own, in the order of its dimensions.
    fn settled<const D: usize>(&self, tensor: Tensor<D>) -> Result<Tensor<D>> {
        Ok(Tensor::from_data(tensor.try_into_data()?, (&self.burn, self.storage.burns())))
    }

    /// `x·Wᵀ`: x `[m, k]`, W `[n, k]`.
    fn product(&mut self, [m, k, n]: [usize; 3]) -> Result<()> {
        let (x, w) = (values(1, m * k), values(2, n * k));
        let (our_x, out) = (self.ours(&x, m, k)?, self.alloc(m, n)?);
        let weight = self.alloc(1, padded_rows(n) * k)?;
        let weight = weight.view().matrix(0, n, k, Order::Weight)?;
        self.device.write(HostSlice::F32(&w), weight)?;
        let op = Linear { x: our_x.view(), weight, bias: None, out: Out::assign(out.view()) };
        let device = self.device.clone();

        let (x, w) = (self.burns(&x, [m, k]), self.settled(self.burns(&w, [n, k]).transpose())?);
        let flops = 2.0 * (m * k * n) as f64;
        let bytes = ((m * k + k * n + m * n) * self.storage.ours().size()) as f64;
        // One row is bound by the reading of its weight.
        let (amount, unit) = if m == 1 { (bytes / 1e9, "GB/s") } else { (flops / 1e9, "GFLOP/s") };
        let work = Work { name: "product", sizes: format!("{m}×{k}×{n}"), amount, unit };
        let ours = || Ok(device.linear(&op)?);
        self.row(work, (&ours, out.view()), &|| x.clone().matmul(w.clone()), |out| out)
    }

    /// Causal attention of one sequence, as one op of burn's and in parts.
    fn attention(&mut self, [heads, tokens, head_dim]: [usize; 3]) -> Result<()> {
        let width = heads * head_dim;
        let [q, k, v] = [1, 2, 3].map(|seed| values(seed, tokens * width));
        let [our_q, our_k, our_v] = [&q, &k, &v].map(|values| self.ours(values, tokens, width));
        let (our_q, our_k, our_v, out) = (our_q?, our_k?, our_v?, self.alloc(tokens, width)?);
        let device = self.device.clone();
        let mut segments = device.alloc_segments(1, tokens)?;
        let segments = segments.write(&device, &Segments::documents([tokens])?)?;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let op = Attention {
            shape: AttentionShape { heads, kv_heads: heads, head_dim, scale, window: None },
            q: our_q.view(),
            keys: Keys::Rows { k: our_k.view(), v: our_v.view() },
            segments,
            out: out.view(),
            lse: None,
        };

        let by_head = |values: &[f32]| self.settled(self.burns(values, [1, tokens, heads, head_dim]).swap_dims(1, 2));
        let (q, k, v) = (by_head(&q)?, by_head(&k)?, by_head(&v)?);
        let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
        // What the mask leaves of two products.
        let amount = 2.0 * (tokens * (tokens + 1) * width) as f64 / 1e9;
        let work = |name| Work { name, sizes: format!("{heads}×{tokens}×{head_dim}"), amount, unit: "GFLOP/s" };
        let ours = || Ok(device.attention(&op)?);
        let by_token = |out: Tensor<4>| out.swap_dims(1, 2).reshape([tokens, width]);
        let parts = || module::attention_fallback(q.clone(), k.clone(), v.clone(), None, None, options);
        self.row(work("causal attention, burn's in parts"), (&ours, out.view()), &parts, by_token)?;
        let fused = || module::attention(q.clone(), k.clone(), v.clone(), None, None, options);
        self.row(work("causal attention"), (&ours, out.view()), &fused, by_token)
    }

    /// A row of the table: our call and what it writes, burn's call and how its result is laid out like ours.
    fn row<const D: usize>(
        &mut self,
        work: Work,
        (call, out): (&dyn Fn() -> Result<()>, View),
        burns: &dyn Fn() -> Tensor<D>,
        like_ours: impl Fn(Tensor<D>) -> Tensor<2>,
    ) -> Result<()> {
        if !work.name.contains(&self.only) {
            return Ok(());
        }
        let burns_call = || {
            burns();
            Ok(())
        };
        let ours = Side { call, wait: &|| Ok(self.clock.wait()?) };
        let theirs = Side { call: &burns_call, wait: &|| Ok(self.burn.sync()?) };
        let counts = (ours.warm_up(self.window)?, theirs.warm_up(self.window)?);

        call()?;
        let result = self.device.read(out)?.wait()?;
        let difference = difference(&result, &like_ours(burns()).try_into_vec_as()?);
        let agrees = difference <= self.storage.tolerance();
        let (mut our_times, mut burns_times) = (Vec::new(), Vec::new());
        for _ in 0..if agrees { ROUNDS } else { 0 } {
            our_times.push(ours.seconds(counts.0)?);
            burns_times.push(theirs.seconds(counts.1)?);
        }

        let mut cells = vec![work.name.to_string(), work.sizes, self.storage.ours().to_string()];
        if agrees {
            let (ours, burns) = (median(our_times), median(burns_times));
            cells.extend([1e3 * ours, 1e3 * burns].map(|milliseconds| format!("{milliseconds:.3}")));
            cells.extend([ours, burns].map(|seconds| format!("{:.1}", work.amount / seconds)));
            cells.extend([work.unit.into(), format!("{:.2}", burns / ours)]);
        } else {
            cells.extend(["–", "–", "–", "–", work.unit, "–"].map(String::from));
            self.wrong += 1;
        }
        cells.push(format!("{difference:.0e}"));
        eprintln!("{}", cells.join(" "));
        self.table.row(cells);
        Ok(())
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let device = wgpu::device()?;
    let (burn, setup) = Burn::wgpu_options().init_with_setup()?;
    let (ours, adapter) = (device.info().clone(), setup.adapter.get_info());
    println!("h1 on {}", ours.device);
    println!("burn {BURN} on {}, {} {}", adapter.name, adapter.backend, adapter.driver_info);
    ensure!(
        ours.device.starts_with(&format!("{}, {} ", adapter.name, adapter.backend)),
        "these are two adapters: WGPU_ADAPTER_NAME chooses h1's, CUBECL_WGPU_DEFAULT_DEVICE burn's"
    );
    let has = |storage: Storage| ours.dtypes.contains(&storage.ours()) && burn.supports_dtype(storage.burns());
    let storages = match arguments.dtype {
        Some(storage) => vec![storage],
        None => [Storage::F32, Storage::F16].into_iter().filter(|storage| has(*storage)).collect(),
    };
    ensure!(storages.iter().all(|storage| has(*storage)), "the adapter has no {}", storages[0].ours());

    let table = Table::new(&[
        ("op", Align::Left),
        ("sizes", Align::Left),
        ("dtype", Align::Left),
        ("h1 ms", Align::Right),
        ("burn ms", Align::Right),
        ("h1", Align::Right),
        ("burn", Align::Right),
        ("unit", Align::Left),
        ("h1 is faster by", Align::Right),
        ("difference", Align::Right),
    ]);
    let window = Duration::from_millis(u64::from(arguments.budget_ms)) / ROUNDS;
    let clock = Clock::new(&device, window)?;
    let only = arguments.only.clone();
    let mut bench = Bench { device, clock, burn, storage: Storage::F32, window, only, table, wrong: 0 };
    for storage in storages {
        bench.storage = storage;
        for sizes in PRODUCTS {
            bench.product(sizes)?;
        }
        bench.attention(ATTENTION)?;
    }
    println!("\n{}", bench.table.text());
    ensure!(bench.wrong == 0, "the sides differ in {} rows, which have no time", bench.wrong);
    Ok(())
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        // A wrong argument is an error like others; help is asked for.
        Err(error) if error.use_stderr() => {
            eprint!("{error}");
            return ExitCode::FAILURE;
        }
        Err(help) => help.exit(),
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

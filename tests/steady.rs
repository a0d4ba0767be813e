//! A step in steady state: how many ops it launches is a number, and on `cpu` it makes next to no memory on the host.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use h1::backend::ops::{LossWeights, Sample, Scaling};
use h1::backend::select::{self, Name};
use h1::backend::{DType, Device, Segments, wgpu};
use h1::bench::shapes::{Shape, random_model};
use h1::model::config::{BlockKind, ModelConfig};
use h1::model::{Activations, Cache, Column, FinalNorm, Keep, Logits, LossKind, Model};
use h1::text::packing::{Batch, NO_LABEL, Segment};
use h1::train::Trainer;
use h1::train::optimizer::{AdamWOptions, Trained};
use h1::train::teacher::Teacher;
use h1::train::trainer::{Divisor, Room, TrainerOptions};

/// The system's allocator, counting what is asked of it.
struct Counting;

static CALLS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

fn count(size: usize) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    BYTES.fetch_add(size as u64, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time: the allocator counts for the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls to the allocator and bytes of the least of several runs: the threads of the pool hand each other work in
/// blocks of memory, a new one now and then.
fn made(mut run: impl FnMut()) -> (u64, u64) {
    let one = |()| {
        let before = (CALLS.load(Ordering::SeqCst), BYTES.load(Ordering::SeqCst));
        run();
        (CALLS.load(Ordering::SeqCst) - before.0, BYTES.load(Ordering::SeqCst) - before.1)
    };
    [(); 8].map(one).into_iter().min().unwrap()
}

fn launched(device: &Device, run: impl FnOnce()) -> u64 {
    let before = device.launches();
    run();
    device.launches() - before
}

/// Two attention and two Mamba layers, by turns.
fn hybrid(device: &Device) -> Model {
    random_model(device, &config(), 2, DType::F32).unwrap()
}

fn config() -> ModelConfig {
    ModelConfig { blocks: vec![BlockKind::Attention; 4], ..Shape::Arithmetic.config() }
}

/// What decoding needs.
struct Decoder<'a> {
    model: &'a Model,
    activations: Activations,
    cache: Cache,
    norm: FinalNorm,
    logits: Logits,
    columns: [Column; 2],
    chosen: Column,
}

impl<'a> Decoder<'a> {
    fn new(model: &'a Model, tokens: usize, sequences: usize) -> Self {
        let device = model.device();
        let column = |dtype| Column::new(device, dtype, sequences).unwrap();
        Decoder {
            model,
            activations: Activations::new(model, Keep::Nothing, tokens, sequences).unwrap(),
            cache: Cache::new(model, sequences, 512, sequences * 512).unwrap(),
            norm: FinalNorm::new(model, sequences).unwrap(),
            logits: Logits::new(model, sequences).unwrap(),
            columns: [column(DType::F32), column(DType::F32)],
            chosen: column(DType::U32),
        }
    }

    /// `ids` in as many sequences as `segments` has, and the next token of each.
    fn step(&mut self, ids: &[u32], segments: &Segments, last: &[u32]) {
        let (model, n) = (self.model, last.len());
        model.forward(&mut self.activations, ids, segments, Some(&mut self.cache), None).unwrap();
        let normed = self.norm.forward(model, self.activations.output().unwrap(), last).unwrap();
        let logits = self.logits.forward(model, normed).unwrap();
        let [temperatures, uniforms] = [0, 1].map(|i| self.columns[i].of(n).unwrap());
        let out = self.chosen.of(n).unwrap();
        model.device().sample(&Sample { logits, temperatures, uniforms, out }).unwrap();
    }
}

fn segments(sequences: usize, len: usize, past: usize) -> Segments {
    let mut segments = Segments::default();
    (0..sequences).for_each(|slot| segments.push(len, past, slot).unwrap());
    segments
}

fn trainer(device: &Device, tokens: usize, recompute: bool) -> Trainer {
    let teacher = Arc::new(random_model(device, &config(), 0, DType::F32).unwrap());
    let options = TrainerOptions {
        trained: Trained::All,
        optimizer: AdamWOptions::default(),
        loss: LossKind {
            weights: LossWeights { reverse_kl: 1.0, forward_kl: 0.0, cross_entropy: 0.0 },
            scaling: Scaling::default(),
        },
        divisor: Divisor::Counted,
        recompute,
        patience: 1,
    };
    let teacher = Teacher::live(teacher);
    Trainer::new(hybrid(device), Some(teacher), options, Room { tokens, segments: 1 }).unwrap()
}

fn batch(tokens: usize) -> [Batch; 1] {
    [Batch {
        ids: (0..tokens).map(|at| (at % 32) as u32).collect(),
        labels: vec![NO_LABEL; tokens],
        counted: vec![true; tokens],
        segments: vec![Segment { start: 0, len: tokens, document: 0 }],
    }]
}

/// Ops of a forward pass with a cache: embedding; norm, q, k and v at once, a rotation with a write of pages, attention, output;
/// norm, z, x, B, C and the low-rank dt at once, dt, convolution with scan, output; norm, gate and up at once with the gated
/// activation, down.
const ATTENTION: u64 = 5;
const MAMBA: u64 = 5;
const MLP: u64 = 3;
const FORWARD: u64 = 1 + 2 * (ATTENTION + MLP) + 2 * (MAMBA + MLP);
/// Those of them that are two in one.
const OF_TWO: u64 = 2 + 2 + 4;
/// Dispatches of the WGSL backend for a decoded token, one for each op, two for one of two and for a write of pages, and for a
/// training step, where sums take several.
const DISPATCHES_OF_A_TOKEN: u64 = FORWARD + OF_TWO + 2 + CHOICE;
const DISPATCHES_OF_A_STEP: u64 = 217;
/// Gathered rows, norm, head, choice.
const CHOICE: u64 = 4;

#[test]
fn prefill_and_decoding_launch_the_same_ops_whatever_their_sizes() {
    let _alone = alone();
    for name in [Name::Reference, Name::Cpu] {
        let device = select::open(name, None).unwrap();
        let model = hybrid(&device);
        let mut decoder = Decoder::new(&model, 40, 2);
        let prefill = launched(&device, || decoder.step(&[5; 40], &segments(2, 20, 0), &[19, 39]));
        let decode = launched(&device, || decoder.step(&[6; 2], &segments(2, 1, 20), &[0, 1]));
        let alone = launched(&device, || decoder.step(&[6], &segments(1, 1, 21), &[0]));
        assert_eq!([prefill, decode, alone], [FORWARD + CHOICE; 3], "{name}");
    }
}

#[test]
fn a_training_step_launches_a_number_of_ops_that_holds() {
    let _alone = alone();
    for name in [Name::Reference, Name::Cpu] {
        let device = select::open(name, None).unwrap();
        for (recompute, expected) in [(false, 185), (true, 219)] {
            let mut trainer = trainer(&device, 12, recompute);
            let step = |trainer: &mut Trainer| {
                trainer.step(&batch(12), 1e-3).unwrap();
            };
            let first = launched(&device, || step(&mut trainer));
            let second = launched(&device, || step(&mut trainer));
            assert_eq!([first, second], [expected; 2], "{name}, recompute {recompute}");
        }
    }
}

#[test]
fn steps_on_wgpu_are_a_number_of_dispatches_and_few_submissions() {
    let _alone = alone();
    let (device, counters) = match wgpu::device_with(&wgpu::Options::default()) {
        Ok(opened) => opened,
        // A machine without an adapter says so; in CI that is a failure.
        Err(error) if std::env::var_os("CI").is_none() => return println!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    };
    let handed = |run: &mut dyn FnMut()| {
        let before = (counters.dispatches(), counters.submissions());
        run();
        (counters.dispatches() - before.0, counters.submissions() - before.1)
    };
    let model = hybrid(&device);
    let mut decoder = Decoder::new(&model, 40, 2);
    decoder.step(&[5; 40], &segments(2, 20, 0), &[19, 39]);
    let token = handed(&mut || decoder.step(&[6; 2], &segments(2, 1, 20), &[0, 1]));
    let mut trainer = trainer(&device, 12, false);
    trainer.compile_ahead(|_, _| {}).unwrap();
    let made = counters.pipelines();
    let mut step = || {
        trainer.step(&batch(12), 1e-3).unwrap();
    };
    step();
    assert_eq!(counters.pipelines(), made, "a pipeline that a step needs was not compiled ahead");
    let step = handed(&mut step);
    assert_eq!([token.0, step.0], [DISPATCHES_OF_A_TOKEN, DISPATCHES_OF_A_STEP]);
    assert!(token.1 <= 4 && step.1 <= 12, "submissions of a token and of a step: {} and {}", token.1, step.1);
}

#[test]
fn what_is_compiled_ahead_on_wgpu_is_all_that_is_needed_and_nothing_is_done() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let options = wgpu::Options { folder: Some(folder.path().into()), ..Default::default() };
    let (device, counters) = match wgpu::device_with(&options) {
        Ok(opened) => opened,
        Err(error) if std::env::var_os("CI").is_none() => return println!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    };
    let model = hybrid(&device);
    let before = (device.launches(), device.allocations(), counters.dispatches());
    let mut heard = Vec::new();
    h1::model::compile_ahead(&model, |done, all| heard.push((done, all))).unwrap();
    assert_eq!(before, (device.launches(), device.allocations(), counters.dispatches()));
    assert_eq!(counters.pipelines(), heard.len() as u64);
    assert!(heard.iter().zip(1..).all(|(&(done, all), n)| done == n && all == heard.len()), "{heard:?}");
    let mut decoder = Decoder::new(&model, 32, 1);
    decoder.step(&[5; 32], &segments(1, 32, 0), &[31]);
    decoder.step(&[6], &segments(1, 1, 32), &[0]);
    assert_eq!(counters.pipelines(), heard.len() as u64);
    // Kept when the device goes, whole; what is not its own is ignored and written again.
    drop(decoder);
    drop(model);
    drop(device);
    let kept = || std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>();
    let files = kept();
    assert_eq!(files.len(), 1, "{files:?}");
    let good = std::fs::read(&files[0]).unwrap();
    std::fs::write(&files[0], &good[..good.len() / 2]).unwrap();
    let (device, _) = wgpu::device_with(&options).unwrap();
    let model = hybrid(&device);
    Decoder::new(&model, 32, 1).step(&[5; 32], &segments(1, 32, 0), &[31]);
    drop(model);
    drop(device);
    assert_eq!(kept(), files);
    assert!(std::fs::metadata(&files[0]).unwrap().len() > good.len() as u64 / 2);
}

#[test]
fn a_steady_step_on_the_cpu_makes_no_memory_that_grows_with_its_sizes() {
    let _alone = alone();
    let device = select::open(Name::Cpu, std::num::NonZeroUsize::new(2)).unwrap();
    let model = hybrid(&device);
    let mut counts = Vec::new();
    for tokens in [64, 256] {
        let mut decoder = Decoder::new(&model, tokens, 2);
        let (ids, both, last) =
            (vec![5; tokens], segments(2, tokens / 2, 0), [tokens as u32 / 2 - 1, tokens as u32 - 1]);
        let prefill = made(|| decoder.step(&ids, &both, &last));
        let one = segments(2, 1, tokens / 2);
        let decode = made(|| decoder.step(&[6; 2], &one, &[0, 1]));
        let mut trainer = trainer(&device, tokens, false);
        let batch = batch(tokens);
        let train = made(|| {
            trainer.step(&batch, 1e-3).unwrap();
        });
        println!("{tokens} tokens: prefill {prefill:?}, decode {decode:?}, training step {train:?} (calls, bytes)");
        counts.push([prefill, decode, train]);
    }
    assert_eq!(counts[0], counts[1]);
}

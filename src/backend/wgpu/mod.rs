//! The WGSL backend: any GPU with a Vulkan, Metal or DX12 driver, through wgpu.
//!
//! - `adapter`: which adapters there are and what they have; everything that may be missing is asked about there.
//! - `memory`, `scratch`, `transfer`: buffers, the windows of them that a dispatch binds, values from and to the host.
//! - `shaders`, `pipelines`: files of `shaders/` and the variants of them that are compiled, each once.
//! - `call`, `recorder`: an op's views and sizes as a dispatch, and dispatches as submissions.
//! - `cooperative`: whether the adapter's cooperative matrices are right.
//! - `products`, `dense`, `elementwise`, `attention`, `mixers`, `loss`, `rows`, `optimiser`: the ops, a function each; `columns`: the
//!   mixers where their matrices do not fit into a binding.
//!
//! A linear weight (`Order::Weight`) lies row after row. Sums are f32 in an order that the sizes fix; there are no
//! atomics. Nothing waits but a read.

mod adapter;
mod attention;
mod call;
mod columns;
mod cooperative;
mod dense;
mod elementwise;
mod loss;
mod memory;
mod mixers;
mod optimiser;
mod pipelines;
mod products;
mod recorder;
mod rows;
mod scratch;
mod shaders;
mod transfer;

use std::sync::{Mutex, PoisonError};

pub use adapter::Options;
use adapter::{Abilities, Failure, Opened};
use call::Call;
use memory::Memory;
use pipelines::{Access, Pipelines};
pub use recorder::Counters;
use recorder::Recorder;
use scratch::{Scratch, Slot};
use shaders::Kernel;
use transfer::Stages;

use super::cache::Cache;
use super::{Backend, BackendInfo, BufferId, DType, Device, Error, HostSlice, Largest, Readback, Result, View, ops};

/// Tokens between two states that the scan saves.
const SCAN_CHUNK: usize = 16;

/// The backend. One op at a time; a call from another thread waits.
struct Wgpu {
    info: BackendInfo,
    gpu: Mutex<Gpu>,
}

/// A device that is open.
struct Gpu {
    device: ::wgpu::Device,
    name: String,
    abilities: Abilities,
    failure: Failure,
    memory: Memory,
    pipelines: Pipelines,
    recorder: Recorder,
    scratch: Scratch,
    stages: Stages,
    /// The pipelines of the calls so far, where calls are planned and not made.
    plan: Option<Vec<(Kernel, Access)>>,
}

/// An adapter of this machine.
pub struct Adapter(::wgpu::Adapter);

impl Adapter {
    /// What it is, what it has and what it lacks.
    pub fn describe(&self) -> String {
        adapter::describe(&self.0)
    }

    /// Its device, kept from some of what it has; and the numbers of what is handed to it.
    ///
    /// # Errors
    /// When its driver refuses.
    pub fn open(&self, options: &Options) -> Result<(Device, Counters)> {
        let gpu = Gpu::new(adapter::open(&self.0, options)?, options)?;
        let counters = gpu.recorder.counters();
        let dtypes = if gpu.abilities.f16 { vec![DType::F32, DType::F16] } else { vec![DType::F32] };
        let info = BackendInfo {
            name: "wgpu",
            device: gpu.name.clone(),
            // Values of all ops but logits, losses, states and what the optimiser keeps may be f16.
            activations: dtypes.clone(),
            dtypes,
            scan_chunk: SCAN_CHUNK,
            chunk_values: crate::backend::CHUNK_VALUES,
            batch_invariant: options.batch_invariant,
            records: false,
        };
        Ok((Device::new(Wgpu { info, gpu: Mutex::new(gpu) }), counters))
    }
}

/// The device of the adapter that `WGPU_ADAPTER_NAME` names, or of the first real GPU, or of the first.
///
/// # Errors
/// When there is no adapter, or it cannot be opened.
pub fn device() -> Result<Device> {
    device_with(&Options::default()).map(|(device, _)| device)
}

/// [`device`] kept from some of what its adapter has; and the numbers of what is handed to it.
///
/// # Errors
/// When there is no adapter, or it cannot be opened.
pub fn device_with(options: &Options) -> Result<(Device, Counters)> {
    Adapter(adapter::choose()?).open(options)
}

/// The adapter that [`device`] would open, and whether it is a real GPU.
///
/// # Errors
/// When there is none.
pub fn describe() -> Result<(String, bool)> {
    let adapter = adapter::choose()?;
    Ok((adapter::describe(&adapter), adapter::is_hardware(&adapter)))
}

/// Every adapter of this machine, real GPUs first.
pub fn adapters() -> Vec<Adapter> {
    adapter::adapters().into_iter().map(Adapter).collect()
}

impl Gpu {
    fn new(opened: Opened, options: &Options) -> Result<Self> {
        let Opened { device, queue, abilities, name, failure, entry } = opened;
        let mut memory = Memory::new(&device, &name, abilities);
        let counters = Counters::default();
        let folder = options.folder.as_deref().map_or_else(|| Cache::of_user("wgpu"), Cache::at);
        let pipelines = Pipelines::new(&device, &abilities, (folder, entry), counters.clone());
        let recorder = Recorder::new(&device, &queue, &abilities, &memory, &pipelines, counters)?;
        let scratch = Scratch::new(&mut memory)?;
        let stages = Stages::default();
        Ok(Gpu { device, name, abilities, failure, memory, pipelines, recorder, scratch, stages, plan: None })
    }

    fn failed(&self, op: &'static str, what: String) -> Error {
        Error::Failed { device: self.name.clone(), what: op.into(), why: what }
    }

    /// That nothing has failed so far.
    fn sound(&self, op: &'static str) -> Result<()> {
        self.failure.get().map_or(Ok(()), |what| Err(self.failed(op, what)))
    }
}

impl Wgpu {
    fn gpu<R>(&self, op: &'static str, run: impl FnOnce(&mut Gpu) -> Result<R>) -> Result<R> {
        let mut gpu = self.gpu.lock().unwrap_or_else(PoisonError::into_inner);
        gpu.sound(op)?;
        run(&mut gpu)
    }
}

/// The ops that are a function of a module each.
macro_rules! calls {
    ($($module:ident: $($op:ident($arguments:ident)),*;)*) => {$($(
        fn $op(&self, op: &ops::$arguments) -> Result<()> {
            self.gpu(stringify!($op), |gpu| $module::$op(&mut Call { op: stringify!($op), gpu }, op))
        }
    )*)*};
}

impl Backend for Wgpu {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<BufferId> {
        if !self.info.dtypes.contains(&dtype) && dtype != DType::U32 {
            let what = format!("{dtype} on {}", self.info.device);
            return Err(Error::Unsupported { backend: "wgpu", op: "alloc", what });
        }
        self.gpu("alloc", |gpu| gpu.memory.alloc("a buffer", dtype, len))
    }

    fn free(&self, buffer: BufferId) {
        let mut gpu = self.gpu.lock().unwrap_or_else(PoisonError::into_inner);
        gpu.recorder.forget(buffer);
        gpu.memory.free(buffer);
    }

    fn reserve(&self, largest: &Largest) -> Result<()> {
        self.gpu("reserve", |gpu| {
            let mut call = Call { op: "reserve", gpu };
            for (slot, values) in rows::sums(largest.tokens, largest.width) {
                call.scratch(slot, 1, values)?;
            }
            call.scratch(Slot::Partials, 1, optimiser::MOST_SUMS.max(largest.tokens * largest.heads)).map(drop)
        })
    }

    fn write(&self, src: HostSlice<'_>, dst: View) -> Result<()> {
        self.gpu("write", |gpu| gpu.write(src, dst))
    }

    fn read(&self, src: View) -> Result<Readback> {
        self.gpu("read", |gpu| gpu.read(src))
    }

    fn compile_ahead(
        &self,
        calls: &mut dyn FnMut() -> Result<()>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<()> {
        let scratch = self.gpu("compile_ahead", |gpu| {
            gpu.plan = Some(Vec::new());
            gpu.memory.planning = true;
            Ok(gpu.scratch.take())
        })?;
        let result = calls();
        self.gpu("compile_ahead", |gpu| {
            gpu.memory.planning = false;
            gpu.scratch.put_back(scratch, &mut gpu.memory);
            let plan = gpu.plan.take().unwrap_or_default();
            result.map(|()| gpu.pipelines.make_all(plan, progress))
        })
    }

    fn start_clock(&self) -> Result<bool> {
        self.gpu("clock", |gpu| Ok(gpu.recorder.start_clock()))
    }

    fn stop_clock(&self) -> Result<f64> {
        self.gpu("clock", Gpu::stop_clock)
    }

    calls! {
        dense: embed(Embed), embed_backward(EmbedBackward), rms_norm(RmsNorm), rms_norm_backward(RmsNormBackward);
        products: linear(Linear), linear_backward_input(LinearBackwardInput),
            linear_backward_weight(LinearBackwardWeight);
        elementwise: swiglu(Swiglu), swiglu_backward(SwigluBackward), rope(Rope), neg_exp(NegExp),
            neg_exp_backward(NegExpBackward);
        columns: attention(Attention), attention_backward(AttentionBackward), conv1d(Conv1d),
            conv1d_backward(Conv1dBackward), selective_scan(SelectiveScan),
            selective_scan_backward(SelectiveScanBackward);
        loss: head_loss(HeadLoss), head_loss_gradient(HeadLossGradient), argmax(Argmax), sample(Sample);
        rows: gather(Gather), scatter_add(ScatterAdd), page_write(PageWrite), copy(Copy), fill(Fill), scale(Scale),
            weighted_sum(WeightedSum);
        optimiser: squared_norm(SquaredNorm), clip_factor(ClipFactor), adamw(AdamW);
    }
}

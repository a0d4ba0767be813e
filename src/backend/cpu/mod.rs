//! The CPU backend: all cores, SIMD chosen at run time, the same bits on every machine.
//!
//! Each output of a product is one chain of fused multiply-adds over the inner index, in order, with lanes across outputs;
//! reductions have fixed shapes; elementary functions are our own. So rows, chunks, threads and the width of the vectors change
//! no bit of a forward output; and threads and vectors none of a gradient.

pub mod adamw;
pub mod attention;
pub mod attention_backward;
mod blocks;
mod call;
pub mod conv;
pub mod conv_backward;
pub mod elementwise;
pub mod gradient;
pub mod head_loss;
mod lines;
pub mod math;
pub mod matrix;
pub mod norm;
mod ops;
pub mod pack;
pub mod products;
pub mod rope;
pub mod rows;
pub mod sample;
pub mod scan;
pub mod scan_backward;
mod scratch;
pub mod segment;
pub mod simd;
#[cfg(test)]
mod testing;
pub mod tile;
mod work;

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};

use call::Call;
use scan::SCAN_CHUNK;
use simd::Simd;

use super::host::{HostMemory, WeightOrder};
use super::{BackendInfo, DType, Device, Error, Result};

/// The backend. One op at a time; a call from another thread waits. Kernels keep their scratch by thread, as much as the
/// largest call so far took.
struct Cpu {
    info: BackendInfo,
    simd: Simd,
    pool: rayon::ThreadPool,
    state: Mutex<State>,
}

struct State {
    memory: HostMemory,
    /// Small parameters of an op that are stored in 16 bits, as f32.
    widened: [Vec<f32>; 2],
}

/// The device of this machine's processor, on `threads` threads, or one a core. The calling thread becomes one of them if it
/// can, so that its own calls need not wake another.
///
/// # Errors
/// When the threads cannot be started.
pub fn device(threads: Option<NonZeroUsize>) -> Result<Device> {
    device_with(threads, Simd::detect())
}

/// [`device`] on an instruction set that need not be the widest.
///
/// # Errors
/// When the threads cannot be started.
pub fn device_with(threads: Option<NonZeroUsize>, simd: Simd) -> Result<Device> {
    let count = count(threads);
    let builder = || rayon::ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("h1-cpu-{i}"));
    // In a pool of the calling thread alone the calls of others would wait for ever.
    let joined = if count > 1 { builder().use_current_thread().build().ok() } else { None };
    let pool = joined.map_or_else(|| builder().build(), Ok);
    let pool = pool.map_err(|error| Error::Unavailable { backend: "cpu".into(), why: error.to_string() })?;
    let device = describe_with(count, simd);
    let state = State { memory: HostMemory::new(&device, WeightOrder::Panels), widened: [Vec::new(), Vec::new()] };
    let info = BackendInfo {
        name: "cpu",
        device,
        dtypes: vec![DType::F32, DType::Bf16, DType::F16],
        activations: vec![DType::F32],
        scan_chunk: SCAN_CHUNK,
        chunk_values: crate::backend::CHUNK_VALUES,
        batch_invariant: true,
        records: false,
    };
    Ok(Device::new(Cpu { info, simd, pool, state: Mutex::new(state) }))
}

/// The processor, the widest instruction set, and the threads that [`device`] would use.
pub fn describe(threads: Option<NonZeroUsize>) -> String {
    describe_with(count(threads), Simd::detect())
}

fn describe_with(threads: usize, simd: Simd) -> String {
    let plural = if threads == 1 { "" } else { "s" };
    format!("{}, {}, {threads} thread{plural}", model_name(), simd.name())
}

fn count(threads: Option<NonZeroUsize>) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    threads.map_or_else(cores, NonZeroUsize::get)
}

impl Cpu {
    fn memory<R>(&self, f: impl FnOnce(&mut HostMemory) -> R) -> R {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).memory)
    }

    /// Runs an op on the pool, with the memory in its hands.
    fn call(
        &self,
        op: &'static str,
        run: impl for<'m> FnOnce(&mut Call<'m>, &'m mut [Vec<f32>; 2]) -> Result<()> + Send,
    ) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { memory, widened } = &mut *state;
        self.pool.install(|| run(&mut Call { op, memory }, widened))
    }
}

/// The processor as the system names it, or its architecture.
fn model_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| Some(line.split_once(':')?.1.trim().into())).unwrap_or_else(|| std::env::consts::ARCH.into())
}

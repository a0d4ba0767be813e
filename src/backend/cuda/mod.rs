//! The CUDA backend: kernels of our own compiled at first use, products through cuBLASLt.
//!
//! The host side stands on a [`driver::Driver`]: `real` is the card's, found at run time; `emulated` runs the same kernels'
//! text on the CPU, so that everything above the driver is tested without a card; `dry` does nothing, which tells what
//! memory a run will take. Weights are stored in f32, bf16 or f16, activations too; sums are f32. All calls go to one
//! stream in order, and none waits for the device.

mod arena;
mod blas;
mod call;
#[doc(hidden)]
pub mod compiler;
mod dense;
pub mod driver;
#[doc(hidden)]
pub mod dry;
#[cfg(unix)]
#[doc(hidden)]
pub mod emulated;
mod heap;
mod libraries;
mod losses;
mod memory;
mod mixers;
mod ops;
mod products;
mod real;
pub mod source;
mod staging;
#[doc(hidden)]
pub mod variants;

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use call::{Buffer, Call, Recorded, State, padding};
use driver::{Driver, Limits};

use super::{
    BackendInfo, BufferId, CHUNK_VALUES, DType, Device, Error, HostSlice, Largest, Readback, RecordingId, Result, View,
};

/// The backend over a driver.
struct Cuda {
    info: BackendInfo,
    driver: Box<dyn Driver>,
    state: Mutex<State>,
}

/// The first NVIDIA card.
///
/// # Errors
/// When the driver or a library is missing or too old, or there is no card: says which.
pub fn device() -> Result<Device> {
    Ok(over(Box::new(real::Card::open(0)?)))
}

/// The first NVIDIA card in words.
///
/// # Errors
/// As [`device`], which it does not open.
pub fn describe() -> Result<String> {
    real::describe(0)
}

/// A device over any driver.
fn over(driver: Box<dyn Driver>) -> Device {
    let info = BackendInfo {
        name: "cuda",
        device: words(driver.limits()),
        dtypes: vec![DType::F32, DType::F16, DType::Bf16],
        activations: vec![DType::F32, DType::F16, DType::Bf16],
        scan_chunk: mixers::SCAN_CHUNK,
        chunk_values: (driver.limits().memory_bytes / 128).clamp(CHUNK_VALUES, 1 << 29),
        batch_invariant: false,
        records: true,
    };
    Device::new(Cuda { info, driver, state: Mutex::default() })
}

/// A device as a person knows it.
fn words(limits: &Limits) -> String {
    let (gibibytes, (major, minor)) = (limits.memory_bytes as f64 / f64::from(1 << 30), limits.capability);
    format!("{}, sm_{major}{minor}, {gibibytes:.1} GiB", limits.name)
}

impl Cuda {
    /// Begins a call of an op.
    fn call(&self, op: &'static str) -> Call<'_> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Call { op, driver: &*self.driver, state }
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<BufferId> {
        if dtype == DType::F64 {
            return Err(Error::Unsupported { backend: "cuda", op: "alloc", what: "f64 values".into() });
        }
        let bytes = len.saturating_mul(dtype.size());
        let start = self.driver.allocate(bytes, "a buffer")?;
        let mut state = self.call("alloc").state;
        let id = BufferId(state.next);
        state.next += 1;
        state.buffers.insert(id, Buffer { start, dtype, len });
        Ok(id)
    }

    fn free(&self, id: BufferId) {
        if let Some(buffer) = self.call("free").state.buffers.remove(&id) {
            self.driver.free(buffer.start);
        }
    }

    /// Scratch is made by the largest call so far; this makes it for calls of these sizes.
    fn reserve(&self, largest: &Largest) -> Result<()> {
        let call = self.call("reserve");
        let bytes = ops::scratch_bytes(largest).max(mixers::scratch_bytes(call.limits(), largest));
        let Call { driver, mut state, .. } = call;
        state.reserve(driver, bytes).map(drop)
    }

    /// The calls are made on a dry device of these limits; what they take of it is planned on this one.
    fn plan(&self, calls: &mut dyn FnMut(&Device) -> bool) -> Result<()> {
        let (device, counters) = dry::device(self.driver.limits());
        if calls(&device) { self.driver.plan(counters.peak_bytes()) } else { Ok(()) }
    }

    /// The first run of a recording loads kernels and makes scratch, the second is recorded, the others replay it. Scratch
    /// that was made anew since then begins this again.
    fn record(&self, id: RecordingId, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let state = self.call("record").state;
        let (recorded, scratch) = (state.recordings.get(&id).copied(), state.scratch());
        drop(state);
        let (now, done) = match recorded {
            Some(Recorded::Graph(graph, with)) if with == scratch => return self.driver.replay(graph),
            Some(Recorded::Ran) => {
                self.driver.begin_recording()?;
                let made = ops();
                let graph = self.driver.end_recording();
                if let (Err(_), Ok(graph)) = (&made, &graph) {
                    self.driver.forget(*graph);
                }
                let graph = made.and(graph)?;
                (Recorded::Graph(graph, scratch), self.driver.replay(graph))
            }
            _ => {
                self.forget(id);
                (Recorded::Ran, ops())
            }
        };
        self.call("record").state.recordings.insert(id, now);
        done
    }

    fn forget(&self, id: RecordingId) {
        if let Some(Recorded::Graph(graph, _)) = self.call("forget").state.recordings.remove(&id) {
            self.driver.forget(graph);
        }
    }

    fn write(&self, src: HostSlice<'_>, dst: View) -> Result<()> {
        let call = self.call("write");
        let place = call.state.place(dst)?;
        if src.len() != dst.len() {
            let what = format!("{} values for a view of [{}, {}]", src.len(), dst.rows, dst.cols);
            return Err(Error::Argument { op: "write", what });
        }
        if let Some(region) = padding(dst, &place) {
            self.driver.clear(region)?;
        }
        if dst.is_empty() {
            return Ok(());
        }
        self.driver.upload(&bytes_of(src, dst.dtype), place.region())
    }

    fn read(&self, src: View) -> Result<Readback> {
        let call = self.call("read");
        let place = call.state.place(src)?;
        if src.is_empty() {
            return Ok(Readback::new(|| Ok(Vec::new())));
        }
        let finish = self.driver.download(place.region())?;
        Ok(Readback::new(move || Ok(values_of(&finish()?, src.dtype))))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for buffer in state.buffers.values() {
            self.driver.free(buffer.start);
        }
        state.release(&*self.driver);
    }
}

/// The bytes of values cast to a dtype.
fn bytes_of(values: HostSlice<'_>, dtype: DType) -> std::borrow::Cow<'_, [u8]> {
    use half::{bf16, f16};
    /// Values that a thread casts at a time.
    const PIECE: usize = 1 << 16;
    fn cast<T: Copy + Sync, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N] + Sync) -> Vec<u8> {
        let mut all = vec![0; values.len() * N];
        let pieces = all.par_chunks_mut(PIECE * N).zip(values.par_chunks(PIECE));
        pieces.for_each(|(all, values)| {
            all.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, &value)| *to = bytes(value));
        });
        all
    }
    fn through_f32<const N: usize>(values: HostSlice<'_>, bytes: impl Fn(f32) -> [u8; N] + Sync) -> Vec<u8> {
        match values {
            HostSlice::F32(values) => cast(values, bytes),
            HostSlice::Bf16(values) => cast(values, |value| bytes(value.to_f32())),
            HostSlice::F16(values) => cast(values, |value| bytes(value.to_f32())),
            HostSlice::U32(values) => cast(values, |value| bytes(value as f32)),
        }
    }
    match (values, dtype) {
        (HostSlice::F32(values), DType::F32) => bytemuck::cast_slice(values).into(),
        (HostSlice::Bf16(values), DType::Bf16) => bytemuck::cast_slice(values).into(),
        (HostSlice::F16(values), DType::F16) => bytemuck::cast_slice(values).into(),
        (HostSlice::U32(values), DType::U32) => bytemuck::cast_slice(values).into(),
        (values, DType::Bf16) => through_f32(values, |value| bf16::from_f32(value).to_ne_bytes()).into(),
        (values, DType::F16) => through_f32(values, |value| f16::from_f32(value).to_ne_bytes()).into(),
        (values, _) => through_f32(values, f32::to_ne_bytes).into(),
    }
}

/// The values of bytes of a dtype.
fn values_of(bytes: &[u8], dtype: DType) -> Vec<f32> {
    use half::{bf16, f16};
    let words = || bytes.as_chunks::<4>().0.iter();
    let halves = || bytes.as_chunks::<2>().0.iter();
    match dtype {
        DType::Bf16 => halves().map(|&half| bf16::from_ne_bytes(half).to_f32()).collect(),
        DType::F16 => halves().map(|&half| f16::from_ne_bytes(half).to_f32()).collect(),
        DType::U32 => words().map(|&word| u32::from_ne_bytes(word) as f32).collect(),
        DType::F32 | DType::F64 => words().map(|&word| f32::from_ne_bytes(word)).collect(),
    }
}

//! The CUDA backend: kernels of our own compiled at first use, products through cuBLASLt.
//!
//! The host side stands on a [`driver::Driver`]: `real` is the card's, found at run time; `emulated` runs the same kernels'
//! text on the CPU, so that everything above the driver is tested without a card. Weights are stored in f32, bf16 or f16,
//! activations too; sums are f32. All calls go to one stream in order, and none waits for the device.

mod blas;
mod call;
#[doc(hidden)]
pub mod compiler;
mod dense;
pub mod driver;
#[cfg(unix)]
#[doc(hidden)]
pub mod emulated;
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

use call::{Buffer, Call, State, padding};
use driver::{Driver, Limits};

use super::{BackendInfo, BufferId, DType, Device, Error, HostSlice, Largest, Readback, Result, View};

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
        batch_invariant: false,
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
    fn cast<const N: usize>(values: HostSlice<'_>, bytes: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
        match values {
            HostSlice::F32(values) => values.iter().flat_map(|&value| bytes(value)).collect(),
            HostSlice::Bf16(values) => values.iter().flat_map(|value| bytes(value.to_f32())).collect(),
            HostSlice::F16(values) => values.iter().flat_map(|value| bytes(value.to_f32())).collect(),
            HostSlice::U32(values) => values.iter().flat_map(|&value| bytes(value as f32)).collect(),
        }
    }
    match (values, dtype) {
        (HostSlice::F32(values), DType::F32) => bytemuck::cast_slice(values).into(),
        (HostSlice::Bf16(values), DType::Bf16) => bytemuck::cast_slice(values).into(),
        (HostSlice::F16(values), DType::F16) => bytemuck::cast_slice(values).into(),
        (HostSlice::U32(values), DType::U32) => bytemuck::cast_slice(values).into(),
        (values, DType::Bf16) => cast(values, |value| bf16::from_f32(value).to_ne_bytes()).into(),
        (values, DType::F16) => cast(values, |value| f16::from_f32(value).to_ne_bytes()).into(),
        (values, _) => cast(values, f32::to_ne_bytes).into(),
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

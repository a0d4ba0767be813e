//! Memory of the backends that live in host memory: buffers by id, and views of them as matrices.

use std::alloc::{self, Layout};
use std::collections::HashMap;
use std::ptr::NonNull;

use half::{bf16, f16};
use ndarray::{Array2, ArrayView2};

pub(super) mod table;

use super::{BufferId, DType, Error, HostSlice, Order, Readback, Result, View, WEIGHT_ROWS};

/// Alignment of every buffer, a cache line and the widest vector register.
const ALIGNMENT: usize = 64;

/// How a backend keeps a linear weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WeightOrder {
    /// Row after row.
    Rows,
    /// Panels of [`WEIGHT_ROWS`] outputs, `[padded_rows / WEIGHT_ROWS, in, WEIGHT_ROWS]`.
    Panels,
}

/// A type that buffers hold.
pub(super) trait Value: Copy {
    const DTYPE: DType;
    fn of_f32(value: f32) -> Self;
    fn of_f64(value: f64) -> Self;
    fn to_f32(self) -> f32;
    fn to_f64(self) -> f64;
}

macro_rules! value {
    ($($type:ty: $dtype:ident, $of_f32:expr, $of_f64:expr, $to_f32:expr, $to_f64:expr;)*) => {$(
        impl Value for $type {
            const DTYPE: DType = DType::$dtype;
            fn of_f32(value: f32) -> Self {
                $of_f32(value)
            }
            fn of_f64(value: f64) -> Self {
                $of_f64(value)
            }
            fn to_f32(self) -> f32 {
                $to_f32(self)
            }
            fn to_f64(self) -> f64 {
                $to_f64(self)
            }
        }
    )*};
}

value! {
    f32: F32, |x| x, |x| x as f32, |x| x, f64::from;
    f64: F64, f64::from, |x| x, |x| x as f32, |x| x;
    bf16: Bf16, bf16::from_f32, |x| bf16::from_f32(to_odd(x)), bf16::to_f32, bf16::to_f64;
    f16: F16, f16::from_f32, |x| f16::from_f32(to_odd(x)), f16::to_f32, f16::to_f64;
    u32: U32, |x| x as u32, |x| x as u32, |x| x as f32, f64::from;
}

/// The f32 beside `x` whose last bit says that something was cut off, so that rounding it again is rounding `x` once.
/// (`half` leaves out the lower half of a f64 when it rounds.)
fn to_odd(x: f64) -> f32 {
    let near = x as f32;
    let (exact, odd) = (f64::from(near) == x || !near.is_finite(), near.to_bits() & 1 == 1);
    match f64::from(near).abs() < x.abs() {
        _ if exact || odd => near,
        true => f32::from_bits(near.to_bits() + 1),
        false => f32::from_bits(near.to_bits() - 1),
    }
}

/// Evaluates an expression with `$type` standing for the type of a dtype.
macro_rules! with_type {
    ($dtype:expr, $type:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $type = f32;
                $body
            }
            DType::F64 => {
                type $type = f64;
                $body
            }
            DType::Bf16 => {
                type $type = bf16;
                $body
            }
            DType::F16 => {
                type $type = f16;
                $body
            }
            DType::U32 => {
                type $type = u32;
                $body
            }
        }
    };
}

struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
    dtype: DType,
    len: usize,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: allocated with this layout, and freed here alone.
            unsafe { alloc::dealloc(self.start.as_ptr(), self.layout) };
        }
    }
}

// SAFETY: a buffer owns its memory; nothing about it belongs to a thread.
unsafe impl Send for Buffer {}

/// The buffers of a device in host memory. All access goes through `&mut`, so whoever holds the memory holds every buffer.
pub(super) struct HostMemory {
    device: String,
    weights: WeightOrder,
    buffers: HashMap<BufferId, Buffer>,
    next: u64,
    used: usize,
    limit: usize,
}

/// A view that lies in its buffer: where it starts, and how it goes on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    start: *mut u8,
    panels: bool,
    /// The view.
    pub view: View,
}

impl Place {
    /// The first value. Valid for the view's span as long as the memory is held and the buffer is not freed.
    pub fn start<T: Value>(&self) -> *mut T {
        debug_assert_eq!(T::DTYPE, self.view.dtype);
        self.start.cast()
    }

    /// Values from the start to the value at a row and column.
    fn index(&self, row: usize, col: usize) -> usize {
        if self.panels {
            (row / WEIGHT_ROWS * self.view.cols + col) * WEIGHT_ROWS + row % WEIGHT_ROWS
        } else {
            row * self.view.stride + col
        }
    }

    /// Shows each value with its row and column.
    ///
    /// # Safety
    /// `T` is the type of the view, the place still exists, and nothing else touches it meanwhile.
    unsafe fn each<T: Value>(&self, mut visit: impl FnMut(usize, usize, &mut T)) {
        for row in 0..self.view.rows {
            for col in 0..self.view.cols {
                // SAFETY: the view's span lies in its buffer.
                visit(row, col, unsafe { &mut *self.start::<T>().add(self.index(row, col)) });
            }
        }
    }
}

impl HostMemory {
    /// Memory of a device with a name for errors, which keeps weights in the order given.
    pub fn new(device: impl Into<String>, weights: WeightOrder) -> Self {
        let (device, limit) = (device.into(), memory_limit());
        HostMemory { device, weights, buffers: HashMap::new(), next: 0, used: 0, limit }
    }

    fn out_of_memory(&self, what: &str, bytes: usize) -> Error {
        Error::OutOfMemory { device: self.device.clone(), what: what.into(), bytes }
    }

    /// A buffer of `len` zeros.
    pub fn alloc(&mut self, dtype: DType, len: usize) -> Result<BufferId> {
        let bytes = len.saturating_mul(dtype.size());
        let layout = Layout::from_size_align(bytes, ALIGNMENT).ok();
        let fits = self.used.checked_add(bytes).is_some_and(|total| total <= self.limit);
        let layout = layout.filter(|_| fits).ok_or_else(|| self.out_of_memory("a buffer", bytes))?;
        let start = if bytes == 0 {
            // A buffer of nothing still has an aligned address.
            NonNull::new(std::ptr::without_provenance_mut(ALIGNMENT))
        } else {
            // SAFETY: the size is not 0.
            NonNull::new(unsafe { alloc::alloc_zeroed(layout) })
        };
        let start = start.ok_or_else(|| self.out_of_memory("a buffer", bytes))?;
        let id = BufferId(self.next);
        self.next += 1;
        self.used += bytes;
        self.buffers.insert(id, Buffer { start, layout, dtype, len });
        Ok(id)
    }

    /// Gives a buffer back.
    pub fn free(&mut self, id: BufferId) {
        if let Some(buffer) = self.buffers.remove(&id) {
            self.used -= buffer.layout.size();
        }
    }

    /// Where a view lies, once it is known to lie in its buffer, without two rows on one value.
    pub fn place(&mut self, view: View) -> Result<Place> {
        let span = view.span();
        let rows_apart = match view.order {
            Order::Rows => view.rows <= 1 || view.stride >= view.cols,
            Order::Weight => view.stride == view.cols,
        };
        self.buffers
            .get(&view.buffer)
            .filter(|buffer| buffer.dtype == view.dtype && rows_apart && (view.is_empty() || span.end <= buffer.len))
            .map(|buffer| Place {
                // A view of nothing may start anywhere: nothing is read there.
                start: buffer.start.as_ptr().wrapping_add(span.start.wrapping_mul(view.dtype.size())),
                panels: view.order == Order::Weight && self.weights == WeightOrder::Panels,
                view,
            })
            .ok_or(Error::Memory { buffer: view.buffer, dtype: view.dtype, first: span.start, end: span.end })
    }

    /// Row-major values of the host into a view; padding becomes 0.
    pub fn write(&mut self, src: HostSlice<'_>, dst: View) -> Result<()> {
        let place = self.place(dst)?;
        if src.len() != dst.len() {
            let what = format!("{} values for a view of [{}, {}]", src.len(), dst.rows, dst.cols);
            return Err(Error::Argument { op: "write", what });
        }
        if dst.order == Order::Weight {
            let bytes = dst.span().len() * dst.dtype.size();
            // SAFETY: the view's span lies in its buffer, and zero bytes are the 0 of every dtype.
            unsafe { place.start.write_bytes(0, bytes) };
        }
        let cols = dst.cols;
        with_type!(dst.dtype, T => {
            // SAFETY: of the view's dtype, just placed, and the memory is held.
            unsafe {
                match src {
                    HostSlice::F32(src) => place.each(|r, c, to| *to = T::of_f32(src[r * cols + c])),
                    HostSlice::Bf16(src) => place.each(|r, c, to| *to = T::of_f32(src[r * cols + c].to_f32())),
                    HostSlice::F16(src) => place.each(|r, c, to| *to = T::of_f32(src[r * cols + c].to_f32())),
                    HostSlice::U32(src) => place.each(|r, c, to| *to = T::of_f64(f64::from(src[r * cols + c]))),
                }
            }
        });
        Ok(())
    }

    /// The values of a view, row-major.
    pub fn read(&mut self, src: View) -> Result<Readback> {
        let place = self.place(src)?;
        let mut values: Vec<f32> = Vec::new();
        values.try_reserve_exact(src.len()).map_err(|_| self.out_of_memory("a copy", 4 * src.len()))?;
        // SAFETY: of the view's dtype, just placed, and the memory is held.
        with_type!(src.dtype, T => unsafe { place.each(|_, _, value: &mut T| values.push(value.to_f32())) });
        Ok(Readback::new(move || Ok(values)))
    }

    /// The values of a view of any type, each exactly.
    pub fn load(&mut self, view: View) -> Result<Array2<f64>> {
        let place = self.place(view)?;
        let mut values = Array2::zeros((view.rows, view.cols));
        // SAFETY: of the view's dtype, just placed, and the memory is held.
        with_type!(view.dtype, T => unsafe { place.each(|r, c, value: &mut T| values[[r, c]] = value.to_f64()) });
        Ok(values)
    }

    /// Writes values into a view of their shape, or adds them to what is there; rounds once, and leaves padding as it is.
    pub fn store(&mut self, view: View, values: ArrayView2<f64>, add: bool) -> Result<()> {
        let place = self.place(view)?;
        with_type!(view.dtype, T => {
            let put = |r: usize, c: usize, to: &mut T| {
                let before = if add { to.to_f64() } else { 0.0 };
                *to = T::of_f64(before + values[[r, c]]);
            };
            // SAFETY: of the view's dtype, just placed, and the memory is held.
            unsafe { place.each(put) };
        });
        Ok(())
    }
}

/// Bytes that this process may hope for: an allocator that hands out more than there is leaves the process to be killed when it
/// writes. Without a limit where the system does not say.
fn memory_limit() -> usize {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let total = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<usize>().ok());
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|max| max.trim().parse().ok());
    total.map_or(usize::MAX, |kilobytes| kilobytes.saturating_mul(1024)).min(group.unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{DeviceId, padded_rows};

    fn memory(weights: WeightOrder) -> HostMemory {
        HostMemory::new("test", weights)
    }

    fn view(memory: &mut HostMemory, dtype: DType, rows: usize, cols: usize) -> View {
        let buffer = memory.alloc(dtype, padded_rows(rows) * cols).unwrap();
        View { device: DeviceId(0), buffer, dtype, order: Order::Rows, offset: 0, rows, cols, stride: cols }
    }

    #[test]
    fn what_is_written_is_read_in_every_type_and_order() {
        for weights in [WeightOrder::Rows, WeightOrder::Panels] {
            for dtype in [DType::F32, DType::Bf16, DType::F16, DType::F64] {
                for order in [Order::Rows, Order::Weight] {
                    let mut memory = memory(weights);
                    let view = View { order, ..view(&mut memory, dtype, 33, 3) };
                    let values: Vec<f32> = (0..99).map(|i| i as f32).collect();
                    memory.write(HostSlice::F32(&values), view).unwrap();
                    assert_eq!(memory.read(view).unwrap().wait().unwrap(), values);
                }
            }
        }
    }

    #[test]
    fn a_f64_is_rounded_once_to_16_bits() {
        // Just above and below the middle of two neighbours, and on it, where the even one wins.
        let middle = 1.0 + 2f64.powi(-8);
        for (shift, expected) in [(2f64.powi(-40), 1.0 + 2f64.powi(-7)), (-2f64.powi(-40), 1.0), (0.0, 1.0)] {
            assert_eq!(bf16::of_f64(middle + shift).to_f64(), expected);
        }
        assert_eq!(f16::of_f64(1.0 + 2f64.powi(-11) + 2f64.powi(-45)).to_f64(), 1.0 + 2f64.powi(-10));
        assert!(bf16::of_f64(f64::NAN).is_nan() && bf16::of_f64(1e300).is_infinite());
    }

    #[test]
    fn a_panel_holds_the_outputs_of_one_input_side_by_side_and_zeros_in_its_padding() {
        let mut memory = memory(WeightOrder::Panels);
        let flat = View { rows: 1, cols: 128, stride: 128, ..view(&mut memory, DType::F32, 33, 2) };
        memory.write(HostSlice::F32(&[7.0; 128]), flat).unwrap();
        let weight = flat.matrix(0, 33, 2, Order::Weight).unwrap();
        let values: Vec<f32> = (0..66).map(|i| i as f32).collect();
        memory.write(HostSlice::F32(&values), weight).unwrap();
        let mut expected = vec![0.0; 128];
        for (out, row) in values.chunks(2).enumerate() {
            for (input, value) in row.iter().enumerate() {
                expected[out / 32 * 64 + input * 32 + out % 32] = *value;
            }
        }
        assert_eq!(memory.read(flat).unwrap().wait().unwrap(), expected);
    }

    #[test]
    fn views_outside_of_a_buffer_of_another_type_or_freed_are_errors() {
        let mut memory = memory(WeightOrder::Rows);
        let view = view(&mut memory, DType::F32, 32, 2);
        let wrong = [
            View { rows: 33, ..view },
            View { offset: 1, ..view },
            View { offset: usize::MAX, ..view },
            View { rows: usize::MAX, stride: usize::MAX, ..view },
            View { stride: 1, ..view },
            View { dtype: DType::F64, ..view },
            View { dtype: DType::U32, ..view },
            View { order: Order::Weight, rows: 33, ..view },
        ];
        for view in wrong {
            assert!(matches!(memory.read(view), Err(Error::Memory { .. })), "{view:?}");
        }
        memory.free(view.buffer);
        assert!(matches!(memory.read(view), Err(Error::Memory { .. })));
        assert_ne!(memory.alloc(DType::F32, 1).unwrap(), view.buffer);
    }

    #[test]
    fn more_memory_than_there_is_is_an_error() {
        let mut memory = memory(WeightOrder::Rows);
        for len in [usize::MAX, usize::MAX / 4, isize::MAX as usize / 4, 1 << 50] {
            assert!(matches!(memory.alloc(DType::F32, len), Err(Error::OutOfMemory { .. })), "{len}");
        }
        assert!(memory.alloc(DType::F32, 0).is_ok());
    }
}

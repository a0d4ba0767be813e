//! A call under way: it holds the state of the device, finds where views lie, and launches.

use std::collections::HashMap;
use std::sync::MutexGuard;

use super::driver::{Arguments, Driver, Graph, Kernel, Limits, Pointer, Product, Region, Shape};
use super::source::{KernelKey, ModuleKey, Source, Value};
use crate::backend::{BufferId, DType, Error, Order, RecordingId, Result, SegmentsView, View, padded_rows};

/// A buffer in device memory.
#[derive(Clone, Copy)]
pub(super) struct Buffer {
    pub start: Pointer,
    pub dtype: DType,
    pub len: usize,
}

/// What the calls of a device share.
#[derive(Default)]
pub(super) struct State {
    pub buffers: HashMap<BufferId, Buffer>,
    pub next: u64,
    pub recordings: HashMap<RecordingId, Recorded>,
    kernels: HashMap<KernelKey, Kernel>,
    /// Modules for this generation of cards alone, and whether they agreed with those for all cards.
    pub trusted: HashMap<ModuleKey, bool>,
    scratch: (Pointer, usize),
}

/// How far a recording is.
#[derive(Clone, Copy)]
pub(super) enum Recorded {
    /// Its ops ran once: their kernels are loaded, their scratch is made.
    Ran,
    /// They are a graph that uses the scratch at this address, of so many bytes.
    Graph(Graph, (Pointer, usize)),
}

impl State {
    /// Where a view lies, once it is known to lie in its buffer, without two rows on one value.
    pub fn place(&self, view: View) -> Result<Place> {
        let span = view.span();
        let rows_apart = match view.order {
            Order::Rows => view.rows <= 1 || view.stride >= view.cols,
            Order::Weight => view.stride == view.cols,
        };
        self.buffers
            .get(&view.buffer)
            .filter(|buffer| buffer.dtype == view.dtype && rows_apart && (view.is_empty() || span.end <= buffer.len))
            // A view of nothing may start anywhere: nothing is read there.
            .map(|buffer| buffer.start.wrapping_add((span.start as u64).wrapping_mul(view.dtype.size() as u64)))
            .map(|start| Place { start, dtype: view.dtype, rows: view.rows, cols: view.cols, stride: view.stride })
            .ok_or(Error::Memory { buffer: view.buffer, dtype: view.dtype, first: span.start, end: span.end })
    }

    /// Where the scratch lies, and how many bytes it has.
    pub fn scratch(&self) -> (Pointer, usize) {
        self.scratch
    }

    /// Gives the scratch back.
    pub fn release(&mut self, driver: &dyn Driver) {
        let (start, room) = std::mem::take(&mut self.scratch);
        if room > 0 {
            driver.free(start);
        }
    }

    /// Makes scratch of at least so many bytes.
    pub fn reserve(&mut self, driver: &dyn Driver, bytes: usize) -> Result<Pointer> {
        let (start, room) = self.scratch;
        if bytes <= room {
            return Ok(start);
        }
        // The old one goes once the launches that use it are done.
        self.release(driver);
        self.scratch = (driver.allocate(bytes, "scratch")?, bytes);
        Ok(self.scratch.0)
    }
}

/// Where a view lies in device memory. The rows of a weight lie one after the other; rows of padding follow them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub start: Pointer,
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
    /// Values from one row to the next.
    pub stride: usize,
}

impl Place {
    /// The kernels' name of its type.
    pub fn of(&self) -> Value {
        Value::Type(type_name(self.dtype))
    }

    /// Its bytes.
    pub fn region(&self) -> Region {
        let size = self.dtype.size();
        let (width, pitch) = (self.cols * size, self.stride * size);
        Region { start: self.start, width, rows: self.rows, pitch }
    }

    /// Its columns from `first`, `cols` of them, which lie in it.
    pub fn columns(&self, first: usize, cols: usize) -> Place {
        Place { start: self.start + (first * self.dtype.size()) as u64, cols, ..*self }
    }

    /// The largest power of two, up to 16 bytes, that every row's address is a multiple of.
    pub fn alignment(&self) -> usize {
        let stride = if self.rows > 1 { self.stride * self.dtype.size() } else { 0 };
        1 << (self.start | stride as u64 | 16).trailing_zeros()
    }
}

/// The kernels' name of a dtype.
pub(super) fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 | DType::F64 => "float",
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
        DType::U32 => "unsigned",
    }
}

/// The kernels' number of a dtype that they know at run time alone.
pub(super) fn type_number(dtype: DType) -> u32 {
    match dtype {
        DType::F32 | DType::F64 | DType::U32 => 0,
        DType::Bf16 => 1,
        DType::F16 => 2,
    }
}

/// The segments of a call: the table `[capacity, SEGMENT_FIELDS]` without gaps.
#[derive(Clone, Copy, Debug)]
pub(super) struct SegmentsPlace {
    pub table: Pointer,
    pub capacity: usize,
}

/// Arguments that are places.
impl Arguments {
    /// A `Rows<T>`.
    pub(super) fn place(self, place: &Place) -> Self {
        self.rows(place.start, place.stride)
    }

    /// A `Rows<T>` that may be absent: its pointer is null then.
    pub(super) fn maybe_place(self, place: Option<Place>) -> Self {
        let (start, stride) = place.map_or((0, 0), |place| (place.start, place.stride));
        self.rows(start, stride)
    }

    /// A `Rows<T>` that may be absent, and how many rows it has.
    pub(super) fn maybe_rows(self, place: Option<Place>) -> Self {
        self.maybe_place(place).size(place.map_or(0, |place| place.rows))
    }

    /// A pointer that may be null.
    pub(super) fn maybe(self, place: Option<Place>) -> Self {
        self.pointer(place.map_or(0, |place| place.start))
    }
}

pub(super) struct Call<'c> {
    pub op: &'static str,
    pub driver: &'c dyn Driver,
    pub state: MutexGuard<'c, State>,
}

impl Call<'_> {
    /// What the device can do.
    pub fn limits(&self) -> &Limits {
        self.driver.limits()
    }

    pub fn unsupported(&self, argument: &str, what: impl std::fmt::Display) -> Error {
        Error::Unsupported { backend: "cuda", op: self.op, what: format!("{argument} of {what}") }
    }

    /// Where a view of f32, bf16 or f16 lies.
    pub fn floats(&self, argument: &str, view: View) -> Result<Place> {
        let place = self.state.place(view)?;
        let stored = matches!(view.dtype, DType::F32 | DType::Bf16 | DType::F16);
        if stored { Ok(place) } else { Err(self.unsupported(argument, view.dtype)) }
    }

    /// Where a view that may be absent lies.
    pub fn maybe_floats(&self, argument: &str, view: Option<View>) -> Result<Option<Place>> {
        view.map(|view| self.floats(argument, view)).transpose()
    }

    /// Where a view of f32 lies.
    pub fn f32(&self, argument: &str, view: View) -> Result<Place> {
        let place = self.state.place(view)?;
        if view.dtype == DType::F32 { Ok(place) } else { Err(self.unsupported(argument, view.dtype)) }
    }

    /// Where a view of f32 that may be absent lies.
    pub fn maybe_f32(&self, argument: &str, view: Option<View>) -> Result<Option<Place>> {
        view.map(|view| self.f32(argument, view)).transpose()
    }

    /// Where a view lies that is stored as another one.
    pub fn like(&self, argument: &str, view: View, other: &Place) -> Result<Place> {
        let place = self.floats(argument, view)?;
        let what = format!("{} beside {}", view.dtype, other.dtype);
        if place.dtype == other.dtype { Ok(place) } else { Err(self.unsupported(argument, what)) }
    }

    /// Where u32 lie.
    pub fn ids(&self, argument: &str, view: View) -> Result<Place> {
        let place = self.state.place(view)?;
        if view.dtype == DType::U32 { Ok(place) } else { Err(self.unsupported(argument, view.dtype)) }
    }

    /// Where a table of u32 without gaps lies.
    pub fn table(&self, argument: &'static str, view: View) -> Result<Place> {
        if view.rows > 1 && view.stride != view.cols {
            return Err(Error::Argument { op: self.op, what: format!("{argument} has gaps between its rows") });
        }
        self.ids(argument, view)
    }

    /// Where segments lie.
    pub fn segments(&self, segments: &SegmentsView) -> Result<SegmentsPlace> {
        let table = self.table("segments", segments.table)?;
        self.ids("positions", segments.positions)?;
        Ok(SegmentsPlace { table: table.start, capacity: table.rows })
    }

    /// Memory for this call alone, in parts of so many bytes, each aligned to 256. What it holds is anything.
    pub fn scratch<const N: usize>(&mut self, bytes: [usize; N]) -> Result<[Pointer; N]> {
        let padded = padded(bytes);
        let mut start = self.state.reserve(self.driver, padded.iter().sum())?;
        Ok(padded.map(|bytes| {
            let part = start;
            start += bytes as u64;
            part
        }))
    }

    /// Launches a kernel of a file; a grid of no block is no launch.
    pub fn launch(
        &mut self,
        (source, entry): (&'static Source, &'static str),
        defines: &[(&'static str, Value)],
        shape: Shape,
        arguments: &Arguments,
    ) -> Result<()> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        let key = KernelKey::new(source, entry, defines);
        let kernel = match self.state.kernels.get(&key) {
            Some(&kernel) => kernel,
            None => {
                let kernel = self.driver.load(&key)?;
                self.state.kernels.insert(key, kernel);
                kernel
            }
        };
        self.driver.launch(kernel, shape, arguments)
    }

    /// Makes a product.
    pub fn product(&self, product: &Product) -> Result<()> {
        if product.m == 0 || product.n == 0 { Ok(()) } else { self.driver.product(product) }
    }

    /// A number as a kernel's `int`.
    pub fn int(&self, what: &'static str, value: usize) -> Result<u32> {
        u32::try_from(value).ok().filter(|&value| value <= i32::MAX as u32).ok_or(Error::Size { what, value })
    }
}

/// Bytes that parts of scratch take, each aligned to 256.
pub(super) fn padded<const N: usize>(bytes: [usize; N]) -> [usize; N] {
    bytes.map(|bytes| bytes.next_multiple_of(256))
}

/// The most blocks along an axis but the first.
const GRID: usize = 65535;
/// The most blocks along the first axis; kernels go on from there.
const GRID_X: usize = i32::MAX as usize;

/// A thread a value of `[rows, cols]`: blocks along x take rows, those along y columns. Where there are more, kernels go on.
pub(super) fn each(rows: usize, cols: usize) -> Shape {
    let block = cols.next_multiple_of(32).clamp(32, 256);
    Shape {
        grid: [rows.min(GRID_X) as u32, cols.div_ceil(block).min(GRID) as u32, 1],
        block: [block as u32, 1, 1],
        shared_bytes: 0,
    }
}

/// A thread eight values of `[rows, cols]`, as EACH_EIGHT of `kernels/h1.cuh` goes over them.
pub(super) fn each_eight(rows: usize, cols: usize) -> Shape {
    each(rows, cols.div_ceil(8))
}

/// A block of `threads` a row.
pub(super) fn blocks(rows: usize, threads: u32) -> Shape {
    Shape { grid: [rows.min(GRID_X) as u32, 1, 1], block: [threads, 1, 1], shared_bytes: 0 }
}

/// Bytes of the padding rows of a weight, after its rows.
pub(super) fn padding(view: View, place: &Place) -> Option<Region> {
    let size = view.dtype.size();
    let rows = padded_rows(view.rows) - view.rows;
    (view.order == Order::Weight && rows > 0 && view.cols > 0).then(|| Region {
        start: place.start + (view.len() * size) as u64,
        width: rows * view.cols * size,
        rows: 1,
        pitch: rows * view.cols * size,
    })
}

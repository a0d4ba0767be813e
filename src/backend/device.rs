//! A device: a backend behind the checks, with buffers that free themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use super::{
    Backend, BackendInfo, BufferId, Checked, DType, DeviceId, Error, HostSlice, Largest, Order, Readback, RecordingId,
    Result, SEGMENT_FIELDS, Segments, SegmentsView, View, ops,
};

/// A backend as models and trainers use it. Cheap to clone; all clones are the same device.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.info().fmt(f)
    }
}

struct Inner {
    id: DeviceId,
    backend: Box<dyn Backend>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    recordings: AtomicU64,
    launches: AtomicU64,
    allocations: AtomicU64,
    /// Of buffers that live, and the most since it was asked for.
    bytes: AtomicUsize,
    peak_bytes: AtomicUsize,
}

/// A buffer of a device, freed when dropped.
pub struct Buffer {
    device: Device,
    view: View,
}

impl Buffer {
    /// The whole buffer, with the shape that it was made with.
    pub fn view(&self) -> View {
        self.view
    }

    /// The first `rows` rows.
    ///
    /// # Errors
    /// When the buffer has fewer.
    pub fn rows(&self, rows: usize) -> Result<View> {
        self.view.row_range(0, rows)
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.view.len() * self.view.dtype.size()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.device.0.backend.free(self.view.buffer);
        self.device.0.counts.bytes.fetch_sub(self.bytes(), Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.view.fmt(f)
    }
}

/// A sequence of ops that is made again and again with the same arguments, such as a step of decoding, so that a device
/// which can launches all of them at once. Forgotten when dropped.
pub struct Recording {
    device: Device,
    id: RecordingId,
}

impl Recording {
    /// Does what `ops` does. It may not call `ops`, but launch again what that launched at an earlier call; so `ops`
    /// must launch the same ops with the same views each time, in buffers that still live, and neither write, read nor
    /// allocate; and no other thread may use the device meanwhile.
    ///
    /// # Errors
    /// Those of `ops`, or when the device fails.
    pub fn run(&self, mut ops: impl FnMut() -> Result<()>) -> Result<()> {
        self.device.0.backend.record(self.id, &mut ops)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.device.0.backend.forget(self.id);
    }
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.id.fmt(f)
    }
}

/// Device memory for segments, written once a step at addresses that stay.
#[derive(Debug)]
pub struct SegmentsBuffer {
    table: Buffer,
    positions: Buffer,
    host: Vec<u32>,
}

impl SegmentsBuffer {
    /// Writes the segments of a call and gives their view.
    ///
    /// # Errors
    /// When there are more segments or tokens than the buffer was made for.
    pub fn write(&mut self, device: &Device, segments: &Segments) -> Result<SegmentsView> {
        let (capacity, count) = (self.table.view.rows, segments.list().len());
        if count > capacity {
            return Err(Error::Range { what: "segments", first: 0, count, of: capacity });
        }
        let positions = self.positions.view.col_range(0, segments.tokens())?;
        segments.table(capacity, &mut self.host);
        device.write(HostSlice::U32(&self.host), self.table.view)?;
        segments.positions(&mut self.host);
        device.write(HostSlice::U32(&self.host), positions)?;
        Ok(SegmentsView { table: self.table.view, positions })
    }
}

impl Device {
    /// A device over `backend`.
    pub fn new(backend: impl Backend + 'static) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = DeviceId(NEXT.fetch_add(1, Ordering::Relaxed));
        Device(Arc::new(Inner { id, backend: Box::new(backend), counts: Counts::default() }))
    }

    /// What its backend is.
    pub fn info(&self) -> &BackendInfo {
        self.0.backend.info()
    }

    /// Ops launched so far.
    pub fn launches(&self) -> u64 {
        self.0.counts.launches.load(Ordering::Relaxed)
    }

    /// Buffers made so far.
    pub fn allocations(&self) -> u64 {
        self.0.counts.allocations.load(Ordering::Relaxed)
    }

    /// The most bytes that buffers took at a time since this was last asked for, or since the start. A backend's own
    /// scratch is not among them.
    pub fn take_peak_bytes(&self) -> usize {
        let now = self.0.counts.bytes.load(Ordering::Relaxed);
        self.0.counts.peak_bytes.swap(now, Ordering::Relaxed)
    }

    /// A buffer of `rows × cols` values, all 0.
    ///
    /// # Errors
    /// When the device has no room, or cannot store the dtype.
    pub fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Buffer> {
        let len = rows.checked_mul(cols).ok_or(Error::Size { what: "buffer", value: usize::MAX })?;
        let buffer: BufferId = self.0.backend.alloc(dtype, len)?;
        let view = View { device: self.0.id, buffer, dtype, order: Order::Rows, offset: 0, rows, cols, stride: cols };
        let (buffer, counts) = (Buffer { device: self.clone(), view }, &self.0.counts);
        counts.allocations.fetch_add(1, Ordering::Relaxed);
        let bytes = counts.bytes.fetch_add(buffer.bytes(), Ordering::Relaxed) + buffer.bytes();
        counts.peak_bytes.fetch_max(bytes, Ordering::Relaxed);
        Ok(buffer)
    }

    /// Memory for up to `segments` segments of up to `tokens` rows in all.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc_segments(&self, segments: usize, tokens: usize) -> Result<SegmentsBuffer> {
        Ok(SegmentsBuffer {
            table: self.alloc(DType::U32, segments, SEGMENT_FIELDS)?,
            positions: self.alloc(DType::U32, 1, tokens)?,
            host: Vec::with_capacity(tokens.max(segments * SEGMENT_FIELDS)),
        })
    }

    /// A recording of nothing yet.
    pub fn recording(&self) -> Recording {
        let id = RecordingId(self.0.counts.recordings.fetch_add(1, Ordering::Relaxed));
        Recording { device: self.clone(), id }
    }

    /// Makes the backend's scratch for calls up to these sizes.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn reserve(&self, largest: &Largest) -> Result<()> {
        self.0.backend.reserve(largest)
    }

    /// Gets the memory of a run ready in one piece, where the backend does not take it as it comes. `calls` make what
    /// the run will make on this device on another one, which is like it but has no memory and computes nothing; the
    /// most that they have at a time is what the run takes.
    ///
    /// # Errors
    /// What `calls` fail with, or when this device has no room: before anything is made on it.
    pub fn plan<E: From<Error>>(
        &self,
        calls: impl FnOnce(&Device) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let (mut calls, mut made) = (Some(calls), Ok(()));
        let planned = self.0.backend.plan(&mut |device| {
            made = calls.take().map_or(Ok(()), |calls| calls(device));
            made.is_ok()
        });
        made.and(planned.map_err(E::from))
    }

    /// Row-major values of the host into a view, cast to its dtype and put into its order.
    ///
    /// # Errors
    /// When the number of values is not the view's.
    pub fn write(&self, src: HostSlice<'_>, dst: View) -> Result<()> {
        self.own("write", dst)?;
        if src.len() != dst.len() {
            let what = format!("{} values for a view of [{}, {}]", src.len(), dst.rows, dst.cols);
            return Err(Error::Argument { op: "write", what });
        }
        if matches!(src, HostSlice::U32(_)) == dst.dtype.is_float() {
            return Err(Error::Argument { op: "write", what: format!("{} from another kind of value", dst.dtype) });
        }
        self.0.backend.write(src, dst)
    }

    /// Starts to read a view; the values come row-major.
    ///
    /// # Errors
    /// When the view does not lie on this device.
    pub fn read(&self, src: View) -> Result<Readback> {
        self.own("read", src)?;
        self.0.backend.read(src)
    }

    /// Compiles what `calls` will need, without making them: see [`Backend::compile_ahead`]. Buffers that `calls` makes have no
    /// memory and must not outlive them.
    ///
    /// # Errors
    /// What `calls` fails with.
    pub fn compile_ahead(
        &self,
        mut calls: impl FnMut() -> Result<()>,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<()> {
        let Counts { launches, allocations, peak_bytes, .. } = &self.0.counts;
        let before = [launches, allocations].map(|count| count.load(Ordering::Relaxed));
        let peak = peak_bytes.load(Ordering::Relaxed);
        let result = self.0.backend.compile_ahead(&mut calls, &mut progress);
        [launches, allocations].iter().zip(before).for_each(|(count, before)| count.store(before, Ordering::Relaxed));
        peak_bytes.store(peak, Ordering::Relaxed);
        result
    }

    /// Makes `calls` and gives the seconds that the device itself took for them, where it can tell.
    ///
    /// # Errors
    /// What `calls` fails with, or when the device fails.
    pub fn seconds_of(&self, calls: impl FnOnce() -> Result<()>) -> Result<Option<f64>> {
        let ticks = self.0.backend.start_clock()?;
        calls()?;
        if ticks { self.0.backend.stop_clock().map(Some) } else { Ok(None) }
    }

    fn own(&self, op: &'static str, view: View) -> Result<()> {
        if view.device == self.0.id { Ok(()) } else { Err(Error::Foreign { op, argument: "view" }) }
    }
}

macro_rules! checked {
    ($($name:ident: $arguments:ident,)*) => {
        /// The ops: each checks its arguments, is counted, and runs.
        ///
        /// # Errors
        /// When an argument does not fit, or the backend cannot do it.
        impl Device {
            $(
                #[doc = concat!("See [`ops::", stringify!($arguments), "`].")]
                ///
                /// # Errors
                /// When an argument does not fit, or the backend cannot do it.
                pub fn $name(&self, op: &ops::$arguments) -> Result<()> {
                    op.check(self.0.id)?;
                    self.0.counts.launches.fetch_add(1, Ordering::Relaxed);
                    self.0.backend.$name(op)
                }
            )*
        }
    };
}

checked! {
    embed: Embed,
    embed_backward: EmbedBackward,
    rms_norm: RmsNorm,
    rms_norm_backward: RmsNormBackward,
    linear: Linear,
    linear_backward_input: LinearBackwardInput,
    linear_backward_weight: LinearBackwardWeight,
    swiglu: Swiglu,
    swiglu_backward: SwigluBackward,
    linear_swiglu: LinearSwiglu,
    rope: Rope,
    attention: Attention,
    attention_backward: AttentionBackward,
    page_write: PageWrite,
    rope_page_write: RopePageWrite,
    conv1d: Conv1d,
    conv1d_backward: Conv1dBackward,
    neg_exp: NegExp,
    neg_exp_backward: NegExpBackward,
    selective_scan: SelectiveScan,
    selective_scan_backward: SelectiveScanBackward,
    conv_scan: ConvScan,
    head_loss: HeadLoss,
    head_loss_gradient: HeadLossGradient,
    argmax: Argmax,
    sample: Sample,
    gather: Gather,
    scatter_add: ScatterAdd,
    copy: Copy,
    fill: Fill,
    scale: Scale,
    weighted_sum: WeightedSum,
    squared_norm: SquaredNorm,
    clip_factor: ClipFactor,
    adamw: AdamW,
}

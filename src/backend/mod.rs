//! What every backend promises, and the backends.
//!
//! A [`Backend`] stands at the level of a layer's fused op. Models and trainers call it through a [`Device`], which
//! checks every argument first, counts the launches and frees buffers; nothing above is generic over the backend.
//!
//! The laws, for every op:
//! - Arguments are [`View`]s; the caller gives the outputs. An output is written whole, whatever it held before.
//! - A sum has an order fixed by its sizes: the same call gives the same bits.
//! - No op returns a number to the host. Numbers are read with [`Device::read`], which need not wait.
//! - An op whose sizes were reserved allocates nothing.

mod cache;
pub mod cases;
mod check;
pub mod cpu;
pub mod cuda;
mod device;
mod error;
mod host;
pub mod ops;
pub mod reference;
mod segments;
pub mod select;
mod view;
pub mod wgpu;

use check::Checked;
pub use device::{Buffer, Device, Recording, SegmentsBuffer};
pub use error::{Error, Result};
pub use segments::{SEGMENT_FIELDS, Segment, Segments, SegmentsView};
pub use view::{BufferId, DType, DeviceId, Order, Out, View, WEIGHT_ROWS, padded_rows};

/// [`BackendInfo::chunk_values`] of most.
pub const CHUNK_VALUES: usize = 1 << 24;

/// What a backend is, in words and numbers.
#[derive(Clone, Debug)]
pub struct BackendInfo {
    /// `cpu`, `reference`, …
    pub name: &'static str,
    /// The device as a person knows it.
    pub device: String,
    /// The dtypes that it stores.
    pub dtypes: Vec<DType>,
    /// Those of them in which its ops take activations as fast as they can; f32 is among them.
    pub activations: Vec<DType>,
    /// Tokens between two states that the scan saves for its backward.
    pub scan_chunk: usize,
    /// Values of a chunk of logits, at most, where a chunk has more than a few rows: more make larger products, and take more
    /// memory.
    pub chunk_values: usize,
    /// Whether a token's logits are the same bits however its sequence is cut into calls and whatever shares them.
    pub batch_invariant: bool,
    /// Whether a [`Recording`] launches at once what it did before, so that calls of sizes that come again cost the host
    /// little.
    pub records: bool,
}

impl BackendInfo {
    /// How activations are stored beside weights in `weights`: residual stream, keys and values too. Logits, losses, states
    /// and what the optimiser keeps are f32 whatever the weights are.
    pub fn activations_beside(&self, weights: DType) -> DType {
        if self.activations.contains(&weights) { weights } else { DType::F32 }
    }
}

/// The largest sizes that calls will have; a backend reserves its scratch for them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Largest {
    /// Rows of a call.
    pub tokens: usize,
    /// Segments of a call.
    pub segments: usize,
    /// Columns of an activation.
    pub width: usize,
    /// Values of a chunk of logits.
    pub logits: usize,
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Columns of queries.
    pub query_width: usize,
    /// Values of a scan's state.
    pub state: usize,
    /// States of a channel of a scan.
    pub d_state: usize,
    /// Values of a weight whose products have rows of another dtype.
    pub converted: usize,
}

/// Values on the host, in row-major order.
#[derive(Clone, Copy, Debug)]
pub enum HostSlice<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [half::bf16]),
    /// IEEE half.
    F16(&'a [half::f16]),
    /// u32.
    U32(&'a [u32]),
}

impl HostSlice<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            HostSlice::F32(values) => values.len(),
            HostSlice::Bf16(values) => values.len(),
            HostSlice::F16(values) => values.len(),
            HostSlice::U32(values) => values.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A read under way; [`Readback::wait`] gives its values.
pub struct Readback(Box<dyn FnOnce() -> Result<Vec<f32>> + Send>);

impl Readback {
    /// A read that `finish` completes.
    pub fn new(finish: impl FnOnce() -> Result<Vec<f32>> + Send + 'static) -> Self {
        Readback(Box::new(finish))
    }

    /// Waits for the values, row-major, u32 as the f32 of the same number.
    ///
    /// # Errors
    /// When the device was lost, or an op before the read failed.
    pub fn wait(self) -> Result<Vec<f32>> {
        (self.0)()
    }
}

/// A recording's number on its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RecordingId(pub u64);

/// What a backend implements. Its ops are called by [`Device`] alone, which has checked shapes, storage, owners and
/// overlaps; a backend checks that views lie in their buffers, and says [`Error::Unsupported`] for what it cannot do.
/// Shapes, formulas and what is saved stand at each op's arguments in [`ops`].
pub trait Backend: Send + Sync {
    /// What it is.
    fn info(&self) -> &BackendInfo;
    /// A new buffer of `len` values, all 0.
    fn alloc(&self, dtype: DType, len: usize) -> Result<BufferId>;
    /// Gives a buffer back; views of it are errors from now on.
    fn free(&self, buffer: BufferId);
    /// Makes scratch for calls up to these sizes.
    fn reserve(&self, largest: &Largest) -> Result<()>;
    /// Gets the memory ready that `calls` take on the device that they are given: see [`Device::plan`]. They give
    /// whether they went well. A backend that takes memory as it comes does nothing, and does not make them.
    fn plan(&self, _calls: &mut dyn FnMut(&Device) -> bool) -> Result<()> {
        Ok(())
    }
    /// Row-major values of the host into a view, cast to its dtype and put into its order; padding becomes 0.
    fn write(&self, src: HostSlice<'_>, dst: View) -> Result<()>;
    /// Starts to read a view.
    fn read(&self, src: View) -> Result<Readback>;
    /// Does what `ops` does, by calling it, or by launching again what it launched at an earlier call with the same
    /// recording: see [`Recording::run`].
    fn record(&self, _recording: RecordingId, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        ops()
    }
    /// Forgets a recording.
    fn forget(&self, _recording: RecordingId) {}
    /// Makes `calls` without their effect: nothing is allocated, computed, written or read, values that are read are 0. What
    /// the device must compile for them is compiled; `progress` hears how many parts of how many are done. No other thread
    /// may use the device meanwhile. A backend that has nothing to compile does nothing.
    fn compile_ahead(
        &self,
        _calls: &mut dyn FnMut() -> Result<()>,
        _progress: &mut dyn FnMut(usize, usize),
    ) -> Result<()> {
        Ok(())
    }
    /// Starts the device's own clock; false where it has none.
    fn start_clock(&self) -> Result<bool> {
        Ok(false)
    }
    /// Stops it, and gives the seconds from the start until all that was launched since was done.
    fn stop_clock(&self) -> Result<f64> {
        Err(Error::Unsupported { backend: self.info().name, op: "clock", what: "times of its own".into() })
    }

    /// See [`ops::Embed`].
    fn embed(&self, op: &ops::Embed) -> Result<()>;
    /// See [`ops::EmbedBackward`].
    fn embed_backward(&self, op: &ops::EmbedBackward) -> Result<()>;
    /// See [`ops::RmsNorm`].
    fn rms_norm(&self, op: &ops::RmsNorm) -> Result<()>;
    /// See [`ops::RmsNormBackward`].
    fn rms_norm_backward(&self, op: &ops::RmsNormBackward) -> Result<()>;
    /// See [`ops::Linear`].
    fn linear(&self, op: &ops::Linear) -> Result<()>;
    /// See [`ops::LinearBackwardInput`].
    fn linear_backward_input(&self, op: &ops::LinearBackwardInput) -> Result<()>;
    /// See [`ops::LinearBackwardWeight`].
    fn linear_backward_weight(&self, op: &ops::LinearBackwardWeight) -> Result<()>;
    /// See [`ops::Swiglu`].
    fn swiglu(&self, op: &ops::Swiglu) -> Result<()>;
    /// See [`ops::SwigluBackward`].
    fn swiglu_backward(&self, op: &ops::SwigluBackward) -> Result<()>;
    /// See [`ops::Rope`].
    fn rope(&self, op: &ops::Rope) -> Result<()>;
    /// See [`ops::Attention`].
    fn attention(&self, op: &ops::Attention) -> Result<()>;
    /// See [`ops::AttentionBackward`].
    fn attention_backward(&self, op: &ops::AttentionBackward) -> Result<()>;
    /// See [`ops::PageWrite`].
    fn page_write(&self, op: &ops::PageWrite) -> Result<()>;
    /// See [`ops::Conv1d`].
    fn conv1d(&self, op: &ops::Conv1d) -> Result<()>;
    /// See [`ops::Conv1dBackward`].
    fn conv1d_backward(&self, op: &ops::Conv1dBackward) -> Result<()>;
    /// See [`ops::NegExp`].
    fn neg_exp(&self, op: &ops::NegExp) -> Result<()>;
    /// See [`ops::NegExpBackward`].
    fn neg_exp_backward(&self, op: &ops::NegExpBackward) -> Result<()>;
    /// See [`ops::SelectiveScan`].
    fn selective_scan(&self, op: &ops::SelectiveScan) -> Result<()>;
    /// See [`ops::SelectiveScanBackward`].
    fn selective_scan_backward(&self, op: &ops::SelectiveScanBackward) -> Result<()>;
    /// See [`ops::HeadLoss`].
    fn head_loss(&self, op: &ops::HeadLoss) -> Result<()>;
    /// See [`ops::HeadLossGradient`].
    fn head_loss_gradient(&self, op: &ops::HeadLossGradient) -> Result<()>;
    /// See [`ops::Argmax`].
    fn argmax(&self, op: &ops::Argmax) -> Result<()>;
    /// See [`ops::Sample`].
    fn sample(&self, op: &ops::Sample) -> Result<()>;
    /// See [`ops::Gather`].
    fn gather(&self, op: &ops::Gather) -> Result<()>;
    /// See [`ops::ScatterAdd`].
    fn scatter_add(&self, op: &ops::ScatterAdd) -> Result<()>;
    /// See [`ops::Copy`].
    fn copy(&self, op: &ops::Copy) -> Result<()>;
    /// See [`ops::Fill`].
    fn fill(&self, op: &ops::Fill) -> Result<()>;
    /// See [`ops::Scale`].
    fn scale(&self, op: &ops::Scale) -> Result<()>;
    /// See [`ops::WeightedSum`].
    fn weighted_sum(&self, op: &ops::WeightedSum) -> Result<()>;
    /// See [`ops::SquaredNorm`].
    fn squared_norm(&self, op: &ops::SquaredNorm) -> Result<()>;
    /// See [`ops::ClipFactor`].
    fn clip_factor(&self, op: &ops::ClipFactor) -> Result<()>;
    /// See [`ops::AdamW`].
    fn adamw(&self, op: &ops::AdamW) -> Result<()>;

    // Two ops that follow each other. A backend may make them in one launch, and need not write what goes from one to the
    // other where nobody keeps it.

    /// See [`ops::LinearSwiglu`].
    fn linear_swiglu(&self, op: &ops::LinearSwiglu) -> Result<()> {
        self.linear(&op.linear)?;
        self.swiglu(&op.swiglu)
    }
    /// See [`ops::RopePageWrite`].
    fn rope_page_write(&self, op: &ops::RopePageWrite) -> Result<()> {
        self.rope(&op.rope)?;
        self.page_write(&op.write)
    }
    /// See [`ops::ConvScan`].
    fn conv_scan(&self, op: &ops::ConvScan) -> Result<()> {
        self.conv1d(&op.conv)?;
        self.selective_scan(&op.scan)
    }
}

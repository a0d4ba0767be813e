//! The ops of the backend: each is a function of a call in the file of its kind.

use super::call::Call;
use super::{Cuda, dense, losses, memory, mixers, products};
use crate::backend::{
    Backend, BackendInfo, BufferId, DType, Device, HostSlice, Largest, Readback, RecordingId, Result, View, ops,
};

/// Bytes of scratch that calls of these sizes take.
pub(super) fn scratch_bytes(largest: &Largest) -> usize {
    dense::scratch_bytes(largest).max(memory::scratch_bytes(largest)).max(products::scratch_bytes(largest))
}

macro_rules! backend {
    ($($name:ident: $arguments:ident => $module:ident;)*) => {
        impl Backend for Cuda {
            fn info(&self) -> &BackendInfo {
                &self.info
            }

            fn alloc(&self, dtype: DType, len: usize) -> Result<BufferId> {
                self.alloc(dtype, len)
            }

            fn free(&self, buffer: BufferId) {
                self.free(buffer);
            }

            fn reserve(&self, largest: &Largest) -> Result<()> {
                self.reserve(largest)
            }

            fn plan(&self, calls: &mut dyn FnMut(&Device) -> bool) -> Result<()> {
                self.plan(calls)
            }

            fn write(&self, src: HostSlice<'_>, dst: View) -> Result<()> {
                self.write(src, dst)
            }

            fn read(&self, src: View) -> Result<Readback> {
                self.read(src)
            }

            fn record(&self, recording: RecordingId, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
                self.record(recording, ops)
            }

            fn forget(&self, recording: RecordingId) {
                self.forget(recording);
            }

            $(
                fn $name(&self, op: &ops::$arguments) -> Result<()> {
                    let mut call: Call<'_> = self.call(stringify!($name));
                    $module::$name(&mut call, op)
                }
            )*
        }
    };
}

backend! {
    embed: Embed => dense;
    embed_backward: EmbedBackward => dense;
    rms_norm: RmsNorm => dense;
    rms_norm_backward: RmsNormBackward => dense;
    linear: Linear => products;
    linear_backward_input: LinearBackwardInput => products;
    linear_backward_weight: LinearBackwardWeight => products;
    swiglu: Swiglu => dense;
    swiglu_backward: SwigluBackward => dense;
    linear_swiglu: LinearSwiglu => products;
    rope: Rope => dense;
    attention: Attention => mixers;
    attention_backward: AttentionBackward => mixers;
    page_write: PageWrite => dense;
    rope_page_write: RopePageWrite => dense;
    conv1d: Conv1d => mixers;
    conv1d_backward: Conv1dBackward => mixers;
    neg_exp: NegExp => dense;
    neg_exp_backward: NegExpBackward => dense;
    selective_scan: SelectiveScan => mixers;
    selective_scan_backward: SelectiveScanBackward => mixers;
    conv_scan: ConvScan => mixers;
    head_loss: HeadLoss => losses;
    head_loss_gradient: HeadLossGradient => losses;
    argmax: Argmax => losses;
    sample: Sample => losses;
    gather: Gather => memory;
    scatter_add: ScatterAdd => memory;
    copy: Copy => memory;
    fill: Fill => memory;
    scale: Scale => memory;
    weighted_sum: WeightedSum => memory;
    squared_norm: SquaredNorm => memory;
    clip_factor: ClipFactor => memory;
    adamw: AdamW => memory;
}

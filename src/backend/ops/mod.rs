//! The arguments of every op: sizes, what is read, what is written. Each op's formula stands in `reference/`.
//!
//! Unless said otherwise activations are `[tokens, width]` rows; an output replaces what its view holds; a gradient
//! of a parameter is f32 and adds to it; `Out` says which of the two. An output never lies in the buffer of an input.

mod attention;
mod conv;
mod dense;
mod loss;
mod memory;
mod optimiser;
mod scan;

pub use attention::{Attention, AttentionBackward, AttentionShape, Keys, PageWrite, Rope, RopePageWrite};
pub use conv::{Conv1d, Conv1dBackward, ConvShape};
pub use dense::{
    Embed, EmbedBackward, Linear, LinearBackwardInput, LinearBackwardWeight, LinearSwiglu, RmsNorm, RmsNormBackward,
    Swiglu, SwigluBackward,
};
pub use loss::{Argmax, HeadLoss, HeadLossGradient, LossWeights, STATISTICS, Sample, Scaling, Temperature};
pub use memory::{Copy, Fill, Gather, Scale, ScatterAdd, WeightedSum};
pub use optimiser::{AdamW, CONTROL, ClipFactor, Control, SquaredNorm};
pub use scan::{ConvScan, NegExp, NegExpBackward, ScanInputs, SelectiveScan, SelectiveScanBackward};

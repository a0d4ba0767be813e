//! One list of cases that holds every backend to the reference: each op, forward and backward, at random sizes with the
//! awkward ones in. A new op or variant is a line here; a new backend runs them all.
//!
//! Activations are drawn in f32 and in what the device stores them in beside the parameters.
//!
//! For each case (see `Trial::run`) outputs are poisoned first and lie inside wider buffers, inputs are surrounded by NaN,
//! the device runs it twice, and every output is compared with that of the reference, which computes in f64.

mod dense;
mod losses;
mod memory;
mod mixers;
mod trial;

use super::reference::Reference;
use super::{DType, Device, Error};
use losses::Gradient;
use mixers::Sequences;
use trial::{Look, Trial};

/// What a backend did wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// An op failed.
    #[error(transparent)]
    Backend(#[from] Error),
    /// An output is not that of the reference, or of the other device.
    #[error("{argument} is off by {error:.1e} of its largest value, more than {tolerance:.1e}")]
    Wrong {
        /// The output.
        argument: &'static str,
        /// Largest difference over the largest value.
        error: f64,
        /// What rounding explains.
        tolerance: f64,
    },
    /// Something that is not an output changed.
    #[error("values of {argument}, or beside it in its buffer, changed that the op does not write")]
    Touched {
        /// The argument.
        argument: &'static str,
    },
    /// The same call gave other bits.
    #[error("{argument} has other bits when the same call is made again")]
    Unsteady {
        /// The output.
        argument: &'static str,
    },
    /// An argument that no op may take was taken.
    #[error("{argument} was accepted {how}")]
    Accepted {
        /// The argument.
        argument: &'static str,
        /// What was wrong with it.
        how: &'static str,
    },
}

type Verdict = Result<(), Failure>;

/// An op at random sizes.
pub struct Case {
    /// The op and its variant.
    pub name: &'static str,
    body: fn(&mut Trial) -> Verdict,
}

impl Case {
    /// Runs the case at the sizes of a seed, on a device and on the reference; gives the largest error of an output as a share
    /// of its tolerance, at most 1.
    ///
    /// # Errors
    /// What the backend did wrong.
    pub fn run(&self, device: &Device, seed: u64) -> Result<f64, Failure> {
        self.look(Trial::new([&Device::new(Reference::new()), device], self.name, seed, Look::Close))
    }

    /// Runs the case on two devices whose outputs are the same bits.
    ///
    /// # Errors
    /// Where they differ.
    pub fn same_bits(&self, device: &Device, other: &Device, seed: u64) -> Verdict {
        self.look(Trial::new([other, device], self.name, seed, Look::SameBits)).map(drop)
    }

    /// Makes the call with one argument after the other on another device, in a freed buffer and outside of its buffer: each
    /// must be an error.
    ///
    /// # Errors
    /// What was accepted.
    pub fn misuse(&self, device: &Device, seed: u64) -> Verdict {
        self.look(Trial::new([&Device::new(Reference::new()), device], self.name, seed, Look::Misuse)).map(drop)
    }

    fn look(&self, mut trial: Trial) -> Result<f64, Failure> {
        (self.body)(&mut trial)?;
        Ok(trial.worst())
    }
}

const fn case(name: &'static str, body: fn(&mut Trial) -> Verdict) -> Case {
    Case { name, body }
}

/// A norm's backward over more rows than a GPU has blocks for, wider than these hold: too much for every device to try it.
pub const MANY_WIDE_ROWS: Case =
    case("rms_norm_backward of many wide rows", |t| dense::rms_norm_backward_of(t, 515, 8200));

/// Every op and its variants.
pub const CASES: &[Case] = &[
    case("embed", dense::embed),
    case("embed_backward", dense::embed_backward),
    case("rms_norm", dense::rms_norm),
    case("rms_norm_backward", dense::rms_norm_backward),
    case("linear", |t| dense::linear(t, 200)),
    case("linear of one row", |t| dense::linear(t, 1)),
    case("linear_backward_input", dense::linear_backward_input),
    case("linear_backward_weight", dense::linear_backward_weight),
    case("swiglu", dense::swiglu),
    case("swiglu_backward", dense::swiglu_backward),
    case("linear_swiglu", |t| dense::linear_swiglu(t, 200)),
    case("linear_swiglu of one row", |t| dense::linear_swiglu(t, 1)),
    case("rope", |t| mixers::rope(t, false)),
    case("rope inverse", |t| mixers::rope(t, true)),
    case("attention", |t| mixers::attention(t, false)),
    case("attention over a window", |t| mixers::attention(t, true)),
    case("attention of a step over many keys", mixers::attention_of_many_keys),
    case("attention of a step over many pages", mixers::attention_of_many_keys_in_pages),
    case("attention over pages", |t| mixers::attention_paged(t, false)),
    case("attention over a window of pages", |t| mixers::attention_paged(t, true)),
    case("attention_backward", |t| mixers::attention_backward(t, false)),
    case("attention_backward over a window", |t| mixers::attention_backward(t, true)),
    case("page_write", mixers::page_write),
    case("rope_page_write", mixers::rope_page_write),
    case("conv1d", |t| mixers::conv1d(t, 1, true)),
    case("conv1d after a repeat", |t| mixers::conv1d(t, 3, true)),
    case("conv1d before a repeat", |t| mixers::conv1d(t, 3, false)),
    case("conv1d_backward", |t| mixers::conv1d_backward(t, 1, true)),
    case("conv1d_backward after a repeat", |t| mixers::conv1d_backward(t, 3, true)),
    case("conv1d_backward before a repeat", |t| mixers::conv1d_backward(t, 3, false)),
    case("neg_exp", |t| t.in_f32(mixers::neg_exp)),
    case("neg_exp_backward", |t| t.in_f32(mixers::neg_exp_backward)),
    case("selective_scan", |t| mixers::selective_scan(t, 16, Sequences::Any)),
    case("selective_scan of any d_state", |t| mixers::selective_scan(t, 0, Sequences::Any)),
    case("selective_scan of a long sequence", |t| mixers::selective_scan(t, 16, Sequences::Long)),
    case("selective_scan of a long sequence, not cut", |t| mixers::selective_scan(t, 16, Sequences::Whole)),
    case("selective_scan of a step", |t| mixers::selective_scan(t, 0, Sequences::Step)),
    case("conv_scan of a step", |t| mixers::conv_scan(t, 0, Sequences::Step)),
    case("conv_scan", |t| mixers::conv_scan(t, 16, Sequences::Any)),
    case("conv_scan of any d_state", |t| mixers::conv_scan(t, 0, Sequences::Any)),
    case("selective_scan_backward", |t| mixers::selective_scan_backward(t, 16, Sequences::Any)),
    case("selective_scan_backward of any d_state", |t| mixers::selective_scan_backward(t, 0, Sequences::Any)),
    case("selective_scan_backward of a long sequence", |t| mixers::selective_scan_backward(t, 16, Sequences::Long)),
    case("selective_scan_backward of a long sequence, not cut", |t| {
        mixers::selective_scan_backward(t, 16, Sequences::Whole)
    }),
    case("head_loss", |t| t.in_f32(|t| losses::head_loss(t, true))),
    case("head_loss without a teacher", |t| t.in_f32(|t| losses::head_loss(t, false))),
    case("head_loss_gradient", |t| t.in_f32(|t| losses::head_loss_gradient(t, true, Gradient::InPlace))),
    case("head_loss_gradient beside the logits", |t| {
        // Gradients need a range that f16 lacks.
        let dtype = if t.activations() == DType::Bf16 { DType::Bf16 } else { DType::F32 };
        t.in_f32(|t| losses::head_loss_gradient(t, true, Gradient::Beside(dtype)))
    }),
    case("head_loss_gradient without a teacher", |t| {
        t.in_f32(|t| losses::head_loss_gradient(t, false, Gradient::InPlace))
    }),
    case("head_loss_gradient, losses alone", |t| t.in_f32(|t| losses::head_loss_gradient(t, true, Gradient::None))),
    case("argmax", |t| t.in_f32(losses::argmax)),
    case("sample", |t| t.in_f32(losses::sample)),
    case("gather", memory::gather),
    case("scatter_add", memory::scatter_add),
    case("copy", memory::copy),
    case("copy of weights", memory::copy_weight),
    case("copy of ids", memory::copy_ids),
    case("fill", memory::fill),
    case("scale", memory::scale),
    case("weighted_sum", |t| t.in_f32(memory::weighted_sum)),
    case("squared_norm", |t| t.in_f32(memory::squared_norm)),
    case("clip_factor", |t| t.in_f32(memory::clip_factor)),
    case("adamw", |t| t.in_f32(|t| memory::adamw(t, None))),
    case("adamw with a stored copy", |t| t.in_f32(|t| memory::adamw(t, Some(t.parameters())))),
    case("adamw of a step that is not finite", |t| t.in_f32(memory::adamw_skips)),
];

/// The dtypes in which a device stores parameters, of those that every reader can be given exactly.
fn parameter_types(device: &Device) -> Vec<DType> {
    device.info().dtypes.iter().copied().filter(|&dtype| dtype != DType::F64).collect()
}

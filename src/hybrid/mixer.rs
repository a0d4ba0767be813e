//! The tensors of a mixer made from an attention: what is copied, and what is drawn.

use rand::RngExt;

use super::{HybridError, Init};
use crate::model::config::{DtInit, MambaConfig, ModelConfig};
use crate::model::tensors::{TensorSpec, layer_tensor};
use crate::random;

/// Makes mixers of one shape.
#[derive(Clone, Debug)]
pub(super) struct Mixer {
    mamba: MambaConfig,
    hidden: usize,
    head_dim: usize,
    /// Whether the attention has biases to copy.
    attention_bias: bool,
    init: Init,
    seed: u64,
}

/// The number whose softplus is `d`.
pub(super) fn inverse_softplus(d: f64) -> f64 {
    d + (-(-d).exp_m1()).ln()
}

impl Mixer {
    pub(super) fn new(teacher: &ModelConfig, mamba: MambaConfig, init: Init, seed: u64) -> Result<Self, HybridError> {
        let (head_dim, d_state) = (teacher.head_dim, mamba.d_state);
        if init == Init::MilAligned && !head_dim.is_multiple_of(d_state) {
            return Err(HybridError::Misaligned { head_dim, d_state });
        }
        let (hidden, attention_bias) = (teacher.hidden_size, teacher.attention_bias);
        Ok(Mixer { mamba, hidden, head_dim, attention_bias, init, seed })
    }

    /// The values of one tensor, row-major.
    pub(super) fn tensor<E: From<HybridError>>(
        &self,
        spec: &TensorSpec,
        teacher: &impl Fn(&str) -> Result<Vec<f32>, E>,
    ) -> Result<Vec<f32>, E> {
        let layer = spec.layer.unwrap_or_default();
        let copies = self.init != Init::Random;
        let part = spec.name.strip_prefix(&layer_tensor(layer, "mixer.")).unwrap_or_default();
        let attention = |part: &str, expected: usize| {
            let name = layer_tensor(layer, &format!("self_attn.{part}"));
            let values = teacher(&name)?;
            match values.len() {
                found if found == expected => Ok(values),
                found => Err(E::from(HybridError::Size { name, expected, found })),
            }
        };
        let MambaConfig { d_inner, d_xb, d_state, dt_rank, d_conv, .. } = self.mamba;
        let linear = (self.hidden as f64).sqrt().recip();
        Ok(match part {
            "in_proj.weight" if copies => {
                let mut values = self.uniform(spec, d_inner * self.hidden, linear);
                values.extend(attention("v_proj.weight", d_xb * self.hidden)?);
                values.extend(attention("k_proj.weight", d_xb * self.hidden)?);
                values.extend(self.in_order(attention("q_proj.weight", d_inner * self.hidden)?, self.hidden));
                values
            }
            "in_proj.bias" if copies && self.attention_bias => {
                let mut values = vec![0.0; d_inner];
                values.extend(attention("v_proj.bias", d_xb)?);
                values.extend(attention("k_proj.bias", d_xb)?);
                values.extend(self.in_order(attention("q_proj.bias", d_inner)?, 1));
                values
            }
            "out_proj.weight" if copies => {
                let output = attention("o_proj.weight", self.hidden * d_inner)?;
                if self.init == Init::MilAligned { self.aligned_columns(&output) } else { output }
            }
            "in_proj.weight" | "dt_in_proj.weight" => self.uniform(spec, spec.len(), linear),
            "out_proj.weight" => self.uniform(spec, spec.len(), (d_inner as f64).sqrt().recip()),
            "dt_proj.weight" => {
                let scale = self.mamba.dt_scale * (dt_rank as f64).sqrt().recip();
                match self.mamba.dt_init {
                    DtInit::Random => self.uniform(spec, spec.len(), scale),
                    DtInit::Constant => vec![scale as f32; spec.len()],
                }
            }
            "dt_proj.bias" => self.dt_bias(spec),
            "conv1d.weight" | "conv1d.bias" => self.uniform(spec, spec.len(), (d_conv as f64).sqrt().recip()),
            "A_log" => (0..spec.len()).map(|i| ((i % d_state + 1) as f64).ln() as f32).collect(),
            "D" => vec![1.0; spec.len()],
            // The biases that a mixer may have and its attention has not.
            _ => vec![0.0; spec.len()],
        })
    }

    /// `count` numbers, uniform in ±`bound`, from the tensor's own stream.
    fn uniform(&self, spec: &TensorSpec, count: usize, bound: f64) -> Vec<f32> {
        let mut stream = random::stream(self.seed, &spec.name);
        (0..count).map(|_| (bound * (2.0 * stream.random::<f64>() - 1.0)) as f32).collect()
    }

    /// b with softplus(b) log-uniform in dt_min..dt_max, no less than dt_init_floor.
    fn dt_bias(&self, spec: &TensorSpec) -> Vec<f32> {
        let MambaConfig { dt_min, dt_max, dt_init_floor, .. } = self.mamba;
        let mut stream = random::stream(self.seed, &spec.name);
        let mut dt = || log_uniform((dt_min, dt_max), stream.random()).max(dt_init_floor);
        (0..spec.len()).map(|_| inverse_softplus(dt()) as f32).collect()
    }

    /// The channel, in the order of the teacher's query heads, that each channel of the hybrid is made from.
    ///
    /// A head of dim Dh has S = Dh / N slices. C head g is paired with B head ⌊g / r⌋, which is slice s = ⌊g / r⌋ mod S
    /// of kv head k = ⌊g / (r·S)⌋; so it takes slice s of one of the r query heads of k, the (g mod r)-th.
    fn aligned_channels(&self) -> impl Iterator<Item = usize> {
        let (d_state, slices, repeat) = (self.mamba.d_state, self.head_dim / self.mamba.d_state, self.mamba.repeat());
        let head_dim = self.head_dim;
        (0..self.mamba.c_heads()).flat_map(move |g| {
            let (kv_head, slice) = (g / repeat / slices, g / repeat % slices);
            let first = (kv_head * repeat + g % repeat) * head_dim + slice * d_state;
            first..first + d_state
        })
    }

    /// The rows of the queries' projection, of `width` values each, in the order of the hybrid's channels.
    fn in_order(&self, queries: Vec<f32>, width: usize) -> Vec<f32> {
        if self.init != Init::MilAligned {
            return queries;
        }
        self.aligned_channels().flat_map(|row| queries[row * width..(row + 1) * width].iter().copied()).collect()
    }

    fn aligned_columns(&self, output: &[f32]) -> Vec<f32> {
        let columns: Vec<usize> = self.aligned_channels().collect();
        output.chunks_exact(self.mamba.d_inner).flat_map(|row| columns.iter().map(|column| row[*column])).collect()
    }
}

/// The number at `share` of the way, in logarithms, from the one end of a range to the other.
pub(super) fn log_uniform((least, greatest): (f64, f64), share: f64) -> f64 {
    (least.ln() + share * (greatest.ln() - least.ln())).exp()
}

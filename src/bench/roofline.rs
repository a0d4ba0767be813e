//! The least time that a card needs, by arithmetic: the larger of operations over the rate of its products, exponentials over
//! the rate of its special-function units, and bytes over the bandwidth of its memory, each byte read or written once.

use serde::Serialize;

use super::Result;
use super::card::Card;
use super::kernels::mixer;
use crate::backend::DType;
use crate::model::config::{BlockKind, ModelConfig};

/// Bytes of the device that are neither weights nor caches when the largest batch is sought.
const RESERVED: f64 = 2e9;
/// Bytes of AdamW a parameter: gradient, master weight and two moments read, master weight and moments written, f32.
const ADAMW: f64 = 28.0;

/// What some work does at least.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Operations of products.
    pub flops: f64,
    /// Exponentials of the scan.
    pub exponentials: f64,
    /// Bytes.
    pub bytes: f64,
}

/// Which of a card's limits is met first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Products.
    Products,
    /// Exponentials.
    Exponentials,
    /// Memory.
    Memory,
}

impl Bound {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Bound::Products => "products",
            Bound::Exponentials => "exponentials",
            Bound::Memory => "memory",
        }
    }
}

/// The least time of a kernel.
#[derive(Clone, Debug, Serialize)]
pub struct Floor {
    /// The kernel.
    pub name: &'static str,
    /// Its sizes.
    pub sizes: String,
    /// Seconds.
    pub seconds: f64,
    /// What limits it.
    pub bound: Bound,
}

/// The floors of a whole model.
#[derive(Clone, Debug, Serialize)]
pub struct ModelFloors {
    /// Bytes of its weights.
    pub weight_bytes: f64,
    /// Bytes that a sequence of the whole context keeps.
    pub cache_bytes: u64,
    /// Tokens a second of one sequence at the whole context.
    pub single_decode: f64,
    /// Sequences of the whole context that fit beside the weights; none where not even one does.
    pub largest_batch: usize,
    /// Tokens a second of that batch, at half of the context: the mean of decoding all of it.
    pub decode: Option<f64>,
    /// Tokens a second of a prompt of the whole context, with logits of its last token.
    pub prefill: f64,
    /// Tokens a second of a distillation step of one sequence of the whole context, everything trained.
    pub distillation: f64,
    /// The same where backward computes everything again.
    pub recomputed_distillation: f64,
}

/// A card and how weights and activations are stored.
#[derive(Clone, Copy, Debug)]
pub struct Roofline {
    /// The card.
    pub card: Card,
    /// The dtype.
    pub dtype: DType,
}

impl Roofline {
    /// The least seconds of some work, and what limits it.
    pub fn seconds(&self, work: Work) -> (f64, Bound) {
        let limits = [
            (work.flops / self.card.gflops(self.dtype), Bound::Products),
            (work.exponentials / self.card.gexponentials, Bound::Exponentials),
            (work.bytes / self.card.gbytes, Bound::Memory),
        ];
        let (most, bound) =
            limits.into_iter().fold((0.0, Bound::Memory), |most, one| if one.0 > most.0 { one } else { most });
        (most / 1e9, bound)
    }

    fn size(&self) -> f64 {
        self.dtype.size() as f64
    }

    /// The kernels of a shape over one sequence of `tokens` tokens.
    ///
    /// # Errors
    /// When its sizes allow no Mamba mixer.
    pub fn kernels(&self, config: &ModelConfig, tokens: usize) -> Result<Vec<Floor>> {
        let (t, size, mamba) = (tokens as f64, self.size(), mixer(config)?);
        let (hidden, mlp, vocabulary) = (config.hidden_size, config.intermediate_size, config.vocab_size);
        let mut floors = Vec::new();
        let mut floor = |name, sizes: String, work| {
            let (seconds, bound) = self.seconds(work);
            floors.push(Floor { name, sizes, seconds, bound });
        };
        let product = |m: usize, k: usize, n: usize| {
            let [m, k, n] = [m, k, n].map(|size| size as f64);
            Work { flops: 2.0 * m * k * n, bytes: (m * k + k * n + m * n) * size, ..Work::default() }
        };
        for [m, k, n] in
            [[tokens, hidden, mlp], [tokens, hidden, vocabulary], [1, hidden, mlp], [1, hidden, vocabulary]]
        {
            floor("linear", format!("{m}×{k}×{n}"), product(m, k, n));
        }

        let (wide, narrow) = (config.query_width() as f64, config.key_value_width() as f64);
        let scores = t * (t + 1.0) / 2.0 * wide;
        let sizes =
            format!("{}/{} heads of {}", config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let attention = |products: f64, rows: f64| Work {
            flops: 2.0 * products * scores,
            bytes: t * rows * (wide + narrow) * size,
            ..Work::default()
        };
        floor("attention", sizes.clone(), attention(2.0, 2.0));
        floor("attention_backward", sizes, attention(5.0, 4.0));

        // What the mixer reads of its projection (z, x, B, C) and dt, with the convolution in the same kernel or apart.
        let (inner, xb, exponentials) =
            (mamba.d_inner as f64, mamba.d_xb as f64, t * mamba.d_inner as f64 * mamba.d_state as f64);
        let (fused, apart) = (3.0 * inner + 2.0 * xb, 4.0 * inner + xb);
        let sizes = format!("{} heads of {} states", mamba.c_heads(), mamba.d_state);
        let scan = |values: f64| Work { exponentials, bytes: t * values * size, ..Work::default() };
        floor("selective_scan", sizes.clone(), scan(apart + inner));
        floor("selective_scan, convolution fused", sizes.clone(), scan(fused + inner));
        floor("selective_scan_backward", sizes.clone(), scan(2.0 * apart + inner));
        floor("selective_scan_backward, convolution fused", sizes, scan(2.0 * fused + inner));
        let taps = format!("{} taps", mamba.d_conv);
        let moved = |values: f64| Work { bytes: t * values * size, ..Work::default() };
        floor("conv1d", taps.clone(), moved(xb + inner));
        floor("conv1d_backward", taps, moved(2.0 * xb + inner));

        let sizes = format!("{tokens}×{hidden}×{vocabulary}");
        let loss = product(tokens, hidden, vocabulary);
        floor("linear and reverse KL, both ways", sizes, Work { flops: 4.0 * loss.flops, bytes: 0.0, ..loss });
        let parameters = config.parameter_count() as f64;
        floor("adamw", format!("{parameters} values"), Work { bytes: parameters * (ADAMW + size), ..Work::default() });
        Ok(floors)
    }

    /// The floors of a model; `context` tokens are a sequence's.
    pub fn model(&self, teacher: &ModelConfig, config: &ModelConfig, context: usize) -> ModelFloors {
        let (weight_bytes, cache_bytes) =
            (config.parameter_count() as f64 * self.size(), config.cache_bytes(context, self.dtype.size()));
        let room = self.card.gibibytes * f64::from(1 << 30) - weight_bytes - RESERVED;
        let largest_batch = (room / cache_bytes as f64).max(0.0) as usize;
        let rate = |work: Work, tokens: usize| tokens as f64 / self.seconds(work).0;
        let decode =
            |batch: usize, context: usize| rate(decode(config, (self.dtype, self.dtype), batch, context), batch);
        let step = distillation(teacher, config, context);
        let again = Work { flops: step.flops + forward(config, context).flops, ..step };
        let prefill = forward(config, context).flops - 2.0 * (context - context.min(1)) as f64 * head(config);
        ModelFloors {
            weight_bytes,
            cache_bytes,
            single_decode: decode(1, context),
            largest_batch,
            decode: (largest_batch > 0).then(|| decode(largest_batch, context / 2)),
            prefill: rate(Work { flops: prefill, ..Work::default() }, context),
            distillation: rate(step, context),
            recomputed_distillation: rate(again, context),
        }
    }
}

/// A step of decoding `batch` sequences that have `context` tokens each, with weights and keys and values stored as said: weights,
/// keys and values are read, states read and written.
pub fn decode(config: &ModelConfig, (weights, values): (DType, DType), batch: usize, context: usize) -> Work {
    let states = config.cache_bytes(0, 0) as f64;
    let cache = config.cache_bytes(context, values.size()) as f64 + states;
    let scores = 4.0 * context as f64 * (config.query_width() * config.layers_of(BlockKind::Attention).count()) as f64;
    Work {
        flops: batch as f64 * (2.0 * products(config) + scores),
        bytes: products(config) * weights.size() as f64 + batch as f64 * cache,
        ..Work::default()
    }
}

/// Parameters of the head.
fn head(config: &ModelConfig) -> f64 {
    (config.vocab_size * config.hidden_size) as f64
}

/// Parameters that a token is multiplied with: all but an embedding of its own.
fn products(config: &ModelConfig) -> f64 {
    config.parameter_count() as f64 - if config.tie_word_embeddings { 0.0 } else { head(config) }
}

/// Every token of a sequence through a model, with the logits of each.
fn forward(config: &ModelConfig, tokens: usize) -> Work {
    let (t, layers) = (tokens as f64, config.layers_of(BlockKind::Attention).count() as f64);
    let scores = 4.0 * t * (t + 1.0) / 2.0 * config.query_width() as f64 * layers;
    Work { flops: 2.0 * products(config) * t + scores, ..Work::default() }
}

/// A step of distillation: the teacher forward, the student forward, and backward, whose products are two for each of forward's
/// and five for attention's two.
pub fn distillation(teacher: &ModelConfig, student: &ModelConfig, tokens: usize) -> Work {
    let dense = 2.0 * products(student) * tokens as f64;
    let student = forward(student, tokens).flops;
    let scores = student - dense;
    Work { flops: forward(teacher, tokens).flops + student + 2.0 * dense + 2.5 * scores, ..Work::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::card::CARDS;
    use crate::bench::shapes::{Shape, hybrid};

    /// The 15B of Apriel-H1 with Mamba layers, on an H100, sequences of 16,384.
    fn floors(mamba: usize) -> ModelFloors {
        let teacher = Shape::Apriel.config();
        let roofline = Roofline { card: CARDS[0], dtype: DType::Bf16 };
        roofline.model(&teacher, &hybrid(&teacher, mamba).unwrap(), 16_384)
    }

    fn close(found: f64, known: f64, share: f64) {
        assert!((found / known - 1.0).abs() < share, "{found}, not {known}");
    }

    #[test]
    fn decoding_and_distillation_have_the_known_floors() {
        for (mamba, batch, rate) in [(0, 15, 837.0), (30, 37, 2000.0), (40, 73, 3863.0)] {
            let floors = floors(mamba);
            assert_eq!(floors.largest_batch, batch, "{mamba} layers");
            close(floors.decode.unwrap(), rate, 0.01);
        }
        let (teacher, hybrid) = (floors(0), floors(30));
        close(teacher.single_decode, 95.0, 0.015);
        close(teacher.prefill, 22_500.0, 0.05);
        close(hybrid.distillation, 5_915.0, 0.01);
        close(hybrid.recomputed_distillation, 4_760.0, 0.01);
    }

    #[test]
    fn the_scan_is_bound_by_its_exponentials() {
        let roofline = Roofline { card: CARDS[0], dtype: DType::Bf16 };
        let kernels = roofline.kernels(&Shape::Apriel.config(), 16_384).unwrap();
        let find = |name: &str| kernels.iter().find(|kernel| kernel.name == name).unwrap();
        let scan = find("selective_scan");
        assert_eq!(scan.bound, Bound::Exponentials);
        close(scan.seconds, 290e-6, 0.01);
        close(find("selective_scan_backward").seconds, 425e-6, 0.01);
        close(find("selective_scan_backward, convolution fused").seconds, 358e-6, 0.01);
    }
}

//! Prefill and decoding of a whole model, many sequences at a time.

use std::time::Instant;

use serde::Serialize;

use super::yardstick::Limits;
use super::{Error, Result, roofline};
use crate::backend::{DType, Device};
use crate::generate::{Event, Generator, Limits as Sizes, Request};
use crate::model::Model;
use crate::model::config::ModelConfig;
use crate::model::parameters::Part;

/// What is run.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Tokens that a sequence is taken to have behind it already, their keys, values and states all 0.
    pub past: usize,
    /// Tokens of a prompt after them.
    pub prompt: usize,
    /// New tokens of a sequence.
    pub new_tokens: usize,
    /// Sequences at a time.
    pub batch: usize,
    /// Tokens of a call, at most: longer prompts come in pieces.
    pub call: usize,
    /// Times that it is run; the best counts.
    pub repeats: usize,
}

impl Load {
    /// Tokens of a sequence at its end.
    fn context(&self) -> usize {
        self.past.saturating_add(self.prompt).saturating_add(self.new_tokens)
    }
}

/// What came out.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Throughput {
    /// Sequences at a time.
    pub batch: usize,
    /// Seconds until every sequence had its first new token.
    pub prefill_seconds: f64,
    /// Prompt tokens of all sequences over that time; logits are made for the last token of each alone.
    pub prefill_tokens_per_second: f64,
    /// New tokens of all sequences after the first of each, over the time that they took; none where only one was asked
    /// for.
    pub decode_tokens_per_second: Option<f64>,
    /// The least time of decoding a token of every sequence ([`roofline::decode`], at half of the new tokens) by the machine's
    /// limits, over the time that it took.
    pub share_of_floor: Option<f64>,
    /// Bytes of a sequence's cache at its end.
    pub cache_bytes: u64,
    /// Bytes of the weights.
    pub weight_bytes: usize,
    /// The most bytes of device buffers at a time: weights, caches, activations, logits.
    pub peak_bytes: usize,
}

/// Gets the memory ready for a model of a shape and what [`measure`] makes beside it for one load after the other.
///
/// # Errors
/// When the device has no room.
pub fn plan((device, dtype): (&Device, DType), shape: &ModelConfig, loads: &[Load]) -> Result<()> {
    device.plan(|device| {
        let model = Model::new(device, shape.clone(), dtype)?;
        loads.iter().try_for_each(|load| generator(&model, *load).map(drop))
    })
}

fn generator(model: &Model, load: Load) -> Result<Generator<'_>> {
    let call = load.call.min(load.batch.saturating_mul(load.prompt));
    Ok(Generator::new(model, Sizes { sequences: load.batch, context: load.context(), call })?)
}

/// Runs `load` on a model. The prompts are random, and every sequence gets all of its new tokens.
///
/// # Errors
/// When the load makes no sense, the device has no room, or it fails.
pub fn measure(model: &Model, load: Load, limits: &Limits) -> Result<Throughput> {
    let Load { past, prompt, new_tokens, batch, call, repeats } = load;
    if [prompt, new_tokens, batch, call, repeats].contains(&0) {
        return Err(Error::Options("a throughput needs at least one token, one sequence and one run".into()));
    }
    let config = model.config();
    let vocabulary = config.vocab_size as u32;
    model.device().take_peak_bytes();
    let mut generator = generator(model, load)?;
    let requests: Vec<Request> = (0..batch)
        .map(|index| Request {
            past,
            prompt: (0..past + prompt).map(|at| (7 * at as u32 + 13 * index as u32 + 5) % vocabulary).collect(),
            max_new_tokens: new_tokens,
            temperature: 0.0,
            seed: 0,
        })
        .collect();
    let (mut prefill, mut decode) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..repeats {
        let run = timed(&mut generator, &requests)?;
        prefill = prefill.min(run.prefill);
        decode = decode.min(run.rest / run.rest_tokens as f64);
    }
    let stored = (model.weights().part(Part::Matrices).dtype, model.activations());
    let step = roofline::decode(config, stored, batch, past + prompt + new_tokens / 2);
    let decoded = decode.is_finite() && decode > 0.0;
    Ok(Throughput {
        batch,
        prefill_seconds: prefill,
        prefill_tokens_per_second: (batch * prompt) as f64 / prefill,
        decode_tokens_per_second: decoded.then(|| 1.0 / decode),
        share_of_floor: decoded.then(|| limits.floor(step.flops, step.bytes) / (decode * batch as f64)),
        cache_bytes: config.cache_bytes(load.context(), model.activations().size()),
        weight_bytes: model.weights().bytes(),
        peak_bytes: model.device().take_peak_bytes(),
    })
}

struct Times {
    prefill: f64,
    rest: f64,
    rest_tokens: usize,
}

fn timed(generator: &mut Generator<'_>, requests: &[Request]) -> Result<Times> {
    let start = Instant::now();
    let (mut begun, mut prefill) = (vec![false; requests.len()], 0.0);
    let (mut waiting, mut rest_tokens) = (requests.len(), 0);
    generator.run(requests, &[], |index, event| {
        if matches!(event, Event::Token(_)) {
            if waiting == 0 {
                rest_tokens += 1;
            } else if !std::mem::replace(&mut begun[index], true) {
                waiting -= 1;
                prefill = start.elapsed().as_secs_f64();
            }
        }
        true
    })?;
    Ok(Times { prefill, rest: start.elapsed().as_secs_f64() - prefill, rest_tokens })
}

//! Sampling, and the scheduler of many sequences over one axis of tokens.

use std::collections::{HashMap, VecDeque};

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::backend::ops::Sample;
use crate::backend::{self, DType, HostSlice, Recording, Segments};
use crate::model::{Activations, Cache, Column, FinalNorm, Keep, Logits, Model};
use crate::random;

/// What keeps a generation from going on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] backend::Error),
    /// A prompt without a token: there is nothing to predict from.
    #[error("prompt {} has no tokens", index + 1)]
    EmptyPrompt {
        /// The request, counted from 0.
        index: usize,
    },
    /// A prompt that leaves no room for a new token.
    #[error("prompt {} has {tokens} tokens and {wanted} are wanted, but a sequence has room for {context}", index + 1)]
    TooLong {
        /// The request.
        index: usize,
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens asked for.
        wanted: usize,
        /// Tokens that a sequence has room for.
        context: usize,
    },
    /// A token that the model does not have.
    #[error("prompt {} has token {token}, which is outside the vocabulary of {vocabulary}", index + 1)]
    Vocabulary {
        /// The request, counted from 0.
        index: usize,
        /// The token.
        token: u32,
        /// Tokens that the model has.
        vocabulary: usize,
    },
    /// A temperature that is none.
    #[error("temperature {0} is not a number that is at least 0")]
    Temperature(f32),
}

/// A sequence to go on with.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its tokens so far; at least one.
    pub prompt: Vec<u32>,
    /// Tokens of the prompt, but for its last, that are taken as done: what the cache's memory holds is taken for theirs. 0
    /// but where decoding is measured in the middle of a long text.
    pub past: usize,
    /// New tokens, at most.
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Seeds its draws: a request gives the same tokens whatever else is generated beside it.
    pub seed: u64,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// It came to an end token.
    End,
    /// It has as many tokens as were asked for.
    Length,
}

/// What happened to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A new token; end tokens are not among them.
    Token(u32),
    /// The sequence ended.
    Finished(Finish),
}

/// The sizes that a generator is made for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences at a time.
    pub sequences: usize,
    /// Tokens of a sequence, prompt and new ones.
    pub context: usize,
    /// Tokens of one call: longer prompts come in pieces.
    pub call: usize,
}

/// A model with its cache and the memory to decode many sequences at once.
#[derive(Debug)]
pub struct Generator<'a> {
    model: &'a Model,
    limits: Limits,
    cache: Cache,
    activations: Activations,
    norm: FinalNorm,
    logits: Logits,
    temperatures: Column,
    uniforms: Column,
    sampled: Column,
    /// Steps of decoding by their number of sequences.
    recordings: HashMap<usize, Recording>,
}

struct Sequence {
    request: usize,
    slot: usize,
    tokens: Vec<u32>,
    /// Tokens that the cache holds.
    past: usize,
    /// Tokens in the call under way.
    taken: usize,
    left: usize,
    temperature: f32,
    draws: ChaCha8Rng,
}

impl<'a> Generator<'a> {
    /// Memory for up to `limits.sequences` sequences.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(model: &'a Model, limits: Limits) -> Result<Self, Error> {
        let (device, count) = (model.device(), limits.sequences);
        let limits = Limits { call: limits.call.max(count), ..limits };
        let tokens = count.saturating_mul(limits.context);
        let column = |dtype| Column::new(device, dtype, count);
        Ok(Generator {
            model,
            limits,
            cache: Cache::new(model, count, limits.context, tokens)?,
            activations: Activations::new(model, Keep::Nothing, limits.call, count)?,
            norm: FinalNorm::new(model, count)?,
            logits: Logits::new(model, count)?,
            temperatures: column(DType::F32)?,
            uniforms: column(DType::F32)?,
            sampled: column(DType::U32)?,
            recordings: HashMap::new(),
        })
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Runs all requests to their ends, as many at a time as there is room for; `ends` are the tokens that end a
    /// sequence. `on` hears every new token as it comes, with the index of its request, and says whether to go on.
    ///
    /// # Errors
    /// When a request does not fit, or the backend fails.
    pub fn run(
        &mut self,
        requests: &[Request],
        ends: &[u32],
        mut on: impl FnMut(usize, Event) -> bool,
    ) -> Result<(), Error> {
        self.check(requests)?;
        let mut waiting: VecDeque<usize> = (0..requests.len()).filter(|i| requests[*i].max_new_tokens > 0).collect();
        let mut free: Vec<usize> = (0..self.limits.sequences).rev().collect();
        let mut running: Vec<Sequence> = Vec::new();
        loop {
            while let (Some(slot), Some(index)) = (free.last().copied(), waiting.front().copied()) {
                free.pop();
                waiting.pop_front();
                running.push(Sequence::new(index, slot, &requests[index]));
            }
            if running.is_empty() {
                return Ok(());
            }
            let sampled = self.step(&mut running)?;
            let mut sampled = sampled.into_iter();
            for sequence in &mut running {
                sequence.past += std::mem::take(&mut sequence.taken);
                if sequence.past < sequence.tokens.len() {
                    continue;
                }
                let Some(token) = sampled.next() else { continue };
                sequence.left -= 1;
                let finish = if ends.contains(&token) {
                    Some(Finish::End)
                } else {
                    sequence.tokens.push(token);
                    if !on(sequence.request, Event::Token(token)) {
                        return Ok(());
                    }
                    (sequence.left == 0).then_some(Finish::Length)
                };
                if let Some(finish) = finish {
                    sequence.left = 0;
                    if !on(sequence.request, Event::Finished(finish)) {
                        return Ok(());
                    }
                }
            }
            running.retain(|sequence| {
                let done = sequence.left == 0;
                if done {
                    self.cache.release(sequence.slot);
                    free.push(sequence.slot);
                }
                !done
            });
        }
    }

    /// Whether the requests can be run; [`Self::run`] asks first of all.
    ///
    /// # Errors
    /// When a prompt has no tokens, too many, or one that the model does not have, or a temperature is none.
    pub fn check(&self, requests: &[Request]) -> Result<(), Error> {
        for (index, request) in requests.iter().enumerate() {
            let (tokens, wanted, context) = (request.prompt.len(), request.max_new_tokens, self.limits.context);
            if tokens == 0 {
                return Err(Error::EmptyPrompt { index });
            }
            // The last new token is never fed.
            if tokens.saturating_add(wanted) > context.saturating_add(1) {
                return Err(Error::TooLong { index, tokens, wanted, context });
            }
            let vocabulary = self.model.config().vocab_size;
            if let Some(token) = request.prompt.iter().copied().find(|token| *token as usize >= vocabulary) {
                return Err(Error::Vocabulary { index, token, vocabulary });
            }
            if !(request.temperature >= 0.0 && request.temperature.is_finite()) {
                return Err(Error::Temperature(request.temperature));
            }
        }
        Ok(())
    }

    /// One call: the next token of every sequence that decodes, and as much of the prompts as fits. Gives the sampled
    /// tokens of the sequences whose tokens are all in, in their order.
    fn step(&mut self, running: &mut [Sequence]) -> Result<Vec<u32>, Error> {
        let device = self.model.device();
        let (mut ids, mut segments) = (Vec::new(), Segments::default());
        let (mut last, mut temperatures, mut uniforms) = (Vec::new(), Vec::new(), Vec::new());
        let mut room = self.limits.call - running.len();
        for sequence in running.iter_mut() {
            let missing = sequence.tokens.len() - sequence.past;
            let take = missing.min(1 + room);
            room -= take - 1;
            sequence.taken = take;
            ids.extend_from_slice(&sequence.tokens[sequence.past..sequence.past + take]);
            segments.push(take, sequence.past, sequence.slot)?;
            if take == missing {
                last.push(ids.len() as u32 - 1);
                temperatures.push(sequence.temperature);
                uniforms.push(sequence.draws.random::<f32>());
            }
        }
        let Generator { model, cache, activations, norm, logits: head, recordings, .. } = self;
        model.prepare(activations, &ids, &segments, Some(cache))?;
        let n = last.len();
        if n == 0 {
            return Ok(model.launch(activations, Some(cache), None).map(|()| Vec::new())?);
        }
        norm.choose(device, &last)?;
        let (temperatures_of, uniforms_of, out) = (self.temperatures.of(n)?, self.uniforms.of(n)?, self.sampled.of(n)?);
        device.write(HostSlice::F32(&temperatures), temperatures_of)?;
        device.write(HostSlice::F32(&uniforms), uniforms_of)?;
        let launch = || {
            model.launch(activations, Some(cache), None)?;
            let logits = head.forward(model, norm.launch(model, activations.output()?, n)?)?;
            device.sample(&Sample { logits, temperatures: temperatures_of, uniforms: uniforms_of, out })
        };
        // A step of decoding comes again with the same sizes; what holds a prompt seldom does.
        if n == ids.len() {
            recordings.entry(n).or_insert_with(|| device.recording()).run(launch)?;
        } else {
            launch()?;
        }
        Ok(device.read(out)?.wait()?.into_iter().map(|token| token as u32).collect())
    }
}

impl Sequence {
    fn new(index: usize, slot: usize, request: &Request) -> Self {
        Sequence {
            request: index,
            slot,
            tokens: request.prompt.clone(),
            past: request.past.min(request.prompt.len().saturating_sub(1)),
            taken: 0,
            left: request.max_new_tokens,
            temperature: request.temperature,
            draws: random::stream(request.seed, "generate"),
        }
    }
}

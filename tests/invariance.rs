//! The law of batch-invariant devices: a token's logits are the same bits however its sequence is cut into calls and whatever
//! shares them.

use std::num::NonZeroUsize;

use h1::backend::select::{self, Name};
use h1::backend::{DType, Device, Segments};
use h1::bench::shapes::{Shape, random_model};
use h1::model::config::{BlockKind, ModelConfig};
use h1::model::{Activations, Cache, FinalNorm, Keep, Logits, Model};

/// Tokens of the sequence that is looked at, and of the one that shares calls with it.
const TOKENS: usize = 70;
const OTHERS: usize = 33;

fn id(at: usize) -> u32 {
    (at * 7 % 32) as u32
}

/// A model with its memory, as a call needs it.
struct Calls<'a> {
    model: &'a Model,
    activations: Activations,
    cache: Cache,
    norm: FinalNorm,
    logits: Logits,
}

impl<'a> Calls<'a> {
    fn new(model: &'a Model) -> Self {
        let tokens = TOKENS + OTHERS;
        Calls {
            model,
            activations: Activations::new(model, Keep::Nothing, tokens, 2).unwrap(),
            cache: Cache::new(model, 2, 128, 256).unwrap(),
            norm: FinalNorm::new(model, tokens).unwrap(),
            logits: Logits::new(model, tokens).unwrap(),
        }
    }

    /// The logits of all rows of a call.
    fn of(&mut self, ids: &[u32], segments: &Segments) -> Vec<f32> {
        let rows: Vec<u32> = (0..ids.len() as u32).collect();
        self.model.forward(&mut self.activations, ids, segments, Some(&mut self.cache), None).unwrap();
        let normed = self.norm.forward(self.model, self.activations.output().unwrap(), &rows).unwrap();
        let logits = self.logits.forward(self.model, normed).unwrap();
        self.model.device().read(logits).unwrap().wait().unwrap()
    }
}

fn segment(segments: &mut Segments, len: usize, past: usize, slot: usize) {
    segments.push(len, past, slot).unwrap();
}

fn cuts_and_company_change_no_bit(device: &Device) {
    let config = ModelConfig { blocks: vec![BlockKind::Attention; 4], ..Shape::Arithmetic.config() };
    let model = random_model(device, &config, 2, DType::F32).unwrap();
    let ids: Vec<u32> = (0..TOKENS).map(id).collect();
    // Whole, behind another sequence.
    let mut both = Segments::default();
    segment(&mut both, OTHERS, 0, 1);
    segment(&mut both, TOKENS, 0, 0);
    let shared: Vec<u32> = (0..OTHERS).map(|at| id(3 * at + 1)).chain(ids.iter().copied()).collect();
    let whole = Calls::new(&model).of(&shared, &both);
    let vocabulary = whole.len() / shared.len();
    let whole = &whole[OTHERS * vocabulary..];
    // Alone: a token at a time, and in pieces.
    for cuts in [vec![1; TOKENS], vec![3, 1, 40, 5, 21]] {
        let (mut calls, mut past) = (Calls::new(&model), 0);
        for len in cuts {
            let mut one = Segments::default();
            segment(&mut one, len, past, 0);
            let logits = calls.of(&ids[past..past + len], &one);
            let expected = &whole[past * vocabulary..(past + len) * vocabulary];
            let same = logits.iter().map(|v| v.to_bits()).eq(expected.iter().map(|v| v.to_bits()));
            assert!(same, "{} tokens after {past} on {}", len, device.info().device);
            past += len;
        }
    }
}

#[test]
fn on_cpu() {
    cuts_and_company_change_no_bit(&select::open_batch_invariant(Name::Cpu, NonZeroUsize::new(2)).unwrap());
}

#[test]
fn on_wgpu() {
    match select::open_batch_invariant(Name::Wgpu, None) {
        Ok(device) => cuts_and_company_change_no_bit(&device),
        // A machine without an adapter says so; in CI that is a failure.
        Err(error) if std::env::var_os("CI").is_none() => println!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    }
}

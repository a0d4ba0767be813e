//! Greedy decoding with the cache: tokens, logits and states.

use super::models::{Run, repeat};
use super::{Report, Result};
use crate::backend::{DType, Device, Segments};
use crate::checkpoint;
use crate::model::cache::LayerCache;
use crate::model::{Cache, Keep};

/// `FOLDER/decode.safetensors`.
pub(super) fn decode(report: &mut Report, device: &Device, folder: &str) -> Result<()> {
    let file = format!("{folder}/decode.safetensors");
    let golden = report.goldens.tensors(&file)?;
    let (prompts, tokens) = (golden.get("prompt_ids")?, golden.get("token_ids")?);
    let (batch, prompt, total) = (prompts.size(0), prompts.size(1), tokens.size(1));
    let step_logits = golden.get("step_logits")?;
    let model = checkpoint::load(device, &report.goldens.path(folder), DType::F32)?;
    let vocabulary = model.config().vocab_size;
    let mut run = Run::new(&model, Keep::Nothing, batch * prompt, batch)?;
    let mut cache = Cache::new(&model, batch, total, batch * total)?;

    let mut generated: Vec<Vec<u32>> = prompts.ids().chunks_exact(prompt.max(1)).map(<[u32]>::to_vec).collect();
    let mut logits_of = vec![Vec::new(); batch];
    let mut past = 0;
    while past + 1 < total {
        let len = if past == 0 { prompt } else { 1 };
        let mut segments = Segments::default();
        for slot in 0..batch {
            segments.push(len, past, slot)?;
        }
        let ids: Vec<u32> = generated.iter().flat_map(|sequence| &sequence[past..]).copied().collect();
        model.forward(&mut run.activations, &ids, &segments, Some(&mut cache), None)?;
        let last: Vec<u32> = (1..=batch).map(|i| (i * len - 1) as u32).collect();
        let (_, logits) = run.head(&last)?;
        for (slot, row) in logits.chunks_exact(vocabulary).enumerate() {
            let best = row.iter().enumerate().fold(0, |best, (i, v)| if *v > row[best] { i } else { best });
            generated[slot].push(best as u32);
            logits_of[slot].extend_from_slice(row);
        }
        if past == 0 {
            states(report, device, (&file, "prefill"), &golden, (&model, &cache), (batch, prompt))?;
        }
        past += len;
    }
    report.compare(&file, "step_logits", &step_logits.values, &logits_of.concat());
    report.exact(&file, "token_ids", generated.concat() == tokens.ids());
    states(report, device, (&file, "final"), &golden, (&model, &cache), (batch, past))
}

fn states(
    report: &mut Report,
    device: &Device,
    (file, when): (&str, &str),
    golden: &super::goldens::Tensors,
    (model, cache): (&crate::model::Model, &Cache),
    (batch, past): (usize, usize),
) -> Result<()> {
    let config = model.config();
    for layer in 0..config.num_hidden_layers() {
        let mut compare = |state: &str, found: &[f32]| {
            let name = format!("{when}.{state}.{layer}");
            if let Some(expected) = golden.find(&name) {
                report.compare(file, &name, &expected.values, found);
            }
        };
        match (cache.layer(layer), &config.mamba) {
            (LayerCache::Mamba { conv, ssm, .. }, Some(mamba)) => {
                let conv = device.read(conv.view())?.wait()?;
                let sequences = conv.chunks_exact(mamba.conv_state());
                let repeated: Vec<f32> = sequences.flat_map(|state| repeat(mamba, state, mamba.d_conv)).collect();
                compare("conv_state", &repeated);
                compare("ssm_state", &device.read(ssm.view())?.wait()?);
            }
            (LayerCache::Attention { .. }, _) => {
                let (heads, head_dim) = (config.num_key_value_heads, config.head_dim);
                let (mut keys, mut values) = (Vec::new(), Vec::new());
                for slot in 0..batch {
                    if let Some([k, v]) = cache.read_keys(device, layer, slot, past)? {
                        keys.extend(super::goldens::swap([1, past, heads, head_dim], &k));
                        values.extend(super::goldens::swap([1, past, heads, head_dim], &v));
                    }
                }
                compare("k_cache", &keys);
                compare("v_cache", &values);
            }
            _ => {}
        }
    }
    Ok(())
}

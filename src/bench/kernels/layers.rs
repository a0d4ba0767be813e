//! Whole mixers: what a layer takes with all of its ops, without the norm before it.

use super::{Bench, Work};
use crate::backend::Segments;
use crate::bench::shapes::{random_model, two_layers};
use crate::bench::{Error, Result};
use crate::hybrid::{Conversion, Init, MixerShape};
use crate::model::config::{BlockKind, MambaConfig, ModelConfig};
use crate::model::{Gradients, Probe};

/// The `m2` mixer of a shape.
pub(in crate::bench) fn mixer(config: &ModelConfig) -> Result<MambaConfig> {
    if let Some(mamba) = &config.mamba {
        return Ok(mamba.clone());
    }
    let teacher = ModelConfig { blocks: vec![BlockKind::Attention], ..config.clone() };
    let all = [0].into_iter().collect();
    let conversion = Conversion::new(&teacher, &teacher, &all, (Init::Random, MixerShape::default(), 0))?;
    conversion.config().mamba.clone().ok_or_else(|| Error::Options("the shape allows no Mamba mixer".into()))
}

/// The Mamba and the attention mixer of the shape, forward, and forward with backward of everything.
pub(super) fn layers(bench: &mut Bench<'_>) -> Result<()> {
    let (device, config, tokens) = (bench.device, bench.config, bench.tokens);
    let model = random_model(device, &two_layers(config), 1, bench.dtype)?;
    let mut probe = Probe::with_backward(&model, tokens, 1)?;
    probe.begin(&Segments::documents([tokens])?)?;
    let gradients = Gradients::new(device, model.weights().table(), |_| true)?;
    let (hidden, mamba) = (config.hidden_size, mixer(config)?);
    let [x, dout] = [bench.values(tokens, hidden)?, bench.values(tokens, hidden)?];
    let [out, dx] = [bench.room(tokens, hidden)?, bench.room(tokens, hidden)?];

    let heads = config.query_width() + config.key_value_width();
    let low = mamba.dt_rank * (hidden + mamba.d_inner);
    for (layer, names, weights) in [
        (1, ["m2 layer", "m2 layer with backward"], hidden * (mamba.in_proj_rows() + mamba.d_inner) + low),
        (0, ["attention layer", "attention layer with backward"], 2 * hidden * heads),
    ] {
        let sizes = format!("{tokens} tokens, hidden {hidden}");
        // The products alone; with backward each is done twice more.
        let bytes = 2 * tokens * hidden * bench.activations().size() + weights * bench.dtype.size();
        let work = |times: f64| Work { flops: times * 2.0 * (tokens * weights) as f64, bytes };
        let (x, out) = (x.view(), out.view());
        bench.op((names[0], sizes.clone()), work(1.0), || probe.mixer(layer, x, out))?;
        bench.op((names[1], sizes), work(3.0), || {
            probe.mixer(layer, x, out)?;
            probe.mixer_backward(layer, &gradients, (x, dout.view()), dx.view())
        })?;
    }
    Ok(())
}

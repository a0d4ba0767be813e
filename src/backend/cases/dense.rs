//! Embedding, norm, products, gated activation.

use super::Verdict;
use super::trial::Trial;
use crate::backend::{DType, Out, ops};

const MOST: usize = 200;

pub fn embed(t: &mut Trial) -> Verdict {
    let (tokens, vocabulary, hidden) = (t.size(MOST), t.size(MOST), t.size(MOST));
    let ids: Vec<_> = (0..tokens).map(|_| t.below(vocabulary)).collect();
    let ids = t.ids("ids", 1, tokens, &ids)?;
    let weight = t.weight("weight", vocabulary, hidden)?;
    let out = t.output("out", tokens, hidden, 0)?;
    t.run(|on| on.device.embed(&ops::Embed { ids: on.view(ids), weight: on.view(weight), out: on.view(out) }))
}

pub fn embed_backward(t: &mut Trial) -> Verdict {
    let (tokens, vocabulary, hidden) = (t.size(MOST), t.size(MOST), t.size(MOST));
    let ids: Vec<_> = (0..tokens).map(|_| t.below(vocabulary)).collect();
    let ids = t.ids("ids", 1, tokens, &ids)?;
    let dout = t.input("dout", tokens, hidden)?;
    let dweight = t.weight_output("dweight", DType::F32, vocabulary, hidden, tokens, true)?;
    t.run(|on| {
        let (ids, dout, dweight) = (on.view(ids), on.view(dout), on.view(dweight));
        on.device.embed_backward(&ops::EmbedBackward { ids, dout, dweight })
    })
}

pub fn rms_norm(t: &mut Trial) -> Verdict {
    let (tokens, hidden) = (t.size(MOST), t.size(MOST));
    let x = t.input("x", tokens, hidden)?;
    let weight = t.parameter("weight", 1, hidden)?;
    let out = t.output("out", tokens, hidden, hidden)?;
    let inv_rms = if t.coin() { Some(t.in_f32(|t| t.output("inv_rms", 1, tokens, hidden))?) } else { None };
    t.run(|on| {
        let (x, weight, out, inv_rms) = (on.view(x), on.view(weight), on.view(out), on.maybe(inv_rms));
        on.device.rms_norm(&ops::RmsNorm { x, weight, eps: 1e-5, out, inv_rms })
    })
}

pub fn rms_norm_backward(t: &mut Trial) -> Verdict {
    let (tokens, hidden) = (t.size(MOST), t.size(MOST));
    rms_norm_backward_of(t, tokens, hidden)
}

/// Of so many rows, of so many values.
pub fn rms_norm_backward_of(t: &mut Trial, tokens: usize, hidden: usize) -> Verdict {
    let x = t.input("x", tokens, hidden)?;
    let weight = t.parameter("weight", 1, hidden)?;
    let out = t.kept("out", tokens, hidden)?;
    let inv_rms = t.in_f32(|t| t.kept("inv_rms", 1, tokens))?;
    t.prepare(|on| {
        let (x, weight, out, inv_rms) = (on.view(x), on.view(weight), on.view(out), Some(on.view(inv_rms)));
        on.device.rms_norm(&ops::RmsNorm { x, weight, eps: 1e-2, out, inv_rms })
    })?;
    let dout = t.input("dout", tokens, hidden)?;
    let (dx, add) = t.out("dx", tokens, hidden, hidden)?;
    let wanted = t.one_of(&[true, true, false]);
    let dweight = if wanted { Some(t.in_f32(|t| t.changed("dweight", 1, hidden, tokens))?) } else { None };
    t.run(|on| {
        let (x, weight, inv_rms, dout) = (on.view(x), on.view(weight), on.view(inv_rms), on.view(dout));
        let (dx, dweight) = (Out { view: on.view(dx), add }, on.maybe(dweight));
        on.device.rms_norm_backward(&ops::RmsNormBackward { x, weight, inv_rms, dout, dx, dweight })
    })
}

/// Of inputs to so many rows: of one row often a multiple of what is read at a time.
fn inputs(t: &mut Trial, most_tokens: usize) -> usize {
    if most_tokens == 1 { t.one_of(&[1, 2, 4, 8, 8]) * t.size(MOST / 8) } else { t.size(MOST) }
}

pub fn linear(t: &mut Trial, most_tokens: usize) -> Verdict {
    let (tokens, inputs, outputs) = (t.size(most_tokens), inputs(t, most_tokens), t.size(MOST));
    let x = t.input("x", tokens, inputs)?;
    let weight = t.weight("weight", outputs, inputs)?;
    let bias = if t.coin() { Some(t.parameter("bias", 1, outputs)?) } else { None };
    // Logits are f32 whatever the activations are.
    let logits = t.activations() != DType::F32 && t.coin();
    let out = |t: &mut Trial| t.out("out", tokens, outputs, inputs);
    let (out, add) = if logits { t.in_f32(out)? } else { out(t)? };
    t.run(|on| {
        let (x, weight, bias, out) = (on.view(x), on.view(weight), on.maybe(bias), Out { view: on.view(out), add });
        on.device.linear(&ops::Linear { x, weight, bias, out })
    })
}

pub fn linear_backward_input(t: &mut Trial) -> Verdict {
    let (tokens, inputs, outputs) = (t.size(MOST), t.size(MOST), t.size(MOST));
    let dout = t.input("dout", tokens, outputs)?;
    let weight = t.weight("weight", outputs, inputs)?;
    let (dx, add) = t.out("dx", tokens, inputs, outputs)?;
    t.run(|on| {
        let (dout, weight, dx) = (on.view(dout), on.view(weight), Out { view: on.view(dx), add });
        on.device.linear_backward_input(&ops::LinearBackwardInput { dout, weight, dx })
    })
}

pub fn linear_backward_weight(t: &mut Trial) -> Verdict {
    let (tokens, inputs, outputs) = (t.size(MOST), t.size(MOST), t.size(MOST));
    let x = t.input("x", tokens, inputs)?;
    let dout = t.input("dout", tokens, outputs)?;
    let dweight = t.weight_output("dweight", DType::F32, outputs, inputs, tokens, true)?;
    let dbias = if t.coin() { Some(t.in_f32(|t| t.changed("dbias", 1, outputs, tokens))?) } else { None };
    t.run(|on| {
        let (x, dout, dweight, dbias) = (on.view(x), on.view(dout), on.view(dweight), on.maybe(dbias));
        on.device.linear_backward_weight(&ops::LinearBackwardWeight { x, dout, dweight, dbias })
    })
}

pub fn swiglu(t: &mut Trial) -> Verdict {
    let (tokens, width) = (t.size(MOST), t.size(MOST));
    let (gate, up) = (t.input("gate", tokens, width)?, t.input("up", tokens, width)?);
    let out = t.output("out", tokens, width, 1)?;
    t.run(|on| on.device.swiglu(&ops::Swiglu { gate: on.view(gate), up: on.view(up), out: on.view(out) }))
}

pub fn linear_swiglu(t: &mut Trial, most_tokens: usize) -> Verdict {
    let (tokens, inputs, width) = (t.size(most_tokens), inputs(t, most_tokens), t.size(MOST));
    let x = t.input("x", tokens, inputs)?;
    // Gate and up in any order, with columns between and behind them.
    let (gap, behind, swapped) = (t.one_of(&[0, 0, 3]), t.one_of(&[0, 0, 1]), t.coin());
    let outputs = 2 * width + gap + behind;
    let weight = t.weight("weight", outputs, inputs)?;
    let bias = if t.one_of(&[true, false, false, false]) { Some(t.parameter("bias", 1, outputs)?) } else { None };
    let keeps = t.one_of(&[true, false, false]);
    let both = if keeps { t.output("both", tokens, outputs, inputs)? } else { t.passed("both", tokens, outputs)? };
    let out = t.output("out", tokens, width, 4 * inputs)?;
    t.run(|on| {
        let both = on.view(both);
        let columns = [both.col_range(0, width)?, both.col_range(width + gap, width)?];
        let [gate, up] = if swapped { [columns[1], columns[0]] } else { columns };
        let (weight, bias) = (on.view(weight), on.maybe(bias));
        let linear = ops::Linear { x: on.view(x), weight, bias, out: Out::assign(both) };
        on.device.linear_swiglu(&ops::LinearSwiglu {
            linear,
            swiglu: ops::Swiglu { gate, up, out: on.view(out) },
            keeps,
        })
    })
}

pub fn swiglu_backward(t: &mut Trial) -> Verdict {
    let (tokens, width) = (t.size(MOST), t.size(MOST));
    let (gate, up) = (t.input("gate", tokens, width)?, t.input("up", tokens, width)?);
    let dout = t.input("dout", tokens, width)?;
    let (dgate, dup) = (t.output("dgate", tokens, width, 1)?, t.output("dup", tokens, width, 1)?);
    t.run(|on| {
        let (gate, up, dout, dgate, dup) = (on.view(gate), on.view(up), on.view(dout), on.view(dgate), on.view(dup));
        on.device.swiglu_backward(&ops::SwigluBackward { gate, up, dout, dgate, dup })
    })
}

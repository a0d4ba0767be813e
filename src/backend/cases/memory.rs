//! Rows moved, filled, scaled and summed; the optimiser's step.

use super::Verdict;
use super::trial::Trial;
use crate::backend::{DType, Out, ops};

const MOST: usize = 200;

pub fn gather(t: &mut Trial) -> Verdict {
    let (n, rows, width) = (t.size(MOST), t.size(MOST), t.size(MOST));
    let src = t.input("src", rows, width)?;
    let index: Vec<_> = (0..n).map(|_| t.below(rows)).collect();
    let index = t.ids("rows", 1, n, &index)?;
    let out = t.output("out", n, width, 0)?;
    t.run(|on| on.device.gather(&ops::Gather { src: on.view(src), rows: on.view(index), out: on.view(out) }))
}

pub fn scatter_add(t: &mut Trial) -> Verdict {
    let (rows, width) = (t.size(MOST), t.size(MOST));
    let n = t.below(rows + 1);
    let src = t.input("src", n, width)?;
    let index = t.permutation(rows);
    let index = t.ids("rows", 1, n, &index[..n])?;
    let out = t.changed("out", rows, width, 1)?;
    t.run(|on| on.device.scatter_add(&ops::ScatterAdd { src: on.view(src), rows: on.view(index), out: on.view(out) }))
}

pub fn copy(t: &mut Trial) -> Verdict {
    let (rows, cols) = (t.size(MOST), t.size(MOST));
    let src = t.parameter("src", rows, cols)?;
    let (out, add) = match t.parameters() {
        // A type that the source does not have, and the source's own.
        DType::F32 if t.coin() => (t.output_as("out", t.narrowest(), rows, cols, 0)?, false),
        _ => t.out("out", rows, cols, 1)?,
    };
    t.run(|on| on.device.copy(&ops::Copy { src: on.view(src), out: Out { view: on.view(out), add } }))
}

pub fn copy_weight(t: &mut Trial) -> Verdict {
    let (rows, cols, add) = (t.size(MOST), t.size(MOST), t.coin());
    let src = t.weight("src", rows, cols)?;
    let out = t.weight_output("out", DType::F32, rows, cols, 1, add)?;
    t.run(|on| on.device.copy(&ops::Copy { src: on.view(src), out: Out { view: on.view(out), add } }))
}

pub fn copy_ids(t: &mut Trial) -> Verdict {
    let (rows, cols) = (t.size(MOST), t.size(MOST));
    let values: Vec<_> = (0..rows * cols).map(|_| t.below(1 << 20)).collect();
    let src = t.ids("src", rows, cols, &values)?;
    let out = t.output_as("out", DType::U32, rows, cols, 0)?;
    t.run(|on| on.device.copy(&ops::Copy { src: on.view(src), out: Out::assign(on.view(out)) }))
}

pub fn fill(t: &mut Trial) -> Verdict {
    let (rows, cols) = (t.size(MOST), t.size(MOST));
    let out = t.output_as("out", t.parameters(), rows, cols, 0)?;
    t.run(|on| on.device.fill(&ops::Fill { value: 0.3, out: on.view(out) }))
}

pub fn scale(t: &mut Trial) -> Verdict {
    let (rows, cols) = (t.size(MOST), t.size(MOST));
    let x = t.changed("x", rows, cols, 1)?;
    t.run(|on| on.device.scale(&ops::Scale { factor: -0.3, x: on.view(x) }))
}

pub fn weighted_sum(t: &mut Trial) -> Verdict {
    let (rows, cols) = (t.size(MOST), t.size(MOST));
    let skipped: Vec<bool> = (0..rows).map(|_| t.coin()).collect();
    let values = t.input_of("values", rows, cols, |t, r, _| if skipped[r] { f64::NAN } else { t.normal() })?;
    let weights = t.input_of("weights", 1, rows, |t, _, r| if skipped[r] { 0.0 } else { t.normal() })?;
    let out = t.changed("out", 1, cols, rows)?;
    t.run(|on| {
        let (values, weights, out) = (on.view(values), on.view(weights), on.view(out));
        on.device.weighted_sum(&ops::WeightedSum { values, weights, out })
    })
}

pub fn squared_norm(t: &mut Trial) -> Verdict {
    let n = t.size(MOST) * t.size(MOST);
    let x = t.input("x", 1, n)?;
    let out = t.changed("out", 1, 1, n)?;
    t.run(|on| on.device.squared_norm(&ops::SquaredNorm { x: on.view(x), out: on.view(out) }))
}

pub fn clip_factor(t: &mut Trial) -> Verdict {
    let squared = t.one_of(&[0.0, 0.25, 9.0, 1e30, f64::NAN, f64::INFINITY]);
    let squared_norm = t.input_of("squared_norm", 1, 1, |_, _, _| squared)?;
    let control = t.changed("control", 1, ops::CONTROL, 1)?;
    let max_norm = t.one_of(&[1.0, 2.5, f32::INFINITY]);
    t.run(|on| {
        let (squared_norm, control) = (on.view(squared_norm), on.view(control));
        on.device.clip_factor(&ops::ClipFactor { squared_norm, max_norm, control })
    })
}

pub fn adamw(t: &mut Trial, stored: Option<DType>) -> Verdict {
    update(t, stored, [0.1, 0.19, 0.0975, 2.0, 0.5])
}

pub fn adamw_skips(t: &mut Trial) -> Verdict {
    let mut control = [0.1, 0.19, 0.0975, 2.0, 0.5];
    let (which, number) = (t.below(ops::CONTROL), t.one_of(&[f64::NAN, f64::INFINITY]));
    control[which] = number;
    update(t, None, control)
}

fn update(t: &mut Trial, stored: Option<DType>, control: [f64; ops::CONTROL]) -> Verdict {
    let n = t.size(MOST) * t.size(MOST);
    let grad = t.input("grad", 1, n)?;
    let control = t.input_of("control", 1, ops::CONTROL, |_, _, i| control[i])?;
    let (param, moment1) = (t.changed("param", 1, n, 1)?, t.changed("moment1", 1, n, 1)?);
    let moment2 = t.changed_of("moment2", 1, n, 1, |t, _, _| t.number(0.01, 1.0))?;
    let stored = stored.map(|dtype| t.output_as("stored", dtype, 1, n, 1)).transpose()?;
    let weight_decay = t.one_of(&[0.0, 0.1]);
    t.run(|on| {
        on.device.adamw(&ops::AdamW {
            param: on.view(param),
            grad: on.view(grad),
            moment1: on.view(moment1),
            moment2: on.view(moment2),
            stored: on.maybe(stored),
            control: on.view(control),
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay,
        })
    })
}

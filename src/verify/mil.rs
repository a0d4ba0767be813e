//! The initialisation of Mamba from attention: what is copied, bit for bit, and the range of what is drawn.

use super::train::Recipe;
use super::{Error, Report, Result};
use crate::checkpoint::Checkpoint;
use crate::hybrid::{Conversion, Init, LayerSet, MixerShape};
use crate::model::config::{BlockKind, MambaConfig};
use crate::model::tensors::{TensorSpec, layer_tensor};

/// The student of `FOLDER/train.json` against its teacher, and h1's own conversion of that teacher against both.
pub(super) fn initialisation(report: &mut Report, folder: &str) -> Result<()> {
    let recipe: Recipe = report.goldens.json(&format!("{folder}/train.json"))?;
    let student = Checkpoint::open(&report.goldens.path(&recipe.student))?;
    let teacher = Checkpoint::open(&report.goldens.path(&recipe.teacher))?;
    let Some(mamba) = student.config().mamba.clone() else { return Ok(()) };
    let file = format!("{}/model.safetensors", recipe.student);
    let layers: Vec<String> = student.config().layers_of(BlockKind::Mamba).map(|layer| layer.to_string()).collect();
    let layers = LayerSet::parse(&layers.join(","), student.config().num_hidden_layers())?;
    let shape = MixerShape { d_state: Some(mamba.d_state), dt_rank: Some(mamba.dt_rank), d_conv: Some(mamba.d_conv) };
    let conversion = Conversion::new(teacher.config(), teacher.config(), &layers, (Init::Mil, shape, 0))?;
    let source = |name: &str| -> Result<Vec<f32>> { Ok(teacher.read_f32(name)?.values) };
    for tensor in student.config().tensors() {
        let golden = student.read_f32(&tensor.name)?.values;
        if !conversion.is_new(&tensor) {
            report.exact(&file, &format!("{} is the teacher's", tensor.name), golden == source(&tensor.name)?);
            continue;
        }
        let ours = conversion.tensor::<Error>(&tensor, source)?;
        let hidden = student.config().hidden_size;
        for (whose, values) in [("golden", &golden), ("ours", &ours)] {
            for (what, holds) in checks(&tensor, values, (&mamba, hidden), source)? {
                report.exact(&file, &format!("{}, {whose}: {what}", tensor.name), holds);
            }
        }
    }
    Ok(())
}

/// What a tensor of a new mixer must satisfy.
fn checks(
    tensor: &TensorSpec,
    values: &[f32],
    (mamba, hidden): (&MambaConfig, usize),
    teacher: impl Fn(&str) -> Result<Vec<f32>>,
) -> Result<Vec<(&'static str, bool)>> {
    let of = |part: &str| teacher(&layer_tensor(tensor.layer.unwrap_or_default(), part));
    // A bound is drawn in f32 and may be rounded up to.
    let within = |values: &[f32], bound: f64| values.iter().all(|v| f64::from(v.abs()) <= bound * (1.0 + 1e-6));
    let varied = |values: &[f32]| values.iter().any(|v| *v != values[0]);
    let root = |n: usize| (n as f64).powf(-0.5);
    let part = tensor.name.split(".mixer.").last().unwrap_or_default();
    Ok(match part {
        "in_proj.weight" => {
            let (z, rest) = values.split_at(mamba.d_inner * hidden);
            let (x, rest) = rest.split_at(mamba.d_xb * hidden);
            let (b, c) = rest.split_at(mamba.d_xb * hidden);
            vec![
                ("z is drawn", within(z, root(hidden)) && varied(z)),
                ("x is v_proj", x == of("self_attn.v_proj.weight")?),
                ("B is k_proj", b == of("self_attn.k_proj.weight")?),
                ("C is q_proj", c == of("self_attn.q_proj.weight")?),
            ]
        }
        "out_proj.weight" => vec![("is o_proj", values == of("self_attn.o_proj.weight")?)],
        "dt_in_proj.weight" => vec![("is drawn", within(values, root(hidden)) && varied(values))],
        "dt_proj.weight" => vec![("is drawn", within(values, mamba.dt_scale * root(mamba.dt_rank)))],
        "dt_proj.bias" => {
            let dt = values.iter().map(|b| f64::from(*b).exp().ln_1p());
            let range = mamba.dt_min.max(mamba.dt_init_floor)..=mamba.dt_max.max(mamba.dt_init_floor);
            let (low, high) = (range.start() * (1.0 - 1e-4), range.end() * (1.0 + 1e-4));
            vec![("softplus lies in its range", dt.clone().all(|dt| low <= dt && dt <= high))]
        }
        "A_log" => {
            let expected = |i: usize| ((i % mamba.d_state + 1) as f64).ln();
            let close = |(i, v): (usize, &f32)| (f64::from(*v) - expected(i)).abs() <= 1e-6 * expected(i).max(1.0);
            vec![("is ln(m + 1)", values.iter().enumerate().all(close))]
        }
        "D" => vec![("is 1", values.iter().all(|v| *v == 1.0))],
        "conv1d.weight" | "conv1d.bias" => vec![("is drawn", within(values, root(mamba.d_conv)) && varied(values))],
        _ => Vec::new(),
    })
}

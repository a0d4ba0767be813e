//! The loss over a chunk of logits, the choice of a token, and the optimiser.

use super::{Bench, Work};
use crate::backend::ops::{
    AdamW, Argmax, CONTROL, HeadLoss, HeadLossGradient, LossWeights, STATISTICS, Sample, Scaling, SquaredNorm,
};
use crate::backend::{Buffer, DType, HostSlice};
use crate::bench::Result;
use crate::bench::shapes::{head_alone, random_model};
use crate::model::Gradients;
use crate::model::decoder::trained_as;
use crate::model::head::{LossHead, LossKind, Targets, chunk_rows};

/// The weights of distillation.
const REVERSE_KL: LossWeights = LossWeights { reverse_kl: 1.0, forward_kl: 0.0, cross_entropy: 0.0 };

/// Values that the optimiser's ops are timed over.
const PARAMETERS: usize = 1 << 24;

/// Statistics, gradient and choices of one chunk.
pub(super) fn head(bench: &mut Bench<'_>) -> Result<()> {
    let (device, vocabulary) = (bench.device, bench.config.vocab_size);
    let rows = chunk_rows(bench.device.info().chunk_values, vocabulary, bench.tokens);
    let (student, teacher) = (bench.numbers(rows, vocabulary)?, bench.numbers(rows, vocabulary)?);
    let (statistics, losses) = (bench.results(rows, STATISTICS)?, bench.results(rows, 3)?);
    let (row_weights, chosen) = (bench.numbers(1, rows)?, device.alloc(DType::U32, 1, rows)?);
    let (student, teacher, statistics) = (student.view(), Some(teacher.view()), statistics.view());
    let (labels, scaling, sizes) = (None, Scaling::default(), format!("{rows}×{vocabulary}"));
    let stored = trained_as(bench.activations());
    let beside = (stored != DType::F32).then(|| device.alloc(stored, rows, vocabulary)).transpose()?;
    let gradient = beside.as_ref().map(Buffer::view);
    let moved = |times: usize| Work { flops: 0.0, bytes: 4 * times * rows * vocabulary };

    let op = Argmax { logits: student, out: chosen.view() };
    bench.op(("argmax", sizes.clone()), moved(1), || device.argmax(&op))?;
    let temperatures = bench.numbers(1, rows)?;
    device.write(HostSlice::F32(&vec![1.0; rows]), temperatures.view())?;
    let uniforms = bench.results(1, rows)?;
    let op =
        Sample { logits: student, temperatures: temperatures.view(), uniforms: uniforms.view(), out: chosen.view() };
    bench.op(("sample", sizes.clone()), moved(1), || device.sample(&op))?;
    let op = HeadLoss { student, teacher, labels, scaling, statistics };
    bench.op(("head_loss", sizes.clone()), moved(2), || device.head_loss(&op))?;
    let op = HeadLossGradient {
        student,
        gradient,
        teacher,
        labels,
        scaling,
        statistics,
        row_weights: row_weights.view(),
        weights: Some(REVERSE_KL),
        losses: losses.view(),
    };
    let work = Work { bytes: moved(2).bytes + stored.size() * rows * vocabulary, ..moved(2) };
    bench.op(("head_loss_gradient", sizes), work, || device.head_loss_gradient(&op))
}

/// The head of student and teacher over all tokens with reverse KL and its gradients: four products, in chunks.
pub(super) fn loss(bench: &mut Bench<'_>) -> Result<()> {
    let (device, tokens, config) = (bench.device, bench.tokens, head_alone(bench.config));
    let (hidden, vocabulary) = (config.hidden_size, config.vocab_size);
    let model = random_model(device, &config, 0, bench.dtype)?;
    let gradients = Gradients::new(device, model.weights().table(), |_| true)?;
    let head = LossHead::new(&model, Some(&model), tokens, false)?;
    let stored = device.alloc(trained_as(bench.activations()), tokens, hidden)?;
    let (stream, dstream) = (bench.values(tokens, hidden)?, stored);
    let normed = bench.values(tokens, hidden)?;
    let targets = Targets {
        rows: &(0..tokens as u32).collect::<Vec<_>>(),
        labels: &vec![u32::MAX; tokens],
        weights: &vec![1.0 / tokens as f32; tokens],
    };
    let kind = LossKind { weights: REVERSE_KL, scaling: Scaling::default() };
    let weight = hidden * vocabulary;
    let work = Work {
        flops: 8.0 * (tokens * weight) as f64,
        bytes: weight * (3 * bench.dtype.size() + 2 * DType::F32.size()),
    };
    bench.op(("linear with reverse KL", format!("{tokens}×{hidden}×{vocabulary}")), work, || {
        let teacher = Some((&model, normed.view()));
        head.run(&model, stream.view(), &targets, teacher, kind, Some((&gradients, dstream.view())))
    })
}

/// The norm of the gradients and the update.
pub(super) fn optimiser(bench: &mut Bench<'_>) -> Result<()> {
    let (device, sizes) = (bench.device, PARAMETERS.to_string());
    let [param, grad, moment1, moment2] = [
        bench.numbers(1, PARAMETERS)?,
        bench.numbers(1, PARAMETERS)?,
        bench.results(1, PARAMETERS)?,
        bench.results(1, PARAMETERS)?,
    ];
    let (sum, control) = (bench.results(1, 1)?, bench.results(1, CONTROL)?);
    device.write(HostSlice::F32(&[1e-6, 1.0, 1.0, 1.0, 1.0]), control.view())?;
    let moved = |times: usize| Work { flops: 0.0, bytes: 4 * times * PARAMETERS };
    let op = SquaredNorm { x: grad.view(), out: sum.view() };
    bench.op(("squared_norm", sizes.clone()), moved(1), || device.squared_norm(&op))?;
    let op = AdamW {
        param: param.view(),
        grad: grad.view(),
        moment1: moment1.view(),
        moment2: moment2.view(),
        stored: None,
        control: control.view(),
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
    };
    bench.op(("adamw", sizes), moved(7), || device.adamw(&op))
}

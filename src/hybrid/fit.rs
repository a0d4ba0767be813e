//! `mil-fit`: dt and the output projection of new mixers, fitted to what the teacher's attention gives.
//!
//! MIL sets the mixer's projections from the attention's, but its dt is so small that a new mixer says nothing at first,
//! and its output is on another scale than the attention's. Both can be put right without a gradient. From the lowest new
//! layer up, with the student's own normed input X of that layer:
//! 1. the target T is what the teacher's attention of that layer, with its output projection, gives for X;
//! 2. for each of a few ranges of dt (log-uniform over the channels), Y is the gated output of the scan;
//! 3. the output projection W minimises ‖T − Y·Wᵀ‖² + λ‖W‖²: `(YᵀY + λ)·Wᵀ = YᵀT`, solved in f64;
//! 4. the range whose W explains most of T is kept, and the stream goes on through the block as it now is.

use rand::RngExt;

use super::mixer::{inverse_softplus, log_uniform};
use super::{HybridError, LayerSet, solve_positive};
use crate::backend::ops::{Fill, LinearBackwardWeight, SquaredNorm};
use crate::backend::{self, Buffer, DType, Order, Segments, View, padded_rows};
use crate::model::weights::{MambaIds, MixerIds};
use crate::model::{Model, Probe};
use crate::random;

/// Ranges of dt to try. The first is that of the published initialisation, whose bias is added twice.
pub const DT_RANGES: [(f64, f64); 5] = [(1e-6, 1e-2), (0.01, 0.1), (0.03, 0.3), (0.1, 1.0), (0.3, 3.0)];

/// How to fit.
#[derive(Clone, Debug, PartialEq)]
pub struct FitOptions {
    /// Ranges of dt to try.
    pub ranges: Vec<(f64, f64)>,
    /// λ, as a share of the mean of the diagonal of YᵀY.
    pub ridge: f64,
    /// Seed of the draws of dt.
    pub seed: u64,
}

impl Default for FitOptions {
    fn default() -> Self {
        FitOptions { ranges: DT_RANGES.to_vec(), ridge: 1e-3, seed: 0 }
    }
}

/// Tokens of one call.
#[derive(Clone, Debug)]
pub struct FitBatch {
    /// The ids.
    pub ids: Vec<u32>,
    /// Who they belong to; none has a past.
    pub segments: Segments,
}

/// How much of the attention's output a range of dt explains.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DtShare {
    /// Least and greatest dt.
    pub range: (f64, f64),
    /// 1 − ‖T − Y·Wᵀ‖² / ‖T‖².
    pub explained: f64,
}

/// What became of one layer.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LayerFit {
    /// The layer.
    pub layer: usize,
    /// What each range explains, in the order in which they were tried.
    pub tried: Vec<DtShare>,
    /// The one that was kept, the first of equals.
    pub kept: DtShare,
}

/// Fits the mixers of the layers `new` of `student`, which are as MIL leaves them, to the attention of `teacher` in the
/// same layers; `progress` hears of each layer when it is done. Only `mixer.out_proj.weight` and `mixer.dt_proj.bias`
/// (where there is one) of those layers change.
///
/// # Errors
/// When there are no tokens, a layer is not Mamba in the student and attention in the teacher, or the device fails.
pub fn fit(
    student: &Model,
    teacher: &Model,
    new: &LayerSet,
    (batches, options): (&[FitBatch], &FitOptions),
    mut progress: impl FnMut(&LayerFit),
) -> Result<Vec<LayerFit>, HybridError> {
    let Some(last) = new.iter().next_back() else { return Ok(Vec::new()) };
    let possible = |(least, greatest): &(f64, f64)| *least > 0.0 && least <= greatest && greatest.is_finite();
    if options.ranges.is_empty() || !options.ranges.iter().all(possible) {
        return Err(HybridError::Ranges { ranges: options.ranges.clone() });
    }
    let mut stream = Stream::new(student, teacher, batches)?;
    let mut fits = Vec::new();
    for layer in 0..=last {
        if new.contains(layer) {
            let fit = stream.fit(layer, options)?;
            progress(&fit);
            fits.push(fit);
        }
        if layer < last {
            stream.advance(layer)?;
        }
    }
    Ok(fits)
}

/// The residual stream of all batches before the layer at hand, and the memory to fit that layer.
struct Stream<'a> {
    student: Probe<'a>,
    teacher: Probe<'a>,
    model: &'a Model,
    batches: &'a [FitBatch],
    /// d_inner.
    inner: usize,
    /// `[all tokens, hidden]`.
    rows: Buffer,
    /// `[a batch, hidden]`.
    target: Buffer,
    /// YᵀY, `[d_inner, d_inner]`.
    gram: Buffer,
    /// TᵀY, `[hidden, d_inner]`.
    cross: Buffer,
    /// ‖T‖².
    energy: Buffer,
}

impl<'a> Stream<'a> {
    fn new(model: &'a Model, teacher: &'a Model, batches: &'a [FitBatch]) -> Result<Self, HybridError> {
        let (device, config) = (model.device(), model.config());
        let total: usize = batches.iter().map(|batch| batch.ids.len()).sum();
        if total == 0 {
            return Err(HybridError::NoTokens);
        }
        let tokens = batches.iter().map(|batch| batch.ids.len()).max().unwrap_or_default();
        let segments = batches.iter().map(|batch| batch.segments.list().len()).max().unwrap_or_default();
        let inner = config.mamba.as_ref().map_or(0, |mamba| mamba.d_inner);
        let matrix = |rows| device.alloc(DType::F32, 1, padded_rows(rows) * inner);
        let mut stream = Stream {
            student: Probe::new(model, tokens, segments)?,
            teacher: Probe::new(teacher, tokens, segments)?,
            model,
            batches,
            inner,
            rows: device.alloc(DType::F32, total, config.hidden_size)?,
            target: device.alloc(DType::F32, tokens, config.hidden_size)?,
            gram: matrix(inner)?,
            cross: matrix(config.hidden_size)?,
            energy: device.alloc(DType::F32, 1, 1)?,
        };
        for (batch, rows) in stream.parts()? {
            stream.student.begin(&batch.segments)?;
            stream.student.embed(&batch.ids, rows)?;
        }
        Ok(stream)
    }

    /// Each batch with its rows of the stream.
    fn parts(&self) -> backend::Result<Vec<(&'a FitBatch, View)>> {
        let starts = self.batches.iter().scan(0, |end, batch| {
            *end += batch.ids.len();
            Some(*end - batch.ids.len())
        });
        let part =
            |(batch, start): (&'a FitBatch, usize)| Ok((batch, self.rows.view().row_range(start, batch.ids.len())?));
        self.batches.iter().zip(starts).map(part).collect()
    }

    fn advance(&mut self, layer: usize) -> Result<(), HybridError> {
        for (batch, rows) in self.parts()? {
            self.student.begin(&batch.segments)?;
            self.student.block(layer, rows)?;
        }
        Ok(())
    }

    fn fit(&mut self, layer: usize, options: &FitOptions) -> Result<LayerFit, HybridError> {
        let device = self.model.device();
        let block = self.model.ids().blocks.get(layer).and_then(Option::as_ref);
        let Some(MixerIds::Mamba(ids)) = block.map(|block| &block.mixer) else {
            return Err(HybridError::NotMamba { layer });
        };
        let mut stream = random::stream(options.seed, &format!("mil-fit dt of layer {layer}"));
        let draws: Vec<f64> = (0..self.inner).map(|_| stream.random()).collect();
        // Without a bias there is no dt to choose.
        let ranges = if ids.dt_bias.is_some() { &options.ranges[..] } else { &options.ranges[..1] };

        let mut best: Option<(DtShare, Vec<f32>)> = None;
        let mut tried = Vec::new();
        for range in ranges {
            if let Some(bias) = ids.dt_bias {
                self.model.weights().write(device, bias, &bias_of(*range, &draws))?;
            }
            let (explained, weight) = self.solve(layer, options.ridge, *range)?;
            let share = DtShare { range: *range, explained };
            tried.push(share);
            if best.as_ref().is_none_or(|(kept, _)| explained > kept.explained) {
                best = Some((share, weight));
            }
        }
        let Some((kept, weight)) = best else { return Err(HybridError::Ranges { ranges: ranges.to_vec() }) };
        self.keep(ids, kept, &weight, &draws)?;
        Ok(LayerFit { layer, tried, kept })
    }

    fn keep(&self, ids: &MambaIds, kept: DtShare, weight: &[f32], draws: &[f64]) -> backend::Result<()> {
        let (device, weights) = (self.model.device(), self.model.weights());
        if let Some(bias) = ids.dt_bias {
            weights.write(device, bias, &bias_of(kept.range, draws))?;
        }
        weights.write(device, ids.out_proj, weight)
    }

    /// The share that is explained, and the output projection `[hidden, d_inner]`, with dt as it is now.
    fn solve(&mut self, layer: usize, ridge: f64, range: (f64, f64)) -> Result<(f64, Vec<f32>), HybridError> {
        let device = self.model.device();
        let (hidden, inner) = (self.target.view().cols, self.inner);
        let gram = self.gram.view().matrix(0, inner, inner, Order::Weight)?;
        let cross = self.cross.view().matrix(0, hidden, inner, Order::Weight)?;
        for out in [self.gram.view(), self.cross.view(), self.energy.view()] {
            device.fill(&Fill { value: 0.0, out })?;
        }
        for (batch, rows) in self.parts()? {
            self.student.begin(&batch.segments)?;
            self.teacher.begin(&batch.segments)?;
            let (normed, y) = self.student.mix(layer, rows)?;
            let target = self.target.rows(rows.rows)?;
            self.teacher.mixer(layer, normed, target)?;
            device.linear_backward_weight(&LinearBackwardWeight { x: y, dout: y, dweight: gram, dbias: None })?;
            device.linear_backward_weight(&LinearBackwardWeight { x: y, dout: target, dweight: cross, dbias: None })?;
            let flat = target.matrix(0, 1, target.len(), Order::Rows)?;
            device.squared_norm(&SquaredNorm { x: flat, out: self.energy.view() })?;
        }
        let read =
            |view| Ok::<_, HybridError>(device.read(view)?.wait()?.into_iter().map(f64::from).collect::<Vec<_>>());
        let (gram, cross, energy) = (read(gram)?, read(cross)?, read(self.energy.view())?);
        let (weight, residual) = ridge_regression(gram, &cross, (inner, ridge)).map_err(|source| HybridError::Fit {
            layer,
            range,
            source,
        })?;
        let energy = energy.first().copied().unwrap_or_default();
        let explained = if energy > 0.0 { -residual / energy } else { 0.0 };
        Ok((explained, weight.into_iter().map(|w| w as f32).collect()))
    }
}

/// b for which softplus(2b), dt of a fresh mixer, is log-uniform in the range.
fn bias_of(range: (f64, f64), draws: &[f64]) -> Vec<f32> {
    draws.iter().map(|draw| (inverse_softplus(log_uniform(range, *draw)) / 2.0) as f32).collect()
}

/// W `[rows, n]` from YᵀY `[n, n]` and TᵀY `[rows, n]`, and what it changes of ‖T‖²: `tr(W·YᵀY·Wᵀ) − 2·tr(W·YᵀT)`,
/// negative where it explains something.
fn ridge_regression(
    mut gram: Vec<f64>,
    cross: &[f64],
    (n, ridge): (usize, f64),
) -> Result<(Vec<f64>, f64), super::NotPositive> {
    let lambda = ridge * (0..n).map(|i| gram[i * n + i]).sum::<f64>() / n as f64;
    for i in 0..n {
        gram[i * n + i] += lambda;
    }
    let mut weight = cross.to_vec();
    solve_positive(&mut gram, n, &mut weight)?;
    // With (YᵀY + λ)·Wᵀ = YᵀT, tr(W·YᵀY·Wᵀ) is tr(W·YᵀT) − λ‖W‖².
    let (fitted, norm) = weight.iter().zip(cross).fold((0.0, 0.0), |(f, n), (w, c)| (f + w * c, n + w * w));
    Ok((weight, -fitted - lambda * norm))
}

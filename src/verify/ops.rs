//! The ops on their own: selective scan, attention, the losses.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::goldens::{Tensor, Tensors, swap};
use super::{Report, Result};
use crate::backend::ops::{
    Attention, AttentionBackward, AttentionShape, HeadLoss, HeadLossGradient, Keys, LossWeights, STATISTICS, Scaling,
    ScanInputs, SelectiveScan, SelectiveScanBackward, Temperature, WeightedSum,
};
use crate::backend::{Buffer, DType, Device, HostSlice, Segments, View};

fn upload(device: &Device, rows: usize, cols: usize, values: &[f32]) -> Result<Buffer> {
    let buffer = device.alloc(DType::F32, rows, cols)?;
    device.write(HostSlice::F32(values), buffer.view())?;
    Ok(buffer)
}

fn zeros(device: &Device, rows: usize, cols: usize) -> Result<Buffer> {
    Ok(device.alloc(DType::F32, rows, cols)?)
}

fn read(device: &Device, view: View) -> Result<Vec<f32>> {
    Ok(device.read(view)?.wait()?)
}

#[derive(Deserialize)]
struct ScanCase {
    batch: usize,
    dim: usize,
    state: usize,
    length: usize,
    groups: usize,
    #[serde(rename = "has_D")]
    has_d: bool,
    has_z: bool,
    has_delta_bias: bool,
    delta_softplus: bool,
    has_h0: bool,
    restarts: Option<Vec<usize>>,
    grad_through_last_state: bool,
}

/// `scan.safetensors`: y, the last state, every gradient.
pub(super) fn scan(report: &mut Report, device: &Device) -> Result<()> {
    let cases: BTreeMap<String, ScanCase> = report.goldens.json("scan.json")?;
    let tensors = report.goldens.tensors("scan.safetensors")?;
    for (name, case) in cases {
        scan_case(report, device, &tensors, &name, &case)?;
    }
    Ok(())
}

fn scan_case(report: &mut Report, device: &Device, tensors: &Tensors, name: &str, case: &ScanCase) -> Result<()> {
    let ScanCase { batch, dim, state, length, groups, .. } = *case;
    let tokens = batch * length;
    let get = |tensor: &str| tensors.get(&format!("{name}.{tensor}"));
    let rows = |tensor: &str| get(tensor).map(Tensor::swapped);
    // B and C are (batch, groups, state, length): groups·state is the width of a row.
    let wide = |tensor: &str| get(tensor).map(|t| swap([batch, groups * state, length, 1], &t.values));

    let mut segments = Segments::default();
    let past = usize::from(case.has_h0);
    let starts: Vec<usize> = case.restarts.clone().unwrap_or_else(|| vec![0]);
    for slot in 0..batch {
        for (i, start) in starts.iter().enumerate() {
            let last = i + 1 == starts.len();
            let end = if last { length } else { starts[i + 1] };
            // Only the state after the last restart is compared; the others go to slots behind.
            segments.push(end - start, past, if last { slot } else { batch + slot * starts.len() + i })?;
        }
    }
    let mut memory = device.alloc_segments(segments.list().len(), tokens)?;
    let segments_view = memory.write(device, &segments)?;

    let group_width = groups * state;
    let mut projected = vec![0.0; tokens * (2 * group_width + dim)];
    let (b, c) = (wide("B")?, wide("C")?);
    let z = if case.has_z { rows("z")? } else { vec![0.0; tokens * dim] };
    for (t, row) in projected.chunks_exact_mut(2 * group_width + dim).enumerate() {
        row[..group_width].copy_from_slice(&b[t * group_width..][..group_width]);
        row[group_width..2 * group_width].copy_from_slice(&c[t * group_width..][..group_width]);
        row[2 * group_width..].copy_from_slice(&z[t * dim..][..dim]);
    }
    let vector = |has: bool, tensor: &str| has.then(|| upload(device, 1, dim, &get(tensor)?.values)).transpose();
    let (d, bias) = (vector(case.has_d, "D")?, vector(case.has_delta_bias, "delta_bias")?);
    let (u, delta) = (upload(device, tokens, dim, &rows("u")?)?, upload(device, tokens, dim, &rows("delta")?)?);
    let a = upload(device, dim, state, &get("A")?.values)?;
    let projected = upload(device, tokens, 2 * group_width + dim, &projected)?;
    let slot_count = batch * (1 + starts.len());
    let slots = |values: &[f32]| {
        let mut all = values.to_vec();
        all.resize(slot_count * dim * state, 0.0);
        upload(device, slot_count, dim * state, &all)
    };
    let state_in = if case.has_h0 { Some(slots(&get("h0")?.values)?) } else { None };
    let inputs = ScanInputs {
        u: u.view(),
        delta: delta.view(),
        a: a.view(),
        projected: projected.view(),
        b_col: 0,
        c_col: group_width,
        z_col: case.has_z.then_some(2 * group_width),
        groups_b: groups,
        groups_c: groups,
        d: d.as_ref().map(Buffer::view),
        delta_bias: bias.as_ref().map(Buffer::view),
        softplus: case.delta_softplus,
        segments: segments_view,
        state_in: state_in.as_ref().map(Buffer::view),
    };
    let chunks = ScanInputs::saved_rows(tokens, segments.list().len(), device.info().scan_chunk);
    let (saved, out) = (zeros(device, chunks, dim * state)?, zeros(device, tokens, dim)?);
    let state_out = zeros(device, slot_count, dim * state)?;
    device.selective_scan(&SelectiveScan {
        inputs,
        state_out: Some(state_out.view()),
        saved: Some(saved.view()),
        out: out.view(),
    })?;

    let dout = upload(device, tokens, dim, &rows("dy")?)?;
    let dstate_out = if case.grad_through_last_state { Some(slots(&get("dlast_state")?.values)?) } else { None };
    let dstate_in = if case.has_h0 { Some(zeros(device, slot_count, dim * state)?) } else { None };
    let (du, ddelta, da) = (zeros(device, tokens, dim)?, zeros(device, tokens, dim)?, zeros(device, dim, state)?);
    let dprojected = zeros(device, tokens, 2 * group_width + dim)?;
    let (dd, dbias) = (zeros(device, 1, dim)?, zeros(device, 1, dim)?);
    device.selective_scan_backward(&SelectiveScanBackward {
        inputs,
        saved: saved.view(),
        dout: dout.view(),
        dstate_out: dstate_out.as_ref().map(Buffer::view),
        du: du.view(),
        ddelta: ddelta.view(),
        da: da.view(),
        dprojected: dprojected.view(),
        dd: d.as_ref().map(|_| dd.view()),
        ddelta_bias: bias.as_ref().map(|_| dbias.view()),
        dstate_in: dstate_in.as_ref().map(Buffer::view),
    })?;

    let mut compare = |tensor: &str, view: View, axes: Option<[usize; 4]>| -> Result<()> {
        let found = read(device, view)?;
        let found = axes.map_or_else(|| found.clone(), |axes| swap(axes, &found));
        report.compare("scan.safetensors", &format!("{name}.{tensor}"), &get(tensor)?.values, &found);
        Ok(())
    };
    let (channels, grouped) = (Some([batch, length, dim, 1]), Some([batch, length, group_width, 1]));
    compare("y", out.view(), channels)?;
    compare("last_state", state_out.rows(batch)?, None)?;
    compare("grad.u", du.view(), channels)?;
    compare("grad.delta", ddelta.view(), channels)?;
    compare("grad.A", da.view(), None)?;
    compare("grad.B", dprojected.view().col_range(0, group_width)?, grouped)?;
    compare("grad.C", dprojected.view().col_range(group_width, group_width)?, grouped)?;
    if case.has_z {
        compare("grad.z", dprojected.view().col_range(2 * group_width, dim)?, channels)?;
    }
    if case.has_d {
        compare("grad.D", dd.view(), None)?;
    }
    if case.has_delta_bias {
        compare("grad.delta_bias", dbias.view(), None)?;
    }
    if let Some(dstate_in) = &dstate_in {
        compare("grad.h0", dstate_in.rows(batch)?, None)?;
    }
    Ok(())
}

#[derive(Deserialize)]
struct AttentionCase {
    batch: usize,
    q_heads: usize,
    kv_heads: usize,
    q_len: usize,
    kv_len: usize,
    head_dim: usize,
    scale: f64,
    causal: bool,
    sliding_window: Option<usize>,
    documents: Option<Vec<usize>>,
}

/// `attention.safetensors`: the output and the gradients of q, k and v.
pub(super) fn attention(report: &mut Report, device: &Device) -> Result<()> {
    let cases: BTreeMap<String, AttentionCase> = report.goldens.json("attention.json")?;
    let tensors = report.goldens.tensors("attention.safetensors")?;
    for (name, case) in cases {
        let AttentionCase { batch, q_heads, kv_heads, q_len, kv_len, head_dim, .. } = case;
        let shape = AttentionShape {
            heads: q_heads,
            kv_heads,
            head_dim,
            scale: case.scale as f32,
            window: case.sliding_window,
        };
        report.exact("attention.json", &format!("{name} is causal"), case.causal);
        let mut segments = Segments::default();
        for slot in 0..batch {
            for len in case.documents.clone().unwrap_or_else(|| vec![q_len]) {
                segments.push(len, kv_len - q_len, slot)?;
            }
        }
        let get = |tensor: &str| tensors.get(&format!("{name}.{tensor}"));
        let rows = |tensor: &str, tokens: usize, width: usize| upload(device, tokens, width, &get(tensor)?.swapped());
        let (tokens, keys) = (batch * q_len, batch * kv_len);
        let (q_cols, kv_cols) = (shape.q_cols(), shape.kv_cols());
        let mut memory = device.alloc_segments(segments.list().len(), tokens)?;
        let segments = memory.write(device, &segments)?;
        let (q, k, v) = (rows("q", tokens, q_cols)?, rows("k", keys, kv_cols)?, rows("v", keys, kv_cols)?);
        let dout = rows("dout", tokens, q_cols)?;
        let (out, lse) = (zeros(device, tokens, q_cols)?, zeros(device, tokens, q_heads)?);
        let (q, k, v) = (q.view(), k.view(), v.view());
        let (out, lse) = (out.view(), lse.view());
        device.attention(&Attention { shape, q, keys: Keys::Rows { k, v }, segments, out, lse: Some(lse) })?;
        let (dq, dk, dv) =
            (zeros(device, tokens, q_cols)?, zeros(device, keys, kv_cols)?, zeros(device, keys, kv_cols)?);
        let dout = dout.view();
        device.attention_backward(&AttentionBackward {
            shape,
            q,
            k,
            v,
            segments,
            out,
            lse,
            dout,
            dq: dq.view(),
            dk: dk.view(),
            dv: dv.view(),
        })?;
        for (tensor, view, axes) in [
            ("out", out, [batch, q_len, q_heads, head_dim]),
            ("grad.q", dq.view(), [batch, q_len, q_heads, head_dim]),
            ("grad.k", dk.view(), [batch, kv_len, kv_heads, head_dim]),
            ("grad.v", dv.view(), [batch, kv_len, kv_heads, head_dim]),
        ] {
            let found = swap(axes, &read(device, view)?);
            report.compare("attention.safetensors", &format!("{name}.{tensor}"), &get(tensor)?.values, &found);
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct LossCase {
    batch: usize,
    length: usize,
    vocab: usize,
    temperature: f32,
    logits_scale: f32,
    unmasked: usize,
}

/// `kl.safetensors`: both directions, both spellings of the temperature.
pub(super) fn head_loss(report: &mut Report, device: &Device) -> Result<()> {
    let cases: BTreeMap<String, LossCase> = report.goldens.json("kl.json")?;
    let tensors = report.goldens.tensors("kl.safetensors")?;
    for (name, case) in &cases {
        for (direction, kind) in [("reverse", 0), ("forward", 1)] {
            for (mode, spelling) in [("both", Temperature::Both), ("teacher_only", Temperature::TeacherOnly)] {
                let scaling = Scaling { logits_scale: case.logits_scale, temperature: case.temperature, spelling };
                loss_case(report, device, &tensors, (name.as_str(), case), (direction, kind), (mode, scaling))?;
            }
        }
    }
    Ok(())
}

fn loss_case(
    report: &mut Report,
    device: &Device,
    tensors: &Tensors,
    (name, case): (&str, &LossCase),
    (direction, kind): (&str, usize),
    (mode, scaling): (&str, Scaling),
) -> Result<()> {
    let (rows, vocab) = (case.batch * case.length, case.vocab);
    let get = |tensor: &str| tensors.get(&format!("{name}.{tensor}"));
    let student = upload(device, rows, vocab, &get("student_logits")?.values)?;
    let teacher = upload(device, rows, vocab, &get("teacher_logits")?.values)?;
    let weights: Vec<f32> = get("mask")?.values.iter().map(|m| m / case.unmasked as f32).collect();
    let weights = upload(device, 1, rows, &weights)?;
    let (statistics, losses) = (zeros(device, rows, STATISTICS)?, zeros(device, rows, 3)?);
    let total = zeros(device, 1, 3)?;
    let (student, teacher) = (student.view(), Some(teacher.view()));
    device.head_loss(&HeadLoss { student, teacher, labels: None, scaling, statistics: statistics.view() })?;
    let only = |wanted| if kind == wanted { 1.0 } else { 0.0 };
    device.head_loss_gradient(&HeadLossGradient {
        student,
        gradient: None,
        teacher,
        labels: None,
        scaling,
        statistics: statistics.view(),
        row_weights: weights.view(),
        weights: Some(LossWeights { reverse_kl: only(0), forward_kl: only(1), cross_entropy: 0.0 }),
        losses: losses.view(),
    })?;
    device.weighted_sum(&WeightedSum { values: losses.view(), weights: weights.view(), out: total.view() })?;
    for (tensor, view) in [
        ("per_token", losses.view().col_range(kind, 1)?),
        ("loss", total.view().col_range(kind, 1)?),
        ("grad", student),
    ] {
        let tensor = format!("{direction}.{mode}.{tensor}");
        let expected = &get(&tensor)?.values;
        report.compare("kl.safetensors", &format!("{name}.{tensor}"), expected, &read(device, view)?);
    }
    Ok(())
}

//! The ops: each finds its arguments in memory, then calls its kernel.

use super::Cpu;
use super::attention::{AttentionInputs, Keys};
use super::attention_backward::{AttentionGradient, AttentionGradients, attention_backward};
use super::call::{Call, with_float};
use super::conv::ConvInputs;
use super::conv_backward::{ConvGradients, conv1d_backward};
use super::gradient::Gradient;
use super::scan::ScanInputs;
use super::scan_backward::{ScanGradients, selective_scan_backward};
use super::{adamw, attention, conv, elementwise, head_loss, norm, products, rope, rows, sample, scan};
use crate::backend::host::table;
use crate::backend::{
    Backend, BackendInfo, BufferId, DType, Error, HostSlice, Largest, Order, Readback, Result, View, ops,
};

/// What the scan reads.
fn scan_inputs<'m>(c: &mut Call<'m>, inputs: &ops::ScanInputs) -> Result<ScanInputs<'m>> {
    let (channels, d_state) = (inputs.channels(), inputs.d_state());
    let segments = c.segments(&inputs.segments, inputs.u.rows)?;
    c.slots(segments, &[inputs.state_in])?;
    let z = inputs.z_col.map(|col| inputs.projected.col_range(col, channels)).transpose()?;
    Ok(ScanInputs {
        u: c.rows("u", inputs.u)?,
        delta: c.rows("delta", inputs.delta)?,
        a: c.rows("a", inputs.a)?,
        b: c.rows("projected", inputs.projected.col_range(inputs.b_col, inputs.groups_b * d_state)?)?,
        c: c.rows("projected", inputs.projected.col_range(inputs.c_col, inputs.groups_c * d_state)?)?,
        d: c.maybe_slice("d", inputs.d)?,
        z: c.maybe_rows("projected", z)?,
        delta_bias: c.maybe_slice("delta_bias", inputs.delta_bias)?,
        softplus: inputs.softplus,
        segments,
        state_in: c.maybe_rows("state_in", inputs.state_in)?,
    })
}

/// What the convolution reads.
fn conv_inputs<'m>(
    c: &mut Call<'m>,
    op: &ops::Conv1d,
    [weight, bias]: &'m mut [Vec<f32>; 2],
) -> Result<ConvInputs<'m>> {
    let segments = c.segments(&op.segments, op.projected.rows)?;
    c.slots(segments, &[op.state_in])?;
    Ok(ConvInputs {
        x: c.rows("projected", op.projected.col_range(op.x_col, op.shape.channels_in)?)?,
        weight: c.parameter("weight", op.weight, weight)?,
        bias: c.maybe_parameter("bias", op.bias, bias)?,
        head: op.shape.head,
        repeat: op.shape.repeat,
        repeat_first: op.shape.repeat_first,
        segments,
        state_in: c.maybe_rows("state_in", op.state_in)?,
    })
}

fn scales(scaling: &ops::Scaling) -> head_loss::Scales {
    head_loss::Scales { student: scaling.student(), teacher: scaling.teacher() }
}

/// The saved states, once there is room for every chunk.
fn check_saved(inputs: &ScanInputs<'_>, saved: View) -> Result<View> {
    let chunks = |segment: usize| inputs.segments[segment].rows().len().div_ceil(scan::SCAN_CHUNK);
    let present = (0..inputs.segments.len()).filter(|&segment| chunks(segment) > 0);
    let needed = present.map(|segment| inputs.saved_row(segment, chunks(segment))).max().unwrap_or(0);
    if needed <= saved.rows { Ok(saved) } else { saved.row_range(0, needed) }
}

impl Backend for Cpu {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<BufferId> {
        if !self.info.dtypes.contains(&dtype) && dtype != DType::U32 {
            return Err(Error::Unsupported { backend: "cpu", op: "alloc", what: format!("buffers of {dtype}") });
        }
        self.memory(|memory| memory.alloc(dtype, len))
    }

    fn free(&self, buffer: BufferId) {
        self.memory(|memory| memory.free(buffer));
    }

    fn reserve(&self, largest: &Largest) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.widened.iter_mut().for_each(|copy| copy.reserve(largest.width));
        Ok(())
    }

    fn write(&self, src: HostSlice<'_>, dst: View) -> Result<()> {
        self.memory(|memory| memory.write(src, dst))
    }

    fn read(&self, src: View) -> Result<Readback> {
        self.memory(|memory| memory.read(src))
    }

    fn embed(&self, op: &ops::Embed) -> Result<()> {
        self.call("embed", |c, _| {
            let (ids, out) = (c.ids_below("ids", op.ids, op.weight.rows)?, c.rows_mut("out", op.out)?);
            with_float!(c, "weight", op.weight, T => {
                rows::embed::<T>(ids, c.panels("weight", op.weight)?, &out);
                Ok(())
            })
        })
    }

    fn embed_backward(&self, op: &ops::EmbedBackward) -> Result<()> {
        self.call("embed_backward", |c, _| {
            let (ids, dout) = (c.ids_below("ids", op.ids, op.dweight.rows)?, c.rows("dout", op.dout)?);
            let dweight = c.panels_as_rows(op.dweight)?;
            rows::embed_backward(ids, dout, &c.rows_mut("dweight", dweight)?);
            Ok(())
        })
    }

    fn rms_norm(&self, op: &ops::RmsNorm) -> Result<()> {
        self.call("rms_norm", |c, [copy, _]| {
            let (x, out) = (c.rows("x", op.x)?, c.rows_mut("out", op.out)?);
            let inv_rms = c.maybe_rows_mut("inv_rms", op.inv_rms)?;
            let weight = c.parameter("weight", op.weight, copy)?.row(0);
            norm::rms_norm(self.simd, x, weight, op.eps, &out, inv_rms.as_ref());
            Ok(())
        })
    }

    fn rms_norm_backward(&self, op: &ops::RmsNormBackward) -> Result<()> {
        self.call("rms_norm_backward", |c, [copy, _]| {
            let (x, dout, inv_rms) = (c.rows("x", op.x)?, c.rows("dout", op.dout)?, c.slice("inv_rms", op.inv_rms)?);
            let (dx, dweight) = (c.rows_mut("dx", op.dx.view)?, c.maybe_rows_mut("dweight", op.dweight)?);
            let weight = c.parameter("weight", op.weight, copy)?.row(0);
            let dx = Gradient { to: &dx, add: op.dx.add };
            norm::rms_norm_backward(self.simd, x, weight, inv_rms, dout, dx, dweight.as_ref());
            Ok(())
        })
    }

    fn linear(&self, op: &ops::Linear) -> Result<()> {
        self.call("linear", |c, [copy, _]| {
            let (x, mut out) = (c.rows("x", op.x)?, c.rows_mut("out", op.out.view)?);
            let bias = c.maybe_parameter("bias", op.bias, copy)?;
            with_float!(c, "weight", op.weight, T => {
                products::forward::<T>(self.simd, x, c.panels("weight", op.weight)?, bias, op.out.add, &mut out);
                Ok(())
            })
        })
    }

    fn linear_backward_input(&self, op: &ops::LinearBackwardInput) -> Result<()> {
        self.call("linear_backward_input", |c, _| {
            let (dout, mut dx) = (c.rows("dout", op.dout)?, c.rows_mut("dx", op.dx.view)?);
            with_float!(c, "weight", op.weight, T => {
                products::input_gradient::<T>(self.simd, dout, c.panels("weight", op.weight)?, op.dx.add, &mut dx);
                Ok(())
            })
        })
    }

    fn linear_backward_weight(&self, op: &ops::LinearBackwardWeight) -> Result<()> {
        self.call("linear_backward_weight", |c, _| {
            let (x, dout) = (c.rows("x", op.x)?, c.rows("dout", op.dout)?);
            let (dweight, dbias) = (c.panels_mut("dweight", op.dweight)?, c.maybe_slice_mut("dbias", op.dbias)?);
            products::weight_gradient(self.simd, x, dout, dweight, dbias);
            Ok(())
        })
    }

    fn swiglu(&self, op: &ops::Swiglu) -> Result<()> {
        self.call("swiglu", |c, _| {
            let (gate, up, out) = (c.rows("gate", op.gate)?, c.rows("up", op.up)?, c.rows_mut("out", op.out)?);
            elementwise::swiglu(self.simd, gate, up, &out);
            Ok(())
        })
    }

    fn swiglu_backward(&self, op: &ops::SwigluBackward) -> Result<()> {
        self.call("swiglu_backward", |c, _| {
            let (gate, up, dout) = (c.rows("gate", op.gate)?, c.rows("up", op.up)?, c.rows("dout", op.dout)?);
            let (dgate, dup) = (c.rows_mut("dgate", op.dgate)?, c.rows_mut("dup", op.dup)?);
            elementwise::swiglu_backward(self.simd, gate, up, dout, &dgate, &dup);
            Ok(())
        })
    }

    fn rope(&self, op: &ops::Rope) -> Result<()> {
        self.call("rope", |c, _| {
            let (x, positions) = (c.rows_mut("x", op.x)?, c.slice_of("positions", op.positions)?);
            rope::rope(self.simd, &x, op.head_dim, positions, c.slice("inv_freq", op.inv_freq)?, op.inverse);
            Ok(())
        })
    }

    fn attention(&self, op: &ops::Attention) -> Result<()> {
        self.call("attention", |c, _| {
            let segments = c.segments(&op.segments, op.q.rows)?;
            let keys = match op.keys {
                ops::Keys::Rows { k, v } => {
                    table::keys("attention", bytemuck::cast_slice(segments), k.rows)?;
                    Keys::Rows { k: c.rows("k", k)?, v: c.rows("v", v)? }
                }
                ops::Keys::Pages { k, v, pages, page_size } => {
                    let pages = c.pages(segments, pages, page_size, k.rows, false)?;
                    Keys::Pages { k: c.rows("k", k)?, v: c.rows("v", v)?, pages, page_size }
                }
            };
            let inputs = AttentionInputs { shape: op.shape, q: c.rows("q", op.q)?, keys, segments };
            let (out, lse) = (c.rows_mut("out", op.out)?, c.maybe_rows_mut("lse", op.lse)?);
            attention::attention(self.simd, &inputs, &out, lse.as_ref());
            Ok(())
        })
    }

    fn attention_backward(&self, op: &ops::AttentionBackward) -> Result<()> {
        self.call("attention_backward", |c, _| {
            let segments = c.segments(&op.segments, op.q.rows)?;
            table::keys("attention_backward", bytemuck::cast_slice(segments), op.k.rows)?;
            let inputs = AttentionGradient {
                shape: op.shape,
                q: c.rows("q", op.q)?,
                k: c.rows("k", op.k)?,
                v: c.rows("v", op.v)?,
                segments,
                out: c.rows("out", op.out)?,
                lse: c.rows("lse", op.lse)?,
                dout: c.rows("dout", op.dout)?,
            };
            let (dq, dk, dv) = (c.rows_mut("dq", op.dq)?, c.rows_mut("dk", op.dk)?, c.rows_mut("dv", op.dv)?);
            attention_backward(self.simd, &inputs, &AttentionGradients { dq: &dq, dk: &dk, dv: &dv });
            Ok(())
        })
    }

    fn page_write(&self, op: &ops::PageWrite) -> Result<()> {
        self.call("page_write", |c, _| {
            let segments = c.segments(&op.segments, op.rows[0].rows)?;
            let pages = c.pages(segments, op.pages, op.page_size, op.out[0].rows, true)?;
            for (rows, out) in op.rows.into_iter().zip(op.out) {
                let values = c.rows("rows", rows)?;
                with_float!(c, "out", out, T => {
                    rows::page_write(values, segments, pages, op.page_size, &c.rows_mut_of::<T>("out", out)?);
                    Ok(())
                })?;
            }
            Ok(())
        })
    }

    fn conv1d(&self, op: &ops::Conv1d) -> Result<()> {
        self.call("conv1d", |c, copies| {
            let inputs = conv_inputs(c, op, copies)?;
            c.slots(inputs.segments, &[op.state_out])?;
            let (state_out, out) = (c.maybe_rows_mut("state_out", op.state_out)?, c.rows_mut("out", op.out)?);
            conv::conv1d(self.simd, &inputs, state_out.as_ref(), &out);
            Ok(())
        })
    }

    fn conv1d_backward(&self, op: &ops::Conv1dBackward) -> Result<()> {
        self.call("conv1d_backward", |c, copies| {
            let ops::Conv1dBackward { shape, projected, x_col, weight, bias, segments, state_in, dout, .. } = *op;
            let forward =
                ops::Conv1d { shape, projected, x_col, weight, bias, segments, state_in, state_out: None, out: dout };
            let inputs = conv_inputs(c, &forward, copies)?;
            c.slots(inputs.segments, &[op.dstate_out, op.dstate_in])?;
            let (dout, dstate_out) = (c.rows("dout", dout)?, c.maybe_rows("dstate_out", op.dstate_out)?);
            let dx = c.rows_mut("dprojected", op.dprojected.col_range(x_col, shape.channels_in)?)?;
            let (dweight, dbias) = (c.maybe_rows_mut("dweight", op.dweight)?, c.maybe_rows_mut("dbias", op.dbias)?);
            let dstate_in = c.maybe_rows_mut("dstate_in", op.dstate_in)?;
            let gradients = ConvGradients {
                dx: &dx,
                dweight: dweight.as_ref(),
                dbias: dbias.as_ref(),
                dstate_in: dstate_in.as_ref(),
            };
            conv1d_backward(self.simd, &inputs, dout, dstate_out, &gradients);
            Ok(())
        })
    }

    fn neg_exp(&self, op: &ops::NegExp) -> Result<()> {
        self.call("neg_exp", |c, [copy, _]| {
            let a = c.rows_mut("a", op.a)?;
            elementwise::neg_exp(self.simd, c.parameter("a_log", op.a_log, copy)?, &a);
            Ok(())
        })
    }

    fn neg_exp_backward(&self, op: &ops::NegExpBackward) -> Result<()> {
        self.call("neg_exp_backward", |c, _| {
            let (a, da, da_log) = (c.rows("a", op.a)?, c.rows("da", op.da)?, c.rows_mut("da_log", op.da_log)?);
            elementwise::neg_exp_backward(self.simd, a, da, &da_log);
            Ok(())
        })
    }

    fn selective_scan(&self, op: &ops::SelectiveScan) -> Result<()> {
        self.call("selective_scan", |c, _| {
            let inputs = scan_inputs(c, &op.inputs)?;
            c.slots(inputs.segments, &[op.state_out])?;
            let saved = op.saved.map(|saved| check_saved(&inputs, saved)).transpose()?;
            let saved = c.maybe_rows_mut("saved", saved)?;
            let (state_out, out) = (c.maybe_rows_mut("state_out", op.state_out)?, c.rows_mut("out", op.out)?);
            scan::selective_scan(self.simd, &inputs, state_out.as_ref(), saved.as_ref(), &out);
            Ok(())
        })
    }

    fn selective_scan_backward(&self, op: &ops::SelectiveScanBackward) -> Result<()> {
        self.call("selective_scan_backward", |c, _| {
            let inputs = scan_inputs(c, &op.inputs)?;
            c.slots(inputs.segments, &[op.dstate_out, op.dstate_in])?;
            let saved = c.rows("saved", check_saved(&inputs, op.saved)?)?;
            let (dout, dstate_out) = (c.rows("dout", op.dout)?, c.maybe_rows("dstate_out", op.dstate_out)?);
            let mut columns = |col, of| c.rows_mut("dprojected", op.dprojected.col_range(col, of)?);
            let (db, dc) = (columns(op.inputs.b_col, inputs.b.cols())?, columns(op.inputs.c_col, inputs.c.cols())?);
            let dz = op.inputs.z_col.map(|col| columns(col, op.inputs.channels())).transpose()?;
            let (dd, bias) = (c.maybe_rows_mut("dd", op.dd)?, c.maybe_rows_mut("ddelta_bias", op.ddelta_bias)?);
            let dstate_in = c.maybe_rows_mut("dstate_in", op.dstate_in)?;
            let gradients = ScanGradients {
                du: &c.rows_mut("du", op.du)?,
                ddelta: &c.rows_mut("ddelta", op.ddelta)?,
                da: &c.rows_mut("da", op.da)?,
                db: &db,
                dc: &dc,
                dz: dz.as_ref(),
                dd: dd.as_ref(),
                ddelta_bias: bias.as_ref(),
                dstate_in: dstate_in.as_ref(),
            };
            selective_scan_backward(self.simd, &inputs, saved, dout, dstate_out, &gradients);
            Ok(())
        })
    }

    fn head_loss(&self, op: &ops::HeadLoss) -> Result<()> {
        self.call("head_loss", |c, _| {
            let (student, teacher) = (c.rows("student", op.student)?, c.maybe_rows("teacher", op.teacher)?);
            let labels = op.labels.map(|labels| c.slice_of("labels", labels)).transpose()?;
            let statistics = c.rows_mut("statistics", op.statistics)?;
            head_loss::head_loss(self.simd, student, teacher, labels, scales(&op.scaling), &statistics);
            Ok(())
        })
    }

    fn head_loss_gradient(&self, op: &ops::HeadLossGradient) -> Result<()> {
        self.call("head_loss_gradient", |c, _| {
            let given = head_loss::Gradient {
                teacher: c.maybe_rows("teacher", op.teacher)?,
                labels: op.labels.map(|labels| c.slice_of("labels", labels)).transpose()?,
                scales: scales(&op.scaling),
                statistics: c.rows("statistics", op.statistics)?,
                row_weights: c.slice("row_weights", op.row_weights)?,
                weights: op.weights,
            };
            let losses = c.rows_mut("losses", op.losses)?;
            let gradient = match op.gradient {
                None => c.rows_mut("student", op.student)?,
                Some(view) => {
                    let gradient = c.rows_mut("gradient", view)?;
                    if op.weights.is_some() {
                        elementwise::copy::<f32, f32>(c.rows("student", op.student)?, &gradient, false);
                    }
                    gradient
                }
            };
            head_loss::head_loss_gradient(self.simd, &gradient, given, &losses);
            Ok(())
        })
    }

    fn argmax(&self, op: &ops::Argmax) -> Result<()> {
        self.call("argmax", |c, _| {
            let (logits, out) = (c.rows("logits", op.logits)?, c.rows_mut_of("out", op.out)?);
            sample::argmax(self.simd, logits, &out);
            Ok(())
        })
    }

    fn sample(&self, op: &ops::Sample) -> Result<()> {
        self.call("sample", |c, _| {
            let (logits, out) = (c.rows("logits", op.logits)?, c.rows_mut_of("out", op.out)?);
            let temperatures = c.slice("temperatures", op.temperatures)?;
            sample::sample(self.simd, logits, temperatures, c.slice("uniforms", op.uniforms)?, &out);
            Ok(())
        })
    }

    fn gather(&self, op: &ops::Gather) -> Result<()> {
        self.call("gather", |c, _| {
            let index = c.ids_below("rows", op.rows, op.src.rows)?;
            with_float!(c, "src", op.src, T => {
                rows::gather::<T>(c.rows_of("src", op.src)?, index, &c.rows_mut_of("out", op.out)?);
                Ok(())
            })
        })
    }

    fn scatter_add(&self, op: &ops::ScatterAdd) -> Result<()> {
        self.call("scatter_add", |c, _| {
            let index = c.ids_below("rows", op.rows, op.out.rows)?;
            table::distinct("scatter_add", "row", index.iter().copied())?;
            rows::scatter_add(self.simd, c.rows("src", op.src)?, index, &c.rows_mut("out", op.out)?);
            Ok(())
        })
    }

    fn copy(&self, op: &ops::Copy) -> Result<()> {
        self.call("copy", |c, _| {
            let (mut src, mut out) = (op.src, op.out.view);
            if src.dtype == DType::U32 {
                elementwise::move_values::<u32>(c.rows_of("src", src)?, &c.rows_mut_of("out", out)?);
                return Ok(());
            }
            if src.order == Order::Weight {
                (src, out) = (c.panels_as_rows(src)?, c.panels_as_rows(out)?);
            }
            with_float!(c, "src", src, S => with_float!(c, "out", out, D => {
                elementwise::copy::<S, D>(c.rows_of("src", src)?, &c.rows_mut_of("out", out)?, op.out.add);
                Ok(())
            }))
        })
    }

    fn fill(&self, op: &ops::Fill) -> Result<()> {
        self.call("fill", |c, _| {
            with_float!(c, "out", op.out, T => {
                let value = <T as elementwise::Storage>::narrow(op.value);
                elementwise::fill::<T>(value, &c.rows_mut_of("out", op.out)?);
                Ok(())
            })
        })
    }

    fn scale(&self, op: &ops::Scale) -> Result<()> {
        self.call("scale", |c, _| {
            with_float!(c, "x", op.x, T => {
                elementwise::scale::<T>(op.factor, &c.rows_mut_of("x", op.x)?);
                Ok(())
            })
        })
    }

    fn weighted_sum(&self, op: &ops::WeightedSum) -> Result<()> {
        self.call("weighted_sum", |c, _| {
            let (values, weights) = (c.rows("values", op.values)?, c.slice("weights", op.weights)?);
            rows::weighted_sum(self.simd, values, weights, &c.rows_mut("out", op.out)?);
            Ok(())
        })
    }

    fn squared_norm(&self, op: &ops::SquaredNorm) -> Result<()> {
        self.call("squared_norm", |c, _| {
            let (x, mut out) = (c.slice("x", op.x)?, c.rows_mut("out", op.out)?);
            adamw::squared_norm(self.simd, x, &mut out.row(0)[0]);
            Ok(())
        })
    }

    fn clip_factor(&self, op: &ops::ClipFactor) -> Result<()> {
        self.call("clip_factor", |c, _| {
            let (squared, mut control) =
                (c.slice("squared_norm", op.squared_norm)?, c.rows_mut("control", op.control)?);
            adamw::clip_factor(squared[0], op.max_norm, control.row(0));
            Ok(())
        })
    }

    fn adamw(&self, op: &ops::AdamW) -> Result<()> {
        self.call("adamw", |c, _| {
            let (param, grad) = (c.rows_mut("param", op.param)?, c.slice("grad", op.grad)?);
            let moments = (&c.rows_mut("moment1", op.moment1)?, &c.rows_mut("moment2", op.moment2)?);
            let control = c.slice("control", op.control)?;
            let &ops::AdamW { beta1, beta2, eps, weight_decay, .. } = op;
            let update = || {
                let update = adamw::Update { beta1, beta2, eps, weight_decay };
                adamw::adamw(self.simd, (&param, grad), moments, control, update);
            };
            let Some(stored) = op.stored else {
                update();
                return Ok(());
            };
            with_float!(c, "stored", stored, T => {
                let (param, stored) = (c.rows("param", op.param)?, c.rows_mut_of::<T>("stored", stored)?);
                update();
                if control.iter().all(|number| number.is_finite()) {
                    elementwise::copy::<f32, T>(param, &stored, false);
                }
                Ok(())
            })
        })
    }
}

//! The backend `reference`: the plain formulas of `h1_reference` in f64 over whatever is stored, one rounding at the end of
//! each op. Slow, and the oracle that the other backends are held to.

use std::sync::{Mutex, MutexGuard, PoisonError};

use h1_reference as formulas;
use ndarray::{Array2, Axis};

use super::host::{HostMemory, WeightOrder, table};
use super::{Backend, BackendInfo, BufferId, DType, HostSlice, Largest, Readback, Result, View, ops};

mod arguments;

use arguments::{
    Conv, Head, Scan, attention_of, clear_fresh, key_rows, row_statistics, sequences, slots, statistics_row,
};

/// The backend. One op at a time; a call from another thread waits.
pub struct Reference {
    info: BackendInfo,
    memory: Mutex<HostMemory>,
}

impl Default for Reference {
    fn default() -> Self {
        Self::new()
    }
}

impl Reference {
    /// A device with no buffers.
    pub fn new() -> Self {
        let info = BackendInfo {
            name: "reference",
            device: "plain formulas in f64".into(),
            dtypes: vec![DType::F32, DType::Bf16, DType::F16, DType::F64],
            activations: vec![DType::F32],
            // Backward starts from the segment's first state.
            scan_chunk: usize::MAX,
            chunk_values: crate::backend::CHUNK_VALUES,
            batch_invariant: false,
            records: false,
        };
        Reference { info, memory: Mutex::new(HostMemory::new("reference", WeightOrder::Rows)) }
    }

    fn held(&self) -> MutexGuard<'_, HostMemory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Reference {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<BufferId> {
        self.held().alloc(dtype, len)
    }

    fn free(&self, buffer: BufferId) {
        self.held().free(buffer);
    }

    fn reserve(&self, _largest: &Largest) -> Result<()> {
        Ok(())
    }

    fn write(&self, src: HostSlice<'_>, dst: View) -> Result<()> {
        self.held().write(src, dst)
    }

    fn read(&self, src: View) -> Result<Readback> {
        self.held().read(src)
    }

    fn embed(&self, op: &ops::Embed) -> Result<()> {
        let mut m = self.held();
        let ids = m.ids_below("embed", "id", op.ids, op.weight.rows)?;
        let out = formulas::embed(&ids, m.load(op.weight)?.view());
        m.store(op.out, out.view(), false)
    }

    fn embed_backward(&self, op: &ops::EmbedBackward) -> Result<()> {
        let mut m = self.held();
        m.place(op.dweight)?;
        let ids = m.ids_below("embed_backward", "id", op.ids, op.dweight.rows)?;
        let dweight = formulas::embed_backward(&ids, m.load(op.dout)?.view(), op.dweight.rows);
        m.store(op.dweight, dweight.view(), true)
    }

    fn rms_norm(&self, op: &ops::RmsNorm) -> Result<()> {
        let mut m = self.held();
        let (x, weight) = (m.load(op.x)?, m.vector(op.weight)?);
        let (out, inv_rms) = formulas::rms_norm(x.view(), weight.view(), f64::from(op.eps));
        m.store(op.out, out.view(), false)?;
        op.inv_rms.map_or(Ok(()), |view| m.store_row(view, &inv_rms, false))
    }

    fn rms_norm_backward(&self, op: &ops::RmsNormBackward) -> Result<()> {
        let mut m = self.held();
        let (x, weight, inv_rms) = (m.load(op.x)?, m.vector(op.weight)?, m.vector(op.inv_rms)?);
        let dout = m.load(op.dout)?;
        let (dx, dweight) = formulas::rms_norm_backward(x.view(), weight.view(), inv_rms.view(), dout.view());
        m.store(op.dx.view, dx.view(), op.dx.add)?;
        op.dweight.map_or(Ok(()), |view| m.store_row(view, &dweight, true))
    }

    fn linear(&self, op: &ops::Linear) -> Result<()> {
        let mut m = self.held();
        let (x, weight) = (m.load(op.x)?, m.load(op.weight)?);
        let bias = m.maybe(op.bias, HostMemory::vector)?;
        let out = formulas::linear(x.view(), weight.view(), bias.as_ref().map(|bias| bias.view()));
        m.store(op.out.view, out.view(), op.out.add)
    }

    fn linear_backward_input(&self, op: &ops::LinearBackwardInput) -> Result<()> {
        let mut m = self.held();
        let (dout, weight) = (m.load(op.dout)?, m.load(op.weight)?);
        let x = Array2::zeros((dout.nrows(), weight.ncols()));
        let (dx, _, _) = formulas::linear_backward(x.view(), weight.view(), dout.view());
        m.store(op.dx.view, dx.view(), op.dx.add)
    }

    fn linear_backward_weight(&self, op: &ops::LinearBackwardWeight) -> Result<()> {
        let mut m = self.held();
        let (x, dout) = (m.load(op.x)?, m.load(op.dout)?);
        let weight = Array2::zeros((dout.ncols(), x.ncols()));
        let (_, dweight, dbias) = formulas::linear_backward(x.view(), weight.view(), dout.view());
        m.store(op.dweight, dweight.view(), true)?;
        op.dbias.map_or(Ok(()), |view| m.store_row(view, &dbias, true))
    }

    fn swiglu(&self, op: &ops::Swiglu) -> Result<()> {
        let mut m = self.held();
        let out = formulas::swiglu(m.load(op.gate)?.view(), m.load(op.up)?.view());
        m.store(op.out, out.view(), false)
    }

    fn swiglu_backward(&self, op: &ops::SwigluBackward) -> Result<()> {
        let mut m = self.held();
        let (gate, up, dout) = (m.load(op.gate)?, m.load(op.up)?, m.load(op.dout)?);
        let (dgate, dup) = formulas::swiglu_backward(gate.view(), up.view(), dout.view());
        m.store(op.dgate, dgate.view(), false)?;
        m.store(op.dup, dup.view(), false)
    }

    fn rope(&self, op: &ops::Rope) -> Result<()> {
        let mut m = self.held();
        let (x, positions, inv_freq) = (m.load(op.x)?, m.ids(op.positions)?, m.vector(op.inv_freq)?.to_vec());
        let rotate = if op.inverse { formulas::rope_inverse } else { formulas::rope };
        m.store(op.x, rotate(x.view(), op.head_dim, &positions, &inv_freq).view(), false)
    }

    fn attention(&self, op: &ops::Attention) -> Result<()> {
        let mut m = self.held();
        let table = m.table("attention", &op.segments, op.q.rows)?;
        let rows = key_rows(&mut m, &table, &op.keys)?;
        let (ops::Keys::Rows { k, v } | ops::Keys::Pages { k, v, .. }) = op.keys;
        let (k, v) = (m.load(k)?.select(Axis(0), &rows), m.load(v)?.select(Axis(0), &rows));
        let shape = attention_of(&op.shape);
        let (out, lse) = formulas::attention(m.load(op.q)?.view(), k.view(), v.view(), &sequences(&table), &shape);
        m.store(op.out, out.view(), false)?;
        op.lse.map_or(Ok(()), |view| m.store(view, lse.view(), false))
    }

    fn attention_backward(&self, op: &ops::AttentionBackward) -> Result<()> {
        let mut m = self.held();
        let table = m.table("attention_backward", &op.segments, op.q.rows)?;
        let rows = key_rows(&mut m, &table, &ops::Keys::Rows { k: op.k, v: op.v })?;
        let (k, v) = (m.load(op.k)?.select(Axis(0), &rows), m.load(op.v)?.select(Axis(0), &rows));
        let (q, out, lse, dout) = (m.load(op.q)?, m.load(op.out)?, m.load(op.lse)?, m.load(op.dout)?);
        let (segments, shape) = (sequences(&table), attention_of(&op.shape));
        let (dq, dk, dv) = formulas::attention_backward(
            q.view(),
            k.view(),
            v.view(),
            out.view(),
            lse.view(),
            dout.view(),
            &segments,
            &shape,
        );
        m.store(op.dq, dq.view(), false)?;
        for (view, dkey) in [(op.dk, dk), (op.dv, dv)] {
            let mut all = Array2::zeros((view.rows, view.cols));
            rows.iter().zip(dkey.rows()).for_each(|(&row, values)| all.row_mut(row).assign(&values));
            m.store(view, all.view(), false)?;
        }
        Ok(())
    }

    fn page_write(&self, op: &ops::PageWrite) -> Result<()> {
        let mut m = self.held();
        let table = m.table("page_write", &op.segments, op.rows[0].rows)?;
        let of_slots = m.ids(op.pages)?;
        let (width, rows) = (op.pages.cols, op.out[0].rows);
        let pages = table::Pages { table: &of_slots, width, page_size: op.page_size, rows };
        pages.check("page_write", &table, true)?;
        for (rows, out) in op.rows.into_iter().zip(op.out) {
            let rows = m.load(rows)?;
            for &[start, len, past, slot, _] in &table {
                for i in 0..len {
                    let to = out.row_range(pages.row(slot, past + i), 1)?;
                    m.store_row(to, &rows.row((start + i) as usize).to_owned(), false)?;
                }
            }
        }
        Ok(())
    }

    fn conv1d(&self, op: &ops::Conv1d) -> Result<()> {
        let mut m = self.held();
        let conv = Conv::load(&mut m, "conv1d", op)?;
        slots("conv1d", &conv.table, &[op.state_out])?;
        let state_in = Some(conv.state_in.view());
        let (out, state_out) =
            formulas::conv1d(conv.x.view(), &conv.formula(&op.shape), state_in, &sequences(&conv.table));
        m.store(op.out, out.view(), false)?;
        m.store_states(op.state_out, &conv.table, &state_out)
    }

    fn conv1d_backward(&self, op: &ops::Conv1dBackward) -> Result<()> {
        let mut m = self.held();
        let ops::Conv1dBackward { shape, projected, x_col, weight, bias, segments, state_in, .. } = *op;
        let given =
            ops::Conv1d { shape, projected, x_col, weight, bias, segments, state_in, state_out: None, out: op.dout };
        let conv = Conv::load(&mut m, "conv1d_backward", &given)?;
        slots("conv1d_backward", &conv.table, &[op.dstate_out, op.dstate_in])?;
        let dstate_out = m.states(op.dstate_out, &conv.table, (shape.channels_in, shape.width), false)?;
        let dout = m.load(op.dout)?;
        let mut gradients = formulas::conv1d_backward(
            conv.x.view(),
            &conv.formula(&op.shape),
            Some(conv.state_in.view()),
            dout.view(),
            Some(dstate_out.view()),
            &sequences(&conv.table),
        );
        clear_fresh(&conv.table, &mut gradients.dstate_in);
        m.store(op.dprojected.col_range(op.x_col, op.shape.channels_in)?, gradients.dx.view(), false)?;
        op.dweight.map_or(Ok(()), |view| m.store(view, gradients.dweight.view(), true))?;
        op.dbias.map_or(Ok(()), |view| m.store_row(view, &gradients.dbias, true))?;
        m.store_states(op.dstate_in, &conv.table, &gradients.dstate_in)
    }

    fn neg_exp(&self, op: &ops::NegExp) -> Result<()> {
        let mut m = self.held();
        let a = formulas::neg_exp(m.load(op.a_log)?.view());
        m.store(op.a, a.view(), false)
    }

    fn neg_exp_backward(&self, op: &ops::NegExpBackward) -> Result<()> {
        let mut m = self.held();
        let da_log = formulas::neg_exp_backward(m.load(op.a)?.view(), m.load(op.da)?.view());
        m.store(op.da_log, da_log.view(), true)
    }

    fn selective_scan(&self, op: &ops::SelectiveScan) -> Result<()> {
        let mut m = self.held();
        let scan = Scan::load(&mut m, "selective_scan", &op.inputs)?;
        slots("selective_scan", &scan.table, &[op.state_out])?;
        let (out, state_out) = formulas::selective_scan(&scan.formula(), &sequences(&scan.table));
        if let Some(saved) = op.saved {
            for (row, state) in scan.state_in.outer_iter().enumerate() {
                m.store_row(saved.row_range(row, 1)?, &state.flatten().into_owned(), false)?;
            }
        }
        m.store(op.out, out.view(), false)?;
        m.store_states(op.state_out, &scan.table, &state_out)
    }

    fn selective_scan_backward(&self, op: &ops::SelectiveScanBackward) -> Result<()> {
        let mut m = self.held();
        let scan = Scan::load(&mut m, "selective_scan_backward", &op.inputs)?;
        // States are computed from the first on, which `saved` holds too.
        m.place(op.saved)?;
        let (channels, d_state) = (op.inputs.channels(), op.inputs.d_state());
        slots("selective_scan_backward", &scan.table, &[op.dstate_out, op.dstate_in])?;
        let dstate_out = m.states(op.dstate_out, &scan.table, (channels, d_state), false)?;
        let dout = m.load(op.dout)?;
        let segments = sequences(&scan.table);
        let mut gradients =
            formulas::selective_scan_backward(&scan.formula(), &segments, dout.view(), Some(dstate_out.view()));
        clear_fresh(&scan.table, &mut gradients.dstate_in);
        m.store(op.du, gradients.du.view(), false)?;
        m.store(op.ddelta, gradients.ddelta.view(), false)?;
        m.store(op.da, gradients.da.view(), false)?;
        let columns = [
            (Some(op.inputs.b_col), Some(gradients.db)),
            (Some(op.inputs.c_col), Some(gradients.dc)),
            (op.inputs.z_col, gradients.dz),
        ];
        for (col, values) in columns {
            if let (Some(col), Some(values)) = (col, values) {
                m.store(op.dprojected.col_range(col, values.ncols())?, values.view(), false)?;
            }
        }
        for (view, values) in [(op.dd, gradients.dd), (op.ddelta_bias, gradients.ddelta_bias)] {
            if let (Some(view), Some(values)) = (view, values) {
                m.store_row(view, &values, true)?;
            }
        }
        m.store_states(op.dstate_in, &scan.table, &gradients.dstate_in)
    }

    fn head_loss(&self, op: &ops::HeadLoss) -> Result<()> {
        let mut m = self.held();
        let head = Head::load(&mut m, op.student, op.teacher, op.labels, &op.scaling, None)?;
        let rows = formulas::head_loss_statistics(head.student.view(), head.teacher(), &head.labels, &head.formula);
        let mut statistics = Array2::zeros((op.student.rows, ops::STATISTICS));
        for (mut to, of_row) in statistics.rows_mut().into_iter().zip(&rows) {
            to.assign(&ndarray::aview1(&statistics_row(of_row)));
        }
        m.store(op.statistics, statistics.view(), false)
    }

    fn head_loss_gradient(&self, op: &ops::HeadLossGradient) -> Result<()> {
        let mut m = self.held();
        let head = Head::load(&mut m, op.student, op.teacher, op.labels, &op.scaling, op.weights)?;
        let (statistics, row_weights) = (m.load(op.statistics)?, m.vector(op.row_weights)?.to_vec());
        let of_rows: Vec<_> = statistics.rows().into_iter().map(row_statistics).collect();
        let losses = of_rows.iter().zip(&head.labels).map(|(row, label)| row.losses(label.is_some()));
        let losses: Vec<_> = losses.map(|l| [l.reverse_kl, l.forward_kl, l.cross_entropy]).collect();
        m.store(op.losses, ndarray::aview2(&losses), false)?;
        if op.weights.is_none() {
            return Ok(());
        }
        let mut gradient = head.student.clone();
        let teacher = head.teacher();
        formulas::head_loss_gradient(gradient.view_mut(), teacher, &head.labels, &of_rows, &row_weights, &head.formula);
        m.store(op.gradient.unwrap_or(op.student), gradient.view(), false)
    }

    fn argmax(&self, op: &ops::Argmax) -> Result<()> {
        let mut m = self.held();
        let ids = formulas::argmax(m.load(op.logits)?.view());
        m.store_ids(op.out, &ids)
    }

    fn sample(&self, op: &ops::Sample) -> Result<()> {
        let mut m = self.held();
        let (logits, temperatures, uniforms) = (m.load(op.logits)?, m.vector(op.temperatures)?, m.vector(op.uniforms)?);
        let ids = formulas::sample(logits.view(), &temperatures.to_vec(), &uniforms.to_vec());
        m.store_ids(op.out, &ids)
    }

    fn gather(&self, op: &ops::Gather) -> Result<()> {
        let mut m = self.held();
        let rows = m.ids_below("gather", "row", op.rows, op.src.rows)?;
        let out = formulas::gather(m.load(op.src)?.view(), &rows);
        m.store(op.out, out.view(), false)
    }

    fn scatter_add(&self, op: &ops::ScatterAdd) -> Result<()> {
        let mut m = self.held();
        let rows = m.ids_below("scatter_add", "row", op.rows, op.out.rows)?;
        table::distinct("scatter_add", "row", rows.iter().copied())?;
        let mut out = m.load(op.out)?;
        formulas::scatter_add(out.view_mut(), &rows, m.load(op.src)?.view());
        m.store(op.out, out.view(), false)
    }

    fn copy(&self, op: &ops::Copy) -> Result<()> {
        let mut m = self.held();
        let src = m.load(op.src)?;
        m.store(op.out.view, src.view(), op.out.add)
    }

    fn fill(&self, op: &ops::Fill) -> Result<()> {
        let mut m = self.held();
        m.place(op.out)?;
        m.store(op.out, Array2::from_elem((op.out.rows, op.out.cols), f64::from(op.value)).view(), false)
    }

    fn scale(&self, op: &ops::Scale) -> Result<()> {
        let mut m = self.held();
        let x = m.load(op.x)? * f64::from(op.factor);
        m.store(op.x, x.view(), false)
    }

    fn weighted_sum(&self, op: &ops::WeightedSum) -> Result<()> {
        let mut m = self.held();
        let (values, weights) = (m.load(op.values)?, m.vector(op.weights)?);
        let mut sum = ndarray::Array1::zeros(op.values.cols);
        for (row, &weight) in values.rows().into_iter().zip(&weights).filter(|(_, weight)| **weight != 0.0) {
            sum.scaled_add(weight, &row);
        }
        m.store_row(op.out, &sum, true)
    }

    fn squared_norm(&self, op: &ops::SquaredNorm) -> Result<()> {
        let mut m = self.held();
        let norm = formulas::squared_norm(&m.vector(op.x)?.to_vec());
        m.store(op.out, ndarray::aview2(&[[norm]]), true)
    }

    fn clip_factor(&self, op: &ops::ClipFactor) -> Result<()> {
        let mut m = self.held();
        let squared = m.load(op.squared_norm)?[[0, 0]];
        let mut control = m.load(op.control)?;
        control[[0, ops::Control::Norm as usize]] = squared.sqrt();
        control[[0, ops::Control::Clip as usize]] = formulas::clip_factor(squared, f64::from(op.max_norm));
        m.store(op.control, control.view(), false)
    }

    fn adamw(&self, op: &ops::AdamW) -> Result<()> {
        let mut m = self.held();
        let control = m.vector(op.control)?;
        let number = |control_of: ops::Control| control[control_of as usize];
        let update = formulas::AdamW {
            lr: number(ops::Control::LearningRate),
            beta1: f64::from(op.beta1),
            beta2: f64::from(op.beta2),
            eps: f64::from(op.eps),
            weight_decay: f64::from(op.weight_decay),
            correction1: number(ops::Control::Correction1),
            correction2: number(ops::Control::Correction2),
            clip: number(ops::Control::Clip),
        };
        let grad = m.vector(op.grad)?.to_vec();
        let (mut param, mut first) = (m.vector(op.param)?.to_vec(), m.vector(op.moment1)?.to_vec());
        let mut second = m.vector(op.moment2)?.to_vec();
        if !control.iter().all(|number| number.is_finite()) {
            return Ok(());
        }
        formulas::adamw(&mut param, &grad, &mut first, &mut second, &update);
        let param = param.into();
        m.store_row(op.param, &param, false)?;
        m.store_row(op.moment1, &first.into(), false)?;
        m.store_row(op.moment2, &second.into(), false)?;
        op.stored.map_or(Ok(()), |view| m.store_row(view, &param, false))
    }
}

//! What the formulas take and give, from and to device memory.

use h1_reference as formulas;
use ndarray::{Array1, Array2, Array3, Axis};

use crate::backend::host::{HostMemory, table};
use crate::backend::{Result, SEGMENT_FIELDS, SegmentsView, View, ops};

impl HostMemory {
    pub fn vector(&mut self, view: View) -> Result<Array1<f64>> {
        Ok(self.load(view)?.flatten().into_owned())
    }

    pub fn maybe<T>(&mut self, view: Option<View>, load: impl Fn(&mut Self, View) -> Result<T>) -> Result<Option<T>> {
        view.map(|view| load(self, view)).transpose()
    }

    pub fn ids(&mut self, view: View) -> Result<Vec<u32>> {
        Ok(self.load(view)?.iter().map(|&id| id as u32).collect())
    }

    pub fn ids_below(&mut self, op: &'static str, what: &str, view: View, bound: usize) -> Result<Vec<u32>> {
        let ids = self.ids(view)?;
        table::below(op, what, ids.iter().copied(), bound)?;
        Ok(ids)
    }

    /// The segments that have rows, once they are known to cover `tokens` rows.
    pub fn table(&mut self, op: &'static str, segments: &SegmentsView, tokens: usize) -> Result<Vec<table::Row>> {
        self.place(segments.positions)?;
        let values = self.ids(segments.table)?;
        let (rows, _) = values.as_chunks::<SEGMENT_FIELDS>();
        table::cover(op, rows, tokens)?;
        Ok(rows.iter().copied().filter(|[_, len, ..]| *len > 0).collect())
    }

    /// The states of sequences, `[segments, rows, cols]`: from their slots, or 0 where `fresh` says so.
    pub fn states(
        &mut self,
        view: Option<View>,
        table: &[table::Row],
        shape: (usize, usize),
        fresh: bool,
    ) -> Result<Array3<f64>> {
        view.map_or(Ok(()), |view| self.place(view).map(drop))?;
        let mut states = Array3::zeros((table.len(), shape.0, shape.1));
        for (&[_, _, past, slot, _], mut state) in table.iter().zip(states.axis_iter_mut(Axis(0))) {
            if let Some(view) = view.filter(|_| past > 0 || !fresh) {
                let values = self.load(view.row_range(slot as usize, 1)?)?;
                state.iter_mut().zip(&values).for_each(|(to, from)| *to = *from);
            }
        }
        Ok(states)
    }

    /// Puts states into their slots.
    pub fn store_states(&mut self, view: Option<View>, table: &[table::Row], states: &Array3<f64>) -> Result<()> {
        let Some(view) = view else { return Ok(()) };
        self.place(view)?;
        for (&[_, _, _, slot, _], state) in table.iter().zip(states.axis_iter(Axis(0))) {
            self.store(view.row_range(slot as usize, 1)?, state.flatten().insert_axis(Axis(0)).view(), false)?;
        }
        Ok(())
    }

    pub fn store_row(&mut self, view: View, values: &Array1<f64>, add: bool) -> Result<()> {
        self.store(view, values.view().insert_axis(Axis(0)), add)
    }

    pub fn store_ids(&mut self, view: View, ids: &[u32]) -> Result<()> {
        self.store_row(view, &ids.iter().map(|&id| f64::from(id)).collect(), false)
    }
}

/// Checks the slots of the states that are there.
pub fn slots(op: &'static str, table: &[table::Row], states: &[Option<View>]) -> Result<()> {
    states.iter().flatten().try_for_each(|view| table::slots(op, table, view.rows))
}

pub fn sequences(table: &[table::Row]) -> Vec<formulas::Segment> {
    let segment = |&[start, len, past, ..]: &table::Row| formulas::Segment {
        start: start as usize,
        len: len as usize,
        past: past as usize,
    };
    table.iter().map(segment).collect()
}

/// The gradient of the state before a sequence's first token has nowhere to go.
pub fn clear_fresh(table: &[table::Row], dstates: &mut Array3<f64>) {
    for (&[_, _, past, ..], mut dstate) in table.iter().zip(dstates.axis_iter_mut(Axis(0))) {
        if past == 0 {
            dstate.fill(0.0);
        }
    }
}

pub fn attention_of(shape: &ops::AttentionShape) -> formulas::Attention {
    formulas::Attention { head_dim: shape.head_dim, window: shape.window, scale: f64::from(shape.scale) }
}

/// The rows in which the keys of the segments lie, one segment after the other.
pub fn key_rows(memory: &mut HostMemory, table: &[table::Row], keys: &ops::Keys) -> Result<Vec<usize>> {
    match *keys {
        ops::Keys::Rows { k, .. } => {
            table::keys("attention", table, k.rows)?;
            Ok(table
                .iter()
                .flat_map(|&[_, len, past, _, keys]| (keys..keys + past + len).map(|row| row as usize))
                .collect())
        }
        ops::Keys::Pages { k, pages, page_size, .. } => {
            let of_slots = memory.ids(pages)?;
            let pages = table::Pages { table: &of_slots, width: pages.cols, page_size, rows: k.rows };
            pages.check("attention", table, false)?;
            let rows = |&[_, len, past, slot, _]: &table::Row| (0..past + len).map(move |p| (slot, p));
            Ok(table.iter().flat_map(rows).map(|(slot, position)| pages.row(slot, position)).collect())
        }
    }
}

/// The arguments of the convolution.
pub struct Conv {
    pub x: Array2<f64>,
    pub weight: Array2<f64>,
    pub bias: Option<Array1<f64>>,
    pub table: Vec<table::Row>,
    pub state_in: Array3<f64>,
}

impl Conv {
    pub fn load(memory: &mut HostMemory, op: &'static str, given: &ops::Conv1d) -> Result<Self> {
        let shape = &given.shape;
        let table = memory.table(op, &given.segments, given.projected.rows)?;
        slots(op, &table, &[given.state_in])?;
        Ok(Conv {
            x: memory.load(given.projected.col_range(given.x_col, shape.channels_in)?)?,
            weight: memory.load(given.weight)?,
            bias: memory.maybe(given.bias, HostMemory::vector)?,
            state_in: memory.states(given.state_in, &table, (shape.channels_in, shape.width), true)?,
            table,
        })
    }

    pub fn formula(&self, shape: &ops::ConvShape) -> formulas::Conv1d<'_, f64> {
        formulas::Conv1d {
            weight: self.weight.view(),
            bias: self.bias.as_ref().map(|bias| bias.view()),
            head: shape.head,
            repeat: shape.repeat,
            order: if shape.repeat_first {
                formulas::RepeatOrder::BeforeConv
            } else {
                formulas::RepeatOrder::AfterConv
            },
        }
    }
}

/// The arguments of the scan.
pub struct Scan {
    u: Array2<f64>,
    delta: Array2<f64>,
    a: Array2<f64>,
    b: Array2<f64>,
    c: Array2<f64>,
    z: Option<Array2<f64>>,
    d: Option<Array1<f64>>,
    delta_bias: Option<Array1<f64>>,
    softplus: bool,
    pub table: Vec<table::Row>,
    pub state_in: Array3<f64>,
}

impl Scan {
    pub fn load(memory: &mut HostMemory, op: &'static str, inputs: &ops::ScanInputs) -> Result<Self> {
        let (channels, d_state) = (inputs.channels(), inputs.d_state());
        let table = memory.table(op, &inputs.segments, inputs.u.rows)?;
        slots(op, &table, &[inputs.state_in])?;
        let columns = |first, count| inputs.projected.col_range(first, count);
        let z = inputs.z_col.map(|col| columns(col, channels)).transpose()?;
        Ok(Scan {
            u: memory.load(inputs.u)?,
            delta: memory.load(inputs.delta)?,
            a: memory.load(inputs.a)?,
            b: memory.load(columns(inputs.b_col, inputs.groups_b * d_state)?)?,
            c: memory.load(columns(inputs.c_col, inputs.groups_c * d_state)?)?,
            z: memory.maybe(z, HostMemory::load)?,
            d: memory.maybe(inputs.d, HostMemory::vector)?,
            delta_bias: memory.maybe(inputs.delta_bias, HostMemory::vector)?,
            softplus: inputs.softplus,
            state_in: memory.states(inputs.state_in, &table, (channels, d_state), true)?,
            table,
        })
    }

    pub fn formula(&self) -> formulas::ScanInputs<'_, f64> {
        formulas::ScanInputs {
            u: self.u.view(),
            delta: self.delta.view(),
            a: self.a.view(),
            b: self.b.view(),
            c: self.c.view(),
            d: self.d.as_ref().map(|d| d.view()),
            z: self.z.as_ref().map(|z| z.view()),
            delta_bias: self.delta_bias.as_ref().map(|bias| bias.view()),
            softplus: self.softplus,
            state_in: Some(self.state_in.view()),
        }
    }
}

/// The arguments of the losses; `labels` are those inside the vocabulary.
pub struct Head {
    pub student: Array2<f64>,
    pub teacher: Option<Array2<f64>>,
    pub labels: Vec<Option<u32>>,
    pub formula: formulas::HeadLoss,
}

impl Head {
    pub fn load(
        memory: &mut HostMemory,
        student: View,
        teacher: Option<View>,
        labels: Option<View>,
        scaling: &ops::Scaling,
        weights: Option<ops::LossWeights>,
    ) -> Result<Self> {
        let labels = match labels {
            Some(labels) => {
                memory.ids(labels)?.iter().map(|&l| Some(l).filter(|&l| (l as usize) < student.cols)).collect()
            }
            None => vec![None; student.rows],
        };
        let weights = weights.unwrap_or(ops::LossWeights { reverse_kl: 0.0, forward_kl: 0.0, cross_entropy: 0.0 });
        let formula = formulas::HeadLoss {
            weights: formulas::LossWeights {
                reverse_kl: f64::from(weights.reverse_kl),
                forward_kl: f64::from(weights.forward_kl),
                cross_entropy: f64::from(weights.cross_entropy),
            },
            logits_scale: f64::from(scaling.logits_scale),
            temperature: f64::from(scaling.temperature),
            spelling: match scaling.spelling {
                ops::Temperature::Both => formulas::Temperature::Both,
                ops::Temperature::TeacherOnly => formulas::Temperature::TeacherOnly,
            },
            vocab_start: 0,
        };
        Ok(Head { student: memory.load(student)?, teacher: memory.maybe(teacher, HostMemory::load)?, labels, formula })
    }

    pub fn teacher(&self) -> Option<ndarray::ArrayView2<'_, f64>> {
        self.teacher.as_ref().map(|teacher| teacher.view())
    }
}

/// A row of the device's statistics.
pub fn statistics_row(of_row: &formulas::RowStatistics<f64>) -> [f64; ops::STATISTICS] {
    [
        of_row.student_max,
        of_row.student_sum,
        of_row.teacher_max,
        of_row.teacher_sum,
        of_row.reverse_cross,
        of_row.forward_cross,
        of_row.label_logit,
    ]
}

/// The inverse of [`statistics_row`].
pub fn row_statistics(row: ndarray::ArrayView1<f64>) -> formulas::RowStatistics<f64> {
    formulas::RowStatistics {
        student_max: row[0],
        student_sum: row[1],
        teacher_max: row[2],
        teacher_sum: row[3],
        reverse_cross: row[4],
        forward_cross: row[5],
        label_logit: row[6],
    }
}

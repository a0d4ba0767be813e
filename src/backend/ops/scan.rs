//! The selective scan of Mamba-1 with the M1 mixer's groups (contract of the `m2` block, step 6 and 7).

use super::Conv1d;
use crate::backend::check::{Check, Checked};
use crate::backend::{DeviceId, Result, SegmentsView, View};

/// What the scan reads, forward and backward. With `dt = softplus(delta + delta_bias)` (or without softplus), channel
/// c in group `c / (channels / groups)` of B and of C:
/// `s_t[c,m] = exp(dt_t[c]·A[c,m])·s_{t−1}[c,m] + dt_t[c]·u_t[c]·B_t[m]`,
/// `out_t[c] = (Σ_m s_t[c,m]·C_t[m] + D[c]·u_t[c])·silu(z_t[c])`.
#[derive(Clone, Copy, Debug)]
pub struct ScanInputs {
    /// `[tokens, channels]`.
    pub u: View,
    /// `[tokens, channels]`.
    pub delta: View,
    /// `[channels, d_state]` f32, negative.
    pub a: View,
    /// `[tokens, cols]`: the whole output of the input projection, with B, C and z at columns of it.
    pub projected: View,
    /// The column of B, `groups_b·d_state` wide.
    pub b_col: usize,
    /// The column of C, `groups_c·d_state` wide.
    pub c_col: usize,
    /// The column of the gate z, `channels` wide, if there is one.
    pub z_col: Option<usize>,
    /// Groups of B; divides the channels.
    pub groups_b: usize,
    /// Groups of C; divides the channels.
    pub groups_c: usize,
    /// `[1, channels]` f32: D, the skip.
    pub d: Option<View>,
    /// `[1, channels]` f32, added to delta before the softplus.
    pub delta_bias: Option<View>,
    /// Whether dt is the softplus (the argument itself above 20).
    pub softplus: bool,
    /// Who belongs to whom.
    pub segments: SegmentsView,
    /// `[slots, channels·d_state]` f32: the state before the segment, read where past > 0; else it is 0.
    pub state_in: Option<View>,
}

impl ScanInputs {
    /// Channels.
    pub fn channels(&self) -> usize {
        self.u.cols
    }

    /// States of a channel.
    pub fn d_state(&self) -> usize {
        self.a.cols
    }

    /// Values of one sequence's state.
    pub fn state(&self) -> usize {
        self.channels() * self.d_state()
    }

    fn check(&self, check: &mut Check) -> Result<()> {
        let (tokens, channels) = (self.u.rows, self.channels());
        check.input("u", self.u, tokens, channels)?;
        check.input("delta", self.delta, tokens, channels)?;
        check.input("a", self.a, channels, self.d_state())?;
        check.input("projected", self.projected, tokens, self.projected.cols)?;
        let divides = |groups: usize| groups > 0 && channels > 0 && channels.is_multiple_of(groups);
        check.require(divides(self.groups_b) && divides(self.groups_c) && self.d_state() > 0, || {
            let (b, c) = (self.groups_b, self.groups_c);
            format!("{channels} channels of {} states over {b} groups of B and {c} of C", self.d_state())
        })?;
        let columns = [
            ("B", Some(self.b_col), self.groups_b * self.d_state()),
            ("C", Some(self.c_col), self.groups_c * self.d_state()),
            ("z", self.z_col, channels),
        ];
        for (name, col, width) in columns {
            let inside = col.is_none_or(|col| col.checked_add(width).is_some_and(|end| end <= self.projected.cols));
            check.require(inside, || format!("{name} at column {col:?} does not lie in {:?}", self.projected.cols))?;
        }
        check.maybe("d", self.d, 1, channels)?;
        check.maybe("delta_bias", self.delta_bias, 1, channels)?;
        check.segments(&self.segments, tokens)
    }

    /// Rows of `saved` that forward fills and backward reads: a state for each chunk of `chunk` tokens (the
    /// backend's own number) of each of at most `segments` segments.
    pub fn saved_rows(tokens: usize, segments: usize, chunk: usize) -> usize {
        tokens / chunk + segments
    }
}

/// The scan.
#[derive(Clone, Copy, Debug)]
pub struct SelectiveScan {
    /// What it reads.
    pub inputs: ScanInputs,
    /// `[slots, channels·d_state]` f32: the state after the segment; the same view as `state_in`, or another buffer.
    pub state_out: Option<View>,
    /// `[≥ saved_rows, channels·d_state]` f32: the states at the starts of chunks, segment after segment (that of
    /// segment i's chunk j in row Σ_{s<i} ceil(len_s / chunk) + j), kept for backward.
    pub saved: Option<View>,
    /// `[tokens, channels]`.
    pub out: View,
}

impl Checked for SelectiveScan {
    fn check(&self, device: DeviceId) -> Result<()> {
        let inputs = &self.inputs;
        let mut check = Check::new("selective_scan", device);
        inputs.check(&mut check)?;
        check.state(inputs.state_in, self.state_out, inputs.state())?;
        let saved = self.saved.map_or(0, |saved| saved.rows);
        check.maybe_output("saved", self.saved, saved, inputs.state())?;
        check.output("out", self.out, inputs.u.rows, inputs.channels())?;
        check.finish()
    }
}

/// [`Conv1d`], then [`SelectiveScan`] of what it writes.
#[derive(Clone, Copy, Debug)]
pub struct ConvScan {
    /// Writes u.
    pub conv: Conv1d,
    /// Reads it, over the same segments.
    pub scan: SelectiveScan,
    /// Whether u is kept for backward; else where it goes may hold anything afterwards.
    pub keeps: bool,
}

impl Checked for ConvScan {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (conv, scan, inputs) = (self.conv, self.scan, self.scan.inputs);
        conv.check(device)?;
        scan.check(device)?;
        let mut check = Check::new("conv_scan", device);
        let u = conv.out == inputs.u && conv.segments == inputs.segments;
        check.require(u, || "the scan's u is not what the convolution writes for the same segments".into())?;
        let rows = [conv.projected, conv.weight, inputs.delta, inputs.a, inputs.projected].map(Some);
        let read = rows.into_iter().chain([conv.bias, inputs.d, inputs.delta_bias]).flatten();
        read.into_iter().try_for_each(|view| check.input("what it reads", view, view.rows, view.cols))?;
        check.segments(&conv.segments, conv.out.rows)?;
        check.state(conv.state_in, conv.state_out, conv.shape.state())?;
        check.state(inputs.state_in, scan.state_out, inputs.state())?;
        let written = [Some(scan.out), Some(conv.out), scan.saved].into_iter().flatten();
        written.into_iter().try_for_each(|view| check.output("what it writes", view, view.rows, view.cols))?;
        check.finish()
    }
}

/// The gradients of [`SelectiveScan`]; states are computed again from those saved.
#[derive(Clone, Copy, Debug)]
pub struct SelectiveScanBackward {
    /// What forward read.
    pub inputs: ScanInputs,
    /// From forward.
    pub saved: View,
    /// `[tokens, channels]`.
    pub dout: View,
    /// `[slots, channels·d_state]` f32: the gradient of the state after each segment.
    pub dstate_out: Option<View>,
    /// `[tokens, channels]`.
    pub du: View,
    /// `[tokens, channels]`.
    pub ddelta: View,
    /// `[channels, d_state]` f32; replaces.
    pub da: View,
    /// The shape of `projected`; only the columns of B, C and z are written.
    pub dprojected: View,
    /// `[1, channels]` f32; adds.
    pub dd: Option<View>,
    /// `[1, channels]` f32; adds.
    pub ddelta_bias: Option<View>,
    /// `[slots, channels·d_state]` f32: the gradient of the state before each segment, 0 where past = 0.
    pub dstate_in: Option<View>,
}

impl Checked for SelectiveScanBackward {
    fn check(&self, device: DeviceId) -> Result<()> {
        let inputs = &self.inputs;
        let (tokens, channels) = (inputs.u.rows, inputs.channels());
        let mut check = Check::new("selective_scan_backward", device);
        inputs.check(&mut check)?;
        check.state(inputs.state_in, None, inputs.state())?;
        check.input("saved", self.saved, self.saved.rows, inputs.state())?;
        check.input("dout", self.dout, tokens, channels)?;
        check.state_grads(self.dstate_out, self.dstate_in, inputs.state())?;
        check.output("du", self.du, tokens, channels)?;
        check.output("ddelta", self.ddelta, tokens, channels)?;
        check.output("da", self.da, channels, inputs.d_state())?;
        check.output("dprojected", self.dprojected, tokens, inputs.projected.cols)?;
        check.maybe_output("dd", self.dd, 1, channels)?;
        check.maybe_output("ddelta_bias", self.ddelta_bias, 1, channels)?;
        check.finish()
    }
}

/// `a = −exp(a_log)`.
#[derive(Clone, Copy, Debug)]
pub struct NegExp {
    /// `[channels, d_state]`.
    pub a_log: View,
    /// `[channels, d_state]` f32.
    pub a: View,
}

impl Checked for NegExp {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("neg_exp", device);
        check.input("a_log", self.a_log, self.a.rows, self.a.cols)?;
        check.output("a", self.a, self.a.rows, self.a.cols)?;
        check.finish()
    }
}

/// `da_log += da ⊙ a`.
#[derive(Clone, Copy, Debug)]
pub struct NegExpBackward {
    /// `[channels, d_state]` f32, from forward.
    pub a: View,
    /// `[channels, d_state]` f32.
    pub da: View,
    /// `[channels, d_state]` f32; adds.
    pub da_log: View,
}

impl Checked for NegExpBackward {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (channels, d_state) = (self.a.rows, self.a.cols);
        let mut check = Check::new("neg_exp_backward", device);
        check.input("a", self.a, channels, d_state)?;
        check.input("da", self.da, channels, d_state)?;
        check.output("da_log", self.da_log, channels, d_state)?;
        check.finish()
    }
}

//! The selective scan of Mamba (Gu and Dao, arXiv:2312.00752; state-spaces/mamba `selective_scan_interface.py`), over segments.

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayView3, Axis, s};

use crate::{Real, Segment, silu, silu_derivative, softplus, softplus_derivative};

/// What the scan reads. Channel `c` uses group `c / (channels / groups)` of B, and of C; the numbers of groups follow from the
/// widths of `b` and `c` and need not be equal.
#[derive(Clone, Copy, Debug)]
pub struct ScanInputs<'a, T> {
    /// `[tokens, channels]`.
    pub u: ArrayView2<'a, T>,
    /// Step sizes before bias and softplus, `[tokens, channels]`.
    pub delta: ArrayView2<'a, T>,
    /// `[channels, d_state]`, negative.
    pub a: ArrayView2<'a, T>,
    /// `[tokens, groups * d_state]`.
    pub b: ArrayView2<'a, T>,
    /// `[tokens, groups * d_state]`.
    pub c: ArrayView2<'a, T>,
    /// The skip, `[channels]`.
    pub d: Option<ArrayView1<'a, T>>,
    /// The gate before silu, `[tokens, channels]`.
    pub z: Option<ArrayView2<'a, T>>,
    /// Added to delta, `[channels]`.
    pub delta_bias: Option<ArrayView1<'a, T>>,
    /// Whether the step size is `softplus(delta + delta_bias)` rather than `delta + delta_bias`.
    pub softplus: bool,
    /// The states before each segment, `[segments, channels, d_state]`; zeros without it.
    pub state_in: Option<ArrayView3<'a, T>>,
}

impl<T: Real> ScanInputs<'_, T> {
    /// `delta + delta_bias`.
    fn raw_step(&self, t: usize, channel: usize) -> T {
        self.delta[[t, channel]] + self.delta_bias.map_or(T::zero(), |bias| bias[channel])
    }

    fn step(&self, t: usize, channel: usize) -> T {
        let raw = self.raw_step(t, channel);
        if self.softplus { softplus(raw) } else { raw }
    }

    fn step_derivative(&self, t: usize, channel: usize) -> T {
        if self.softplus { softplus_derivative(self.raw_step(t, channel)) } else { T::one() }
    }

    /// The first column of a channel's group in a matrix `[tokens, groups * d_state]`.
    fn group_column(&self, matrix: ArrayView2<T>, channel: usize) -> usize {
        let (channels, d_state) = self.a.dim();
        let groups = matrix.ncols() / d_state;
        assert_eq!(channels % groups, 0, "selective_scan: channels in whole groups");
        channel / (channels / groups) * d_state
    }

    /// The states of one channel in one segment, before its first token and after each: `[len + 1, d_state]`.
    fn states(&self, index: usize, segment: &Segment, channel: usize) -> Array2<T> {
        let b_column = self.group_column(self.b, channel);
        let mut states = Array2::zeros((segment.len + 1, self.a.ncols()));
        if let Some(state_in) = self.state_in {
            states.row_mut(0).assign(&state_in.slice(s![index, channel, ..]));
        }
        for (i, t) in segment.rows().enumerate() {
            let step = self.step(t, channel);
            for m in 0..self.a.ncols() {
                states[[i + 1, m]] = (step * self.a[[channel, m]]).exp() * states[[i, m]]
                    + step * self.u[[t, channel]] * self.b[[t, b_column + m]];
            }
        }
        states
    }

    /// The output before the gate, `C · state + D u`.
    fn ungated(&self, t: usize, channel: usize, state: ArrayView1<T>) -> T {
        let c_column = self.group_column(self.c, channel);
        let skip = self.d.map_or(T::zero(), |d| d[channel] * self.u[[t, channel]]);
        state.iter().enumerate().map(|(m, &value)| value * self.c[[t, c_column + m]]).sum::<T>() + skip
    }
}

/// (y `[tokens, channels]`, state_out `[segments, channels, d_state]`).
///
/// With `Δ = softplus(delta + delta_bias)`, for each channel and state index `m`:
/// `s_t[m] = exp(Δ_t A[m]) s_{t-1}[m] + Δ_t u_t B_t[m]`, `y_t = (Σ_m s_t[m] C_t[m] + D u_t) * silu(z_t)`; state_out is the last s.
pub fn selective_scan<T: Real>(inputs: &ScanInputs<T>, segments: &[Segment]) -> (Array2<T>, Array3<T>) {
    let (channels, d_state) = inputs.a.dim();
    let mut y = Array2::zeros(inputs.u.dim());
    let mut state_out = Array3::zeros((segments.len(), channels, d_state));
    for (index, segment) in segments.iter().enumerate() {
        for channel in 0..channels {
            let states = inputs.states(index, segment, channel);
            for (i, t) in segment.rows().enumerate() {
                let gate = inputs.z.map_or(T::one(), |z| silu(z[[t, channel]]));
                y[[t, channel]] = inputs.ungated(t, channel, states.row(i + 1)) * gate;
            }
            state_out.slice_mut(s![index, channel, ..]).assign(&states.row(segment.len));
        }
    }
    (y, state_out)
}

/// What [`selective_scan_backward`] returns, each in the shape of what it is the gradient of; present where that is present.
#[derive(Clone, Debug)]
pub struct ScanGradients<T> {
    /// `[tokens, channels]`.
    pub du: Array2<T>,
    /// `[tokens, channels]`.
    pub ddelta: Array2<T>,
    /// `[channels, d_state]`.
    pub da: Array2<T>,
    /// `[tokens, groups * d_state]`.
    pub db: Array2<T>,
    /// `[tokens, groups * d_state]`.
    pub dc: Array2<T>,
    /// `[channels]`.
    pub dd: Option<Array1<T>>,
    /// `[tokens, channels]`.
    pub dz: Option<Array2<T>>,
    /// `[channels]`.
    pub ddelta_bias: Option<Array1<T>>,
    /// `[segments, channels, d_state]`; also without a state_in, which is then zeros.
    pub dstate_in: Array3<T>,
}

/// The gradients of [`selective_scan`] from dy `[tokens, channels]` and, where the state went on, dstate_out
/// `[segments, channels, d_state]`.
///
/// The gradient `h` of the state runs backwards: at token `t` it first gains `dout_t C_t`, with `dout = dy * silu(z)`; then
/// `dA += h Δ e s_{t-1}`, `dΔ_t = Σ_m h (A e s_{t-1} + u B)`, `du_t = Σ_m h Δ B + dout D` and `dB_t += h Δ u`, with `e = exp(Δ A)`; and
/// it goes on to `t - 1` as `h e`.
pub fn selective_scan_backward<T: Real>(
    inputs: &ScanInputs<T>,
    segments: &[Segment],
    dy: ArrayView2<T>,
    dstate_out: Option<ArrayView3<T>>,
) -> ScanGradients<T> {
    let (channels, d_state) = inputs.a.dim();
    let mut gradients = ScanGradients {
        du: Array2::zeros(inputs.u.dim()),
        ddelta: Array2::zeros(inputs.delta.dim()),
        da: Array2::zeros(inputs.a.dim()),
        db: Array2::zeros(inputs.b.dim()),
        dc: Array2::zeros(inputs.c.dim()),
        dd: inputs.d.map(|d| Array1::zeros(d.dim())),
        dz: inputs.z.map(|z| Array2::zeros(z.dim())),
        ddelta_bias: None,
        dstate_in: Array3::zeros((segments.len(), channels, d_state)),
    };
    for (index, segment) in segments.iter().enumerate() {
        for channel in 0..channels {
            let states = inputs.states(index, segment, channel);
            let b_column = inputs.group_column(inputs.b, channel);
            let c_column = inputs.group_column(inputs.c, channel);
            let mut h = match dstate_out {
                Some(dstate) => dstate.slice(s![index, channel, ..]).to_owned(),
                None => Array1::zeros(d_state),
            };
            for (i, t) in segment.rows().enumerate().rev() {
                let (u, step) = (inputs.u[[t, channel]], inputs.step(t, channel));
                let mut dout = dy[[t, channel]];
                if let (Some(z), Some(dz)) = (inputs.z, &mut gradients.dz) {
                    let gate = z[[t, channel]];
                    dz[[t, channel]] = dout * inputs.ungated(t, channel, states.row(i + 1)) * silu_derivative(gate);
                    dout *= silu(gate);
                }
                if let (Some(d), Some(dd)) = (inputs.d, &mut gradients.dd) {
                    gradients.du[[t, channel]] += dout * d[channel];
                    dd[channel] += dout * u;
                }
                let mut dstep = T::zero();
                for m in 0..d_state {
                    let (a, b) = (inputs.a[[channel, m]], inputs.b[[t, b_column + m]]);
                    let decay = (step * a).exp();
                    let before = states[[i, m]];
                    h[m] += dout * inputs.c[[t, c_column + m]];
                    gradients.dc[[t, c_column + m]] += dout * states[[i + 1, m]];
                    gradients.da[[channel, m]] += h[m] * step * decay * before;
                    gradients.db[[t, b_column + m]] += h[m] * step * u;
                    gradients.du[[t, channel]] += h[m] * step * b;
                    dstep += h[m] * (a * decay * before + u * b);
                    h[m] *= decay;
                }
                gradients.ddelta[[t, channel]] = dstep * inputs.step_derivative(t, channel);
            }
            gradients.dstate_in.slice_mut(s![index, channel, ..]).assign(&h);
        }
    }
    gradients.ddelta_bias = inputs.delta_bias.map(|_| gradients.ddelta.sum_axis(Axis(0)));
    gradients
}

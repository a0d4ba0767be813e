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

#[cfg(test)]
mod tests {
    use ndarray::concatenate;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    /// A scan of random sizes with all of its inputs.
    #[derive(Clone, Debug)]
    struct Case {
        u: Array2<f64>,
        delta: Array2<f64>,
        a: Array2<f64>,
        b: Array2<f64>,
        c: Array2<f64>,
        d: Option<Array1<f64>>,
        z: Option<Array2<f64>>,
        delta_bias: Option<Array1<f64>>,
        softplus: bool,
        state_in: Option<Array3<f64>>,
        segments: Vec<Segment>,
    }

    impl Case {
        fn inputs(&self) -> ScanInputs<'_, f64> {
            ScanInputs {
                u: self.u.view(),
                delta: self.delta.view(),
                a: self.a.view(),
                b: self.b.view(),
                c: self.c.view(),
                d: self.d.as_ref().map(|d| d.view()),
                z: self.z.as_ref().map(|z| z.view()),
                delta_bias: self.delta_bias.as_ref().map(|bias| bias.view()),
                softplus: self.softplus,
                state_in: self.state_in.as_ref().map(|state| state.view()),
            }
        }

        fn run(&self) -> (Array2<f64>, Array3<f64>) {
            selective_scan(&self.inputs(), &self.segments)
        }

        /// Tokens `from..to` of segment `index` as a call of their own.
        fn part(&self, index: usize, from: usize, to: usize, state_in: Option<Array3<f64>>) -> Self {
            let start = self.segments[index].start;
            let rows = |x: &Array2<f64>| x.slice(s![start + from..start + to, ..]).to_owned();
            Self {
                u: rows(&self.u),
                delta: rows(&self.delta),
                b: rows(&self.b),
                c: rows(&self.c),
                z: self.z.as_ref().map(rows),
                state_in,
                segments: whole(to - from),
                ..self.clone()
            }
        }

        /// The state that segment `index` starts from.
        fn state_of(&self, index: usize) -> Option<Array3<f64>> {
            self.state_in.as_ref().map(|state| state.slice(s![index..index + 1, .., ..]).to_owned())
        }
    }

    fn cases() -> impl Strategy<Value = Case> {
        // Channels, groups of B, groups of C: each side may be the finer one.
        let widths = prop::sample::select(vec![(1, 1, 1), (3, 1, 3), (4, 2, 4), (6, 3, 1), (6, 2, 3), (5, 5, 5)]);
        let switches = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
        (segments(), widths, size(), switches, any::<u64>()).prop_map(
            |(segments, (channels, groups_b, groups_c), d_state, (d, z, delta_bias, softplus, state), seed)| {
                let mut noise = Noise(seed);
                let tokens = tokens(&segments);
                Case {
                    u: noise.array((tokens, channels)),
                    delta: noise.array_in((tokens, channels), 0.05, 1.0),
                    a: noise.array_in((channels, d_state), -2.0, -0.2),
                    b: noise.array((tokens, groups_b * d_state)),
                    c: noise.array((tokens, groups_c * d_state)),
                    d: d.then(|| noise.array(channels)),
                    z: z.then(|| noise.array((tokens, channels))),
                    delta_bias: delta_bias.then(|| noise.array_in(channels, 0.0, 0.3)),
                    softplus,
                    state_in: state.then(|| noise.array((segments.len(), channels, d_state))),
                    segments,
                }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn gradients_are_certified(case in cases(), state_goes_on: bool, seed: u64) {
            let mut noise = Noise(seed);
            let (y, state_out) = case.run();
            let dy = noise.array(y.dim());
            let dstate_out = state_goes_on.then(|| noise.array(state_out.dim()));
            let objective = |change: &dyn Fn(&mut Case)| {
                let mut case = case.clone();
                change(&mut case);
                let (y, state_out) = case.run();
                project(&y, &dy) + dstate_out.as_ref().map_or(0.0, |dstate| project(&state_out, dstate))
            };
            let dstate = dstate_out.as_ref().map(|dstate| dstate.view());
            let grad = selective_scan_backward(&case.inputs(), &case.segments, dy.view(), dstate);
            assert_gradient("du", &case.u, &grad.du, |x| objective(&|case| case.u.assign(x)));
            assert_gradient("ddelta", &case.delta, &grad.ddelta, |x| objective(&|case| case.delta.assign(x)));
            assert_gradient("da", &case.a, &grad.da, |x| objective(&|case| case.a.assign(x)));
            assert_gradient("db", &case.b, &grad.db, |x| objective(&|case| case.b.assign(x)));
            assert_gradient("dc", &case.c, &grad.dc, |x| objective(&|case| case.c.assign(x)));
            let state_in = case.state_in.clone().unwrap_or(Array3::zeros(state_out.dim()));
            assert_gradient("dstate_in", &state_in, &grad.dstate_in, |x| {
                objective(&|case| case.state_in = Some(x.clone()))
            });
            assert_eq!(
                (grad.dd.is_some(), grad.dz.is_some(), grad.ddelta_bias.is_some()),
                (case.d.is_some(), case.z.is_some(), case.delta_bias.is_some())
            );
            if let (Some(d), Some(dd)) = (&case.d, &grad.dd) {
                assert_gradient("dd", d, dd, |x| objective(&|case| case.d = Some(x.clone())));
            }
            if let (Some(z), Some(dz)) = (&case.z, &grad.dz) {
                assert_gradient("dz", z, dz, |x| objective(&|case| case.z = Some(x.clone())));
            }
            if let (Some(bias), Some(dbias)) = (&case.delta_bias, &grad.ddelta_bias) {
                assert_gradient("ddelta_bias", bias, dbias, |x| {
                    objective(&|case| case.delta_bias = Some(x.clone()))
                });
            }
        }

        #[test]
        fn a_segment_never_sees_another(case in cases()) {
            let (y, state_out) = case.run();
            for (index, segment) in case.segments.iter().enumerate() {
                let (alone, state) = case.part(index, 0, segment.len, case.state_of(index)).run();
                assert_eq!(alone, y.slice(s![segment.rows(), ..]));
                assert_eq!(state, state_out.slice(s![index..index + 1, .., ..]));
            }
        }

        #[test]
        fn a_sequence_equals_its_parts_with_the_state_handed_on(case in cases(), cut in 0..100usize) {
            let (y, state_out) = case.run();
            for (index, segment) in case.segments.iter().enumerate() {
                let cut = cut % (segment.len + 1);
                let (first, state) = case.part(index, 0, cut, case.state_of(index)).run();
                let (second, state) = case.part(index, cut, segment.len, Some(state)).run();
                assert_eq!(concatenate![Axis(0), first, second], y.slice(s![segment.rows(), ..]));
                assert_eq!(state, state_out.slice(s![index..index + 1, .., ..]));
            }
        }

        #[test]
        fn no_output_depends_on_a_later_token(case in cases(), at in 0..100usize) {
            let y = case.run().0;
            for segment in case.segments.iter().filter(|segment| segment.len > 0) {
                let t = segment.start + at % segment.len;
                let mut changed = case.clone();
                for x in [&mut changed.u, &mut changed.delta, &mut changed.b, &mut changed.c] {
                    x.row_mut(t).fill(2.0);
                }
                assert_eq!(changed.run().0.slice(s![..t, ..]), y.slice(s![..t, ..]));
            }
        }

        #[test]
        fn output_and_state_are_linear_in_u_and_the_state_before(case in cases(), seed: u64) {
            let other_u = Noise(seed).array(case.u.dim());
            let shape = case.run().1.dim();
            let state = case.state_in.clone().unwrap_or(Array3::zeros(shape));
            let other_state = Noise(!seed).array(shape);
            let run = |u: &Array2<f64>, state: &Array3<f64>| {
                Case { u: u.clone(), state_in: Some(state.clone()), ..case.clone() }.run()
            };
            let (y, last) = run(&(&case.u * 2.5 - &other_u), &(&state * 2.5 - &other_state));
            let ((y1, last1), (y2, last2)) = (run(&case.u, &state), run(&other_u, &other_state));
            assert_close("y", &y, &(y1 * 2.5 - y2), 1e-12);
            assert_close("state", &last, &(last1 * 2.5 - last2), 1e-12);
        }

        #[test]
        fn without_input_the_state_decays_by_the_sum_of_steps(case in cases()) {
            let shape = case.run().1.dim();
            let state_in = case.state_in.clone().unwrap_or(Array3::ones(shape));
            let case = Case { u: Array2::zeros(case.u.dim()), state_in: Some(state_in.clone()), ..case };
            let want = Array3::from_shape_fn(shape, |(index, channel, m)| {
                let steps: f64 = case.segments[index].rows().map(|t| case.inputs().step(t, channel)).sum();
                (case.a[[channel, m]] * steps).exp() * state_in[[index, channel, m]]
            });
            assert_close("state", &case.run().1, &want, 1e-12);
        }

        #[test]
        fn shared_groups_equal_groups_written_out(case in cases()) {
            let (channels, d_state) = case.a.dim();
            let expand = |x: &Array2<f64>| {
                let channels_a_group = channels / (x.ncols() / d_state);
                let columns: Vec<usize> =
                    (0..channels).flat_map(|channel| (0..d_state).map(move |m| channel / channels_a_group * d_state + m)).collect();
                x.select(Axis(1), &columns)
            };
            let expanded = Case { b: expand(&case.b), c: expand(&case.c), ..case.clone() };
            assert_eq!(expanded.run(), case.run());
        }
    }

    #[test]
    fn one_state_follows_the_recursion_by_hand() {
        let column = |values: [f64; 2]| Array2::from_shape_vec((2, 1), values.to_vec()).unwrap();
        let case = Case {
            u: column([3.0, 5.0]),
            delta: column([0.5, 0.25]),
            a: ndarray::array![[-2.0]],
            b: column([7.0, 11.0]),
            c: column([13.0, 17.0]),
            d: Some(ndarray::array![19.0]),
            z: None,
            delta_bias: None,
            softplus: false,
            state_in: None,
            segments: whole(2),
        };
        let s0: f64 = 0.5 * 3.0 * 7.0;
        let s1: f64 = (-0.5f64).exp() * s0 + 0.25 * 5.0 * 11.0;
        let (y, state) = case.run();
        assert_close("y", &y, &column([13.0 * s0 + 19.0 * 3.0, 17.0 * s1 + 19.0 * 5.0]), 1e-15);
        assert_close("state", &state, &ndarray::array![[[s1]]], 1e-15);
    }
}

//! Causal depthwise convolution over segments with a repeat of heads and silu, as in M1's Mamba mixer
//! (jxiw/M1 `mamba/hybrid_mamba_layer.py`; the convolution itself: Dao-AILab/causal-conv1d).

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayView3, Axis, s};

use crate::{Real, Segment, silu, silu_derivative};

/// Whether heads are repeated before the convolution, which then has a filter for each of the repeats, or after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepeatOrder {
    /// `repeat_kv_before_conv` true: weight has `in_channels * repeat` rows.
    BeforeConv,
    /// `repeat_kv_before_conv` false: weight has `in_channels` rows.
    AfterConv,
}

/// The convolution's parameters and its repeat of heads. Output channel `c` of `in_channels * repeat` reads the input channel
/// `(c / (head * repeat)) * head + c % head`: each head of `head` channels stands `repeat` times in a row.
#[derive(Clone, Copy, Debug)]
pub struct Conv1d<'a, T> {
    /// Filters `[channels, W]`, the last column for the current token; `channels` as [`RepeatOrder`] says.
    pub weight: ArrayView2<'a, T>,
    /// `[channels]`.
    pub bias: Option<ArrayView1<'a, T>>,
    /// Channels of a head; divides `in_channels`.
    pub head: usize,
    /// How often each head occurs in the output; 1 for a plain convolution.
    pub repeat: usize,
    /// Where the repeat is.
    pub order: RepeatOrder,
}

impl<T: Real> Conv1d<'_, T> {
    /// For each output channel: the input channel and the filter.
    fn wiring(&self, in_channels: usize) -> Vec<(usize, usize)> {
        assert_eq!(in_channels % self.head, 0, "conv1d: input in whole heads");
        let channels = in_channels * self.repeat;
        let wiring: Vec<(usize, usize)> = (0..channels)
            .map(|channel| {
                let input = channel / (self.head * self.repeat) * self.head + channel % self.head;
                let filter = match self.order {
                    RepeatOrder::BeforeConv => channel,
                    RepeatOrder::AfterConv => input,
                };
                (input, filter)
            })
            .collect();
        let filters = wiring.iter().map(|&(_, filter)| filter + 1).max().unwrap_or(0);
        assert_eq!(filters, self.weight.nrows(), "conv1d: one filter a channel");
        wiring
    }

    /// The convolution of a segment before silu: inputs `[W + len, in_channels]` → `[len, channels]`. Row `t` reads the inputs
    /// `t + 1 ..= t + W`, of which the last is its own.
    fn preactivation(&self, inputs: ArrayView2<T>) -> Array2<T> {
        let taps = self.weight.ncols();
        let wiring = self.wiring(inputs.ncols());
        Array2::from_shape_fn((inputs.nrows() - taps, wiring.len()), |(t, channel)| {
            let (input, filter) = wiring[channel];
            let bias = self.bias.map_or(T::zero(), |bias| bias[filter]);
            bias + (0..taps).map(|k| self.weight[[filter, k]] * inputs[[t + 1 + k, input]]).sum::<T>()
        })
    }
}

/// The last W inputs before a segment, then its own: `[W + len, in_channels]`.
fn with_history<T: Real>(
    x: ArrayView2<T>,
    segment: &Segment,
    state_in: Option<ArrayView3<T>>,
    index: usize,
    taps: usize,
) -> Array2<T> {
    let history = match state_in {
        Some(state) => state.index_axis(Axis(0), index).t().to_owned(),
        None => Array2::zeros((taps, x.ncols())),
    };
    let mut inputs = Array2::zeros((taps + segment.len, x.ncols()));
    inputs.slice_mut(s![..taps, ..]).assign(&history);
    inputs.slice_mut(s![taps.., ..]).assign(&x.slice(s![segment.rows(), ..]));
    inputs
}

/// (y `[tokens, in_channels * repeat]`, state_out `[segments, in_channels, W]`) of x `[tokens, in_channels]`.
///
/// `y_t[c] = silu(bias + Σ_k weight[filter, k] x_{t-W+1+k}[input])`, where inputs before the segment come from state_in
/// `[segments, in_channels, W]` (zeros without it): the last W inputs before the repeat, oldest first, zeros where fewer were
/// seen. state_out is the same after the segment.
pub fn conv1d<T: Real>(
    x: ArrayView2<T>,
    op: &Conv1d<T>,
    state_in: Option<ArrayView3<T>>,
    segments: &[Segment],
) -> (Array2<T>, Array3<T>) {
    let taps = op.weight.ncols();
    let mut y = Array2::zeros((x.nrows(), x.ncols() * op.repeat));
    let mut state_out = Array3::zeros((segments.len(), x.ncols(), taps));
    for (index, segment) in segments.iter().enumerate() {
        let inputs = with_history(x, segment, state_in, index, taps);
        y.slice_mut(s![segment.rows(), ..]).assign(&op.preactivation(inputs.view()).mapv(silu));
        state_out.index_axis_mut(Axis(0), index).assign(&inputs.slice(s![segment.len.., ..]).t());
    }
    (y, state_out)
}

/// What [`conv1d_backward`] returns, each in the shape of what it is the gradient of.
#[derive(Clone, Debug)]
pub struct Conv1dGradients<T> {
    /// `[tokens, in_channels]`.
    pub dx: Array2<T>,
    /// `[channels, W]`.
    pub dweight: Array2<T>,
    /// `[channels]`; also without a bias.
    pub dbias: Array1<T>,
    /// `[segments, in_channels, W]`; also without a state_in, which is then zeros.
    pub dstate_in: Array3<T>,
}

/// The gradients of [`conv1d`] from dy `[tokens, in_channels * repeat]` and, where the state went on, dstate_out
/// `[segments, in_channels, W]`. With `da = dy * silu'(a)` of the preactivation `a`, `dinput` and `dweight` are the products of
/// `da` with the other factor of each tap.
pub fn conv1d_backward<T: Real>(
    x: ArrayView2<T>,
    op: &Conv1d<T>,
    state_in: Option<ArrayView3<T>>,
    dy: ArrayView2<T>,
    dstate_out: Option<ArrayView3<T>>,
    segments: &[Segment],
) -> Conv1dGradients<T> {
    let taps = op.weight.ncols();
    let wiring = op.wiring(x.ncols());
    let mut gradients = Conv1dGradients {
        dx: Array2::zeros(x.dim()),
        dweight: Array2::zeros(op.weight.dim()),
        dbias: Array1::zeros(op.weight.nrows()),
        dstate_in: Array3::zeros((segments.len(), x.ncols(), taps)),
    };
    for (index, segment) in segments.iter().enumerate() {
        let inputs = with_history(x, segment, state_in, index, taps);
        let preactivation = op.preactivation(inputs.view());
        let mut dinputs = Array2::<T>::zeros(inputs.dim());
        if let Some(dstate) = dstate_out {
            dinputs.slice_mut(s![segment.len.., ..]).assign(&dstate.index_axis(Axis(0), index).t());
        }
        for ((t, channel), &a) in preactivation.indexed_iter() {
            let (input, filter) = wiring[channel];
            let da = dy[[segment.start + t, channel]] * silu_derivative(a);
            gradients.dbias[filter] += da;
            for k in 0..taps {
                gradients.dweight[[filter, k]] += da * inputs[[t + 1 + k, input]];
                dinputs[[t + 1 + k, input]] += da * op.weight[[filter, k]];
            }
        }
        gradients.dstate_in.index_axis_mut(Axis(0), index).assign(&dinputs.slice(s![..taps, ..]).t());
        gradients.dx.slice_mut(s![segment.rows(), ..]).assign(&dinputs.slice(s![taps.., ..]));
    }
    gradients
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, array, concatenate};
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    /// A convolution of random sizes with all of its inputs.
    #[derive(Clone, Debug)]
    struct Case {
        x: Array2<f64>,
        weight: Array2<f64>,
        bias: Option<Array1<f64>>,
        state_in: Option<Array3<f64>>,
        segments: Vec<Segment>,
        head: usize,
        repeat: usize,
        order: RepeatOrder,
    }

    impl Case {
        fn op(&self) -> Conv1d<'_, f64> {
            Conv1d {
                weight: self.weight.view(),
                bias: self.bias.as_ref().map(|bias| bias.view()),
                head: self.head,
                repeat: self.repeat,
                order: self.order,
            }
        }

        fn run(&self) -> (Array2<f64>, Array3<f64>) {
            conv1d(self.x.view(), &self.op(), self.state_in.as_ref().map(|state| state.view()), &self.segments)
        }

        /// The rows of segment `index` from token `from` on, as a call of their own.
        fn part(&self, index: usize, from: usize, to: usize, state_in: Option<Array3<f64>>) -> Self {
            let start = self.segments[index].start;
            Self {
                x: self.x.slice(s![start + from..start + to, ..]).to_owned(),
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
        let sizes = (prop::sample::select(vec![1, 2, 3]), prop::sample::select(vec![1, 2, 3]), 1..=3usize, 1..=4usize);
        (segments(), sizes, any::<bool>(), any::<bool>(), any::<bool>(), any::<u64>()).prop_map(
            |(segments, (heads, head, repeat, taps), before, has_bias, has_state, seed)| {
                let mut noise = Noise(seed);
                let order = if before { RepeatOrder::BeforeConv } else { RepeatOrder::AfterConv };
                let in_channels = heads * head;
                let channels = if before { in_channels * repeat } else { in_channels };
                Case {
                    x: noise.array((tokens(&segments), in_channels)),
                    weight: noise.array((channels, taps)),
                    bias: has_bias.then(|| noise.array(channels)),
                    state_in: has_state.then(|| noise.array((segments.len(), in_channels, taps))),
                    segments,
                    head,
                    repeat,
                    order,
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
            let objective = |case: &Case| {
                let (y, state_out) = case.run();
                project(&y, &dy) + dstate_out.as_ref().map_or(0.0, |dstate| project(&state_out, dstate))
            };
            let (state_in, dstate) = (case.state_in.as_ref(), dstate_out.as_ref());
            let gradients = conv1d_backward(
                case.x.view(),
                &case.op(),
                state_in.map(|state| state.view()),
                dy.view(),
                dstate.map(|dstate| dstate.view()),
                &case.segments,
            );
            assert_gradient("dx", &case.x, &gradients.dx, |x| objective(&Case { x: x.clone(), ..case.clone() }));
            assert_gradient("dweight", &case.weight, &gradients.dweight, |weight| {
                objective(&Case { weight: weight.clone(), ..case.clone() })
            });
            let bias = case.bias.clone().unwrap_or(Array1::zeros(case.weight.nrows()));
            assert_gradient("dbias", &bias, &gradients.dbias, |bias| {
                objective(&Case { bias: Some(bias.clone()), ..case.clone() })
            });
            let state_in = case.state_in.clone().unwrap_or(Array3::zeros(state_out.dim()));
            assert_gradient("dstate_in", &state_in, &gradients.dstate_in, |state| {
                objective(&Case { state_in: Some(state.clone()), ..case.clone() })
            });
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
                let parts = concatenate![Axis(0), first, second];
                assert_eq!(parts, y.slice(s![segment.rows(), ..]));
                assert_eq!(state, state_out.slice(s![index..index + 1, .., ..]));
            }
        }

        #[test]
        fn no_output_depends_on_a_later_input(case in cases(), at in 0..100usize) {
            let y = case.run().0;
            for segment in case.segments.iter().filter(|segment| segment.len > 0) {
                let t = segment.start + at % segment.len;
                let mut changed = case.clone();
                changed.x.slice_mut(s![t, ..]).fill(9.0);
                assert_eq!(changed.run().0.slice(s![..t, ..]), y.slice(s![..t, ..]));
            }
        }

        #[test]
        fn preactivation_is_linear_in_the_inputs(case in cases(), rows in 0..5usize, seed: u64) {
            let mut noise = Noise(seed);
            let case = Case { bias: None, ..case };
            let shape = (case.weight.ncols() + rows, case.x.ncols());
            let (x1, x2): (Array2<f64>, Array2<f64>) = (noise.array(shape), noise.array(shape));
            let a = |x: &Array2<f64>| case.op().preactivation(x.view());
            assert_close("a", &a(&(&x1 * 2.5 - &x2)), &(a(&x1) * 2.5 - a(&x2)), 1e-12);
        }

        #[test]
        fn repeating_filters_before_equals_repeating_outputs_after(case in cases()) {
            let case = Case { weight: case.weight.slice(s![..case.x.ncols(), ..]).to_owned(), bias: None, ..case };
            let rows: Vec<usize> = (0..case.x.ncols() / case.head)
                .flat_map(|head| vec![head; case.repeat])
                .flat_map(|head| head * case.head..(head + 1) * case.head)
                .collect();
            let weight = case.weight.select(Axis(0), &rows);
            let after = Case { order: RepeatOrder::AfterConv, ..case.clone() }.run();
            let before = Case { weight, order: RepeatOrder::BeforeConv, ..case }.run();
            assert_eq!(before, after);
            for (channel, &input) in rows.iter().enumerate() {
                assert_eq!(after.0.column(channel), after.0.column(rows.iter().position(|&row| row == input).unwrap()));
            }
        }
    }

    #[test]
    fn the_last_tap_is_the_current_token_and_the_state_the_last_inputs() {
        let weight = array![[1.0, 10.0, 100.0]];
        let op = Conv1d { weight: weight.view(), bias: None, head: 1, repeat: 1, order: RepeatOrder::BeforeConv };
        let (y, state) = conv1d(array![[1.0], [2.0]].view(), &op, None, &whole(2));
        assert_eq!(y, array![[100.0], [210.0]].mapv(silu));
        assert_eq!(state, array![[[0.0, 1.0, 2.0]]]);
        let (y, state) = conv1d(array![[3.0]].view(), &op, Some(state.view()), &whole(1));
        assert_eq!(y, array![[321.0]].mapv(silu));
        assert_eq!(state, array![[[1.0, 2.0, 3.0]]]);
    }
}

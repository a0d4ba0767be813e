//! One call made on the reference and on another device, and everything that is looked at afterwards.

use std::cell::Cell;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{Failure, Verdict, parameter_types};
use crate::backend::{
    Buffer, DType, Device, HostSlice, Order, Result, SEGMENT_FIELDS, Segments, SegmentsView, View, padded_rows,
};
use crate::random;

/// Sizes that kernels trip over: 1, primes, one less and one more than a vector and a tile.
const SIZES: [usize; 24] =
    [1, 2, 3, 4, 5, 7, 8, 13, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 96, 97, 127, 128, 129, 191];

/// What a trial is for.
#[derive(Clone, Copy, PartialEq)]
pub enum Look {
    /// Outputs are those of the other device, but for rounding.
    Close,
    /// Outputs are those of the other device.
    SameBits,
    /// Wrong arguments are errors.
    Misuse,
}

/// An argument of a trial.
#[derive(Clone, Copy)]
pub struct Arg(usize);

/// What is done with an argument.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    /// Read.
    Input,
    /// Written by [`Trial::prepare`], then read.
    Kept,
    /// Written, with values and as many of them as the backend likes.
    Own,
    /// Written, or read and written; with the number of terms of each value's sum, 0 where the result is exact.
    Output(usize),
}

struct Argument {
    name: &'static str,
    role: Role,
    /// On the two devices.
    buffers: [Buffer; 2],
    views: [View; 2],
}

/// A call on one of the two devices.
pub struct On<'t> {
    pub device: &'t Device,
    side: usize,
    trial: &'t Trial,
    /// An argument whose view is replaced, and whether the call has looked at it.
    wrong: Option<(usize, View)>,
    looked: Cell<bool>,
}

impl On<'_> {
    pub fn view(&self, Arg(index): Arg) -> View {
        match self.wrong {
            Some((wrong, view)) if wrong == index => {
                self.looked.set(true);
                view
            }
            _ => self.trial.arguments[index].views[self.side],
        }
    }

    pub fn maybe(&self, arg: Option<Arg>) -> Option<View> {
        arg.map(|arg| self.view(arg))
    }

    pub fn segments(&self, (table, positions): (Arg, Arg)) -> SegmentsView {
        SegmentsView { table: self.view(table), positions: self.view(positions) }
    }
}

/// A case at the sizes of one seed.
pub struct Trial {
    /// A device to compare with, the reference as a rule, and the device under trial.
    devices: [Device; 2],
    random: ChaCha8Rng,
    parameters: DType,
    /// The dtype of the activations made now.
    activations: DType,
    /// Whether rows start where vectors may: where there are kernels for tiles they are used then.
    aligned: bool,
    arguments: Vec<Argument>,
    look: Look,
    worst: f64,
}

/// What the argument to be made is: all but its values.
struct Plan {
    name: &'static str,
    dtype: DType,
    order: Order,
    /// On the two devices.
    rows: [usize; 2],
    cols: usize,
    role: Role,
}

impl Trial {
    pub fn new(devices: [&Device; 2], name: &str, seed: u64, look: Look) -> Self {
        let mut random = random::stream(seed, name);
        let types = parameter_types(devices[1]);
        let parameters = types.get(random.random_range(0..types.len().max(1))).copied().unwrap_or(DType::F32);
        let info = devices[1].info();
        let beside = info.activations_beside(parameters);
        let (mut activations, mut aligned) = (DType::F32, false);
        if info.activations.len() > 1 {
            let narrow = random.random_range(0..4) > 0;
            (activations, aligned) = (if narrow { beside } else { DType::F32 }, random.random());
        }
        let (devices, arguments) = (devices.map(Device::clone), Vec::new());
        Trial { devices, random, parameters, activations, aligned, arguments, look, worst: 0.0 }
    }

    /// The largest error of an output as a share of its tolerance.
    pub fn worst(&self) -> f64 {
        self.worst
    }

    /// A dtype that the device stores parameters in, the last that it names.
    pub fn narrowest(&self) -> DType {
        parameter_types(&self.devices[1]).last().copied().unwrap_or(DType::F32)
    }

    /// The dtype of this trial's parameters.
    pub fn parameters(&self) -> DType {
        self.parameters
    }

    /// The dtype of this trial's activations.
    pub fn activations(&self) -> DType {
        self.activations
    }

    /// Makes arguments that are f32 whatever the activations are.
    pub fn in_f32<R>(&mut self, make: impl FnOnce(&mut Self) -> R) -> R {
        let activations = std::mem::replace(&mut self.activations, DType::F32);
        let made = make(self);
        self.activations = activations;
        made
    }

    /// Whether this trial is for kernels that work in tiles of 16-bit values.
    pub fn in_tiles(&self) -> bool {
        self.aligned && self.activations != DType::F32
    }

    /// A size of at most `most`.
    pub fn size(&mut self, most: usize) -> usize {
        let fitting = SIZES.iter().filter(|&&size| size <= most).count();
        SIZES[self.random.random_range(0..fitting.max(1))]
    }

    /// A number of `low..high`.
    pub fn number(&mut self, low: f64, high: f64) -> f64 {
        self.random.random_range(low..high)
    }

    /// A whole number of `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.random.random_range(0..n)
    }

    pub fn coin(&mut self) -> bool {
        self.random.random()
    }

    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.random.random_range(0..choices.len())]
    }

    /// The numbers of `0..n` in a random order.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        (1..n).for_each(|i| order.swap(i, self.random.random_range(0..=i)));
        order
    }

    /// An argument inside a wider buffer, at an odd place. Around inputs lies NaN, which a kernel that reads too far carries
    /// along; around outputs lie numbers.
    fn place(&mut self, plan: Plan, mut value: impl FnMut(usize, usize) -> f64) -> Result<Arg> {
        let Plan { name, dtype, order, rows, cols, role } = plan;
        let wide = order == Order::Rows && dtype.is_float();
        let (gaps, offsets): (&[usize], &[usize]) =
            if self.aligned { (&[0, 16], &[0, 64]) } else { (&[0, 0, 1, 5, 16], &[0, 1, 7, 64]) };
        let gap = if wide { self.one_of(gaps) } else { 0 };
        let offset = self.one_of(offsets) * if wide { 1 } else { 64 };
        let mut make = |side: usize| -> Result<(Buffer, View)> {
            let (device, rows) = (&self.devices[side], rows[side]);
            let stride = cols + gap;
            let room = if order == Order::Weight { padded_rows(rows) } else { rows };
            let len = offset + room * stride + 19;
            let buffer = device.alloc(dtype, 1, len)?;
            let flat = buffer.view();
            let guard = match (role, dtype) {
                (_, DType::U32) => 9e6,
                (Role::Output(_), _) => 0.625,
                _ => f64::NAN,
            };
            let mut values = vec![guard; len];
            let view = View { rows, cols, stride, order, offset, ..flat };
            let inside: Vec<f64> =
                (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))).map(|(r, c)| value(r, c)).collect();
            if order == Order::Rows {
                for (i, value) in inside.iter().enumerate() {
                    values[offset + i / cols * stride + i % cols] = *value;
                }
            }
            write(device, flat, &values)?;
            if order == Order::Weight {
                write(device, view, &inside)?;
            }
            Ok((buffer, view))
        };
        let ((first, view), (second, other)) = (make(0)?, make(1)?);
        self.arguments.push(Argument { name, role, buffers: [first, second], views: [view, other] });
        Ok(Arg(self.arguments.len() - 1))
    }

    fn plan(name: &'static str, dtype: DType, rows: usize, cols: usize, role: Role) -> Plan {
        Plan { name, dtype, order: Order::Rows, rows: [rows, rows], cols, role }
    }

    /// The same values for both devices: drawn once, in order.
    fn drawn(&mut self, plan: Plan, mut value: impl FnMut(&mut Trial, usize, usize) -> f64) -> Result<Arg> {
        let (rows, cols) = (plan.rows[0], plan.cols);
        let mut values = Vec::with_capacity(rows * cols);
        for r in 0..rows {
            for c in 0..cols {
                values.push(value(self, r, c));
            }
        }
        self.place(plan, |r, c| values[r * cols + c])
    }

    /// Activations to read, of values around 0 with a deviation of 1.
    pub fn input(&mut self, name: &'static str, rows: usize, cols: usize) -> Result<Arg> {
        self.input_of(name, rows, cols, |t, _, _| t.normal())
    }

    /// Activations to read.
    pub fn input_of(
        &mut self,
        name: &'static str,
        rows: usize,
        cols: usize,
        value: impl FnMut(&mut Trial, usize, usize) -> f64,
    ) -> Result<Arg> {
        self.drawn(Self::plan(name, self.activations, rows, cols, Role::Input), value)
    }

    /// A value of a distribution around 0 with a deviation of 1.
    pub fn normal(&mut self) -> f64 {
        (0..3).map(|_| self.number(-1.0, 1.0)).sum()
    }

    /// A parameter of the trial's dtype, in rows.
    pub fn parameter(&mut self, name: &'static str, rows: usize, cols: usize) -> Result<Arg> {
        self.drawn(Self::plan(name, self.parameters, rows, cols, Role::Input), |t, _, _| t.normal())
    }

    /// A linear weight of the trial's dtype, scaled so that its products are of the order of 1.
    pub fn weight(&mut self, name: &'static str, rows: usize, cols: usize) -> Result<Arg> {
        let plan = Plan { order: Order::Weight, ..Self::plan(name, self.parameters, rows, cols, Role::Input) };
        self.drawn(plan, |t, _, _| t.normal() / (cols as f64).sqrt())
    }

    /// u32 to read.
    pub fn ids(&mut self, name: &'static str, rows: usize, cols: usize, values: &[usize]) -> Result<Arg> {
        self.drawn(Self::plan(name, DType::U32, rows, cols, Role::Input), |_, r, c| values[r * cols + c] as f64)
    }

    /// Rows that [`Trial::prepare`] writes.
    pub fn kept(&mut self, name: &'static str, rows: usize, cols: usize) -> Result<Arg> {
        self.place(Self::plan(name, self.activations, rows, cols, Role::Kept), |_, _| f64::NAN)
    }

    /// Rows that the device writes for itself alone, in [`Trial::prepare`] or when it is run.
    pub fn own(
        &mut self,
        name: &'static str,
        rows: impl Fn(&Device) -> usize,
        cols: usize,
        prepared: bool,
    ) -> Result<Arg> {
        let role = if prepared { Role::Kept } else { Role::Own };
        let rows = [rows(&self.devices[0]), rows(&self.devices[1])];
        self.place(Plan { rows, ..Self::plan(name, DType::F32, 0, cols, role) }, |_, _| f64::NAN)
    }

    /// Rows that go from one op to the next, and may hold anything afterwards.
    pub fn passed(&mut self, name: &'static str, rows: usize, cols: usize) -> Result<Arg> {
        self.place(Self::plan(name, self.activations, rows, cols, Role::Own), |_, _| f64::NAN)
    }

    /// Of an f32 sum of values that were rounded to the storage of activations: as many terms as have its tolerance.
    pub fn terms_of_rounded(&self, terms: usize) -> usize {
        match self.activations {
            DType::Bf16 => 1 << 32,
            DType::F16 => 1 << 26,
            _ => terms,
        }
    }

    /// A row of u32 to write.
    pub fn output_ids(&mut self, name: &'static str, count: usize) -> Result<Arg> {
        self.output_as(name, DType::U32, 1, count, 0)
    }

    /// An output that replaces what is there. Each value is a sum of `terms`, or exact with 0.
    pub fn output(&mut self, name: &'static str, rows: usize, cols: usize, terms: usize) -> Result<Arg> {
        self.output_as(name, self.activations, rows, cols, terms)
    }

    /// An output of another dtype that replaces what is there.
    pub fn output_as(
        &mut self,
        name: &'static str,
        dtype: DType,
        rows: usize,
        cols: usize,
        terms: usize,
    ) -> Result<Arg> {
        let poison = if dtype.is_float() { f64::NAN } else { 8e6 };
        self.place(Self::plan(name, dtype, rows, cols, Role::Output(terms)), |_, _| poison)
    }

    /// An output that is read as well: one that adds, is changed in place, or not written as a whole.
    pub fn changed(&mut self, name: &'static str, rows: usize, cols: usize, terms: usize) -> Result<Arg> {
        self.changed_of(name, rows, cols, terms, |t, _, _| t.normal())
    }

    /// The same with other values.
    pub fn changed_of(
        &mut self,
        name: &'static str,
        rows: usize,
        cols: usize,
        terms: usize,
        value: impl FnMut(&mut Trial, usize, usize) -> f64,
    ) -> Result<Arg> {
        self.drawn(Self::plan(name, self.activations, rows, cols, Role::Output(terms)), value)
    }

    /// An output that replaces or, as often, adds.
    pub fn out(&mut self, name: &'static str, rows: usize, cols: usize, terms: usize) -> Result<(Arg, bool)> {
        let add = self.coin();
        let arg = if add { self.changed(name, rows, cols, terms)? } else { self.output(name, rows, cols, terms)? };
        Ok((arg, add))
    }

    /// A matrix in the order of weights that is added to, or replaced.
    pub fn weight_output(
        &mut self,
        name: &'static str,
        dtype: DType,
        rows: usize,
        cols: usize,
        terms: usize,
        add: bool,
    ) -> Result<Arg> {
        let plan = Plan { order: Order::Weight, ..Self::plan(name, dtype, rows, cols, Role::Output(terms)) };
        self.drawn(plan, |t, _, _| if add { t.normal() } else { f64::NAN })
    }

    /// The device table and positions of segments, with a few empty rows perhaps.
    pub fn segments(&mut self, segments: &Segments) -> Result<(Arg, Arg)> {
        let spare = self.one_of(&[0, 1, 3]);
        self.segments_beside(segments, spare)
    }

    /// The device table and positions of segments, with `spare` empty rows.
    pub fn segments_beside(&mut self, segments: &Segments, spare: usize) -> Result<(Arg, Arg)> {
        let capacity = segments.list().len() + spare;
        let (mut table, mut positions) = (Vec::new(), Vec::new());
        segments.table(capacity, &mut table);
        segments.positions(&mut positions);
        let widen = |values: Vec<u32>| values.into_iter().map(|value| value as usize).collect::<Vec<_>>();
        let table = self.ids("segments", capacity, SEGMENT_FIELDS, &widen(table))?;
        Ok((table, self.ids("positions", 1, segments.tokens(), &widen(positions))?))
    }

    /// Random segments of `slots` sequences, some empty, some with tokens before them where `past` allows it.
    pub fn sequences(&mut self, past: bool) -> Result<(Segments, usize)> {
        let count = self.one_of(&[1, 1, 2, 3, 5]);
        let spare = self.one_of(&[0, 2]);
        let slots = self.permutation(count + spare);
        let mut segments = Segments::default();
        for slot in slots.into_iter().take(count) {
            let len = self.one_of(&[0, 1, 1, 2, 3, 5, 16, 17, 31, 33, 65, 130]);
            let before = self.one_of(&[0, 0, 1, 2, 7, 31, 32, 70]);
            segments.push(len, if past { before } else { 0 }, slot)?;
        }
        Ok((segments, count + spare))
    }

    /// A step of decoding: a token of each sequence as a rule, and as a rule with tokens before it.
    pub fn step(&mut self) -> Result<(Segments, usize)> {
        let (count, spare) = (self.one_of(&[1, 1, 2, 3, 5]), self.one_of(&[0, 2]));
        let slots = self.permutation(count + spare);
        let mut segments = Segments::default();
        for slot in slots.into_iter().take(count) {
            segments.push(self.one_of(&[0, 1, 1, 1, 1, 2]), self.one_of(&[0, 1, 2, 7, 70]), slot)?;
        }
        Ok((segments, count + spare))
    }

    /// A step of decoding behind many tokens, whose keys are split.
    pub fn step_after_many(&mut self) -> Result<(Segments, usize)> {
        let (count, mut segments) = (self.one_of(&[1, 1, 2]), Segments::default());
        for slot in self.permutation(count) {
            segments.push(self.one_of(&[1, 1, 2]), self.one_of(&[300, 512, 777]), slot)?;
        }
        Ok((segments, count))
    }

    /// One sequence that is long enough to be cut in time.
    pub fn long_sequence(&mut self) -> Result<(Segments, usize)> {
        let (len, past, slots) = (self.one_of(&[800, 1100, 1301]), self.one_of(&[0, 7]), self.one_of(&[1, 3]));
        let mut segments = Segments::default();
        segments.push(len, past, slots - 1)?;
        Ok((segments, slots))
    }

    fn call(&self, side: usize, wrong: Option<(usize, View)>, op: &impl Fn(&On) -> Result<()>) -> (Result<()>, bool) {
        let on = On { device: &self.devices[side], side, trial: self, wrong, looked: Cell::new(false) };
        let result = op(&on);
        (result, on.looked.get())
    }

    /// Makes a call on both devices whose outputs the op under trial reads.
    pub fn prepare(&self, op: impl Fn(&On) -> Result<()>) -> Result<()> {
        self.call(0, None, &op).0?;
        self.call(1, None, &op).0
    }

    /// Makes the call, and looks at everything.
    pub fn run(&mut self, op: impl Fn(&On) -> Result<()>) -> Verdict {
        if self.look == Look::Misuse {
            return self.misuse(&op);
        }
        let before =
            self.arguments.iter().map(|a| values(&self.devices[1], a.buffers[1].view())).collect::<Result<Vec<_>>>()?;
        self.call(0, None, &op).0?;
        self.call(1, None, &op).0?;
        let mut first = Vec::new();
        for (argument, before) in self.arguments.iter().zip(&before) {
            let after = values(&self.devices[1], argument.buffers[1].view())?;
            argument.untouched(&self.devices[1], before, &after)?;
            if let Role::Output(terms) = argument.role {
                let (a, b) =
                    (values(&self.devices[1], argument.views[1])?, values(&self.devices[0], argument.views[0])?);
                let terms = if self.look == Look::SameBits { 0 } else { terms };
                let (error, tolerance) = (error(&a, &b), tolerance(argument.views[1].dtype, terms));
                if error > tolerance {
                    return Err(Failure::Wrong { argument: argument.name, error, tolerance });
                }
                self.worst = self.worst.max(if error > 0.0 { error / tolerance } else { 0.0 });
                write(
                    &self.devices[1],
                    argument.buffers[1].view(),
                    &before.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(),
                )?;
            }
            first.push(after);
        }
        self.call(1, None, &op).0?;
        for (argument, first) in self.arguments.iter().zip(&first) {
            if !same_bits(&values(&self.devices[1], argument.buffers[1].view())?, first) {
                return Err(Failure::Unsteady { argument: argument.name });
            }
        }
        Ok(())
    }

    /// Makes the call with each argument wrong in turn. Any answer is good but acceptance and a panic; to another number of
    /// rows and to other ids, which may be right where they are free, any but a panic.
    fn misuse(&self, op: &impl Fn(&On) -> Result<()>) -> Verdict {
        for (index, argument) in self.arguments.iter().enumerate() {
            let view = argument.views[1];
            let freed = self.devices[1].alloc(view.dtype, 1, argument.buffers[1].view().cols)?.view().buffer;
            let wrong = [
                ("on another device", argument.views[0]),
                ("in a freed buffer", View { buffer: freed, ..view }),
                ("outside of its buffer", View { offset: argument.buffers[1].view().cols + 1, ..view }),
                ("at an offset without end", View { offset: usize::MAX, ..view }),
            ];
            for (how, view) in wrong {
                let (result, looked) = self.call(1, Some((index, view)), op);
                let lies_nowhere = view.is_empty()
                    && view.device == argument.views[1].device
                    && view.buffer == argument.views[1].buffer;
                if result.is_ok() && looked && !lies_nowhere {
                    return Err(Failure::Accepted { argument: argument.name, how });
                }
            }
            for rows in [0, view.rows + 1, usize::MAX] {
                let _any_answer = self.call(1, Some((index, View { rows, ..view })), op);
            }
            if view.dtype == DType::U32 {
                // Tables that lead outside of everything.
                let wild = self.devices[1].alloc(DType::U32, 1, argument.buffers[1].view().cols)?;
                write(&self.devices[1], wild.view(), &vec![4e9; wild.view().cols])?;
                let _any_answer = self.call(1, Some((index, View { buffer: wild.view().buffer, ..view })), op);
            }
        }
        Ok(())
    }
}

impl Argument {
    /// Only the values of an output may have changed, and the padding of a weight is still 0.
    fn untouched(&self, device: &Device, before: &[f32], after: &[f32]) -> Verdict {
        let view = self.views[1];
        let mut outside = vec![true; before.len()];
        match (self.role, view.order) {
            (Role::Output(_) | Role::Own, Order::Rows) => {
                for row in 0..view.rows {
                    outside[view.offset + row * view.stride..][..view.cols].fill(false);
                }
            }
            (Role::Output(_) | Role::Own, Order::Weight) => outside[view.span()].fill(false),
            (Role::Input | Role::Kept, _) => {}
        }
        let changed =
            before.iter().zip(after).zip(&outside).any(|((b, a), &outside)| outside && a.to_bits() != b.to_bits());
        let padded = View { rows: padded_rows(view.rows), ..view };
        let padding =
            view.order == Order::Weight && values(device, padded)?[view.len()..].iter().any(|&value| value != 0.0);
        if changed || padding { Err(Failure::Touched { argument: self.name }) } else { Ok(()) }
    }
}

fn write(device: &Device, view: View, values: &[f64]) -> Result<()> {
    if view.dtype == DType::U32 {
        device.write(HostSlice::U32(&values.iter().map(|&v| v as u32).collect::<Vec<_>>()), view)
    } else {
        device.write(HostSlice::F32(&values.iter().map(|&v| v as f32).collect::<Vec<_>>()), view)
    }
}

fn values(device: &Device, view: View) -> Result<Vec<f32>> {
    device.read(view)?.wait()
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.iter().map(|v| v.to_bits()).eq(b.iter().map(|v| v.to_bits()))
}

/// The largest difference over the largest value of `b`, which inputs are chosen to keep near 1: where all are below a tenth,
/// they are differences of larger ones. Infinite where one is NaN and the other is not.
fn error(a: &[f32], b: &[f32]) -> f64 {
    let finite = b.iter().filter(|value| value.is_finite());
    let largest = finite.fold(0.1, |largest: f64, &value| largest.max(f64::from(value).abs()));
    let differences = a.iter().zip(b).map(|(&a, &b)| match f64::from(a) - f64::from(b) {
        _ if a == b || (a.is_nan() && b.is_nan()) => 0.0,
        difference if difference.is_nan() => f64::INFINITY,
        difference => difference.abs(),
    });
    differences.fold(0.0, f64::max) / largest
}

/// What rounding may do to a sum of so many terms, in any order: the unit of rounding, and its random walk. Where values are
/// stored in 16 bits sums are f32 nevertheless, and a few values on the way to one are rounded to 16 bits.
fn tolerance(dtype: DType, terms: usize) -> f64 {
    let (unit, stored) = match dtype {
        DType::F64 => (2f64.powi(-53), 0.0),
        DType::F32 => (2f64.powi(-24), 0.0),
        DType::F16 => (2f64.powi(-24), 2f64.powi(-11)),
        DType::Bf16 => (2f64.powi(-24), 2f64.powi(-8)),
        DType::U32 => (0.0, 0.0),
    };
    if terms == 0 { 0.0 } else { 8.0 * (unit * (1.0 + terms as f64).sqrt() + stored) }
}

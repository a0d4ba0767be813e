//! Attention, the convolution and the scan over segments.

use super::Verdict;
use super::trial::{Arg, On, Trial};
use crate::backend::{Result, Segments, ops};

pub fn rope(t: &mut Trial, inverse: bool) -> Verdict {
    let (tokens, heads, head_dim) = (t.size(100), t.size(8), 2 * t.size(64));
    let x = t.changed("x", tokens, heads * head_dim, 1)?;
    let positions: Vec<_> = (0..tokens).map(|_| t.one_of(&[0, 1, 77, 5000, 131_071])).collect();
    let positions = t.ids("positions", 1, tokens, &positions)?;
    let frequency = |_: &mut Trial, _, j: usize| 1e4f64.powf(-2.0 * j as f64 / head_dim as f64);
    let inv_freq = t.in_f32(|t| t.input_of("inv_freq", 1, head_dim / 2, frequency))?;
    t.run(|on| {
        let (x, positions, inv_freq) = (on.view(x), on.view(positions), on.view(inv_freq));
        on.device.rope(&ops::Rope { x, head_dim, positions, inv_freq, inverse })
    })
}

fn attention_shape(t: &mut Trial, windowed: bool) -> ops::AttentionShape {
    let (kv_heads, groups) = (t.one_of(&[1, 2, 3]), t.one_of(&[1, 2, 4]));
    let head_dim = if t.in_tiles() { t.one_of(&[64, 128]) } else { t.size(70) };
    let window = windowed.then(|| t.one_of(&[1, 2, 17, 32, 64]));
    let scale = (head_dim as f32).sqrt().recip();
    ops::AttentionShape { heads: kv_heads * groups, kv_heads, head_dim, scale, window }
}

/// Rows of keys or values; those of no segment are NaN.
fn keys(t: &mut Trial, name: &'static str, used: &[bool], cols: usize) -> Result<Arg> {
    t.input_of(name, used.len(), cols, |t, row, _| if used[row] { t.normal() } else { f64::NAN })
}

pub fn attention(t: &mut Trial, windowed: bool) -> Verdict {
    let (segments, _) = t.sequences(true)?;
    attention_of(t, &segments, windowed)
}

pub fn attention_of_many_keys(t: &mut Trial) -> Verdict {
    let (segments, _) = t.step_after_many()?;
    attention_of(t, &segments, false)
}

fn attention_of(t: &mut Trial, segments: &Segments, windowed: bool) -> Verdict {
    let shape = attention_shape(t, windowed);
    let used: Vec<bool> = (0..segments.keys() + t.one_of(&[0, 3])).map(|row| row < segments.keys()).collect();
    let (k, v) = (keys(t, "k", &used, shape.kv_cols())?, keys(t, "v", &used, shape.kv_cols())?);
    attend(t, segments, shape, |on| ops::Keys::Rows { k: on.view(k), v: on.view(v) })
}

/// Pages for the segments: the table, whose unused entries lead nowhere, and the rows of the pool that hold a token.
fn pages(t: &mut Trial, segments: &Segments, slots: usize, page_size: usize) -> (usize, Vec<usize>, Vec<bool>) {
    let longest = segments.list().iter().map(|s| (s.past + s.len) as usize).max().unwrap_or(0);
    let width = longest.div_ceil(page_size) + t.one_of(&[0, 1]);
    let count = slots * width + 1;
    let free = t.permutation(count);
    let mut table = vec![4_000_000; slots * width];
    let mut used = vec![false; count * page_size];
    let mut free = free.into_iter();
    for s in segments.list() {
        let (slot, tokens) = (s.slot as usize, (s.past + s.len) as usize);
        for (page, to) in table[slot * width..].iter_mut().take(tokens.div_ceil(page_size)).enumerate() {
            if let Some(of_pool) = free.next() {
                *to = of_pool;
                used[of_pool * page_size..][..page_size.min(tokens - page * page_size)].fill(true);
            }
        }
    }
    (width, table, used)
}

pub fn attention_paged(t: &mut Trial, windowed: bool) -> Verdict {
    let (segments, slots) = t.sequences(true)?;
    attention_paged_of(t, &segments, slots, windowed)
}

pub fn attention_of_many_keys_in_pages(t: &mut Trial) -> Verdict {
    let (segments, slots) = t.step_after_many()?;
    attention_paged_of(t, &segments, slots, false)
}

fn attention_paged_of(t: &mut Trial, segments: &Segments, slots: usize, windowed: bool) -> Verdict {
    let shape = attention_shape(t, windowed);
    let page_size = t.one_of(&[1, 3, 16, 32]);
    let (width, table, used) = pages(t, segments, slots, page_size);
    let pages = t.ids("pages", slots, width, &table)?;
    let (k, v) = (keys(t, "k", &used, shape.kv_cols())?, keys(t, "v", &used, shape.kv_cols())?);
    attend(t, segments, shape, |on| {
        let (k, v, pages) = (on.view(k), on.view(v), on.view(pages));
        ops::Keys::Pages { k, v, pages, page_size }
    })
}

fn attend(t: &mut Trial, segments: &Segments, shape: ops::AttentionShape, keys: impl Fn(&On) -> ops::Keys) -> Verdict {
    let terms = shape.head_dim + segments.keys();
    let q = t.input("q", segments.tokens(), shape.q_cols())?;
    let segments_of = t.segments(segments)?;
    let out = t.output("out", segments.tokens(), shape.q_cols(), terms)?;
    let lse = if t.coin() { Some(t.in_f32(|t| t.output("lse", segments.tokens(), shape.heads, terms))?) } else { None };
    t.run(|on| {
        let (q, out, lse, segments) = (on.view(q), on.view(out), on.maybe(lse), on.segments(segments_of));
        on.device.attention(&ops::Attention { shape, q, keys: keys(on), segments, out, lse })
    })
}

pub fn attention_backward(t: &mut Trial, windowed: bool) -> Verdict {
    let (segments, _) = t.sequences(true)?;
    let shape = attention_shape(t, windowed);
    let tokens = segments.tokens();
    let used: Vec<bool> = (0..segments.keys() + t.one_of(&[0, 3])).map(|row| row < segments.keys()).collect();
    let (k, v) = (keys(t, "k", &used, shape.kv_cols())?, keys(t, "v", &used, shape.kv_cols())?);
    let q = t.input("q", tokens, shape.q_cols())?;
    let segments_of = t.segments(&segments)?;
    let (out, lse) = (t.kept("out", tokens, shape.q_cols())?, t.in_f32(|t| t.kept("lse", tokens, shape.heads))?);
    t.prepare(|on| {
        let keys = ops::Keys::Rows { k: on.view(k), v: on.view(v) };
        let (q, out, lse, segments) = (on.view(q), on.view(out), Some(on.view(lse)), on.segments(segments_of));
        on.device.attention(&ops::Attention { shape, q, keys, segments, out, lse })
    })?;
    let dout = t.input("dout", tokens, shape.q_cols())?;
    // Four sums stand one behind the other (score, dout·v, dout·out, the gradient), and where few keys are seen the
    // difference of the second and the third is small beside them.
    let terms = 16 * (shape.head_dim + segments.keys());
    let dq = t.output("dq", tokens, shape.q_cols(), terms)?;
    let terms = 16 * (shape.head_dim + tokens * shape.heads / shape.kv_heads);
    let dk = t.output("dk", used.len(), shape.kv_cols(), terms)?;
    let dv = t.output("dv", used.len(), shape.kv_cols(), terms)?;
    t.run(|on| {
        on.device.attention_backward(&ops::AttentionBackward {
            shape,
            q: on.view(q),
            k: on.view(k),
            v: on.view(v),
            segments: on.segments(segments_of),
            out: on.view(out),
            lse: on.view(lse),
            dout: on.view(dout),
            dq: on.view(dq),
            dk: on.view(dk),
            dv: on.view(dv),
        })
    })
}

pub fn page_write(t: &mut Trial) -> Verdict {
    let (segments, slots) = t.sequences(true)?;
    let (page_size, cols) = (t.one_of(&[1, 3, 16, 32]), t.size(100));
    let (width, table, used) = pages(t, &segments, slots, page_size);
    let pages = t.ids("pages", slots, width, &table)?;
    let rows = [t.input("keys", segments.tokens(), cols)?, t.input("values", segments.tokens(), cols)?];
    let segments_of = t.segments(&segments)?;
    let out = [t.changed("all_keys", used.len(), cols, 0)?, t.changed("all_values", used.len(), cols, 0)?];
    t.run(|on| {
        let (rows, out) = (rows.map(|rows| on.view(rows)), out.map(|out| on.view(out)));
        let (segments, pages) = (on.segments(segments_of), on.view(pages));
        on.device.page_write(&ops::PageWrite { rows, segments, pages, page_size, out })
    })
}

pub fn rope_page_write(t: &mut Trial) -> Verdict {
    let (segments, slots) = t.sequences(true)?;
    let (page_size, heads, kv_heads, head_dim) = (t.one_of(&[1, 3, 16, 32]), t.size(5), t.size(3), 2 * t.size(64));
    let (width, table, used) = pages(t, &segments, slots, page_size);
    let pages = t.ids("pages", slots, width, &table)?;
    let frequency = |_: &mut Trial, _, j: usize| 1e4f64.powf(-2.0 * j as f64 / head_dim as f64);
    let inv_freq = t.in_f32(|t| t.input_of("inv_freq", 1, head_dim / 2, frequency))?;
    let segments_of = t.segments(&segments)?;
    let (rotated, cols) = ((heads + kv_heads) * head_dim, kv_heads * head_dim);
    let x = t.changed("x", segments.tokens(), rotated + cols, 1)?;
    let other = if t.coin() { Some(t.input("values", segments.tokens(), cols)?) } else { None };
    let out = [t.changed("all_keys", used.len(), cols, 1)?, t.changed("all_values", used.len(), cols, 0)?];
    t.run(|on| {
        let (x, segments, inv_freq) = (on.view(x), on.segments(segments_of), on.view(inv_freq));
        let (positions, pages, out) = (segments.positions, on.view(pages), out.map(|out| on.view(out)));
        let values = on.maybe(other).map_or_else(|| x.col_range(rotated, cols), Ok)?;
        let rows = [x.col_range(heads * head_dim, cols)?, values];
        let rope = ops::Rope { x: x.col_range(0, rotated)?, head_dim, positions, inv_freq, inverse: false };
        let write = ops::PageWrite { rows, segments, pages, page_size, out };
        on.device.rope_page_write(&ops::RopePageWrite { rope, write })
    })
}

/// The values of a state before the segments; NaN in slots that are not to be read.
fn before(segments: &Segments, slots: usize) -> impl Fn(&mut Trial, usize, usize) -> f64 {
    let mut read = vec![false; slots];
    segments.list().iter().filter(|s| s.past > 0 && s.len > 0).for_each(|s| read[s.slot as usize] = true);
    move |t, slot, _| if read[slot] { t.normal() } else { f64::NAN }
}

/// The state before and the state after, `[slots, values]`: absent, apart, or the same.
fn state(
    t: &mut Trial,
    segments: &Segments,
    slots: usize,
    values: usize,
    terms: usize,
) -> Result<(Option<Arg>, Option<Arg>)> {
    let before = before(segments, slots);
    Ok(match t.one_of(&["none", "after", "before", "apart", "same"]) {
        "after" => (None, Some(t.output("state_out", slots, values, terms)?)),
        "before" => (Some(t.input_of("state_in", slots, values, before)?), None),
        "apart" => {
            (Some(t.input_of("state_in", slots, values, before)?), Some(t.output("state_out", slots, values, terms)?))
        }
        "same" => {
            let state = Some(t.changed_of("state", slots, values, terms, before)?);
            (state, state)
        }
        _ => (None, None),
    })
}

/// The state before the segments of a backward, and the gradients of the states after and before.
struct StateGradients {
    state_in: Option<Arg>,
    dstate_out: Option<Arg>,
    dstate_in: Option<Arg>,
}

impl StateGradients {
    fn draw(t: &mut Trial, segments: &Segments, slots: usize, values: usize, terms: usize) -> Result<Self> {
        let before = before(segments, slots);
        let (given, wanted, started) = (t.coin(), t.coin(), t.coin());
        Ok(StateGradients {
            state_in: if started { Some(t.input_of("state_in", slots, values, before)?) } else { None },
            dstate_out: if given { Some(t.input("dstate_out", slots, values)?) } else { None },
            dstate_in: if wanted { Some(t.output("dstate_in", slots, values, terms)?) } else { None },
        })
    }
}

/// The convolution's sizes and inputs.
struct Conv {
    segments: Segments,
    slots: usize,
    segments_of: (Arg, Arg),
    shape: ops::ConvShape,
    projected: Arg,
    cols: usize,
    x_col: usize,
    weight: Arg,
    bias: Option<Arg>,
}

impl Conv {
    fn draw(t: &mut Trial, repeat: usize, repeat_first: bool) -> Result<Self> {
        let (segments, slots) = t.sequences(true)?;
        let head = t.size(40);
        let channels_in = head * t.one_of(&[1, 2, 3]);
        let segments_of = t.segments(&segments)?;
        Self::of(t, (segments, slots, segments_of), (channels_in, head, repeat, repeat_first))
    }

    /// Of so many channels, a head and all, over given segments.
    fn of(
        t: &mut Trial,
        (segments, slots, segments_of): (Segments, usize, (Arg, Arg)),
        (channels_in, head, repeat, repeat_first): (usize, usize, usize, bool),
    ) -> Result<Self> {
        let in_tiles = t.in_tiles();
        let width = t.one_of(if in_tiles { &[2, 3, 4, 4] } else { &[1, 2, 3, 4, 4, 5] });
        let shape = ops::ConvShape { channels_in, head, repeat, width, repeat_first };
        let (x_cols, behind) = if in_tiles { ([0, 16, 32, 64], [0, 8, 16]) } else { ([0, 1, 7, 32], [0, 1, 5]) };
        let x_col = t.one_of(&x_cols);
        let cols = x_col + channels_in + t.one_of(&behind);
        // What is not x must not be read.
        let inside = x_col..x_col + channels_in;
        let value = |t: &mut Trial, _, col: usize| if inside.contains(&col) { t.normal() } else { f64::NAN };
        let projected = t.input_of("projected", segments.tokens(), cols, value)?;
        let weight = t.parameter("weight", shape.filters(), shape.width)?;
        let bias = if t.coin() { Some(t.parameter("bias", 1, shape.filters())?) } else { None };
        Ok(Conv { segments, slots, segments_of, shape, projected, cols, x_col, weight, bias })
    }

    /// The state before and the state after.
    fn states(&self, t: &mut Trial) -> Result<(Option<Arg>, Option<Arg>)> {
        t.in_f32(|t| state(t, &self.segments, self.slots, self.shape.state(), 0))
    }

    fn op(&self, on: &On, (state_in, state_out): (Option<Arg>, Option<Arg>), out: Arg) -> ops::Conv1d {
        ops::Conv1d {
            shape: self.shape,
            projected: on.view(self.projected),
            x_col: self.x_col,
            weight: on.view(self.weight),
            bias: on.maybe(self.bias),
            segments: on.segments(self.segments_of),
            state_in: on.maybe(state_in),
            state_out: on.maybe(state_out),
            out: on.view(out),
        }
    }
}

pub fn conv1d(t: &mut Trial, repeat: usize, repeat_first: bool) -> Verdict {
    let conv = Conv::draw(t, repeat, repeat_first)?;
    let states = conv.states(t)?;
    let out = t.output("out", conv.segments.tokens(), conv.shape.channels_out(), conv.shape.width)?;
    t.run(|on| on.device.conv1d(&conv.op(on, states, out)))
}

pub fn conv1d_backward(t: &mut Trial, repeat: usize, repeat_first: bool) -> Verdict {
    let conv = Conv::draw(t, repeat, repeat_first)?;
    let (shape, tokens) = (conv.shape, conv.segments.tokens());
    let dout = t.input("dout", tokens, shape.channels_out())?;
    let terms = shape.width * repeat;
    let states = t.in_f32(|t| StateGradients::draw(t, &conv.segments, conv.slots, shape.state(), terms))?;
    let dprojected = t.changed("dprojected", tokens, conv.cols, terms)?;
    let terms = tokens * repeat;
    let dweight = if t.one_of(&[true, true, false]) {
        Some(t.in_f32(|t| t.changed("dweight", shape.filters(), shape.width, terms))?)
    } else {
        None
    };
    let dbias = if t.coin() { Some(t.in_f32(|t| t.changed("dbias", 1, shape.filters(), terms))?) } else { None };
    t.run(|on| {
        on.device.conv1d_backward(&ops::Conv1dBackward {
            shape,
            projected: on.view(conv.projected),
            x_col: conv.x_col,
            weight: on.view(conv.weight),
            bias: on.maybe(conv.bias),
            segments: on.segments(conv.segments_of),
            state_in: on.maybe(states.state_in),
            dout: on.view(dout),
            dstate_out: on.maybe(states.dstate_out),
            dprojected: on.view(dprojected),
            dweight: on.maybe(dweight),
            dbias: on.maybe(dbias),
            dstate_in: on.maybe(states.dstate_in),
        })
    })
}

pub fn neg_exp(t: &mut Trial) -> Verdict {
    let (channels, d_state) = (t.size(200), t.size(33));
    let a_log = t.parameter("a_log", channels, d_state)?;
    let a = t.output("a", channels, d_state, 1)?;
    t.run(|on| on.device.neg_exp(&ops::NegExp { a_log: on.view(a_log), a: on.view(a) }))
}

pub fn neg_exp_backward(t: &mut Trial) -> Verdict {
    let (channels, d_state) = (t.size(200), t.size(33));
    let (a, da) = (t.input("a", channels, d_state)?, t.input("da", channels, d_state)?);
    let da_log = t.changed("da_log", channels, d_state, 1)?;
    t.run(|on| {
        let (a, da, da_log) = (on.view(a), on.view(da), on.view(da_log));
        on.device.neg_exp_backward(&ops::NegExpBackward { a, da, da_log })
    })
}

/// What the sequences of a scan are like.
#[derive(Clone, Copy, PartialEq)]
pub enum Sequences {
    /// Of any length.
    Any,
    /// One, long enough to be cut in time.
    Long,
    /// The same with room for others beside it, for which a small device does not cut it.
    Whole,
    /// A token or two of each, as a step of decoding has.
    Step,
}

/// The scan's sizes and inputs.
struct Scan {
    segments: Segments,
    slots: usize,
    segments_of: (Arg, Arg),
    channels: usize,
    d_state: usize,
    cols: usize,
    groups: (usize, usize),
    columns: (usize, usize, Option<usize>),
    softplus: bool,
    u: Arg,
    delta: Arg,
    a: Arg,
    projected: Arg,
    d: Option<Arg>,
    delta_bias: Option<Arg>,
}

impl Scan {
    /// With u that is given.
    fn draw(t: &mut Trial, d_state: usize, sequences: Sequences) -> Result<Self> {
        Self::of(t, d_state, sequences, |t, tokens, channels| t.input("u", tokens, channels))
    }

    fn of(
        t: &mut Trial,
        d_state: usize,
        sequences: Sequences,
        u: impl FnOnce(&mut Trial, usize, usize) -> Result<Arg>,
    ) -> Result<Self> {
        let (long, step) = (matches!(sequences, Sequences::Long | Sequences::Whole), sequences == Sequences::Step);
        let (segments, slots) = match sequences {
            Sequences::Any => t.sequences(true)?,
            Sequences::Long | Sequences::Whole => t.long_sequence()?,
            Sequences::Step => t.step()?,
        };
        let tokens = segments.tokens();
        let d_state = match d_state {
            0 if step && t.coin() => 16,
            0 => t.size(33),
            given => given,
        };
        let in_tiles = t.in_tiles() && d_state == 16;
        // Few channels, and no room for other segments, leave it to parts of the sequence, even on a small device.
        let (groups, tiles, most): (&[_], &[_], _) =
            if long { (&[1, 2], &[16, 32], 16) } else { (&[1, 2, 4], &[16, 32, 48], 40) };
        let groups = (t.one_of(groups), t.one_of(groups));
        let channels =
            groups.0.max(groups.1) * if in_tiles || step && t.coin() { t.one_of(tiles) } else { t.size(most) };
        let gaps = if in_tiles { [0, 0, 8, 16] } else { [0, 0, 1, 16] };
        let widths = [groups.0 * d_state, groups.1 * d_state, channels];
        // B, C and z in any order, with columns between them that must not be read.
        let mut columns = [0; 3];
        let mut cols = if in_tiles { t.one_of(&[0, 8]) } else { t.one_of(&[0, 3]) };
        for part in t.permutation(3) {
            columns[part] = cols;
            cols += widths[part] + t.one_of(&gaps);
        }
        // Kernels for tiles take those alone that have a gate, and softplus.
        let most: &[bool] = match sequences {
            Sequences::Whole if in_tiles => &[true],
            _ if in_tiles => &[true, true, true, true, true, false],
            _ => &[true, true, false],
        };
        let gated = t.one_of(most);
        let parts = if gated { 3 } else { 2 };
        let inside = |col: usize| (0..parts).any(|part| (columns[part]..columns[part] + widths[part]).contains(&col));
        let softplus = t.one_of(most);
        let segments_of = match sequences {
            Sequences::Long => t.segments_beside(&segments, 0)?,
            Sequences::Whole => t.segments_beside(&segments, 7)?,
            Sequences::Any | Sequences::Step => t.segments(&segments)?,
        };
        let projected =
            t.input_of("projected", tokens, cols, |t, _, col| if inside(col) { t.normal() } else { f64::NAN })?;
        let u = u(t, tokens, channels)?;
        // Step sizes from 0.01 to 0.5, and now and then one above 20, where softplus is the argument itself.
        let step = |t: &mut Trial, _, _| match softplus {
            true if t.below(50) == 0 => t.number(19.0, 22.0),
            true => t.normal() - 2.0,
            false => t.number(0.01, 0.5),
        };
        let delta = t.input_of("delta", tokens, channels, step)?;
        let a = t.in_f32(|t| t.input_of("a", channels, d_state, |t, _, _| -t.number(0.05, 6.0)))?;
        let d = if t.coin() { Some(t.in_f32(|t| t.input("d", 1, channels))?) } else { None };
        let bias = |t: &mut Trial, _, _| t.number(0.0, 0.3);
        let delta_bias = if t.coin() { Some(t.in_f32(|t| t.input_of("delta_bias", 1, channels, bias))?) } else { None };
        let columns = (columns[0], columns[1], gated.then_some(columns[2]));
        Ok(Scan {
            segments,
            slots,
            segments_of,
            channels,
            d_state,
            cols,
            groups,
            columns,
            softplus,
            u,
            delta,
            a,
            projected,
            d,
            delta_bias,
        })
    }

    fn inputs(&self, on: &On, state_in: Option<Arg>) -> ops::ScanInputs {
        ops::ScanInputs {
            u: on.view(self.u),
            delta: on.view(self.delta),
            a: on.view(self.a),
            projected: on.view(self.projected),
            b_col: self.columns.0,
            c_col: self.columns.1,
            z_col: self.columns.2,
            groups_b: self.groups.0,
            groups_c: self.groups.1,
            d: on.maybe(self.d),
            delta_bias: on.maybe(self.delta_bias),
            softplus: self.softplus,
            segments: on.segments(self.segments_of),
            state_in: on.maybe(state_in),
        }
    }

    fn saved(&self, t: &mut Trial, prepared: bool) -> Result<Arg> {
        let (tokens, segments) = (self.segments.tokens(), self.segments.list().len());
        let rows =
            |device: &crate::backend::Device| ops::ScanInputs::saved_rows(tokens, segments, device.info().scan_chunk);
        t.own("saved", rows, self.channels * self.d_state, prepared)
    }
}

pub fn selective_scan(t: &mut Trial, d_state: usize, sequences: Sequences) -> Verdict {
    let scan = Scan::draw(t, d_state, sequences)?;
    let (tokens, values) = (scan.segments.tokens(), scan.channels * scan.d_state);
    let (state_in, state_out) = t.in_f32(|t| state(t, &scan.segments, scan.slots, values, tokens))?;
    let saved = if sequences != Sequences::Step && t.coin() { Some(scan.saved(t, false)?) } else { None };
    let out = t.output("out", tokens, scan.channels, tokens + scan.d_state)?;
    t.run(|on| {
        on.device.selective_scan(&ops::SelectiveScan {
            inputs: scan.inputs(on, state_in),
            state_out: on.maybe(state_out),
            saved: on.maybe(saved),
            out: on.view(out),
        })
    })
}

pub fn conv_scan(t: &mut Trial, d_state: usize, sequences: Sequences) -> Verdict {
    let keeps = t.coin();
    let scan = Scan::of(t, d_state, sequences, |t, tokens, channels| {
        if keeps { t.output("u", tokens, channels, 5) } else { t.passed("u", tokens, channels) }
    })?;
    let dividing = |n: usize, of: &[usize]| of.iter().copied().filter(|of| n.is_multiple_of(*of)).collect::<Vec<_>>();
    let in_tiles = t.in_tiles() && scan.d_state == 16;
    let head = if in_tiles { 16 } else { t.one_of(&dividing(scan.channels, &[1, 2, 3, 4, 8, 16, 16, 16])) };
    let repeat = t.one_of(&dividing(scan.channels / head, &[1, 2, 3, 4]));
    let (segments, sizes) = (scan.segments.clone(), (scan.channels / repeat, head, repeat, t.coin()));
    let conv = Conv::of(t, (segments, scan.slots, scan.segments_of), sizes)?;
    let (tokens, values) = (scan.segments.tokens(), scan.channels * scan.d_state);
    let states_of_conv = conv.states(t)?;
    let terms = t.terms_of_rounded(tokens + scan.d_state);
    let (state_in, state_out) = t.in_f32(|t| state(t, &scan.segments, scan.slots, values, terms))?;
    let saved = if sequences != Sequences::Step && t.coin() { Some(scan.saved(t, false)?) } else { None };
    let out = t.output("out", tokens, scan.channels, terms)?;
    t.run(|on| {
        let (inputs, state_out, saved) = (scan.inputs(on, state_in), on.maybe(state_out), on.maybe(saved));
        let conv = conv.op(on, states_of_conv, scan.u);
        let scan = ops::SelectiveScan { inputs, state_out, saved, out: on.view(out) };
        on.device.conv_scan(&ops::ConvScan { conv, scan, keeps })
    })
}

pub fn selective_scan_backward(t: &mut Trial, d_state: usize, sequences: Sequences) -> Verdict {
    let scan = Scan::draw(t, d_state, sequences)?;
    let (tokens, channels) = (scan.segments.tokens(), scan.channels);
    // Where a channel remembers hundreds of tokens, exponentials that are off by the last bit the same way add up in states and
    // in their gradients, and do not cancel as roundings do: one bit moved da by 7.6e-5 of its largest value.
    let of_decays = if matches!(sequences, Sequences::Long | Sequences::Whole) { 64 } else { 1 };
    let terms = of_decays * (tokens + scan.d_state);
    let values = channels * scan.d_state;
    let states = t.in_f32(|t| StateGradients::draw(t, &scan.segments, scan.slots, values, terms))?;
    let (saved, out) = (scan.saved(t, true)?, t.kept("out", tokens, channels)?);
    t.prepare(|on| {
        let inputs = scan.inputs(on, states.state_in);
        let (saved, out) = (Some(on.view(saved)), on.view(out));
        on.device.selective_scan(&ops::SelectiveScan { inputs, state_out: None, saved, out })
    })?;
    let dout = t.input("dout", tokens, channels)?;
    let (du, ddelta) = (t.output("du", tokens, channels, terms)?, t.output("ddelta", tokens, channels, terms)?);
    let da = t.in_f32(|t| t.output("da", channels, scan.d_state, terms))?;
    let dprojected = t.changed("dprojected", tokens, scan.cols, terms + channels)?;
    let (skip, bias) = (scan.d.is_some() && t.coin(), scan.delta_bias.is_some() && t.coin());
    let dd = if skip { Some(t.in_f32(|t| t.changed("dd", 1, channels, terms))?) } else { None };
    let ddelta_bias = if bias { Some(t.in_f32(|t| t.changed("ddelta_bias", 1, channels, terms))?) } else { None };
    t.run(|on| {
        on.device.selective_scan_backward(&ops::SelectiveScanBackward {
            inputs: scan.inputs(on, states.state_in),
            saved: on.view(saved),
            dout: on.view(dout),
            dstate_out: on.maybe(states.dstate_out),
            du: on.view(du),
            ddelta: on.view(ddelta),
            da: on.view(da),
            dprojected: on.view(dprojected),
            dd: on.maybe(dd),
            ddelta_bias: on.maybe(ddelta_bias),
            dstate_in: on.maybe(states.dstate_in),
        })
    })
}

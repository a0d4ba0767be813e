//! The scale of a plot's axis: its range, where its ticks stand, how their numbers read.

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use std::ops::Range;

/// How many ticks an axis has at most.
const MOST_TICKS: usize = 8;

/// A linear or logarithmic scale.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Axis {
    log: bool,
    /// The first and the last value; their decimal logarithms if the scale is logarithmic.
    low: f64,
    high: f64,
    /// Values at the ticks, rising.
    ticks: Vec<f64>,
}

impl Axis {
    /// A linear scale over `values`, widened on each side by a part `padding` of their range.
    pub fn linear(values: impl Iterator<Item = f64>, padding: f64) -> Option<Axis> {
        let (low, high) = widened(range(values)?, padding, |value| if value == 0.0 { 1.0 } else { value.abs() / 5.0 });
        Some(Axis { log: false, low, high, ticks: linear_ticks(low, high) })
    }

    /// A logarithmic scale over those of `values` that are above 0, widened likewise.
    pub fn logarithmic(values: impl Iterator<Item = f64>, padding: f64) -> Option<Axis> {
        let (low, high) = range(values.filter(|value| *value > 0.0))?;
        let (low, high) = widened((low.log10(), high.log10()), padding, |_| 0.1);
        Some(Axis { log: true, low, high, ticks: logarithmic_ticks(low, high) })
    }

    /// A place for each of `count` things, with room for a bar; at most 32 ticks.
    pub fn indices(count: usize) -> Axis {
        let ticks = (0..count).step_by(count.div_ceil(32).max(1)).map(|index| index as f64).collect();
        Axis { log: false, low: -0.7, high: count as f64 - 0.3, ticks }
    }

    /// Whether `value` has a place: it is finite, and above 0 on a logarithmic scale.
    pub fn shows(&self, value: f64) -> bool {
        value.is_finite() && !(self.log && value <= 0.0)
    }

    /// The first and the last value.
    pub fn ends(&self) -> (f64, f64) {
        match self.log {
            true => (10_f64.powf(self.low), 10_f64.powf(self.high)),
            false => (self.low, self.high),
        }
    }

    /// How far along the scale `value` stands, from 0 at its begin to 1 at its end.
    pub fn share(&self, value: f64) -> f64 {
        let value = if self.log { value.log10() } else { value };
        (value - self.low) / (self.high - self.low)
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        first + (self.share(*value) * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        let (low, high) = self.ends();
        low..high
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        let largest = self.ticks.iter().fold(0.0, |largest, tick| tick.abs().max(largest));
        number(*value, largest)
    }
}

/// A range with room at both ends; `spread` gives a single value, or nearly one, a range.
fn widened((low, high): (f64, f64), padding: f64, spread: impl Fn(f64) -> f64) -> (f64, f64) {
    let middle = low / 2.0 + high / 2.0;
    let (low, high) = match high - low < spread(middle) * 1e-3 {
        true => (middle - spread(middle) / 2.0, middle + spread(middle) / 2.0),
        false => (low, high),
    };
    let padding = padding * (high - low);
    (low - padding, high + padding)
}

/// The least and the greatest of the finite values.
fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|value| value.is_finite()).fold(None, |range, value| match range {
        None => Some((value, value)),
        Some((low, high)) => Some((value.min(low), value.max(high))),
    })
}

/// Multiples of 1, 2 or 5 times a power of ten, as many as are allowed.
fn linear_ticks(low: f64, high: f64) -> Vec<f64> {
    let power = 10_f64.powf(((high - low) / MOST_TICKS as f64).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    // A multiple that lies at an end, but for rounding, is in.
    let multiples = |step: f64| (low / step - 1e-9).ceil() as i64..=(high / step + 1e-9).floor() as i64;
    let fits = |step: &&f64| multiples(**step).count() <= MOST_TICKS;
    let step = step.iter().find(fits).copied().unwrap_or(high - low);
    multiples(step).map(|multiple| multiple as f64 * step).collect()
}

/// Powers of ten; with their multiples by 2 and 5 where there are few; plain steps where there is hardly one.
fn logarithmic_ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = low.floor() as i32..=high.ceil() as i32;
    let ticks = |factors: &[f64], every: usize| -> Vec<f64> {
        decades
            .clone()
            .step_by(every)
            .flat_map(|decade| factors.iter().map(move |factor| factor * 10_f64.powi(decade)))
            .filter(|tick| (low..=high).contains(&tick.log10()))
            .collect()
    };
    let fine = ticks(&[1.0, 2.0, 5.0], 1);
    match fine.len() {
        0..3 => linear_ticks(10_f64.powf(low), 10_f64.powf(high)),
        3..=MOST_TICKS => fine,
        _ => ticks(&[1.0], (high - low) as usize / MOST_TICKS + 1),
    }
}

/// A number of an axis whose largest is `largest`: with k, M, G or T, or with a power of ten where it is small.
fn number(value: f64, largest: f64) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let size = value.abs();
    if size < largest * 1e-9 {
        return "0".to_string();
    }
    if let Some((unit, name)) = units.iter().find(|(unit, _)| size >= unit * (1.0 - 1e-9)) {
        return short(value / unit) + name;
    }
    if size < 1e-3 {
        let power = (size * (1.0 + 1e-9)).log10().floor();
        return format!("{}e{power}", short(value / 10_f64.powf(power)));
    }
    short(value)
}

/// Up to four decimals, as many as there are.
fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|tick| axis.format_ext(tick)).collect()
    }

    #[test]
    fn ticks_are_round_numbers() {
        let linear = |low, high| labels(&Axis::linear([low, high].into_iter(), 0.0).unwrap());
        assert_eq!(linear(0.0, 1.0), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(linear(-0.3, 0.3), ["-0.3", "-0.2", "-0.1", "0", "0.1", "0.2", "0.3"]);
        assert_eq!(linear(0.0, 1500.0), ["0", "200", "400", "600", "800", "1k", "1.2k", "1.4k"]);
        assert_eq!(linear(0.0, 1.4e6), ["0", "200k", "400k", "600k", "800k", "1M", "1.2M", "1.4M"]);
        assert_eq!(linear(0.0, 4e-5), ["0", "1e-5", "2e-5", "3e-5", "4e-5"]);
        let logarithmic = |low, high| labels(&Axis::logarithmic([low, high].into_iter(), 0.0).unwrap());
        assert_eq!(logarithmic(1e-3, 10.0), ["0.001", "0.01", "0.1", "1", "10"]);
        assert_eq!(logarithmic(0.1, 4.0), ["0.1", "0.2", "0.5", "1", "2"]);
        assert_eq!(logarithmic(1.1, 1.6), ["1.1", "1.2", "1.3", "1.4", "1.5", "1.6"]);
    }

    #[test]
    fn an_axis_leaves_out_what_has_no_place() {
        let axis = Axis::logarithmic([f64::NAN, -1.0, 0.0, 1.0, 100.0].into_iter(), 0.0).unwrap();
        assert_eq!((axis.ends(), axis.share(10.0)), ((1.0, 100.0), 0.5));
        assert!(axis.shows(0.1) && ![0.0, -1.0, f64::INFINITY, f64::NAN].iter().any(|value| axis.shows(*value)));
        assert_eq!(Axis::linear([f64::NAN].into_iter(), 0.0), None);
        assert_eq!(Axis::logarithmic([-1.0].into_iter(), 0.0), None);
    }

    proptest! {
        #[test]
        fn ticks_are_few_lie_within_and_read_differently(low in -1e6..1e6_f64, size in -6.0..6.0_f64, log: bool) {
            let values = [low, low + 10_f64.powf(size)];
            let axis = match log {
                false => Axis::linear(values.into_iter(), 0.05),
                true => Axis::logarithmic(values.map(|value| 1e-3 + value.abs()).into_iter(), 0.05),
            }.unwrap();
            let (first, last) = axis.ends();
            prop_assert!((2..=MOST_TICKS).contains(&axis.ticks.len()), "{axis:?}");
            prop_assert!(axis.ticks.iter().all(|tick| (-1e-9..=1.0 + 1e-9).contains(&axis.share(*tick))));
            prop_assert!(axis.ticks.windows(2).all(|pair| pair[0] < pair[1]) && first < last);
            let labels = labels(&axis);
            prop_assert!(labels.windows(2).all(|pair| pair[0] != pair[1]), "{labels:?}");
        }
    }
}

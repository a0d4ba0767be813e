//! Plots as SVG text: the importance of layers, and curves over the steps of a run.

use super::axis::Axis;
use super::canvas::{
    COLOURS, INK, LEFT, LINE_HEIGHT, RIGHT, TEXT_SIZE, axes, column, frame, header, svg, text, text_width,
};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;
use std::collections::HashMap;

/// A curve of more points than this is drawn thin.
const DENSE: usize = 400;

const BAND: RGBColor = RGBColor(243, 243, 246);
const STAGE: RGBColor = RGBColor(130, 130, 130);
const ABSENT: RGBColor = RGBColor(226, 226, 226);

/// Why there is no plot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlotError {
    /// No number can be shown.
    #[error("the plot `{0}` has no point to show")]
    NoPoints(String),
    /// The drawing failed.
    #[error("the plot could not be drawn: {0}")]
    Drawing(String),
}

/// A named curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// What the legend says.
    pub name: String,
    /// x and y, x rising; what is not finite (or not above 0 where y is logarithmic) is left out.
    pub points: Vec<(f64, f64)>,
}

/// A part of the x axis with a name of its own; it ends where the next begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// What stands above it.
    pub name: String,
    /// Its first x.
    pub start: f64,
}

/// Curves over the steps of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Curves<'a> {
    /// What the plot shows.
    pub title: &'a str,
    /// What x is, with its unit.
    pub x: &'a str,
    /// What y is, with its unit.
    pub y: &'a str,
    /// Whether the y axis is logarithmic.
    pub log: bool,
    /// The curves, in the order of the legend; a single one has no legend.
    pub series: &'a [Series],
    /// The stages, in order; none is fine.
    pub stages: &'a [Stage],
}

/// Scores of layers and the order that follows from them.
#[derive(Clone, Debug, PartialEq)]
pub struct Importance<'a> {
    /// What the plot shows.
    pub title: &'a str,
    /// What a score is, with its unit.
    pub score: &'a str,
    /// The score of each layer; none for a layer that was not scored, being a Mamba layer already.
    pub scores: &'a [Option<f64>],
    /// The scored layers, least important first.
    pub order: &'a [usize],
    /// The layers that are replaced: the first of `order`, or those of them that stand apart.
    pub chosen: &'a [usize],
}

/// Draws curves, as the text of an SVG file: stages as shaded bands with their names above. There are seven colours.
pub fn curves(plot: &Curves) -> Result<String, PlotError> {
    let none = || PlotError::NoPoints(plot.title.to_string());
    let points = || plot.series.iter().flat_map(|series| series.points.iter());
    let heights = points().filter(|point| point.0.is_finite()).map(|point| point.1);
    let y = if plot.log { Axis::logarithmic(heights, 0.05) } else { Axis::linear(heights, 0.05) };
    let y = y.ok_or_else(none)?;
    let shown = points().filter(|point| y.shows(point.1)).map(|point| point.0);
    let x = Axis::linear(shown.chain(plot.stages.iter().map(|stage| stage.start)), 0.0).ok_or_else(none)?;
    let colours = COLOURS.iter().copied().cycle();
    let legend: Vec<(&str, RGBColor)> = plot.series.iter().map(|series| series.name.as_str()).zip(colours).collect();
    let right = right_end(plot.stages, &x);
    let names = stage_names(plot.stages, &x, right);

    svg(|page| {
        let strip = header(page, plot.title, if legend.len() > 1 { &legend } else { &[] }, plot.y)?;
        let top = strip + LINE_HEIGHT * names.iter().map(|name| name.row + 1).max().unwrap_or(0);
        let mut frame = frame(page, top, right, &x, &y)?;
        let (low, high) = y.ends();
        let ends = names.iter().skip(1).map(|name| name.start).chain([x.ends().1]);
        for (name, end) in names.iter().zip(ends).step_by(2) {
            frame.draw_series([Rectangle::new([(name.start, low), (end, high)], BAND.filled())])?;
        }
        axes(&mut frame, plot.x, true)?;
        for name in &names {
            let middle = top - name.row * LINE_HEIGHT - LINE_HEIGHT / 2;
            page.draw(&PathElement::new([(name.column, middle - 7), (name.column, top)], STAGE))?;
            frame.draw_series([PathElement::new([(name.start, low), (name.start, high)], STAGE)])?;
            text(page, name.text, (name.column + NAME_GAP, middle), TEXT_SIZE, HPos::Left)?;
        }
        for (series, (_, colour)) in plot.series.iter().zip(&legend) {
            let shown = series.points.iter().copied().filter(|point| x.shows(point.0) && y.shows(point.1));
            let points = thin(shown, |point| column(&x, right, point));
            match points.as_slice() {
                [point] => frame.draw_series([Circle::new(*point, 3, colour.filled())])?,
                _ => {
                    let width = if points.len() > DENSE { 1 } else { 2 };
                    frame.draw_series([PathElement::new(points, colour.stroke_width(width))])?
                }
            };
        }
        Ok(())
    })
}

/// The name of a stage above the frame, right of the line at which the stage begins.
#[derive(Clone, Debug)]
struct StageName<'a> {
    text: &'a str,
    start: f64,
    /// The pixel column of the line.
    column: i32,
    /// Rows are counted upwards from the frame; the line goes up to its name's row.
    row: i32,
}

/// Pixels between a line and its name.
const NAME_GAP: i32 = 5;

/// Pixels that a name needs, from its line to what follows it.
fn name_width(name: &str) -> i32 {
    text_width(name, TEXT_SIZE) + 2 * NAME_GAP
}

/// Where the frame ends so that the names of late stages find room; at half of the page at the earliest.
fn right_end(stages: &[Stage], x: &Axis) -> i32 {
    let room = |stage: &Stage| f64::from(RIGHT - name_width(&stage.name) - LEFT) / x.share(stage.start).max(1e-6);
    let rooms = stages.iter().filter(|stage| x.shows(stage.start)).map(room);
    LEFT + rooms.fold(f64::from(RIGHT - LEFT), f64::min).max(f64::from(RIGHT - LEFT) / 2.0) as i32
}

/// Lays names, in the order of their stages, into the lowest rows where they keep clear of each other: a name stands
/// above those of the stages that begin below it, so that their lines end before they cross it.
fn stage_names<'a>(stages: &'a [Stage], x: &Axis, right: i32) -> Vec<StageName<'a>> {
    let mut names: Vec<StageName> = Vec::new();
    for stage in stages.iter().rev().filter(|stage| x.shows(stage.start)) {
        let column = column(x, right, stage.start);
        let end = column + name_width(&stage.name);
        let row = names.iter().filter(|later| later.column < end).map(|later| later.row + 1).max().unwrap_or(0);
        names.push(StageName { text: &stage.name, start: stage.start, column, row });
    }
    names.reverse();
    names
}

/// At most four points for each column of pixels: the first, the least, the greatest and the last.
fn thin(points: impl Iterator<Item = (f64, f64)>, column: impl Fn(f64) -> i32) -> Vec<(f64, f64)> {
    let mut kept: Vec<(f64, f64)> = Vec::new();
    let mut run: Vec<(f64, f64)> = Vec::new();
    let mut close = |run: &mut Vec<(f64, f64)>| {
        let last = run.len().saturating_sub(1);
        let by_height = |a: &usize, b: &usize| run[*a].1.total_cmp(&run[*b].1);
        let least = (0..run.len()).min_by(by_height).unwrap_or(0);
        let greatest = (0..run.len()).max_by(by_height).unwrap_or(0);
        let mut chosen = [0, least, greatest, last];
        chosen.sort_unstable();
        let mut before = None;
        for index in chosen {
            if before != Some(index) {
                kept.extend(run.get(index));
            }
            before = Some(index);
        }
        run.clear();
    };
    for point in points {
        if run.first().is_some_and(|first| column(first.0) != column(point.0)) {
            close(&mut run);
        }
        run.push(point);
    }
    close(&mut run);
    kept
}

/// Draws the scores as bars, as the text of an SVG file. The layers that are replaced have a colour of their own; at
/// each bar stands the layer's rank, 1 being the least important.
pub fn importance(plot: &Importance) -> Result<String, PlotError> {
    let none = || PlotError::NoPoints(plot.title.to_string());
    let scores = || plot.scores.iter().copied().flatten().filter(|score| score.is_finite());
    if scores().next().is_none() {
        return Err(none());
    }
    let x = Axis::indices(plot.scores.len());
    // Bars stand on 0, and their ranks need room.
    let y = Axis::linear(scores().chain([0.0]), 0.07).ok_or_else(none)?;
    let ranks: HashMap<usize, usize> = plot.order.iter().enumerate().map(|(rank, layer)| (*layer, rank)).collect();
    let mut legend = vec![(REPLACED, COLOURS[1]), (KEPT, COLOURS[0])];
    if plot.scores.contains(&None) {
        legend.push((ALREADY, ABSENT));
    }

    svg(|page| {
        let top = header(page, plot.title, &legend, plot.score)?;
        let mut frame = frame(page, top, RIGHT, &x, &y)?;
        axes(&mut frame, "layer", false)?;
        let (low, high) = y.ends();
        let pitch = column(&x, RIGHT, 1.0) - column(&x, RIGHT, 0.0);
        for (layer, score) in plot.scores.iter().enumerate() {
            let place = layer as f64;
            let (left, right) = (place - 0.38, place + 0.38);
            let rank = ranks.get(&layer).copied();
            let Some(score) = score else {
                frame.draw_series([Rectangle::new([(left, low), (right, high)], ABSENT.filled())])?;
                continue;
            };
            if !score.is_finite() {
                continue;
            }
            let replaced = plot.chosen.contains(&layer);
            let colour = COLOURS[usize::from(replaced)];
            frame.draw_series([Rectangle::new([(left, 0.0), (right, *score)], colour.filled())])?;
            if let Some(rank) = rank.filter(|_| pitch >= SMALL_PITCH) {
                let (column, row) = frame.backend_coord(&(place, *score));
                let above = if *score < 0.0 { 8 } else { -8 };
                let size = if pitch >= PLAIN_PITCH { TEXT_SIZE - 1.0 } else { TEXT_SIZE - 3.0 };
                text(page, &(rank + 1).to_string(), (column, row + above), size, HPos::Center)?;
            }
        }
        frame.draw_series([PathElement::new([(x.ends().0, 0.0), (x.ends().1, 0.0)], INK.mix(0.6))])?;
        Ok(())
    })
}

const REPLACED: &str = "replaced";
const KEPT: &str = "kept";
const ALREADY: &str = "Mamba already";
/// Pixels between bars from which on ranks can be read, and from which on in plain size.
const SMALL_PITCH: i32 = 11;
const PLAIN_PITCH: i32 = 16;

#[cfg(test)]
mod tests;

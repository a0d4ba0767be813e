//! What all plots share: title and legend, the frame with its axes, text, and the SVG around them.
//!
//! White ground, so that they read on any page; the colours are Okabe and Ito's, which colour-blind readers can tell
//! apart. Fonts are the reader's own, so widths of text are estimated, generously.

use super::axis::Axis;
use super::plot::PlotError;
use plotters::coord::Shift;
use plotters::coord::ranged1d::Ranged;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Width and height in pixels.
const SIZE: (i32, i32) = (880, 450);
const MARGIN: i32 = 16;
/// What the numbers of the y axis take, and the numbers and the title of the x axis.
const BESIDE: i32 = 52;
const BELOW: i32 = 50;
const TITLE_HEIGHT: i32 = 36;
/// The height of a line of the legend, or of names above the frame.
pub(super) const LINE_HEIGHT: i32 = 20;
const TITLE_SIZE: f64 = 16.0;
/// The size of plain text.
pub(super) const TEXT_SIZE: f64 = 12.0;
/// The width of a letter as a part of its size.
const LETTER_WIDTH: f64 = 0.58;

pub(super) const INK: RGBColor = RGBColor(40, 40, 40);
const GRID: RGBColor = RGBColor(224, 224, 224);
pub(super) const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// The whole picture, in pixels.
pub(super) type Page<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// The frame, in values of its axes.
pub(super) type Frame<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<Axis, Axis>>;

impl<E: std::error::Error + Send + Sync> From<DrawingAreaErrorKind<E>> for PlotError {
    fn from(error: DrawingAreaErrorKind<E>) -> Self {
        PlotError::Drawing(error.to_string())
    }
}

/// The text of an SVG file that `draw` fills.
pub(super) fn svg(draw: impl FnOnce(&Page) -> Result<(), PlotError>) -> Result<String, PlotError> {
    let mut text = String::new();
    let page = SVGBackend::with_string(&mut text, (SIZE.0 as u32, SIZE.1 as u32)).into_drawing_area();
    page.fill(&WHITE)?;
    draw(&page)?;
    page.present()?;
    drop(page);
    Ok(text)
}

/// Draws the title, the legend and what the y axis shows, and says at which height they end.
///
/// The y axis is named in a line of its own, since a name beside the axis has to be short.
pub(super) fn header(page: &Page, title: &str, legend: &[(&str, RGBColor)], y: &str) -> Result<i32, PlotError> {
    let style = ("sans-serif", TITLE_SIZE * POINT, FontStyle::Bold).into_font().color(&INK);
    page.draw(&Text::new(title.to_string(), (MARGIN, MARGIN), style.pos(Pos::new(HPos::Left, VPos::Top))))?;
    let mut top = TITLE_HEIGHT;
    let mut left = MARGIN;
    for (name, colour) in legend {
        let width = 18 + text_width(name, TEXT_SIZE) + 18;
        if left > MARGIN && left + width > RIGHT {
            left = MARGIN;
            top += LINE_HEIGHT;
        }
        let middle = top + LINE_HEIGHT / 2;
        page.draw(&Rectangle::new([(left, middle - 5), (left + 12, middle + 5)], colour.filled()))?;
        text(page, name, (left + 18, middle), TEXT_SIZE, HPos::Left)?;
        left += width;
    }
    if !legend.is_empty() {
        top += LINE_HEIGHT + 4;
    }
    text(page, &format!("\u{2191} {y}"), (MARGIN, top + LINE_HEIGHT / 2), TEXT_SIZE, HPos::Left)?;
    Ok(top + LINE_HEIGHT + 2)
}

/// The frame below `top` and left of the pixel column `right`, still empty.
pub(super) fn frame<'a>(page: &Page<'a>, top: i32, right: i32, x: &Axis, y: &Axis) -> Result<Frame<'a>, PlotError> {
    Ok(ChartBuilder::on(page)
        .margin_top(top)
        .margin_right(SIZE.0 - right)
        .margin_bottom(MARGIN / 2)
        .margin_left(MARGIN / 2)
        .y_label_area_size(BESIDE)
        .x_label_area_size(BELOW)
        .build_cartesian_2d(x.clone(), y.clone())?)
}

/// Where every frame begins.
pub(super) const LEFT: i32 = MARGIN / 2 + BESIDE;

/// The last pixel column that is drawn on, where a frame ends unless it has to leave room.
pub(super) const RIGHT: i32 = SIZE.0 - MARGIN;

/// The pixel column of a value on the x axis of a frame that ends at `right`.
pub(super) fn column(x: &Axis, right: i32, value: f64) -> i32 {
    x.map(&value, (LEFT, right - 1))
}

/// Draws the grid, the axes, their numbers and the title of x. `upright` has grid lines at the ticks of x too.
pub(super) fn axes(frame: &mut Frame, x: &str, upright: bool) -> Result<(), PlotError> {
    let style = ("sans-serif", TEXT_SIZE * POINT).into_font().color(&INK);
    let mut mesh = frame.configure_mesh();
    mesh.bold_line_style(GRID).axis_style(INK.mix(0.6)).label_style(style.clone()).axis_desc_style(style);
    mesh.max_light_lines(0).x_desc(x);
    if !upright {
        mesh.disable_x_mesh();
    }
    Ok(mesh.draw()?)
}

/// plotters writes a font's size divided by this.
const POINT: f64 = 1.24;

/// Draws plain text beside a pixel, at the middle of its height.
pub(super) fn text(page: &Page, text: &str, at: (i32, i32), size: f64, side: HPos) -> Result<(), PlotError> {
    let style = ("sans-serif", size * POINT).into_font().color(&INK).pos(Pos::new(side, VPos::Center));
    Ok(page.draw(&Text::new(text.to_string(), at, style))?)
}

/// How many pixels plain text takes, at most.
pub(super) fn text_width(text: &str, size: f64) -> i32 {
    (text.chars().count() as f64 * size * LETTER_WIDTH).ceil() as i32
}

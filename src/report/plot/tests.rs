use super::*;
use proptest::prelude::*;

fn series(points: &[(f64, f64)]) -> Series {
    Series { name: "loss".to_string(), points: points.to_vec() }
}

fn plot<'a>(series: &'a [Series], stages: &'a [Stage], log: bool) -> Curves<'a> {
    Curves { title: "Loss & <KL>", x: "step", y: "loss (nats per token)", log, series, stages }
}

/// The `points` of every polyline.
fn polylines(svg: &str) -> Vec<Vec<(i32, i32)>> {
    svg.lines()
        .filter(|line| line.starts_with("<polyline") && line.contains("stroke-width=\"2\""))
        .map(|line| {
            let points = line.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
            let pair = |pair: &str| {
                let (x, y) = pair.split_once(',').unwrap();
                (x.parse().unwrap(), y.parse().unwrap())
            };
            points.split_whitespace().map(pair).collect()
        })
        .collect()
}

#[test]
fn a_plot_says_its_title_its_axes_and_its_stages() {
    let stages = [Stage { name: "2 Mamba".to_string(), start: 0.0 }, Stage { name: "\"4\"".to_string(), start: 5.0 }];
    let both = [series(&[(0.0, 1.0), (9.0, 2.0)]), Series { name: "held <out>".to_string(), points: vec![(3.0, 1.5)] }];
    let svg = curves(&plot(&both, &stages, false)).unwrap();
    for words in [
        "Loss &amp; &lt;KL&gt;",
        "step",
        "\u{2191} loss (nats per token)",
        "2 Mamba",
        "&quot;4&quot;",
        "held &lt;out&gt;",
    ] {
        assert!(svg.contains(words), "{words}");
    }
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    assert_eq!(svg.matches("<circle").count(), 1);
    assert_eq!(svg, curves(&plot(&both, &stages, false)).unwrap());
}

#[test]
fn the_first_point_is_at_the_left_the_last_at_the_right_and_more_is_higher() {
    for log in [false, true] {
        let svg = curves(&plot(&[series(&[(0.0, 1.0), (50.0, 10.0), (100.0, 100.0)])], &[], log)).unwrap();
        let line = &polylines(&svg)[0];
        assert!(line[0].0 < line[1].0 && line[1].0 < line[2].0);
        assert!(line[0].1 > line[1].1 && line[1].1 > line[2].1);
        let halfway = (line[1].1 - line[0].1).abs_diff(line[2].1 - line[1].1) <= 1;
        assert_eq!(halfway, log, "{line:?}");
    }
}

#[test]
fn what_cannot_be_shown_is_left_out_and_nothing_at_all_is_an_error() {
    let odd = [(0.0, f64::NAN), (1.0, 1.0), (f64::INFINITY, 2.0), (2.0, 0.0), (3.0, 4.0)];
    assert_eq!(polylines(&curves(&plot(&[series(&odd)], &[], true)).unwrap())[0].len(), 2);
    assert_eq!(polylines(&curves(&plot(&[series(&odd)], &[], false)).unwrap())[0].len(), 3);
    for points in [&[][..], &[(1.0, -1.0)], &[(f64::NAN, 1.0)]] {
        let error = curves(&plot(&[series(points)], &[], true)).unwrap_err();
        assert_eq!(error, PlotError::NoPoints("Loss & <KL>".to_string()));
    }
}

#[test]
fn names_stand_at_the_columns_of_the_frame() {
    let (x, y) =
        (Axis::linear([3.0, 77.0].into_iter(), 0.0).unwrap(), Axis::linear([0.0, 1.0].into_iter(), 0.0).unwrap());
    let mut seen = Vec::new();
    svg(|page| {
        let frame = frame(page, 80, 700, &x, &y)?;
        seen.extend((3..=77).map(|value| (frame.backend_coord(&(value.into(), 0.5)).0, column(&x, 700, value.into()))));
        Ok(())
    })
    .unwrap();
    assert!(seen.iter().all(|(drawn, reckoned)| drawn == reckoned), "{seen:?}");
}

proptest! {
    #[test]
    fn names_of_stages_keep_clear_of_each_other(widths in prop::collection::vec((1..400_u32, 0..24_usize), 1..9)) {
        let mut start = 0;
        let stages: Vec<Stage> = widths.iter().map(|(width, letters)| {
            start += width;
            Stage { name: "m".repeat(*letters), start: f64::from(start) }
        }).collect();
        let x = Axis::linear([0.0, f64::from(start) * 1.25].into_iter(), 0.0).unwrap();
        let right = right_end(&stages, &x);
        let names = stage_names(&stages, &x, right);
        prop_assert_eq!(names.len(), stages.len());
        for (index, name) in names.iter().enumerate() {
            let end = name.column + name_width(name.text);
            prop_assert!(end <= RIGHT + 1 && name.column <= right);
            for other in names[index + 1..].iter().filter(|other| other.column < end) {
                // The other's line, up to its row, would cross this name; this name's line is left of the other's.
                prop_assert!(other.row < name.row && other.column >= name.column, "{names:?}");
            }
        }
    }

    #[test]
    fn thinning_keeps_the_outline(heights in prop::collection::vec(-9..9_i32, 1..200), width in 1..20_usize) {
        let points: Vec<(f64, f64)> =
            heights.iter().enumerate().map(|(index, height)| (index as f64, f64::from(*height))).collect();
        let column = |x: f64| (x / width as f64) as i32;
        let kept = thin(points.iter().copied(), column);
        prop_assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for run in points.chunks(width) {
            let here = |point: &(f64, f64)| column(point.0) == column(run[0].0);
            let inside: Vec<(f64, f64)> = kept.iter().copied().filter(here).collect();
            let range = |points: &[(f64, f64)]| {
                points.iter().fold((f64::MAX, f64::MIN), |(low, high), point| (low.min(point.1), high.max(point.1)))
            };
            prop_assert!(inside.len() <= 4 && inside.iter().all(|point| run.contains(point)));
            prop_assert_eq!(range(&inside), range(run));
            prop_assert_eq!((inside.first(), inside.last()), (run.first(), run.last()));
        }
    }
}

#[test]
fn the_least_important_layers_are_marked_and_every_bar_has_its_rank() {
    let scores = [Some(3.0), Some(-0.5), None, Some(1.0), Some(f64::NAN)];
    let plot =
        Importance { title: "LOO", score: "loss (nats)", scores: &scores, order: &[1, 3, 0, 4], chosen: &[1, 3] };
    let svg = importance(&plot).unwrap();
    let colour = |colour: RGBColor| format!("fill=\"#{:02X}{:02X}{:02X}\"", colour.0, colour.1, colour.2);
    let bars = |fill| svg.lines().filter(|line| line.starts_with("<rect") && line.contains(&colour(fill))).count();
    // One more each, in the legend.
    assert_eq!((bars(COLOURS[1]), bars(COLOURS[0]), bars(ABSENT)), (2 + 1, 1 + 1, 1 + 1));
    let texts: Vec<&str> = svg.lines().filter(|line| ["1", "2", "3", "4"].contains(line)).collect();
    // Layers 1 to 4 below the axis, and two ticks of y, as well as the three ranks.
    for rank in ["1", "2", "3"] {
        assert!(texts.iter().filter(|text| **text == rank).count() >= 2, "{texts:?}");
    }
    assert!(svg.contains("Mamba already"));
    let none = Importance { scores: &[None, Some(f64::NAN)], ..plot };
    assert_eq!(importance(&none).unwrap_err(), PlotError::NoPoints("LOO".to_string()));
}

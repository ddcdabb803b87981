//! The report's pictures: line and bar charts as SVG text.

use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::prelude::*;

/// One line or one set of bars.
#[derive(Debug, Clone)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// Points (x, y).
    pub points: Vec<(f64, f64)>,
}

/// What a chart shows.
#[derive(Debug, Clone)]
pub struct Chart {
    /// Title.
    pub title: String,
    /// X axis with its unit.
    pub x: String,
    /// Y axis with its unit.
    pub y: String,
    /// Logarithmic x axis.
    pub log_x: bool,
    /// Logarithmic y axis.
    pub log_y: bool,
    /// What is drawn.
    pub series: Vec<Series>,
}

const SIZE: (u32, u32) = (640, 360);
/// Okabe and Ito's palette, readable with any colour vision.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

type Drawn = Result<(), Box<dyn std::error::Error>>;

impl Chart {
    /// The chart as an SVG element, or `None` when no point can be drawn on its axes.
    pub fn svg(&self) -> Option<String> {
        let usable = |(x, y): &(f64, f64)| {
            x.is_finite() && y.is_finite() && (!self.log_x || *x > 0.0) && (!self.log_y || *y > 0.0)
        };
        let series: Vec<Series> = self
            .series
            .iter()
            .map(|s| Series {
                name: s.name.clone(),
                points: s.points.iter().copied().filter(usable).collect(),
            })
            .collect();
        let all = || series.iter().flat_map(|s| s.points.iter().copied());
        let (x_low, x_high) = bounds(all().map(|p| p.0))?;
        let (y_low, y_high) = bounds(all().map(|p| p.1))?;
        let x_range = if self.log_x {
            spread_log(x_low, x_high)
        } else {
            spread(x_low, x_high, false)
        };
        let y_range = if self.log_y {
            spread_log(y_low, y_high)
        } else {
            spread(y_low, y_high, true)
        };
        let mut svg = String::new();
        let drawn: Drawn = {
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            let mut builder = ChartBuilder::on(&area);
            builder
                .caption(&self.title, ("sans-serif", 16))
                .margin(10)
                .x_label_area_size(38)
                .y_label_area_size(62);
            match (self.log_x, self.log_y) {
                (false, false) => builder
                    .build_cartesian_2d(x_range, y_range)
                    .map_err(Into::into)
                    .and_then(|c| self.draw(c, &series)),
                (true, false) => builder
                    .build_cartesian_2d(x_range.log_scale(), y_range)
                    .map_err(Into::into)
                    .and_then(|c| self.draw(c, &series)),
                (false, true) => builder
                    .build_cartesian_2d(x_range, y_range.log_scale())
                    .map_err(Into::into)
                    .and_then(|c| self.draw(c, &series)),
                (true, true) => builder
                    .build_cartesian_2d(x_range.log_scale(), y_range.log_scale())
                    .map_err(Into::into)
                    .and_then(|c| self.draw(c, &series)),
            }
        };
        drawn.ok().map(|()| svg)
    }

    fn draw<'a, X, Y>(
        &self,
        mut chart: ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
        series: &[Series],
    ) -> Drawn
    where
        X: Ranged<ValueType = f64> + ValueFormatter<f64>,
        Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .x_label_formatter(&|v| short(*v))
            .y_label_formatter(&|v| short(*v))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (i, s) in series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            chart
                .draw_series(LineSeries::new(
                    s.points.iter().copied(),
                    colour.stroke_width(2),
                ))?
                .label(&s.name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2))
                });
            if s.points.len() <= 40 {
                chart.draw_series(s.points.iter().map(|p| Circle::new(*p, 3, colour.filled())))?;
            }
        }
        if series.len() > 1 {
            chart
                .configure_series_labels()
                .position(free_corner(series))
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.2))
                .draw()?;
        }
        Ok(())
    }
}

/// The corner on the right that the first line leaves free.
fn free_corner(series: &[Series]) -> SeriesLabelPosition {
    let points = series.first().map_or(&[][..], |s| &s.points);
    match (points.first(), points.last()) {
        (Some(first), Some(last)) if last.1 < first.1 => SeriesLabelPosition::UpperRight,
        _ => SeriesLabelPosition::LowerRight,
    }
}

fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |b, v| {
        Some(b.map_or((v, v), |(lo, hi): (f64, f64)| (lo.min(v), hi.max(v))))
    })
}

/// A linear range with some room; starts at zero when asked and possible.
fn spread(low: f64, high: f64, from_zero: bool) -> std::ops::Range<f64> {
    let low = if from_zero && low >= 0.0 { 0.0 } else { low };
    let room = if high > low {
        (high - low) * 0.05
    } else {
        high.abs().max(1.0) * 0.05
    };
    let start = if from_zero && low == 0.0 {
        0.0
    } else {
        low - room
    };
    start..high + room
}

fn spread_log(low: f64, high: f64) -> std::ops::Range<f64> {
    low / 1.2..high * 1.2
}

/// A tick label: at most four characters of number and a suffix.
fn short(value: f64) -> String {
    let size = value.abs();
    if size >= 1e9 {
        format!("{:.3}G", value / 1e9).replace(".000", "")
    } else if size >= 1e6 {
        format!("{}M", trim(value / 1e6))
    } else if size >= 1e4 {
        format!("{}K", trim(value / 1e3))
    } else if size >= 0.01 || value == 0.0 {
        trim(value)
    } else {
        format!("{value:.0e}")
    }
}

fn trim(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>, log_y: bool) -> Chart {
        Chart {
            title: "t".into(),
            x: "x".into(),
            y: "y".into(),
            log_x: false,
            log_y,
            series: vec![Series {
                name: "s".into(),
                points,
            }],
        }
    }

    #[test]
    fn draws_every_point_and_nothing_without_points() {
        let svg = chart(vec![(1.0, 2.0), (2.0, 4.0)], false).svg().unwrap();
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(chart(vec![], false).svg().is_none());
        assert!(chart(vec![(1.0, f64::NAN)], false).svg().is_none());
        let svg = chart(vec![(1.0, 0.0), (2.0, 4.0)], true).svg().unwrap();
        assert_eq!(
            svg.matches("<circle").count(),
            1,
            "a zero has no place on a logarithmic axis"
        );
    }
}

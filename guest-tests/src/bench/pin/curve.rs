//! What mapping memory for a device costs over its size: a line for each kind, beside it a dashed one for the bare program.
//!
//! Both axes are logarithmic: kinds are orders of magnitude apart, and what grows with the size is then a straight line.

use std::error::Error;
use std::path::Path;

use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::Memory;
use super::attach::Outcome;
use crate::bench::boot::BenchError;

const SIZE: (u32, u32) = (800, 500);
/// Of a decade: room for what is drawn at the edges.
const ROOM: f64 = 1.5;
/// Of the bare program's lines, in pixels.
const DASH: u32 = 6;
const GAP: u32 = 5;

/// A line: its name, its kind, whether it is the bare program's, and its points in GiB and milliseconds.
struct Line {
    name: String,
    memory: Memory,
    is_bare: bool,
    points: Vec<(f64, f64)>,
}

/// Draws the medians.
pub(super) fn draw(path: &Path, release: &str, outcomes: &[Outcome]) -> Result<(), BenchError> {
    let failed = |source| BenchError::Draw {
        path: path.to_owned(),
        source,
    };
    let text = svg(release, &lines(outcomes)).map_err(failed)?;
    std::fs::write(path, text).map_err(|error| failed(error.into()))
}

fn lines(outcomes: &[Outcome]) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for outcome in outcomes {
        let (own, bare) = outcome.map_medians();
        let what = format!(
            "{}, {}",
            outcome.memory().name(),
            outcome.interface().word()
        );
        for (who, is_bare, seconds) in [("daxhund", false, own), ("bare", true, bare)] {
            let name = format!("{what}: {who}");
            let point = (outcome.gib(), seconds * 1e3);
            match lines.iter_mut().find(|line| line.name == name) {
                Some(line) => line.points.push(point),
                None => lines.push(Line {
                    name,
                    memory: outcome.memory(),
                    is_bare,
                    points: vec![point],
                }),
            }
        }
    }
    lines
}

fn svg(release: &str, lines: &[Line]) -> Result<String, Box<dyn Error + Send + Sync>> {
    let mut text = String::new();
    {
        let points = || lines.iter().flat_map(|line| &line.points);
        let range = |of: fn(&(f64, f64)) -> f64| {
            let least = points().map(of).fold(f64::INFINITY, f64::min);
            let most = points().map(of).fold(0.0, f64::max);
            least / ROOM..most * ROOM
        };
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(
                format!("Mapping guest memory for a device, host kernel {release}"),
                ("sans-serif", 18),
            )
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(70)
            .build_cartesian_2d(
                range(|point| point.0).log_scale(),
                range(|point| point.1).log_scale(),
            )?;
        chart
            .configure_mesh()
            .x_desc("GiB")
            .y_desc("median, ms (emulated)")
            .max_light_lines(1)
            .draw()?;
        for line in lines {
            let colour = colour(line.memory);
            let points = line.points.iter().copied();
            let key = |(x, y)| [(x, y), (x + 20, y)];
            if line.is_bare {
                chart
                    .draw_series(DashedLineSeries::new(points, DASH, GAP, colour.into()))?
                    .label(&line.name)
                    .legend(move |at| DashedPathElement::new(key(at), DASH, GAP, colour));
            } else {
                chart
                    .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
                    .label(&line.name)
                    .legend(move |at| PathElement::new(key(at), colour.stroke_width(2)));
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .draw()?;
        area.present()?;
    }
    Ok(text)
}

fn colour(memory: Memory) -> RGBColor {
    match memory {
        Memory::Dax => BLUE,
        Memory::Hugetlb => RGBColor(0, 130, 60),
        Memory::Anonymous => RED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_two_lines() {
        let outcomes = [
            Outcome::example(Memory::Dax, 1, 10),
            Outcome::example(Memory::Dax, 4, 40),
            Outcome::example(Memory::Anonymous, 1, 1000),
            Outcome::example(Memory::Anonymous, 4, 4000),
        ];
        let lines = lines(&outcomes);
        assert_eq!(lines.len(), 4);
        assert!(lines.iter().all(|line| line.points.len() == 2));
        let text = svg("6.12", &lines).unwrap();
        for line in &lines {
            assert!(text.contains(&line.name), "{} in {text}", line.name);
        }
    }
}

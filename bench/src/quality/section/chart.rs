//! The picture: perplexity ratio by cache fraction, one line a method.

use super::Results;
use crate::quality::jobs::Conversion;
use crate::quality::mlac::Runner;
use mlac::report::charts::{Chart, Series};

impl<R: Runner> Results<'_, R> {
    /// Ratio by cache, a line for each method; nothing where one size gives no line.
    pub fn chart(&self) -> Option<String> {
        if self.request.sizes.len() < 2 {
            return None;
        }
        let mut series: Vec<Series> = self
            .methods()
            .iter()
            .map(|&method| {
                let mut points: Vec<(f64, f64)> = self
                    .request
                    .sizes
                    .iter()
                    .filter_map(|&size| {
                        let conversion = Conversion::plain(self.request, method, size);
                        Some((self.share(size), self.main_ratio(&conversion).ok()?))
                    })
                    .collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                Series {
                    name: method.name().to_owned(),
                    points,
                }
            })
            .collect();
        let mut theirs: Vec<(f64, f64)> = self
            .request
            .sizes
            .iter()
            .filter_map(|&size| {
                let text = self.transmla_itself(size)?;
                Some((self.share(size), text.split(' ').next()?.parse().ok()?))
            })
            .collect();
        theirs.sort_by(|a, b| a.0.total_cmp(&b.0));
        series.push(Series {
            name: "TransMLA's own code".to_owned(),
            points: theirs,
        });
        series.retain(|s| !s.points.is_empty());
        Chart {
            title: format!("Perplexity at equal cache: {}", self.model()),
            x: "cache, share of GQA's".to_owned(),
            y: "perplexity / original's".to_owned(),
            log_x: false,
            log_y: true,
            series,
        }
        .svg()
    }
}

//! The times as one picture: a block of bars for every shape, ours and the peers', the shortest first.

use std::fmt::Write as _;

use super::results::Results;

const ROW: f64 = 18.0;
const LEFT: f64 = 420.0;
const WIDTH: f64 = 500.0;

struct Bar {
    name: String,
    microseconds: f64,
    peer: bool,
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

impl Results {
    /// The bars of a shape, shortest first.
    fn bars(&self, shape: (u32, u32)) -> Vec<Bar> {
        let mut bars: Vec<Bar> = self
            .bench
            .iter()
            .filter(|b| (b.batch, b.context) == shape)
            .map(|b| Bar {
                name: b.kernel.clone(),
                microseconds: b.microseconds,
                peer: false,
            })
            .collect();
        bars.extend(
            self.peers
                .iter()
                .filter(|p| (p.batch, p.context) == shape)
                .filter_map(|p| {
                    Some(Bar {
                        name: p.name.clone(),
                        microseconds: p.microseconds?,
                        peer: true,
                    })
                }),
        );
        bars.sort_by(|a, b| a.microseconds.total_cmp(&b.microseconds));
        bars
    }

    /// The times as an SVG picture.
    pub fn svg(&self) -> String {
        let mut shapes: Vec<(u32, u32)> = self.bench.iter().map(|b| (b.batch, b.context)).collect();
        shapes.sort_unstable();
        shapes.dedup();
        let mut body = String::new();
        let mut y = 40.0;
        for shape in shapes {
            let bars = self.bars(shape);
            let longest = bars.iter().map(|b| b.microseconds).fold(0.0, f64::max);
            let _ = writeln!(
                body,
                "<text x=\"10\" y=\"{y}\" font-weight=\"bold\">batch {} x {} tokens</text>",
                shape.0, shape.1
            );
            y += ROW;
            for bar in bars {
                let width = WIDTH * bar.microseconds / longest;
                let fill = if bar.peer { "#b0622b" } else { "#2b6cb0" };
                let _ = writeln!(
                    body,
                    "<text x=\"{}\" y=\"{y}\" text-anchor=\"end\">{}</text><rect x=\"{LEFT}\" y=\"{}\" width=\"{width:.1}\" \
                     height=\"12\" fill=\"{fill}\"/><text x=\"{:.1}\" y=\"{y}\">{:.1} us</text>",
                    LEFT - 8.0,
                    escape(&bar.name),
                    y - 10.0,
                    LEFT + width + 6.0,
                    bar.microseconds
                );
                y += ROW;
            }
            y += ROW;
        }
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"1020\" height=\"{y}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"10\" y=\"20\" font-size=\"15\">Attention over a paged cache on {}: microseconds, blue ours, brown peers'</text>\n{body}</svg>\n",
            escape(&self.device)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::Peer;
    use super::super::results::{Bench, Results};
    use crate::{Arch, AttentionDesc};

    #[test]
    fn bars_are_as_long_as_their_times_and_failed_peers_have_none() {
        let bench = |kernel: &str, context, microseconds| Bench {
            kernel: kernel.to_owned(),
            batch: 1,
            context,
            microseconds,
            gigabytes_per_second: 1.0,
            teraflops: 1.0,
            copy_fraction: 0.5,
            matmul_fraction: Some(0.25),
            over_gqa: None,
            over_best_gqa: None,
        };
        let peer = |name: &str, microseconds| Peer {
            name: name.to_owned(),
            desc: AttentionDesc::grouped(64, 8, 64, Arch::Sm90a),
            batch: 1,
            context: 4096,
            microseconds,
            gigabytes_per_second: 1.0,
            teraflops: 1.0,
            complaint: None,
        };
        let results = Results {
            device: "a <GPU>".to_owned(),
            multiprocessors: 1,
            seed: 1,
            copy_gigabytes_per_second: 1.0,
            matmul: None,
            parity: Vec::new(),
            sanitized: Vec::new(),
            append: Vec::new(),
            bench: vec![bench("long", 4096, 40.0), bench("other shape", 64, 3.0)],
            splits: Vec::new(),
            peers: vec![peer("short", Some(10.0)), peer("compared only", None)],
            skipped: Vec::new(),
        };
        let svg = results.svg();
        assert!(
            svg.contains("a &lt;GPU>") && !svg.contains("compared only"),
            "{svg}"
        );
        let (short, long) = (svg.find(">short<").unwrap(), svg.find(">long<").unwrap());
        assert!(short < long, "{svg}");
        assert!(
            svg[short..long].contains("width=\"125.0\"") && svg[long..].contains("width=\"500.0\""),
            "{svg}"
        );
        assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count());
    }
}

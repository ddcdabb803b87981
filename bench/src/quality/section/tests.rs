use super::super::harness::tests::{Fake, harness, request};
use super::super::jobs::jobs;
use super::figures::{mean_and_deviation, paired_error, percent, show};
use super::*;

const STEPS: [(&str, &str); 3] = [
    ("allocation", "ranks by layer"),
    ("basis", "a basis"),
    ("refit", "a refit"),
];

fn body(extra: &str, refuses: Option<&'static str>, skip: usize) -> (String, Option<String>) {
    let work = tempfile::tempdir().unwrap();
    let request = request(work.path(), extra);
    let harness = harness(&request, Fake::new(refuses));
    let all = jobs(&request, &STEPS.map(|(name, _)| name));
    let entries: Vec<Entry> = all[..all.len() - skip]
        .iter()
        .map(|job| harness.run(job).unwrap())
        .collect();
    let results = Results::new(&request, &harness, &entries, &STEPS, true);
    let chart = results.chart();
    let link = chart.is_some().then_some("quality.svg");
    (results.body(link), chart)
}

fn line<'a>(text: &'a str, start: &str) -> &'a str {
    text.lines()
        .find(|l| l.starts_with(start))
        .unwrap_or_else(|| panic!("no {start:?} in:\n{text}"))
}

#[test]
fn every_table_has_its_rows() {
    let (text, chart) = body("", None, 0);
    assert!(text.starts_with(
        "Figures are the converted model's perplexity over the original's 20.0000, by `mlac eval` on the first 2 windows of 2048"
    ));
    assert_eq!(
        line(&text, "| cache"),
        "| cache | r + d_r | recipe | recipe-refined | recipe-uniform | transmla | svd |"
    );
    assert_eq!(
        line(&text, "| 37.5 %"),
        "| 37.5 % | 80 + 64 | 1.100 | 1.100 | 1.100 | 1.100 | 1.100 |"
    );
    assert_eq!(
        line(&text, "| 25 % | 96 to"),
        "| 25 % | 96 to 160 | 64 | 192.0 | 96 |"
    );
    assert_eq!(
        line(&text, "| recipe | 80 + 64"),
        "| recipe | 80 + 64 | 1.100, 1.100, 1.100 | 1.100 | 0.0000 |"
    );
    assert!(line(&text, "| 8192 ").starts_with("| 8192 | 2 | 20.00 | 1.100"));
    assert_eq!(
        line(&text, "| `refit`"),
        "| `refit` | a refit | 1.100 | +0.000 | 0.000 |"
    );
    assert_eq!(text.matches("| nothing |").count(), 2);
    assert!(!text.contains("`allocation`") && !text.contains("failed"));
    assert!(text.contains(
        "mlac convert SmolLM2.gguf -o mla --calib train.txt --budget 0.75 --gradients gradients-0.safetensors --json\n"
    ));
    assert!(!text.contains("/models") && !text.contains("converted-"));
    assert!(text.contains("200 gradient steps on every layer: it is not free of training"));
    let chart = chart.unwrap();
    assert_eq!(chart.matches("<circle").count(), 5 * 5);
}

#[test]
fn what_failed_or_is_missing_is_said() {
    let (text, chart) = body("", Some("transmla"), 0);
    assert!(line(&text, "| 50 %").ends_with("| 1.100 | 1.100 | failed | 1.100 |"));
    assert_eq!(
        line(&text, "| transmla 128 + 64"),
        r"| transmla 128 + 64, seed 0 | SmolLM2.gguf: no \| thanks |"
    );
    assert_eq!(chart.unwrap().matches("<circle").count(), 4 * 5);
    let (text, _) = body("--ablation 128+64", None, 1);
    assert_eq!(
        line(&text, "| `refit`"),
        "| `refit` | a refit | not run | - | - |"
    );
}

#[test]
fn tables_not_asked_for_are_left_out() {
    let few = "--sizes 64+32 --seeds 4 --windows-list none --ablation none --methods recipe";
    let (text, _) = body(few, None, 0);
    assert!(!text.contains("gradient steps"), "nothing here was refined");
    assert!(!text.contains(".svg"), "one size gives no line");
    assert!(!text.contains("### By") && !text.contains("### Without"));
    assert!(text.contains("--calib-seed 4"));
}

#[test]
fn figures_of_transmla_stand_only_where_they_were_measured() {
    let work = tempfile::tempdir().unwrap();
    let mut request = request(work.path(), "--sizes 128+64,16+32,100+20");
    let theirs = |request: &Request, perplexity: f64| {
        let harness = harness(request, Fake::new(None));
        let mut entry = harness.run(&Job::original(Windows::main(request))).unwrap();
        entry.measured[0].perplexity = Some(perplexity);
        let entries = [entry];
        let results = Results::new(request, &harness, &entries, &STEPS, true);
        let all: Vec<_> = request
            .sizes
            .iter()
            .map(|&s| results.transmla_itself(s))
            .collect();
        all
    };
    assert_eq!(
        theirs(&request, 19.1341),
        [None, None, None],
        "another model"
    );
    request.model = "/models/SmolLM2-135M-Instruct.Q4_1.gguf".into();
    assert_eq!(
        theirs(&request, 19.1341),
        [
            Some("1.89".to_owned()),
            Some("17.6 (at 32 + 16)".to_owned()),
            None
        ]
    );
    assert_eq!(theirs(&request, 21.4), [None, None, None], "another text");
    request.eval_windows = 4;
    assert_eq!(theirs(&request, 19.1341), [None, None, None]);
}

#[test]
fn spreads_and_errors() {
    assert_eq!(mean_and_deviation(&[]), (None, None));
    assert_eq!(mean_and_deviation(&[2.0]), (Some(2.0), None));
    let (mean, deviation) = mean_and_deviation(&[1.0, 3.0]);
    assert_eq!(mean, Some(2.0));
    assert!((deviation.unwrap() - 2.0_f64.sqrt()).abs() < 1e-12);
    assert_eq!(paired_error(&[1.0], &[1.0, 2.0]), None);
    assert!((paired_error(&[1.0, 3.0], &[0.0, 0.0]).unwrap() - 1.0).abs() < 1e-12);
    assert_eq!(
        [1.2345, 12.345, 123.45, 12345.0].map(show),
        ["1.234", "12.35", "123", "1.2e4"]
    );
    assert_eq!(percent(0.125), "12.5 %");
}

//! The refit's compensation: the residual stream of a converted model stays nearer to the original's.

mod common;

use std::fs;

use common::Bench;

/// Distance of the two residual streams after the last layer.
fn distance(bench: &Bench, output: &str, steps: &str) -> f64 {
    let text = bench.text("text.txt", 12000);
    let text = text.to_str().expect("a file of the test");
    let args = [
        "convert",
        "model",
        "-o",
        output,
        "--layers",
        "all",
        "--calib",
        text,
        "--calib-windows",
        "16",
        "--calib-window",
        "64",
        "--kv-lora-rank",
        "6",
        "--rope-dim",
        "4",
        steps,
    ];
    bench.run(&args).succeeds();
    let bytes = fs::read(bench.path(output).join("mlac.json")).expect("a file of the test");
    let record: serde_json::Value = serde_json::from_slice(&bytes).expect("a file of the test");
    let layers = record["layers"].as_array().expect("layers");
    assert!(layers.len() > 1, "nothing to make up for in one layer");
    layers[layers.len() - 1]["stream_error"]
        .as_f64()
        .expect("a distance")
}

#[test]
fn streams_stay_nearer_with_it() {
    for name in ["llama_tied_bias", "qwen2_bias", "gpt_oss_dense"] {
        let bench = Bench::with(name);
        let with = distance(&bench, "with", "--steps=-allocation");
        let without = distance(&bench, "without", "--steps=-compensation");
        assert!(
            with < without,
            "{name}: {with} with, {without} without"
        );
    }
}

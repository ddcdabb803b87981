//! `mlac export --form ort-cuda`: what the folder says of itself, and what is refused. `tests/tests/cuda_provider` runs the graph.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "a test that cannot go on says why by panicking"
)]

mod common;

use std::fs;

use common::{Bench, Run};

/// Runs `mlac` with a cache of kernels in the test's folder.
fn run(bench: &Bench, args: &[&str]) -> Run {
    let mut command = bench.command(args);
    command.env("MLAC_KERNEL_CACHE", bench.path("cubins"));
    Run(command.output().unwrap())
}

/// An MLA checkpoint with these ranks in `mla`.
fn converted(rank: &str, rope: &str) -> Bench {
    // Its KV heads have 96 numbers, the least that the kernels' ranks take among the fixtures.
    let bench = Bench::with("gpt_oss_mxfp4");
    let ranks = ["--kv-lora-rank", rank, "--rope-dim", rope];
    let args = ["convert", "model", "-o", "mla", "--calib", "none"];
    bench.run(&[&args[..], &ranks].concat()).succeeds();
    bench
}

const EXPORT: [&str; 8] = [
    "export", "mla", "-o", "cuda", "--form", "ort-cuda", "--target", "sm_90a",
];

#[test]
fn the_folder_says_what_it_is_for_and_the_cpu_refuses_it() {
    let bench = converted("64", "32");
    let said = run(&bench, &EXPORT).succeeds();
    assert!(said.contains("on sm_90a; not run on a GPU"), "{said}");
    let facts: serde_json::Value =
        serde_json::from_slice(&fs::read(bench.path("cuda/mlac.json")).unwrap()).unwrap();
    let expected = serde_json::json!({
        "form": "ort-cuda", "provider": "CUDAExecutionProvider", "architecture": "sm_90a", "compute_capability": [9, 0],
        "query_tokens": [1, 16], "capacity_multiple": 64, "run_on_a_gpu": false
    });
    assert_eq!(facts, expected);
    assert!(!bench.path("cuda/prefill.onnx").exists());
    let text = bench.text("text.txt", 400);
    let text = text.to_str().unwrap();
    for command in [
        &["generate", "cuda", "--prompt", "a jar"][..],
        &["verify", "mla", "cuda", "--tokens", "16"],
        &["eval", "cuda", "--text", text, "--window", "16"],
        &["bench", "cuda", "--contexts", "16"],
    ] {
        run(&bench, command).refuses(&[
            "one for its CUDAExecutionProvider on sm_90a (form ort-cuda)",
            "--form ort",
        ]);
    }
}

#[test]
fn what_the_form_does_not_take_is_refused_by_name() {
    let bench = converted("64", "32");
    let refuses = |args: &[&str], words: &[&str]| {
        run(&bench, args).refuses(words);
        assert!(!bench.path("cuda").exists());
    };
    refuses(&EXPORT[..6], &["--target", "--target sm_90a"]);
    refuses(&[&EXPORT[..7], &["sm_75"]].concat(), &["sm_80, sm_86"]);
    refuses(
        &[&EXPORT[..], &["--dtype", "f32"]].concat(),
        &["f16, which its kernels take"],
    );
    let other = [&EXPORT[..4], &["--form", "ort", "--target", "sm_90a"]].concat();
    refuses(&other, &["the only form that is for one GPU"]);
    let operator = [&EXPORT[..], &["--gqa-form", "operator"]].concat();
    refuses(&operator, &["GroupQueryAttention"]);
    let mut source = EXPORT;
    source[1] = "model";
    refuses(&source, &["converted layers"]);

    let bench = converted("32", "32");
    run(&bench, &EXPORT).refuses(&[
        "layer 1: kernel kv_lora_rank",
        "--align 64",
        "--kv-lora-rank",
    ]);
    let bench = converted("64", "8");
    run(&bench, &EXPORT).refuses(&["layer 1: kernel qk_rope_head_dim", "--rope-dim"]);
}

//! Every command on a tiny model: what it prints, what it leaves, how it exits.

mod common;

use std::fs;

use common::{Bench, contents};

/// GPT-OSS: sliding layers hold their window, the others everything; what the plan says is what
/// the graph returns, before and after the window's edge.
#[test]
fn the_plan_of_a_model_with_windows_is_what_the_graph_caches() {
    let bench = Bench::with("gpt_oss_mxfp4");
    for layers in ["full", "all"] {
        let (mla, onnx) = (format!("mla-{layers}"), format!("onnx-{layers}"));
        let ranks = ["--budget", "0.4", "--layers", layers];
        bench
            .run(
                &[
                    &["convert", "model", "-o", &mla, "--calib", "none"],
                    &ranks[..],
                ]
                .concat(),
            )
            .succeeds();
        for file in [
            "configuration_gpt_oss_mla.py",
            "modeling_gpt_oss_mla.py",
            "README.md",
            "tokenizer.json",
        ] {
            assert!(bench.path(&mla).join(file).is_file(), "{file} is missing");
        }
        bench.run(&["export", &mla, "-o", &onnx]).succeeds();
        for prompt in [
            "two",
            "the shelf holds a jar of nails, two maps; and 31 letters",
        ] {
            let said = bench
                .run(&[
                    "generate",
                    &onnx,
                    "--prompt",
                    prompt,
                    "--max-tokens",
                    "4",
                    "--json",
                ])
                .succeeds();
            let said: serde_json::Value = serde_json::from_str(&said).unwrap();
            let tokens = said["cached_tokens"].to_string();
            let cached = ["--contexts", &tokens, "--cache-bytes", "4", "--json"];
            let plan = bench
                .run(&[&["plan", "model"], &ranks[..], &cached].concat())
                .succeeds();
            let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
            assert_eq!(
                plan["cache"][0]["mla_bytes"], said["cache_bytes"],
                "{layers}, {tokens} tokens"
            );
        }
    }
}

#[test]
fn the_parts_of_the_way_one_by_one() {
    let bench = Bench::with("llama_gqa");
    let text = bench.text("text.txt", 4000);
    let text = text.to_str().unwrap();

    let plan = bench
        .run(&["plan", "model", "--budget", "0.5", "--json"])
        .succeeds();
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    let planned = plan["mla_numbers_per_token"].as_u64().unwrap();
    assert!(
        planned * 2 <= plan["gqa_numbers_per_token"].as_u64().unwrap(),
        "{plan}"
    );

    let calibration = [
        "--calib",
        text,
        "--calib-windows",
        "4",
        "--calib-window",
        "64",
    ];
    let mut convert = vec!["convert", "model", "-o", "mla", "--budget", "50%"];
    convert.extend(calibration);
    bench.run(&convert).succeeds();
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(bench.path("mla/mlac.json")).unwrap()).unwrap();
    // The plan without calibration is an even one; a measured one keeps the same budget.
    let cached = record["mla_cache_numbers"].as_u64().unwrap();
    assert!(cached <= planned, "{cached} of {planned} numbers");
    assert_eq!(record["calibration"]["windows"], 4);
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(bench.path("mla/config.json")).unwrap()).unwrap();
    assert_eq!(config["model_type"], "llama_mla");

    bench.run(&["export", "mla", "-o", "onnx"]).succeeds();
    for file in [
        "decoder.onnx",
        "prefill.onnx",
        "decoder.onnx.data",
        "config.json",
        "tokenizer.json",
    ] {
        assert!(bench.path("onnx").join(file).is_file(), "{file} is missing");
    }
    bench
        .run(&[
            "verify", "mla", "onnx", "--text", text, "--tokens", "48", "--steps", "16",
        ])
        .succeeds();
    let lossy = bench.run(&[
        "verify", "model", "onnx", "--text", text, "--tokens", "48", "--json",
    ]);
    assert_eq!(
        lossy.code(),
        1,
        "half a random model's cache cannot be exact: {}",
        lossy.out()
    );

    let mut perplexities = Vec::new();
    for subject in ["mla", "onnx"] {
        let args = [
            "eval",
            subject,
            "--text",
            text,
            "--window",
            "64",
            "--windows",
            "3",
            "--json",
        ];
        let result: serde_json::Value = serde_json::from_str(&bench.run(&args).succeeds()).unwrap();
        assert_eq!(result["losses"].as_array().unwrap().len(), 3);
        perplexities.push(result["perplexity"].as_f64().unwrap());
    }
    assert!(
        (perplexities[0] / perplexities[1] - 1.0).abs() < 1e-4,
        "{perplexities:?}"
    );

    let said = bench
        .run(&[
            "generate",
            "onnx",
            "--prompt",
            "two maps",
            "--max-tokens",
            "5",
            "--json",
        ])
        .succeeds();
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert!(said["tokens"].as_u64().unwrap() <= 5);
    let bytes = said["cache_bytes_per_token"].as_f64().unwrap();
    assert!(
        (bytes - 4.0 * cached as f64).abs() < 1e-9,
        "f32 cache of {cached} numbers, found {bytes} bytes"
    );

    bench.run(&["export", "model", "-o", "gqa"]).succeeds();
    let timed = bench
        .run(&[
            "bench",
            "gqa",
            "onnx",
            "--contexts",
            "32,64",
            "--repeats",
            "2",
            "--json",
        ])
        .succeeds();
    let timed: serde_json::Value = serde_json::from_str(&timed).unwrap();
    assert_eq!(timed[1]["context"], 64);
    assert_eq!(timed[1]["cache_bytes"][1].as_u64(), Some(64 * 4 * planned));
}

#[test]
fn full_rank_is_exact_for_every_architecture() {
    for name in [
        "llama_yarn",
        "mistral_window",
        "qwen2_bias",
        "qwen3_norm",
        "llama_sharded",
        "mistral_bf16",
    ] {
        let bench = Bench::with(name);
        let text = bench.text("text.txt", 200);
        let text = text.to_str().unwrap();
        bench
            .run(&[
                "convert",
                "model",
                "-o",
                "mla",
                "--kv-lora-rank",
                "max",
                "--layers",
                "all",
            ])
            .succeeds();
        bench.run(&["export", "mla", "-o", "onnx"]).succeeds();
        for candidate in ["mla", "onnx"] {
            let args = [
                "verify", "model", candidate, "--text", text, "--tokens", "56", "--steps", "32",
            ];
            let run = bench.run(&args);
            assert_eq!(
                run.code(),
                0,
                "{name} against {candidate}: {}{}",
                run.out(),
                run.err()
            );
        }
    }
}

#[test]
fn what_is_not_converted_is_copied_byte_for_byte_and_runs_repeat() {
    let bench = Bench::with("mistral_bf16");
    let text = bench.text("text.txt", 2000);
    let text = text.to_str().unwrap();
    let convert = |out: &str| {
        let args = [
            "convert",
            "model",
            "-o",
            out,
            "--budget",
            "0.5",
            "--layers",
            "1",
            "--calib",
            text,
            "--calib-windows",
            "2",
            "--calib-window",
            "48",
        ];
        bench.run(&args).succeeds();
        contents(&bench.path(out))
    };
    let first = convert("a");
    assert!(
        first == convert("b"),
        "the same input and recipe give the same bytes"
    );
    let source = mlac_model::Checkpoint::open(bench.model()).unwrap();
    let converted = mlac_model::Checkpoint::open(bench.path("a")).unwrap();
    let mut copied = 0;
    for info in converted.tensors() {
        if info.name.starts_with("model.layers.1.self_attn.") {
            continue;
        }
        assert_eq!(
            source.bytes(&info.name).unwrap(),
            converted.bytes(&info.name).unwrap(),
            "{}",
            info.name
        );
        copied += 1;
    }
    assert!(copied > 5);
}

#[test]
fn compile_leaves_a_report_that_agrees_with_the_plan() {
    let (bench, report) = compiled("llama_gqa", &["--form", "standard"]);
    assert_eq!(report["form"], "standard");
    assert!(bench.path("out/onnx/prefill.onnx").is_file());
}

#[test]
fn compile_for_onnx_runtime_does_all_of_it_on_the_graph_with_the_operator() {
    // With a window of 5: its caches are rings.
    let (bench, report) = compiled("mistral_window", &["--form", "ort", "--layers", "all"]);
    assert_eq!(report["form"], "ort");
    assert!(!bench.path("out/onnx/prefill.onnx").exists());
    let graph = fs::read(bench.path("out/onnx/decoder.onnx")).unwrap();
    let operator = b"LatentAttention";
    assert!(graph.windows(operator.len()).any(|at| at == operator));
    let page = fs::read_to_string(bench.path("out/report.html")).unwrap();
    assert!(page.contains("ort: mlac::LatentAttention"));
    // The printed commands give the figures again.
    let parity = report["parity"].as_array().unwrap();
    let ort = parity.iter().find(|row| {
        let what = row["what"].as_str().unwrap();
        what.starts_with("converted:") && what.contains("mlac's operators")
    });
    let command = ort.unwrap()["command"].as_str().unwrap();
    let words: Vec<&str> = command.split(' ').skip(1).collect();
    bench.run(&words).succeeds();
    let command = report["decode_command"].as_str().unwrap();
    let words: Vec<&str> = command.split(' ').skip(1).collect();
    let table = bench.run(&words).succeeds();
    assert_eq!(
        table.contains("B / C"),
        report["operator_left_out"].is_null()
    );
}

/// Compiles a fixture, and checks what every report must say.
fn compiled(model: &str, more: &[&str]) -> (Bench, serde_json::Value) {
    let bench = Bench::with(model);
    let text = bench.text("text.txt", 4000);
    let text = text.to_str().expect("a path of the test");
    let args = [
        "compile",
        "model",
        "-o",
        "out",
        "--budget",
        "0.5",
        "--calib",
        text,
        "--calib-windows",
        "2",
        "--calib-window",
        "64",
        "--eval",
        text,
        "--eval-window",
        "64",
        "--eval-windows",
        "2",
        "--contexts",
        "16,32",
        "--prompt",
        "a jar",
    ];
    let args: Vec<&str> = args.iter().chain(more).copied().collect();
    // The fixture promises 128 positions, the report's parity text has 256 tokens: still defined for RoPE.
    let out = bench.run(&args).succeeds();
    assert!(
        out.contains("perplexity") && out.contains("passed") && !out.contains("FAILED"),
        "{out}"
    );
    let report: serde_json::Value =
        serde_json::from_slice(&fs::read(bench.path("out/report.json")).expect("the report"))
            .expect("JSON");
    assert!(
        report["mla_cache_numbers"].as_u64() <= report["gqa_cache_numbers"].as_u64().map(|n| n / 2)
    );
    let page = fs::read_to_string(bench.path("out/report.html")).expect("the page");
    assert!(page.matches("<svg").count() >= 5, "five charts");
    assert_eq!(
        page.matches("http").count(),
        page.matches("http://www.w3.org/2000/svg").count(),
        "the page loads nothing from elsewhere"
    );
    assert!(bench.path("out/checkpoint/model.safetensors").is_file());
    // Both baselines, or why one is not there.
    for point in report["decode"].as_array().expect("decode times") {
        let operator = &point["gqa_operator_ms"];
        assert!(operator.is_number() == report["operator_left_out"].is_null());
        assert!(point["gqa_ms"].is_number() && point["mla_ms"].is_number());
    }
    (bench, report)
}

#[test]
fn engines_are_built_and_a_changed_input_is_named() {
    let bench = Bench::with("llama_gqa");
    bench
        .run(&[
            "convert", "model", "-o", "mla", "--budget", "0.5", "--calib", "none",
        ])
        .succeeds();
    bench
        .run(&[
            "export",
            "mla",
            "-o",
            "onnx",
            "--dtype",
            "f16",
            "--tensorrt",
        ])
        .succeeds();
    let shapes = [
        "--max-batch",
        "2",
        "--max-context",
        "128",
        "--max-prefill",
        "64",
    ];
    let mut build = vec!["build", "onnx", "-o", "engines", "--target", "sm89,sm120"];
    build.extend(shapes);
    bench.run(&build).succeeds();
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(bench.path("engines/manifest.json")).unwrap()).unwrap();
    for engine in manifest["engines"].as_array().unwrap() {
        let file = bench.path("engines").join(engine["file"].as_str().unwrap());
        assert_eq!(
            fs::metadata(file).unwrap().len(),
            engine["bytes"].as_u64().unwrap()
        );
    }
    bench
        .run(&["build", "onnx", "-o", "engines", "--check"])
        .succeeds();
    let data = bench.path("onnx/decoder.onnx.data");
    let mut bytes = fs::read(&data).unwrap();
    bytes[0] ^= 1;
    fs::write(&data, bytes).unwrap();
    let stale = bench.run(&["build", "onnx", "-o", "engines", "--check"]);
    assert_eq!(stale.code(), 1, "{}", stale.err());
    assert!(
        stale.out().contains("decoder.onnx.data") && stale.out().contains("sha256"),
        "{}",
        stale.out()
    );
    bench
        .run(&["build", "onnx", "-o", "other", "--target", "sm90"])
        .refuses(&["sm90"]);
    assert!(!bench.path("other").exists());
}

/// Distance of the two residual streams after the last layer.
fn stream_distance(bench: &Bench, output: &str, steps: &str) -> f64 {
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
    let metric = if steps.contains("gradient") {
        "Output"
    } else {
        "Gradient"
    };
    assert_eq!(record["recipe"]["metric"], metric, "{steps}");
    let layers = record["layers"].as_array().expect("layers");
    assert!(layers.len() > 1, "nothing to make up for in one layer");
    layers[layers.len() - 1]["stream_error"]
        .as_f64()
        .expect("a distance")
}

#[test]
fn compensation_keeps_the_streams_together() {
    for name in ["llama_tied_bias", "qwen2_bias", "gpt_oss_dense"] {
        let bench = Bench::with(name);
        let with = stream_distance(&bench, "with", "--steps=-gradient");
        let without = stream_distance(&bench, "without", "--steps=-gradient,-compensation");
        assert!(with < without, "{name}: {with} with, {without} without");
        let by_gradients = stream_distance(&bench, "gradients", "--steps=-allocation");
        assert!(
            (by_gradients - with).abs() > 1e-6,
            "{name}: the metric changes nothing"
        );
    }
}

/// `mlac ... | head` ends well; a result that cannot be written is an error.
#[test]
fn a_reader_that_has_seen_enough_is_no_failure_and_a_full_disk_is() {
    let bench = Bench::with("llama_llama3");
    let args = ["plan", "model", "--budget", "0.5"];
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let closed = bench
        .command(&args)
        .stdout(writer)
        .output()
        .expect("mlac runs");
    let said = String::from_utf8_lossy(&closed.stderr);
    assert!(closed.status.success(), "{:?}: {said}", closed.status);
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .expect("a device that is always full");
    let failed = bench
        .command(&args)
        .stdout(full)
        .output()
        .expect("mlac runs");
    let said = String::from_utf8_lossy(&failed.stderr);
    assert_eq!(failed.status.code(), Some(2), "{said}");
    assert!(said.contains("standard output"), "{said}");
}

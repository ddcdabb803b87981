//! `--refine`: what it leaves, that a killed run is taken up, and what it refuses.

mod common;

use std::fs;
use std::path::PathBuf;

use common::{Bench, Run, contents};

fn convert(bench: &Bench, output: &str, more: &[&str]) -> Run {
    let text = bench.text("text.txt", 6000);
    let text = text.to_str().expect("a file of the test");
    let mut args = vec![
        "convert", "model", "-o", output, "--layers", "all", "--calib", text,
    ];
    args.extend(["--calib-windows", "8", "--calib-window", "64"]);
    if !more.iter().any(|a| a.starts_with("--kv-lora-rank")) {
        args.extend(["--kv-lora-rank", "8", "--rope-dim", "4"]);
    }
    args.extend(more);
    bench.run(&args)
}

fn record(bench: &Bench, output: &str) -> serde_json::Value {
    let bytes = fs::read(bench.path(output).join("mlac.json")).expect("a file of the test");
    serde_json::from_slice(&bytes).expect("a file of the test")
}

/// Something that happens to a kept layer's file.
type Damage = fn(&mut Vec<u8>);

/// One family per form of the encoder.
#[test]
fn layers_get_no_worse_and_the_folder_says_what_was_done() {
    for name in ["llama_tied_bias", "qwen3_norm", "gpt_oss_mxfp4"] {
        let bench = Bench::with(name);
        let run = convert(&bench, "mla", &["--refine", "12", "--refine-rows", "32"]);
        run.succeeds();
        assert!(
            run.err().contains("refining layer 0, step 12 of 12, error"),
            "{}",
            run.err()
        );
        assert!(
            !bench.path("mla.refine").exists(),
            "{name}: removed when it is done"
        );

        let record = record(&bench, "mla");
        assert_eq!(record["refine"]["steps"], 12, "{name}");
        for layer in record["layers"].as_array().unwrap() {
            let refined = &layer["refined"];
            let error = |key: &str| refined[key].as_f64().unwrap();
            assert!(
                error("error_after") <= error("error_before"),
                "{name}: {layer}"
            );
            let taken = error("share") > 0.0;
            assert_eq!(taken, refined["note"].is_null(), "{name}: {refined}");
            assert_eq!(
                (&refined["windows"], &refined["held_out"]),
                (&7.into(), &1.into())
            );
        }
        let card = fs::read_to_string(bench.path("mla/README.md")).unwrap();
        assert!(card.contains("**not free of training**") && card.contains("12 gradient steps"));

        // Still a checkpoint that exports and computes the same in both forms.
        bench.run(&["export", "mla", "-o", "onnx"]).succeeds();
        let text = bench.text("short.txt", 200);
        let text = text.to_str().unwrap();
        let verify = [
            "verify", "mla", "onnx", "--text", text, "--tokens", "48", "--steps", "8",
        ];
        bench.run(&verify).succeeds();
    }
}

#[test]
fn without_steps_the_bytes_are_those_of_a_conversion_without_refinement() {
    let bench = Bench::with("qwen2_bias");
    convert(&bench, "plain", &[]).succeeds();
    convert(&bench, "zero", &["--refine", "0"]).succeeds();
    assert!(contents(&bench.path("plain")) == contents(&bench.path("zero")));
    convert(&bench, "some", &["--refine", "3"]).succeeds();
    assert!(contents(&bench.path("plain")) != contents(&bench.path("some")));
}

#[test]
fn at_full_rank_nothing_is_refined() {
    let bench = Bench::with("llama_gqa");
    let full = ["--kv-lora-rank", "max"];
    // Without the refit, whose ridge is not free of rounding, and without drift every layer is exact.
    let steps = ["--steps=-refit,-sequential"];
    convert(&bench, "plain", &[&full[..], &steps].concat()).succeeds();
    let refined = [&full[..], &steps, &["--refine", "3"]].concat();
    convert(&bench, "refined", &refined).succeeds();
    let layers = &record(&bench, "refined")["layers"];
    for layer in layers.as_array().unwrap() {
        assert_eq!(layer["refined"]["steps"], 0, "{layer}");
    }
    let weights = |name: &str| fs::read(bench.path(name).join("model.safetensors")).unwrap();
    assert!(weights("plain") == weights("refined"));
}

/// A run that was killed after a layer, repeated: the same bytes, without doing that layer again.
#[test]
fn a_killed_run_is_taken_up_and_damaged_layers_are_not() {
    let bench = Bench::with("gpt_oss_dense");
    let options = ["--refine", "10", "--refine-rows", "32"];
    convert(&bench, "whole", &options).succeeds();
    let whole = contents(&bench.path("whole"));
    let layers = record(&bench, "whole")["layers"].as_array().unwrap().len();
    assert!(layers >= 2);

    let kept = |layer: usize| {
        bench
            .path("out.refine")
            .join(format!("layer-{layer}.safetensors"))
    };
    let interrupt = || {
        let text = bench.text("text.txt", 6000);
        let text = text.to_str().unwrap();
        let mut args = vec![
            "convert", "model", "-o", "out", "--layers", "all", "--calib", text,
        ];
        args.extend(["--calib-windows", "8", "--calib-window", "64"]);
        args.extend(["--kv-lora-rank", "8", "--rope-dim", "4"]);
        args.extend(options);
        let mut child = bench
            .command(&args)
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Killed as soon as the first layer is there.
        while !kept(0).exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(
            kept(0).exists() && !bench.path("out").exists(),
            "killed in the middle"
        );
    };
    let repeat = |again: bool, reason: Option<&str>| {
        let run = convert(&bench, "out", &options);
        run.succeeds();
        let err = run.err();
        assert_eq!(err.contains("refining layer 0"), again, "{err}");
        if let Some(reason) = reason {
            assert!(
                err.contains(reason) && err.contains("it is refined again"),
                "{err}"
            );
        }
        assert!(contents(&bench.path("out")) == whole, "the same bytes");
        assert!(!bench.path("out.refine").exists());
        fs::remove_dir_all(bench.path("out")).unwrap();
    };

    interrupt();
    repeat(false, None);

    let damages: [Damage; 4] = [
        |bytes| bytes.truncate(bytes.len() / 2),
        |bytes| *bytes.last_mut().unwrap() ^= 1,
        Vec::clear,
        // The first digit of a figure in the metadata.
        |bytes| {
            let key = b"energy_kept";
            let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
            let digit = bytes[at..].iter().position(u8::is_ascii_digit).unwrap() + at;
            bytes[digit] = if bytes[digit] == b'7' { b'8' } else { b'7' };
        },
    ];
    for damage in damages {
        interrupt();
        let mut bytes = fs::read(kept(0)).unwrap();
        damage(&mut bytes);
        fs::write(kept(0), bytes).unwrap();
        repeat(true, Some("damaged"));
    }

    // Layers of another request.
    interrupt();
    let run = convert(&bench, "out", &["--refine", "11", "--refine-rows", "32"]);
    run.succeeds();
    let err = run.err();
    assert!(
        err.contains("refining layer 0") && err.contains("another source or request"),
        "{err}"
    );
    fs::remove_dir_all(bench.path("out")).unwrap();

    // Layers of another source: one weight of the first layer's experts or norms differs.
    interrupt();
    let model: PathBuf = bench.model().join("model.safetensors");
    let mut bytes = fs::read(&model).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let norm = &json["model.layers.0.post_attention_layernorm.weight"]["data_offsets"][0];
    let at = 8 + header + norm.as_u64().unwrap() as usize;
    bytes[at] ^= 1;
    fs::write(&model, bytes).unwrap();
    let run = convert(&bench, "out", &options);
    run.succeeds();
    assert!(
        run.err().contains("another source or request"),
        "{}",
        run.err()
    );
}

#[test]
fn what_cannot_be_refined_is_refused_before_any_work() {
    let bench = Bench::with("llama_gqa");
    let text = bench.text("text.txt", 4000);
    let text = text.to_str().unwrap();
    let calibrated = ["--calib", text, "--calib-window", "64"];
    for (options, words) in [
        (vec!["--calib", "none"], ["--refine", "calibration text"]),
        (
            [&calibrated[..], &["--calib-windows", "1"]].concat(),
            ["--refine", "--calib-windows"],
        ),
        (
            [&calibrated[..], &["--refine-rows", "0"]].concat(),
            ["--refine-rows", "0"],
        ),
        (
            [&calibrated[..], &["--refine-rate", "nan"]].concat(),
            ["--refine-rate", "NaN"],
        ),
    ] {
        let mut args = vec![
            "convert", "model", "-o", "out", "--budget", "0.5", "--refine", "5",
        ];
        args.extend(options);
        bench.run(&args).refuses(&words);
        assert!(!bench.path("out").exists() && !bench.path("out.refine").exists());
    }
}

/// The whole way, too; its layers lie beside its own output.
#[test]
fn compile_refines_and_leaves_nothing_beside() {
    let bench = Bench::with("llama_gqa");
    let text = bench.text("text.txt", 4000);
    let text = text.to_str().unwrap();
    let mut args = vec![
        "compile", "model", "-o", "out", "--budget", "0.5", "--calib", text,
    ];
    args.extend([
        "--calib-windows",
        "4",
        "--calib-window",
        "64",
        "--contexts",
        "16",
    ]);
    args.extend(["--prompt", "a jar", "--refine", "3"]);
    bench.run(&args).succeeds();
    assert!(!bench.path("out.refine").exists());
    let report = fs::read(bench.path("out/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    assert!(report["layers"][0]["refined"]["error_before"].is_number());
    let page = fs::read_to_string(bench.path("out/report.html")).unwrap();
    assert!(page.contains("after refinement"));
}

//! Bad input is refused with exit code 2, says what and how to mend it, and leaves nothing.

mod common;

use std::fs;
use std::path::Path;
use std::time::Duration;

use common::{Bench, Run, contents};

const CONVERT: [&str; 6] = ["convert", "model", "-o", "out", "--kv-lora-rank", "max"];

/// Damages a copy of the fixture, converts it, and expects a refusal and no output.
#[track_caller]
fn refused(fixture: &str, damage: impl Fn(&Path), words: &[&str]) {
    let bench = Bench::with(fixture);
    damage(&bench.model());
    bench.run(&CONVERT).refuses(words);
    nothing_left(&bench);
}

#[track_caller]
fn nothing_left(bench: &Bench) {
    assert!(
        !bench.path("out").exists(),
        "no output under its final name"
    );
    assert!(
        !bench.path("out.partial").exists(),
        "no half folder after an orderly refusal"
    );
}

fn edit(path: &Path, change: impl Fn(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).expect("a file of the test");
    change(&mut bytes);
    fs::write(path, bytes).expect("a file of the test");
}

fn edit_config(model: &Path, key: &str, value: serde_json::Value) {
    let path = model.join("config.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).expect("a file of the test"))
            .expect("a file of the test");
    json[key] = value;
    fs::write(path, json.to_string()).expect("a file of the test");
}

/// Rewrites the header of a safetensors file.
fn edit_header(path: &Path, change: impl Fn(&mut serde_json::Value)) {
    edit(path, |bytes| {
        let length =
            u64::from_le_bytes(bytes[..8].try_into().expect("a file of the test")) as usize;
        let mut header: serde_json::Value =
            serde_json::from_slice(&bytes[8..8 + length]).expect("a file of the test");
        change(&mut header);
        let text = header.to_string();
        let data = bytes.split_off(8 + length);
        bytes.clear();
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.bytes());
        bytes.extend(data);
    });
}

#[test]
fn a_truncated_shard() {
    let cut = |m: &Path| edit(&m.join("model.safetensors"), |b| b.truncate(b.len() - 100));
    refused("llama_gqa", cut, &["model.safetensors"]);
}

#[test]
fn a_header_longer_than_the_file() {
    let lie = |m: &Path| {
        edit(&m.join("model.safetensors"), |b| {
            b[..8].copy_from_slice(&(1_u64 << 40).to_le_bytes());
        });
    };
    refused("llama_gqa", lie, &["model.safetensors"]);
}

#[test]
fn offsets_that_overlap() {
    let overlap = |m: &Path| {
        edit_header(&m.join("model.safetensors"), |header| {
            let same = header["model.layers.0.self_attn.k_proj.weight"]["data_offsets"].clone();
            header["model.layers.0.self_attn.v_proj.weight"]["data_offsets"] = same;
        });
    };
    refused("llama_gqa", overlap, &["model.safetensors"]);
}

#[test]
fn a_missing_shard() {
    let lose = |m: &Path| fs::remove_file(m.join("model-00002-of-00003.safetensors")).unwrap();
    refused("llama_sharded", lose, &["model-00002-of-00003.safetensors"]);
}

#[test]
fn a_wrong_dtype() {
    let retype = |m: &Path| {
        edit_header(&m.join("model.safetensors"), |header| {
            header["model.layers.0.self_attn.q_proj.weight"]["dtype"] = "I32".into();
        });
    };
    refused(
        "llama_gqa",
        retype,
        &["model.layers.0.self_attn.q_proj.weight", "I32"],
    );
}

#[test]
fn a_shape_that_contradicts_the_configuration() {
    let resize = |m: &Path| edit_config(m, "intermediate_size", 64.into());
    refused("llama_gqa", resize, &["mlp.gate_proj.weight", "64"]);
}

#[test]
fn weights_that_are_not_numbers() {
    for (tensor, what) in [("self_attn.q_proj", "converted"), ("mlp.up_proj", "copied")] {
        let name = format!("model.layers.1.{tensor}.weight");
        let poison = |m: &Path| {
            let path = m.join("model.safetensors");
            edit(&path, |bytes| {
                let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                let header: serde_json::Value =
                    serde_json::from_slice(&bytes[8..8 + length]).unwrap();
                let at = 8 + length + header[&name]["data_offsets"][0].as_u64().unwrap() as usize;
                bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
            });
        };
        println!("a NaN in a {what} tensor");
        refused("llama_gqa", poison, &[&name, "NaN"]);
    }
}

#[test]
fn an_unknown_model_type() {
    let rename = |m: &Path| edit_config(m, "model_type", "quantum_llama".into());
    refused("llama_gqa", rename, &["model_type", "quantum_llama"]);
}

#[test]
fn calibration_texts_that_do_not_do() {
    let bench = Bench::with("llama_gqa");
    fs::write(bench.path("empty.txt"), " \n").unwrap();
    let short = bench.text("short.txt", 20);
    let convert = |text: &str, more: &[&str]| {
        let mut args = vec![
            "convert", "model", "-o", "out", "--budget", "0.5", "--calib", text,
        ];
        args.extend(more);
        bench.run(&args)
    };
    convert("empty.txt", &["--calib-window", "64"]).refuses(&["empty.txt"]);
    convert(short.to_str().unwrap(), &["--calib-window", "64"]).refuses(&["short.txt", "64"]);
    convert(
        short.to_str().unwrap(),
        &["--calib-window", "8", "--calib-windows", "5"],
    )
    .refuses(&["short.txt"]);
    convert(short.to_str().unwrap(), &["--calib-window", "100000"]).refuses(&["--calib-window"]);
    let missing = convert("nowhere.txt", &["--calib-window", "64"]);
    missing.refuses(&["nowhere.txt"]);
    nothing_left(&bench);
}

#[test]
fn options_out_of_range() {
    let bench = Bench::with("llama_gqa");
    for (options, words) in [
        (vec!["--budget", "1.5"], vec!["--budget", "1.5"]),
        (vec!["--budget", "0"], vec!["--budget"]),
        (vec!["--budget", "nan"], vec!["--budget"]),
        (
            vec!["--kv-lora-rank", "999", "--rope-dim", "8"],
            vec!["kv_lora_rank", "999"],
        ),
        (
            vec!["--kv-lora-rank", "8", "--rope-dim", "7"],
            vec!["qk_rope_head_dim", "7"],
        ),
        (vec!["--kv-lora-rank", "8"], vec!["--rope-dim"]),
        (
            vec!["--budget", "0.5", "--layers", "9"],
            vec!["--layers", "9"],
        ),
        (
            vec!["--budget", "0.5", "--steps=refit,-basis"],
            vec!["--steps"],
        ),
        (vec![], vec!["--budget"]),
    ] {
        let mut args = vec!["convert", "model", "-o", "out", "--calib", "none"];
        args.extend(options);
        bench.run(&args).refuses(&words);
    }
    bench
        .run(&["convert", "model", "-o", "out", "--budget", "0.5"])
        .refuses(&["--calib"]);
    assert_eq!(
        bench
            .run(&["convert", "model", "-o", "out", "--budget", "half"])
            .code(),
        2
    );
    nothing_left(&bench);
}

#[test]
fn an_output_that_exists() {
    let bench = Bench::with("llama_gqa");
    fs::create_dir(bench.path("out")).unwrap();
    fs::write(bench.path("out/mine"), "keep").unwrap();
    bench.run(&CONVERT).refuses(&["out"]);
    bench
        .run(&["export", "model", "-o", "out"])
        .refuses(&["out"]);
    bench
        .run(&["compile", "model", "-o", "out", "--kv-lora-rank", "max"])
        .refuses(&["out"]);
    assert_eq!(fs::read_to_string(bench.path("out/mine")).unwrap(), "keep");
}

#[test]
fn a_disk_that_takes_no_more() {
    // A limit on the size of files stands for a full disk: the write fails in the middle.
    for args in [
        vec!["convert", "model", "-o", "out", "--kv-lora-rank", "max"],
        vec!["export", "model", "-o", "out"],
    ] {
        let bench = Bench::with("llama_gqa");
        let script = format!(
            "ulimit -f 16; trap '' XFSZ; exec {} {}",
            env!("CARGO_BIN_EXE_mlac"),
            args.join(" ")
        );
        let output = std::process::Command::new("bash")
            .args(["-c", &script])
            .current_dir(bench.path(""))
            .output()
            .unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{err}");
        assert!(err.contains("out"), "names the file: {err}");
        nothing_left(&bench);
    }
}

#[test]
fn a_run_killed_at_any_moment_can_be_repeated() {
    let bench = Bench::with("llama_gqa");
    let text = bench.text("text.txt", 4000);
    let args = [
        "convert",
        "model",
        "-o",
        "out",
        "--budget",
        "0.5",
        "--calib",
        text.to_str().unwrap(),
        "--calib-windows",
        "8",
        "--calib-window",
        "64",
    ];
    let mut undisturbed = args;
    undisturbed[3] = "whole";
    let started = std::time::Instant::now();
    bench.run(&undisturbed).succeeds();
    let length = started.elapsed();
    let whole = contents(&bench.path("whole"));
    let mut killed = 0;
    for part in 1..=6_u32 {
        let mut child = bench
            .command(&args)
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(length * part / 7);
        child.kill().unwrap();
        child.wait().unwrap();
        if bench.path("out").exists() {
            assert!(
                contents(&bench.path("out")) == whole,
                "a folder under its final name is whole"
            );
            fs::remove_dir_all(bench.path("out")).unwrap();
        } else {
            killed += 1;
        }
    }
    assert!(killed > 0, "at least one run was killed before its end");
    std::thread::sleep(Duration::from_millis(10));
    bench.run(&args).succeeds();
    assert!(
        contents(&bench.path("out")) == whole,
        "the repeated run gives the same bytes"
    );
    assert!(!bench.path("out.partial").exists());
}

#[test]
fn a_build_without_enterprise_tensorrt_says_what_is_needed() {
    let bench = Bench::with("llama_gqa");
    bench.run(&["export", "model", "-o", "onnx"]).succeeds();
    let build = |args: &[&str]| {
        let mut words = vec!["build", "onnx", "-o", "out", "--backend", "tensorrt"];
        words.extend(args);
        let mut command = bench.command(&words);
        // A folder without libraries: what the machine has does not matter.
        command.env("MLAC_TENSORRT", bench.path("onnx"));
        Run(command.output().expect("mlac runs"))
    };
    build(&["--target", "sm90"]).refuses(&["MLAC_TENSORRT", "libnvinfer.so.11", "fix: "]);
    build(&["--target", "sm90,sm80"]).refuses(&["builds for the GPU it runs on"]);
    build(&["--target", "sm121"]).refuses(&["sm90", "which mlac has kernels for"]);
    nothing_left(&bench);
}

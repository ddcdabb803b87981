//! `mlac convert` on every fixture. At full rank the MLA model gives transformers' logits of the
//! original, from weights alone and from a text; at any rank the exported model computes what
//! the checkpoint says, by the float64 reference, and caches as few numbers as were asked for.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use mlac::cli::{args::Cli, commands};
use mlac_model::{Checkpoint, MlaLayer};
use mlac_tests::cases::Cases;
use mlac_tests::compare::{Difference, require_close};
use mlac_tests::decode::compare;
use mlac_tests::export::{export, standard};
use mlac_tests::fixtures::{self, Fixture, MODELS, STEPWISE};
use mlac_tests::python::{self, Job};
use mlac_tests::words::{with_tokenizer, words};
use mlac_tests::{Outcome, runtime, smollm2, text};

/// Of the logits' scale, against transformers: rounding of products of f32 weights.
const EXACT: f64 = 1e-4;
/// Of the logits' scale, ONNX Runtime against the float64 reference on the same checkpoint.
const SAME_WEIGHTS: f64 = 2e-5;

/// Runs `mlac convert MODEL -o TARGET OPTIONS`.
fn convert(model: &Path, target: &Path, options: &[&str]) -> Outcome<Checkpoint> {
    let mut line: Vec<OsString> = vec!["mlac".into(), "convert".into(), model.into()];
    line.extend(["-o".into(), target.into()]);
    line.extend(options.iter().map(Into::into));
    let cli = Cli::try_parse_from(line).map_err(text)?;
    if !commands::run(cli).map_err(text)? {
        return Err("mlac convert answered no".into());
    }
    Checkpoint::open(target).map_err(text)
}

/// Exports a converted model and compares its logits with `expected`.
fn run(
    model: &Fixture,
    converted: &Checkpoint,
    expected: &[f64],
    tolerance: f64,
) -> Outcome<Difference> {
    let folder = tempfile::tempdir().map_err(text)?;
    export(converted.path(), folder.path(), standard())?;
    compare(
        folder.path(),
        converted.config(),
        standard(),
        (&model.io, &STEPWISE),
        (expected, tolerance),
    )
}

/// Every tensor outside converted attention, and every one that the form keeps inside, has the
/// source's type and bytes.
fn require_rest_unchanged(source: &Path, converted: &Checkpoint) -> Outcome {
    let source = Checkpoint::open(source).map_err(text)?;
    let is_converted = |name: &str| {
        (0..source.config().num_hidden_layers).any(|layer| {
            let tensor = name.strip_prefix(&format!("model.layers.{layer}.self_attn."));
            match (converted.config().mla_layer(layer), tensor) {
                (Some(mla), Some(tensor)) => !mla.encoder.keeps(tensor),
                _ => false,
            }
        })
    };
    for info in source.tensors() {
        if is_converted(&info.name) {
            continue;
        }
        let new = converted.info(&info.name).map_err(text)?;
        let same_bytes =
            source.bytes(&info.name).map_err(text)? == converted.bytes(&info.name).map_err(text)?;
        if new.dtype != info.dtype || new.shape != info.shape || !same_bytes {
            return Err(format!("{} changed", info.name));
        }
    }
    Ok(())
}

fn exact(options: &[&str], calibrated: bool) {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let calibration = scratch.path().join("calibration.txt");
    fs::write(&calibration, words(400, 128)).expect("a writable temporary folder");
    let mut options = options.to_vec();
    let path = calibration.display().to_string();
    if calibrated {
        options.extend([
            "--calib",
            &path,
            "--calib-window",
            "64",
            "--calib-windows",
            "4",
        ]);
    }
    options.extend(["--kv-lora-rank", "max"]);
    let mut cases = Cases::new();
    for model in fixtures::models().expect("the committed fixtures") {
        let source = scratch.path().join(&model.name);
        with_tokenizer(&model.folder, &source, model.io.vocab).expect("a copy of the fixture");
        for layers in layer_choices(&model) {
            let name = format!("{} {layers}", model.name);
            cases.measure(&name, || {
                let target = scratch.path().join(format!("{name}.mla"));
                let options = [&options[..], &["--layers", layers]].concat();
                let converted = convert(&source, &target, &options)?;
                require_rest_unchanged(&source, &converted)?;
                let expected: Vec<f64> = model.io.logits.iter().map(|&x| f64::from(x)).collect();
                run(&model, &converted, &expected, EXACT)
            });
        }
    }
    cases.finish(MODELS);
}

/// What the float64 reference is asked: the logits of each converted model on its fixture's texts.
fn reference_jobs(converted: &[(&Fixture, Checkpoint)]) -> Vec<Job> {
    let job = |(model, checkpoint): &(&Fixture, Checkpoint)| Job {
        folder: checkpoint.path().to_path_buf(),
        io: model.folder.join("io.safetensors"),
        out: PathBuf::from(checkpoint.path()).with_extension("logits"),
    };
    converted.iter().map(job).collect()
}

/// `--layers all`, and `full` where only some layers have a window.
fn layer_choices(model: &Fixture) -> Vec<&'static str> {
    let windows = Checkpoint::open(&model.folder)
        .expect("a committed fixture")
        .config()
        .sliding_window
        .clone();
    let some = windows.iter().any(Option::is_some) && windows.iter().any(Option::is_none);
    if some {
        vec!["all", "full"]
    } else {
        vec!["all"]
    }
}

/// With less than half of the cache, windows included: [`compare`] holds the bytes that the last
/// step returned against the plan of the converted model.
#[test]
fn windows_and_latents_together_cache_what_the_plan_says() {
    let scratch = tempfile::tempdir().unwrap();
    let mut cases = Cases::new();
    let models = fixtures::models().unwrap();
    let mut converted = Vec::new();
    for model in models.iter().filter(|m| m.name.starts_with("gpt_oss")) {
        for layers in ["all", "full"] {
            let name = format!("{} {layers}", model.name);
            cases.run(&name, || {
                let target = scratch.path().join(format!("{name}.mla"));
                let options = ["--budget", "0.4", "--layers", layers, "--calib", "none"];
                converted.push((model, convert(&model.folder, &target, &options)?));
                Ok(())
            });
        }
    }
    let jobs = reference_jobs(&converted);
    let answers = python::reference(&jobs, false).unwrap();
    for ((model, checkpoint), answer) in converted.iter().zip(&answers) {
        let name = checkpoint.path().display().to_string();
        cases.measure(format!("{name} as the reference"), || {
            run(model, checkpoint, &answer.logits, SAME_WEIGHTS)
        });
    }
    cases.finish(20);
}

#[test]
fn full_rank_from_weights_is_exact() {
    exact(&[], false);
}

#[test]
fn full_rank_from_a_text_is_exact() {
    exact(&[], true);
}

/// `TransMLA` keeps at most one head's worth of rotation, which is everything only where there is
/// one KV head; elsewhere it refuses instead of calling an approximation exact.
#[test]
fn full_rank_by_transmla_is_exact_or_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let mut cases = Cases::new();
    for model in fixtures::models().unwrap() {
        let target = scratch.path().join(&model.name);
        let options = [
            "--method",
            "transmla",
            "--kv-lora-rank",
            "max",
            "--layers",
            "all",
        ];
        let heads = Checkpoint::open(&model.folder)
            .unwrap()
            .config()
            .num_key_value_heads;
        cases.run(&model.name, || {
            match convert(&model.folder, &target, &options) {
                Ok(converted) if heads == 1 => {
                    let expected: Vec<f64> =
                        model.io.logits.iter().map(|&x| f64::from(x)).collect();
                    run(&model, &converted, &expected, EXACT).map(drop)
                }
                Err(why) if heads > 1 && why.contains("transmla") && !target.exists() => Ok(()),
                Ok(_) => Err("it converted".into()),
                Err(why) => Err(why),
            }
        });
    }
    cases.finish(MODELS);
}

#[test]
fn full_rank_by_plain_low_rank_is_exact() {
    exact(&["--method", "svd"], false);
}

#[test]
fn half_the_cache_computes_what_the_checkpoint_says() {
    half("recipe");
}

#[test]
fn half_the_cache_by_transmla_computes_what_the_checkpoint_says() {
    half("transmla");
}

fn half(method: &str) {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let calibration = scratch.path().join("calibration.txt");
    fs::write(&calibration, words(400, 128)).expect("a writable temporary folder");
    let calibration = calibration.display().to_string();
    let models = fixtures::models().expect("the committed fixtures");
    let target = |model: &Fixture| scratch.path().join(format!("{}.mla", model.name));
    let mut cases = Cases::new();
    let mut converted = Vec::new();
    for model in &models {
        // Full-attention layers only, where the model has both kinds.
        let layers = if model.name == "mistral_window" {
            "all"
        } else {
            "full"
        };
        cases.run(format!("{} converts", model.name), || {
            let source = scratch.path().join(&model.name);
            with_tokenizer(&model.folder, &source, model.io.vocab)?;
            // TransMLA keeps one head's rotation at most.
            let config = Checkpoint::open(&source).map_err(text)?.config().clone();
            let rotary = config.head_dim / 2;
            let latent = (config.gqa_cache_width() / 2 - rotary).to_string();
            let rotary = rotary.to_string();
            let size = match method {
                "transmla" => vec!["--kv-lora-rank", &latent, "--rope-dim", &rotary],
                _ => vec!["--budget", "0.5"],
            };
            let options = [
                "--method",
                method,
                "--layers",
                layers,
                "--calib",
                &calibration,
                "--calib-window",
                "64",
                "--calib-windows",
                "4",
            ];
            let options = [&options[..], &size].concat();
            let checkpoint = convert(&source, &target(model), &options)?;
            require_rest_unchanged(&source, &checkpoint)?;
            let config = checkpoint.config();
            let mla = config.mla.as_ref().ok_or("no converted layer")?;
            // Layers may differ, their sum may not pass the budget.
            let cached: usize = mla.layers.values().map(MlaLayer::cache_width).sum();
            let whole = config.gqa_cache_width() * mla.layers.len();
            if 2 * cached > whole {
                return Err(format!("{cached} of {whole} numbers are cached"));
            }
            converted.push((model, checkpoint));
            Ok(())
        });
    }
    let jobs = reference_jobs(&converted);
    let answers = python::reference(&jobs, false).expect("the float64 reference");
    for ((model, checkpoint), answer) in converted.iter().zip(&answers) {
        cases.measure(format!("{} as the reference", model.name), || {
            run(model, checkpoint, &answer.logits, SAME_WEIGHTS)
        });
        cases.run(format!("{} differs from the source", model.name), || {
            let (found, source) = (
                model.io.real(&answer.logits),
                model.io.real(&model.io.logits),
            );
            match require_close(&found, &source, &answer.shape, EXACT) {
                Ok(_) => Err("half the cache cannot be exact for a random model".into()),
                Err(_) => Ok(()),
            }
        });
    }
    cases.finish(3 * MODELS);
}

#[test]
fn smollm2_at_full_rank_decodes_as_transformers() {
    let scratch = tempfile::tempdir().unwrap();
    let (mla, onnx) = (scratch.path().join("mla"), scratch.path().join("onnx"));
    convert(
        &runtime::smollm2().unwrap(),
        &mla,
        &["--kv-lora-rank", "max"],
    )
    .unwrap();
    export(&mla, &onnx, standard()).unwrap();
    let mut cases = Cases::new();
    smollm2::compare(&mut cases, &onnx).unwrap();
    cases.finish(48);
}

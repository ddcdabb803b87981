//! MLA checkpoints, exported and run in ONNX Runtime, compute what the definition of the form says:
//! exact ones give transformers' logits of their source, any other those of the float64 reference.
//! Prefill is expanded and decode absorbed, and each form alone does both; `mlac::LatentAttention` does both over a cache in place.

use std::path::{Path, PathBuf};

use mlac_graph::builders::{CacheProduct, DecoderOptions, MlaForm, Runtime};
use mlac_graph::ir::DType;
use mlac_model::Checkpoint;
use mlac_tests::cases::Cases;
use mlac_tests::decode::compare;
use mlac_tests::export::{export, export_one, standard};
use mlac_tests::fixtures::{self, Fixture, MODELS, PIECES, STEPWISE};
use mlac_tests::python::{self, Job};
use mlac_tests::{Outcome, text};

/// Of the logits' scale.
const TOLERANCE: f64 = 2e-5;
/// Of the logits' scale, for weights, activations and caches in f16.
const F16_TOLERANCE: f64 = 2e-2;

#[test]
fn exact_mla_checkpoints_decode_as_transformers() {
    let models = fixtures::models().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let places = synthesize(&models, scratch.path(), "exact").unwrap();
    let mut cases = Cases::new();
    for (model, checkpoint) in models.iter().zip(&places) {
        let expected: Vec<f64> = model.io.logits.iter().map(|&x| f64::from(x)).collect();
        check_forms(&mut cases, model, checkpoint, &expected);
    }
    cases.finish(10 * MODELS);
}

#[test]
fn any_mla_checkpoint_decodes_as_the_reference() {
    let models = fixtures::models().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let places = synthesize(&models, scratch.path(), "random").unwrap();
    let jobs: Vec<Job> = models
        .iter()
        .zip(&places)
        .map(|(model, checkpoint)| Job {
            folder: checkpoint.clone(),
            io: model.folder.join("io.safetensors"),
            out: checkpoint.with_extension("logits"),
        })
        .collect();
    let answers = python::reference(&jobs, false).unwrap();
    let mut cases = Cases::new();
    for ((model, checkpoint), answer) in models.iter().zip(&places).zip(&answers) {
        check_forms(&mut cases, model, checkpoint, &answer.logits);
    }
    cases.finish(10 * MODELS);
}

/// The MLA checkpoint of each model.
fn synthesize(models: &[Fixture], scratch: &Path, kind: &'static str) -> Outcome<Vec<PathBuf>> {
    let places: Vec<PathBuf> = models.iter().map(|m| scratch.join(&m.name)).collect();
    let triples: Vec<(PathBuf, PathBuf, &str)> = models
        .iter()
        .zip(&places)
        .map(|(model, place)| (model.folder.clone(), place.clone(), kind))
        .collect();
    python::synthetic_mla(&triples)?;
    Ok(places)
}

/// `expected`: logits `[batch, seq, vocab]`.
fn check_forms(cases: &mut Cases, model: &Fixture, place: &Path, expected: &[f64]) {
    let one = |mla_form| DecoderOptions {
        mla_form,
        ..standard()
    };
    let fused = DecoderOptions {
        runtime: Runtime::TensorRt,
        ..standard()
    };
    let rows = DecoderOptions {
        product: CacheProduct::CacheRows,
        ..standard()
    };
    let f16 = DecoderOptions {
        dtype: DType::F16,
        ..standard()
    };
    let operator = DecoderOptions {
        runtime: Runtime::OnnxRuntime,
        ..standard()
    };
    let operator_f16 = DecoderOptions {
        dtype: DType::F16,
        ..operator
    };
    let mut run = |name: &str, options: DecoderOptions, both: bool, pieces: &[usize]| {
        let tolerance = if options.dtype == DType::F16 {
            F16_TOLERANCE
        } else {
            TOLERANCE
        };
        cases.measure(format!("{} {name}", model.name), || {
            let folder = tempfile::tempdir().map_err(text)?;
            let write = if both { export } else { export_one };
            write(place, folder.path(), options)?;
            let checkpoint = Checkpoint::open(place).map_err(text)?;
            compare(
                folder.path(),
                checkpoint.config(),
                options,
                (&model.io, pieces),
                (expected, tolerance),
            )
        });
    };
    run("expanded, then absorbed", standard(), true, &STEPWISE);
    run("absorbed", one(MlaForm::Absorbed), false, &STEPWISE);
    run("expanded", one(MlaForm::Expanded), false, &STEPWISE);
    run("in pieces", standard(), true, &PIECES);
    run("absorbed, cache by rows", rows, false, &STEPWISE);
    run("for TensorRT", fused, true, &STEPWISE);
    run("f16", f16, true, &STEPWISE);
    run("LatentAttention", operator, false, &STEPWISE);
    run("LatentAttention in pieces", operator, false, &PIECES);
    run("LatentAttention f16", operator_f16, false, &STEPWISE);
}

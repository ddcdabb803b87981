//! MLA checkpoints, exported and run in ONNX Runtime, compute what the definition of the form says:
//! exact ones give transformers' logits of their source, any other those of the float64 reference.
//! Prefill is expanded and decode absorbed, and each form alone does both.

use std::path::{Path, PathBuf};

use mlac_engines::ort::CacheKind;
use mlac_graph::builders::{GqaForm, MlaForm};
use mlac_model::Checkpoint;
use mlac_tests::cases::Cases;
use mlac_tests::compare::require_close;
use mlac_tests::decode::{decode, decode_padded};
use mlac_tests::export::{export, export_one};
use mlac_tests::fixtures::{self, Fixture, MODELS, PREFILL};
use mlac_tests::python::{self, Job};
use mlac_tests::{Outcome, text};

/// Of the logits' scale.
const TOLERANCE: f64 = 2e-5;

#[test]
fn exact_mla_checkpoints_decode_as_transformers() {
    let models = fixtures::models().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let places = synthesize(&models, scratch.path(), "exact");
    let mut cases = Cases::new();
    for (model, checkpoint) in models.iter().zip(&places) {
        let expected: Vec<f64> = model.io.logits.iter().map(|&x| f64::from(x)).collect();
        check_forms(&mut cases, model, checkpoint, &expected);
    }
    cases.finish(3 * MODELS);
}

#[test]
fn any_mla_checkpoint_decodes_as_the_reference() {
    let models = fixtures::models().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let places = synthesize(&models, scratch.path(), "random");
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
    cases.finish(3 * MODELS);
}

/// The MLA checkpoint of each model.
fn synthesize(models: &[Fixture], scratch: &Path, kind: &'static str) -> Vec<PathBuf> {
    let places: Vec<PathBuf> = models.iter().map(|m| scratch.join(&m.name)).collect();
    let triples: Vec<(PathBuf, PathBuf, &str)> = models
        .iter()
        .zip(&places)
        .map(|(model, place)| (model.folder.clone(), place.clone(), kind))
        .collect();
    python::synthetic_mla(&triples).unwrap();
    places
}

/// `expected`: logits `[batch, seq, vocab]`.
fn check_forms(cases: &mut Cases, model: &Fixture, checkpoint: &Path, expected: &[f64]) {
    let mut run = |name: &str, export: &dyn Fn(&Path) -> Outcome| {
        cases.run(format!("{} {name}", model.name), || {
            let folder = tempfile::tempdir().map_err(text)?;
            export(folder.path())?;
            compare(model, checkpoint, folder.path(), expected)
        });
    };
    run("expanded, then absorbed", &|folder| {
        export(checkpoint, folder, GqaForm::Primitives)
    });
    run("absorbed", &|folder| {
        export_one(checkpoint, folder, MlaForm::Absorbed)
    });
    run("expanded", &|folder| {
        export_one(checkpoint, folder, MlaForm::Expanded)
    });
}

fn compare(model: &Fixture, checkpoint: &Path, folder: &Path, expected: &[f64]) -> Outcome {
    let io = &model.io;
    let expected = io.real(expected);
    if io.padded() {
        let logits = decode_padded(folder, io, PREFILL)?;
        return require_close(&io.real(&logits), &expected, &[io.vocab], TOLERANCE).map(drop);
    }
    let decoded = decode(folder, io, PREFILL)?;
    require_close(&io.real(&decoded.logits), &expected, &io.shape(), TOLERANCE)?;

    let checkpoint = Checkpoint::open(checkpoint).map_err(text)?;
    let config = checkpoint.config();
    let mut numbers = 0;
    for layout in &decoded.layouts {
        let expected = match config.mla_layer(layout.layer) {
            Some(layer) => CacheKind::Latent {
                width: layer.cache_width(),
            },
            None => CacheKind::KeyValue {
                heads: config.num_key_value_heads,
                key_width: config.head_dim,
                value_width: config.head_dim,
            },
        };
        if layout.kind != expected {
            return Err(format!("cache {layout:?}, expected {expected:?}"));
        }
        numbers += layout.numbers_per_token();
    }
    if decoded.layouts.len() != config.num_hidden_layers
        || (decoded.cached_per_token - numbers as f64).abs() > 1e-9
    {
        return Err(format!(
            "{} numbers cached per token in {} layers, expected {numbers} in {}",
            decoded.cached_per_token,
            decoded.layouts.len(),
            config.num_hidden_layers
        ));
    }
    Ok(())
}

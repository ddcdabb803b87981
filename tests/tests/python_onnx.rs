//! Exported folders satisfy onnx.checker, and Python's onnxruntime computes the fixtures' logits
//! from them, GQA and MLA, without any code of mlac.

use std::path::{Path, PathBuf};

use mlac_graph::builders::{DecoderOptions, GqaForm, Runtime};
use mlac_tests::Outcome;
use mlac_tests::cases::Cases;
use mlac_tests::compare::require_close;
use mlac_tests::decode::decode;
use mlac_tests::export::{export, standard, with_gqa};
use mlac_tests::fixtures::{self, Fixture, MODELS, STEPWISE};
use mlac_tests::python::{self, Job};

/// Of the logits' scale, against transformers.
const TOLERANCE: f64 = 2e-5;
/// The same library runs the same file in both languages.
const SAME_RUNTIME: f64 = 2e-6;

struct Exported<'a> {
    model: &'a Fixture,
    label: String,
    folder: PathBuf,
}

/// Every fixture in each GQA form, and its exact MLA form, for every runtime and for `TensorRT`.
fn export_all<'a>(models: &'a [Fixture], scratch: &Path) -> Outcome<Vec<Exported<'a>>> {
    let place = |model: &Fixture, kind: &str| scratch.join(format!("{}.{kind}", model.name));
    let triples: Vec<(PathBuf, PathBuf, &str)> = models
        .iter()
        .map(|model| (model.folder.clone(), place(model, "mla"), "exact"))
        .collect();
    python::synthetic_mla(&triples)?;
    let mut exported = Vec::new();
    for model in models {
        let mut add = |kind: &str, checkpoint: &Path, options: DecoderOptions| {
            let folder = place(model, &format!("{kind}.onnx"));
            export(checkpoint, &folder, options)?;
            exported.push(Exported {
                model,
                label: format!("{} {kind}", model.name),
                folder,
            });
            Outcome::Ok(())
        };
        let fused = DecoderOptions {
            runtime: Runtime::TensorRt,
            ..standard()
        };
        let operator = with_gqa(GqaForm::GroupQueryAttention);
        let mla = place(model, "mla");
        add("gqa", &model.folder, standard())?;
        add("gqa operator", &model.folder, operator)?;
        add("gqa for TensorRT", &model.folder, fused)?;
        add("mla", &mla, standard())?;
        add("mla for TensorRT", &mla, fused)?;
    }
    Ok(exported)
}

#[test]
fn checker_and_python_onnxruntime_accept_every_export() {
    let models = fixtures::models().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let exported = export_all(&models, scratch.path()).unwrap();
    let folders: Vec<PathBuf> = exported.iter().map(|e| e.folder.clone()).collect();
    let report = python::check(&folders).unwrap();
    // A decoder for each export, and a prefill graph for each MLA one.
    assert_eq!(report.lines().count(), 7 * models.len(), "{report}");

    let jobs: Vec<Job> = exported
        .iter()
        .map(|e| Job {
            folder: e.folder.clone(),
            io: e.model.folder.join("io.safetensors"),
            out: e.folder.join("python.logits"),
        })
        .collect();
    let answers = python::onnxruntime(&jobs).unwrap();
    let mut cases = Cases::new();
    for (e, answer) in exported.iter().zip(&answers) {
        let io = &e.model.io;
        cases.measure(format!("{} as transformers", e.label), || {
            if answer.shape != io.shape() {
                return Err(format!(
                    "shape {:?}, expected {:?}",
                    answer.shape,
                    io.shape()
                ));
            }
            let (found, expected) = (io.real(&answer.logits), io.real(&io.logits));
            require_close(&found, &expected, &io.shape(), TOLERANCE)
        });
        if io.padded() {
            continue;
        }
        cases.measure(format!("{} as mlac's sessions", e.label), || {
            let ours = decode(&e.folder, io, &STEPWISE)?;
            let (found, expected) = (io.real(&answer.logits), io.real(&ours.logits));
            require_close(&found, &expected, &io.shape(), SAME_RUNTIME)
        });
    }
    cases.finish(10 * MODELS - 10);
}

//! Exported folders satisfy onnx.checker, and Python's onnxruntime computes the fixtures' logits
//! from them, GQA and MLA, without any code of mlac.

use std::path::{Path, PathBuf};

use mlac_graph::builders::GqaForm;
use mlac_tests::cases::Cases;
use mlac_tests::compare::require_close;
use mlac_tests::decode::decode;
use mlac_tests::export::{GQA_FORMS, export};
use mlac_tests::fixtures::{self, Fixture, MODELS, PREFILL};
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

/// Every fixture in each GQA form, and its exact MLA form.
fn export_all<'a>(models: &'a [Fixture], scratch: &Path) -> Vec<Exported<'a>> {
    let place = |model: &Fixture, kind: &str| scratch.join(format!("{}.{kind}", model.name));
    let triples: Vec<(PathBuf, PathBuf, &str)> = models
        .iter()
        .map(|model| (model.folder.clone(), place(model, "mla"), "exact"))
        .collect();
    python::synthetic_mla(&triples).unwrap();
    let mut exported = Vec::new();
    for model in models {
        let mut add = |kind: String, checkpoint: &Path, form: GqaForm| {
            let folder = place(model, &format!("{kind}.onnx"));
            export(checkpoint, &folder, form).unwrap();
            exported.push(Exported {
                model,
                label: format!("{} {kind}", model.name),
                folder,
            });
        };
        for form in GQA_FORMS {
            add(format!("{form:?}"), &model.folder, form);
        }
        add("mla".into(), &place(model, "mla"), GqaForm::Primitives);
    }
    exported
}

#[test]
fn checker_and_python_onnxruntime_accept_every_export() {
    let models = fixtures::models().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let exported = export_all(&models, scratch.path());
    let folders: Vec<PathBuf> = exported.iter().map(|e| e.folder.clone()).collect();
    let report = python::check(&folders).unwrap();
    // A decoder for each export, and a prefill graph for each MLA one.
    assert_eq!(report.lines().count(), 4 * models.len(), "{report}");

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
        cases.run(format!("{} as transformers", e.label), || {
            if answer.shape != io.shape() {
                return Err(format!(
                    "shape {:?}, expected {:?}",
                    answer.shape,
                    io.shape()
                ));
            }
            let (found, expected) = (io.real(&answer.logits), io.real(&io.logits));
            require_close(&found, &expected, &io.shape(), TOLERANCE).map(drop)
        });
        if io.padded() {
            continue;
        }
        cases.run(format!("{} as mlac's sessions", e.label), || {
            let ours = decode(&e.folder, io, PREFILL)?;
            let (found, expected) = (io.real(&answer.logits), io.real(&ours.logits));
            require_close(&found, &expected, &io.shape(), SAME_RUNTIME).map(drop)
        });
    }
    cases.finish(6 * MODELS - 3);
}

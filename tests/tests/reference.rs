//! The float64 reference of the MLA form is itself right: it agrees with transformers on every
//! fixture, in GQA form and in an exact MLA form made from the definition.

use std::path::PathBuf;

use mlac_tests::cases::Cases;
use mlac_tests::compare::require_close;
use mlac_tests::fixtures::{self, MODELS};
use mlac_tests::python::{self, Job};

/// Against transformers, which computes in f32.
const TOLERANCE: f64 = 1e-5;
/// Between two orders of the same float64 products.
const REORDERED: f64 = 1e-12;

#[test]
fn the_reference_agrees_with_transformers_and_with_itself() {
    let models = fixtures::models().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let place = |name: &str, kind: &str| scratch.path().join(format!("{name}.{kind}"));
    let triples: Vec<(PathBuf, PathBuf, &str)> = models
        .iter()
        .flat_map(|model| {
            ["exact", "random"].map(|kind| (model.folder.clone(), place(&model.name, kind), kind))
        })
        .collect();
    python::synthetic_mla(&triples).unwrap();

    let jobs = |kind: &str, out: &str| -> Vec<Job> {
        models
            .iter()
            .map(|model| Job {
                folder: if kind == "gqa" {
                    model.folder.clone()
                } else {
                    place(&model.name, kind)
                },
                io: model.folder.join("io.safetensors"),
                out: place(&model.name, &format!("{kind}.{out}")),
            })
            .collect()
    };
    let mut cases = Cases::new();
    for kind in ["gqa", "exact"] {
        let answers = python::reference(&jobs(kind, "absorbed"), false).unwrap();
        for (model, answer) in models.iter().zip(&answers) {
            cases.measure(format!("{} {kind}", model.name), || {
                let found = model.io.real(&answer.logits);
                let expected = model.io.real(&model.io.logits);
                require_close(&found, &expected, &answer.shape, TOLERANCE)
            });
        }
    }
    let absorbed = python::reference(&jobs("random", "absorbed"), false).unwrap();
    let expanded = python::reference(&jobs("random", "expanded"), true).unwrap();
    for ((model, a), b) in models.iter().zip(&absorbed).zip(&expanded) {
        cases.run(format!("{} absorbed and expanded", model.name), || {
            require_close(&a.logits, &b.logits, &a.shape, REORDERED).map(drop)
        });
        cases.run(
            format!("{} random differs from the source", model.name),
            || {
                let source = model.io.real(&model.io.logits);
                match require_close(&model.io.real(&a.logits), &source, &a.shape, 0.01) {
                    Ok(_) => Err("random ranks give the source's logits".into()),
                    Err(_) => Ok(()),
                }
            },
        );
    }
    cases.finish(4 * MODELS);
}

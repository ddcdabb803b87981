//! `mlac generate`, `verify` and `bench` of engines, over the TensorRT and the driver of `engines/tests/fake_tensorrt`.
#![allow(
    clippy::doc_markdown,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests"
)]

#[allow(
    dead_code,
    reason = "shared with the other tests of the command, which use more of it"
)]
mod common;
#[allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "shared with the tests of mlac-engines, which use more of it"
)]
#[path = "../../engines/tests/fake_tensorrt/mod.rs"]
mod fake_tensorrt;

use std::fs;
use std::path::Path;

use common::{Bench, Run};
use fake_tensorrt::{Fakes, Layer, Model};

/// Tokens of the tests' tokenizer: characters from the space on.
fn id(character: u8) -> i64 {
    i64::from(character) - 32
}

fn model() -> Model {
    Model {
        vocab: 96,
        context: 128,
        capacity: 128,
        piece: 16,
        f16: true,
        ..Model::default()
    }
}

/// The folder of a model's engines, with the configuration and the tokenizer of the fixture.
fn engines(bench: &Bench, model: &Model) -> tempfile::TempDir {
    let side = |name: &'static str| (name, fs::read(bench.model().join(name)).unwrap());
    model.folder(&[side("config.json"), side("tokenizer.json")])
}

fn run(bench: &Bench, fakes: &Fakes, args: &[&str]) -> Run {
    let mut command = bench.command(args);
    command.envs(fakes.variables());
    Run(command.output().unwrap())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What greedy decoding of the model adds.
fn greedy(model: &Model, prompt: &str, count: usize) -> Vec<String> {
    let mut ids: Vec<i64> = prompt.bytes().map(id).collect();
    let mut added = Vec::new();
    while added.len() < count {
        let logits = model.logits(&ids);
        let last = &logits[logits.len() - model.vocab..];
        let mut best = 0;
        for (i, x) in last.iter().enumerate() {
            if *x > last[best] {
                best = i;
            }
        }
        // The fixture's end token.
        if best == 2 {
            break;
        }
        ids.push(best as i64);
        let character = if best == 95 { b'\n' } else { 32 + best as u8 };
        added.push(char::from(character).to_string());
    }
    added
}

#[test]
fn commands_run_engines() {
    let bench = Bench::with("llama_gqa");
    let fakes = Fakes::new();
    let folder = engines(&bench, &model());
    let at = text(folder.path());

    let prompt = "the shelf holds a jar of nails, two maps";
    let said = run(
        &bench,
        &fakes,
        &[
            "generate",
            at,
            "--prompt",
            prompt,
            "--max-tokens",
            "12",
            "--json",
        ],
    )
    .succeeds();
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let expected = greedy(&model(), prompt, 12);
    assert!(expected.len() > 3, "{expected:?} shows little");
    // The tokenizer has no decoder, so tokens have spaces between them.
    assert_eq!(said["text"], expected.join(" "));
    assert_eq!(said["cached_tokens"], prompt.len() + expected.len());

    // Pieces and steps of one model against pieces of another length, and against another model.
    let again = engines(
        &bench,
        &Model {
            piece: 5,
            f16: false,
            ..model()
        },
    );
    let compare = |b: &Path| {
        let tokens = ["--tokens", "60", "--steps", "20"];
        run(
            &bench,
            &fakes,
            &[&["verify", at, text(b)], &tokens[..]].concat(),
        )
    };
    let same = compare(again.path()).succeeds();
    assert!(same.contains("max abs   0.000e0"), "{same}");
    let mut layers = model().layers;
    layers.push(Layer::Latent {
        width: 2,
        window: None,
    });
    let other = engines(&bench, &Model { layers, ..model() });
    let differs = compare(other.path());
    assert_eq!(differs.code(), 1, "{}{}", differs.out(), differs.err());

    let timed = run(
        &bench,
        &fakes,
        &[
            "bench",
            at,
            "--contexts",
            "32,100",
            "--repeats",
            "2",
            "--json",
        ],
    )
    .succeeds();
    let timed: serde_json::Value = serde_json::from_str(&timed).unwrap();
    // Latents of 5 and 2 numbers, keys and values of 2 heads of 3, and of 4 numbers in a window of 6; f16.
    let bytes = |tokens: usize| 2 * (tokens * (5 + 2 + 2 * 2 * 3) + 6 * 2 * 4);
    assert_eq!(timed[0]["cache_bytes"][0], bytes(32));
    assert_eq!(timed[1]["cache_bytes"][0], bytes(100));
    let beyond = run(
        &bench,
        &fakes,
        &["bench", at, "--contexts", "128", "--repeats", "1"],
    );
    beyond.refuses(&["1 sequences of 128 tokens", "--max-context"]);
}

#[test]
fn a_machine_without_a_gpu_says_what_is_missing() {
    let bench = Bench::with("llama_gqa");
    let folder = engines(&bench, &model());
    // Whatever this machine has: of the drivers none is in that folder.
    let mut command = bench.command(&["generate", text(folder.path()), "--prompt", "a"]);
    command.env("MLAC_TENSORRT", folder.path().join("none"));
    let run = Run(command.output().unwrap());
    run.refuses(&[]);
    let err = run.err();
    assert!(
        err.contains("CUDA driver") || err.contains("MLAC_TENSORRT"),
        "{err}"
    );
}

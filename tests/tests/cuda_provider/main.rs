//! `mlac export --form ort-cuda`, run without a GPU.
//!
//! The exported graph runs in ONNX Runtime, its operator being registered for the CPU's execution provider, on a `libcuda.so.1` of the
//! tests that runs the kernels' own sources on the CPU (as in `ort-ops/tests/cuda`). A prompt in pieces of 16 tokens, then step by step,
//! every token's logits are compared with the standard form's. A process has one driver, so a case is two more processes: one
//! converts and exports, one runs.
//!
//! What this cannot show: ONNX Runtime's CUDA execution provider, and what only a GPU shows.
#![expect(
    unsafe_code,
    reason = "the operator is added to the runtime's own options"
)]
#![expect(
    clippy::print_stdout,
    reason = "a test without a harness tells what it did"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on says why by panicking"
)]

#[path = "../../../kernels/tests/common/mod.rs"]
mod common;
#[path = "../../../ort-ops/tests/cuda/environment.rs"]
mod environment;
mod session;
#[allow(dead_code, reason = "of its functions only the driver is wanted here")]
#[path = "../../../kernels/tests/common/step.rs"]
mod step;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Parser;
use common::run_compiler;
use mlac::cli::{args::Cli, commands};
use mlac_kernels::layer::{QUERY_TOKENS, describe};
use mlac_kernels::{
    Arch, AttentionConfig, AttentionDesc, Cache, Compiler, CompilerName, Toolchain,
};
use mlac_model::Checkpoint;
use mlac_tests::compare::require_close;
use mlac_tests::decode::decode;
use mlac_tests::fixtures::{self, Fixture};
use step::fake_driver;

/// Of the logits' scale: weights, activations and caches are f16 on one side only.
const TOLERANCE: f64 = 2e-2;

struct Case {
    fixture: &'static str,
    /// How it is converted: to ranks that the kernels take.
    options: &'static [&'static str],
    arch: Arch,
}

/// Sinks and experts; layers with a window that are not converted, and one that is, shorter than a piece of a prompt.
const CASES: [Case; 2] = [
    Case {
        fixture: "gpt_oss_mxfp4",
        options: &["--kv-lora-rank", "64", "--rope-dim", "32"],
        arch: Arch::Sm90a,
    },
    Case {
        fixture: "gpt_oss_mha",
        options: &[
            "--kv-lora-rank",
            "64",
            "--rope-dim",
            "48",
            "--layers",
            "0,1",
        ],
        arch: Arch::Sm80,
    },
];

/// The fixture's text in pieces that the nodes have kernels for.
fn pieces(seq: usize) -> Vec<usize> {
    let [_, piece] = QUERY_TOKENS.map(|tokens| tokens as usize);
    let mut pieces = vec![piece; 2];
    pieces.resize(2 + seq - 2 * piece, 1);
    pieces
}

fn mlac(folder: &Path, words: &[&str], paths: [&str; 2]) {
    let [from, to] = paths.map(|name| folder.join(name).display().to_string());
    let line = ["mlac", words[0], &from, "-o", &to];
    let line = line.into_iter().chain(words[1..].iter().copied());
    assert!(commands::run(Cli::try_parse_from(line).unwrap()).unwrap());
}

/// Converts, exports in both forms, and says which cubins the nodes bring.
fn prepare(case: &Case, folder: &Path) {
    let model = fixtures::model(case.fixture).unwrap();
    let from = model.folder.display().to_string();
    let options = [&["convert", "--calib", "none"], case.options].concat();
    mlac(folder, &options, [&from, "mla"]);
    mlac(folder, &["export"], ["mla", "standard"]);
    let target = case.arch.name();
    let options = ["export", "--form", "ort-cuda", "--target", target];
    mlac(folder, &options, ["mla", "cuda"]);
    let cache = Cache::of_user().unwrap();
    let compiler = Compiler::load(&Toolchain::find().unwrap(), CompilerName::Nvrtc).unwrap();
    for (slug, desc) in requests(case, folder) {
        let cubin = cache.get(&desc, &compiler).unwrap();
        assert!(!cubin.built, "{slug}: the export compiled another kernel");
        fs::copy(cubin.path, folder.join(slug + ".cubin")).unwrap();
    }
}

/// The kernels of the model, by name.
fn requests(case: &Case, folder: &Path) -> BTreeMap<String, AttentionDesc> {
    let checkpoint = Checkpoint::open(folder.join("mla")).unwrap();
    let config = checkpoint.config();
    let layers = config.mla.as_ref().unwrap().layers.keys();
    let of_layer = |&layer: &usize| {
        let desc = describe(config, layer, case.arch).unwrap();
        QUERY_TOKENS.map(|query_tokens| AttentionDesc {
            query_tokens,
            ..desc
        })
    };
    let all = layers.flat_map(of_layer);
    all.map(|desc| (desc.slug(), desc)).collect()
}

/// Runs the exported graph and compares every token's logits.
fn whole(case: &Case, folder: &Path) {
    let Fixture { io, .. } = fixtures::model(case.fixture).unwrap();
    let pieces = pieces(io.seq);
    let found = session::decode(&folder.join("cuda/decoder.onnx"), &io, &pieces);
    let expected: Vec<f32> = fs::read(folder.join("expected"))
        .unwrap()
        .chunks(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    let real = |logits: &[f32]| -> Vec<f64> { logits.iter().map(|&x| x.into()).collect() };
    let close = require_close(&real(&found), &real(&expected), &io.shape(), TOLERANCE).unwrap();
    println!(
        "{}: {:.1e} of the scale at most",
        case.fixture, close.of_scale
    );
}

/// The standard form's logits, in f32.
fn reference(case: &Case, folder: &Path) {
    let Fixture { io, .. } = fixtures::model(case.fixture).unwrap();
    let standard = decode(&folder.join("standard"), &io, &pieces(io.seq)).unwrap();
    let bytes: Vec<u8> = standard
        .logits
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    fs::write(folder.join("expected"), bytes).unwrap();
}

fn child(words: &[&str], settings: &[(&str, &Path)]) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("child").args(words);
    command
        .envs(settings.iter().copied())
        .status()
        .unwrap()
        .success()
}

/// A driver for each kernel, and the one that chooses among them.
fn drivers(case: &Case, folder: &Path) {
    let mut list = Vec::new();
    for (slug, desc) in requests(case, folder) {
        let own = folder.join(&slug);
        fs::create_dir(&own).unwrap();
        fake_driver(&desc, &AttentionConfig::choose(&desc).unwrap(), &own, &[]);
        let (cubin, library) = (folder.join(slug + ".cubin"), own.join("libcuda.so.1"));
        list.extend([cubin.display().to_string(), library.display().to_string()]);
    }
    fs::write(folder.join("kernels.txt"), list.join("\n")).unwrap();
    let source = folder.join("dispatch.cpp");
    fs::write(&source, include_str!("dispatch.cpp")).unwrap();
    let driver = folder.join("driver");
    fs::create_dir(&driver).unwrap();
    let flags = ["-O1", "-shared", "-fPIC", "-fvisibility=hidden"];
    run_compiler(&flags, &[source], &driver.join("libcuda.so.1"));
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let ["child", what, case, folder] = words[..] {
        let case = &CASES[case.parse::<usize>().unwrap()];
        let folder = Path::new(folder);
        if what == "prepare" {
            prepare(case, folder);
            reference(case, folder);
        } else {
            whole(case, folder);
        }
        return ExitCode::SUCCESS;
    }
    let mut good = true;
    for (i, case) in CASES.iter().enumerate() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path();
        let (number, text) = (i.to_string(), folder.display().to_string());
        let cache = folder.join("cubins");
        let mut passed = child(
            &["prepare", &number, &text],
            &[("MLAC_KERNEL_CACHE", &cache)],
        );
        if passed {
            drivers(case, folder);
            let (major, minor) = case.arch.capability();
            let capability = format!("{major}.{minor}");
            let settings = [
                ("LD_LIBRARY_PATH", &*folder.join("driver")),
                ("MLAC_FAKE_KERNELS", &folder.join("kernels.txt")),
                ("MLAC_FAKE_CAPABILITY", Path::new(&capability)),
            ];
            passed = child(&["whole", &number, &text], &settings);
        }
        let verdict = if passed { "ok" } else { "FAILED" };
        println!("test {} on {} ... {verdict}", case.fixture, case.arch);
        good &= passed;
    }
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

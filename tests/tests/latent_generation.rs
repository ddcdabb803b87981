//! `--form ort` gives the same greedy tokens as the standard form, in Python's onnxruntime with the library of operators and
//! in mlac's decoder.

use std::ffi::OsString;
use std::path::Path;

use clap::Parser;
use mlac::cli::{args::Cli, commands};
use mlac_engines::Decode;
use mlac_engines::ort::{Decoder, SessionOptions};
use mlac_model::{Checkpoint, ExpertFormat};
use mlac_tests::cases::Cases;
use mlac_tests::fixtures::{self, PREFILL};
use mlac_tests::latent::python::library;
use mlac_tests::python::{self, Generation};
use mlac_tests::{Outcome, runtime, text};

const COUNT: usize = 64;

/// Runs `mlac`.
fn mlac(arguments: &[&str], paths: [&Path; 2]) -> Outcome {
    let [command, options @ ..] = arguments else {
        return Err("no command".into());
    };
    let mut line: Vec<OsString> = vec!["mlac".into(), command.into(), paths[0].into()];
    line.extend(["-o".into(), paths[1].into()]);
    line.extend(options.iter().map(Into::into));
    let cli = Cli::try_parse_from(line).map_err(text)?;
    if commands::run(cli).map_err(text)? {
        return Ok(());
    }
    Err(format!("mlac {command} answered no"))
}

/// Greedy tokens of mlac's own decoder, and the bytes cached of them.
fn decode(folder: &Path, ids: &[i64]) -> Outcome<(Vec<i64>, usize)> {
    let mut decoder =
        Decoder::open(folder, &SessionOptions::default().with_threads(1)).map_err(text)?;
    let best = |row: &[f32]| {
        let first = |a: usize, b: usize| if row[b] > row[a] { b } else { a };
        (0..row.len()).reduce(first).unwrap_or(0) as i64
    };
    let mut tokens = vec![best(&decoder.prefill(ids).map_err(text)?.last(0))];
    while tokens.len() < COUNT {
        let last = tokens[tokens.len() - 1];
        tokens.push(best(&decoder.step(last).map_err(text)?.last(0)));
    }
    Ok((tokens, decoder.cache_bytes()))
}

/// Exports an MLA checkpoint in both forms and lets both continue `ids`.
fn same_tokens(checkpoint: &Path, ids: &[i64], layers: usize) -> Outcome {
    let scratch = tempfile::tempdir().map_err(text)?;
    let folder = |form: &str| scratch.path().join(form);
    for form in ["standard", "ort"] {
        mlac(&["export", "--form", form], [checkpoint, &folder(form)])?;
    }
    if folder("ort").join("prefill.onnx").exists() {
        return Err("the form ort has a prefill graph of its own".into());
    }
    let source = Checkpoint::open(checkpoint).map_err(text)?;
    let mxfp4 = source.config().moe;
    let mxfp4 = mxfp4.is_some_and(|moe| moe.format == ExpertFormat::Mxfp4);
    let graph = std::fs::read(folder("ort").join("decoder.onnx")).map_err(text)?;
    let operator = b"Mxfp4Experts";
    if graph.windows(operator.len()).any(|at| at == operator) != mxfp4 {
        return Err(format!(
            "experts in MXFP4: {mxfp4}, Mxfp4Experts in the form ort: {}",
            !mxfp4
        ));
    }
    let jobs = ["standard", "ort"].map(|form| Generation {
        folder: folder(form),
        ids: ids.to_vec(),
        count: COUNT,
    });
    let python = python::generate(&jobs, &library()?)?;
    if !python[0].kept.is_empty() || python[1].kept.len() != layers {
        return Err(format!(
            "caches in place: {:?} and {:?}, expected none and {layers}",
            python[0].kept, python[1].kept
        ));
    }
    let standard = decode(&folder("standard"), ids)?;
    let ort = decode(&folder("ort"), ids)?;
    if standard.1 != ort.1 {
        return Err(format!("{} bytes cached, standard {}", ort.1, standard.1));
    }
    let all = [&python[0].tokens, &python[1].tokens, &standard.0, &ort.0];
    if all.iter().all(|tokens| *tokens == all[0]) && all[0].len() == COUNT {
        return Ok(());
    }
    Err(format!(
        "python standard, python ort, mlac standard, mlac ort: {all:?}"
    ))
}

#[test]
fn fixtures_speak_the_same_in_both_forms() {
    let scratch = tempfile::tempdir().unwrap();
    let mut cases = Cases::new();
    let names = [
        "gpt_oss_sinks",
        "gpt_oss_mxfp4",
        "mistral_window",
        "qwen3_norm",
    ];
    for name in names {
        cases.run(name, || {
            let model = fixtures::model(name)?;
            let place = scratch.path().join(name);
            python::synthetic_mla(&[(model.folder.clone(), place.clone(), "exact")])?;
            let checkpoint = Checkpoint::open(&place).map_err(text)?;
            let config = checkpoint.config();
            let converted = |layer: &usize| config.mla_layer(*layer).is_some();
            let layers = (0..config.num_hidden_layers).filter(converted).count();
            same_tokens(&place, &model.io.input_ids[..PREFILL], layers)
        });
    }
    cases.finish(names.len());
}

#[test]
fn smollm2_speaks_the_same_in_both_forms() {
    let scratch = tempfile::tempdir().unwrap();
    let place = scratch.path().join("mla");
    let options = [
        "convert",
        "--calib",
        "none",
        "--kv-lora-rank",
        "128",
        "--rope-dim",
        "64",
    ];
    mlac(&options, [&runtime::smollm2().unwrap(), &place]).unwrap();
    let ids = fixtures::smollm2().unwrap().input_ids;
    same_tokens(&place, &ids[..PREFILL], 30).unwrap();
}

//! `--form ort` gives the same greedy tokens as the standard form, in Python's onnxruntime with the library of operators and
//! in mlac's decoder.

use std::ffi::OsString;
use std::path::Path;

use clap::Parser;
use mlac::cli::{args::Cli, commands};
use mlac_engines::Decode;
use mlac_engines::ort::{Decoder, SessionOptions};
use mlac_model::tensor::bytes_from_f32;
use mlac_model::{Checkpoint, CheckpointWriter, Dtype, ExpertFormat, TensorInfo};
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
    let has = |operator: &str| {
        let mut places = graph.windows(operator.len());
        places.any(|at| at == operator.as_bytes())
    };
    // The output projection is the source's, in the source's type.
    let o_proj = source.info("model.layers.0.self_attn.o_proj.weight");
    let stored = o_proj.map_err(text)?.dtype.size() == 2;
    for (what, operator, expected) in [
        ("experts in MXFP4", "Mxfp4Experts", mxfp4),
        ("weights of 16 bits", "Linear16", stored),
    ] {
        if has(operator) != expected {
            let found = !expected;
            return Err(format!(
                "{what}: {expected}, {operator} in the form ort: {found}"
            ));
        }
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

/// `source` with all numbers in bf16.
fn narrowed(source: &Checkpoint, folder: &Path) -> Outcome {
    let as_bf16 = |info: &TensorInfo| match info.dtype {
        Dtype::U8 => info.clone(),
        _ => TensorInfo::new(info.name.clone(), Dtype::BF16, info.shape.clone()),
    };
    let infos = source.tensors().iter().map(as_bf16).collect();
    let writer = CheckpointWriter::create(folder, infos, 1 << 30).map_err(text)?;
    for info in source.tensors() {
        let bytes = if info.dtype == Dtype::U8 {
            source.bytes(&info.name).map_err(text)?.to_vec()
        } else {
            let numbers = source.f32(&info.name, &info.shape).map_err(text)?;
            bytes_from_f32(Dtype::BF16, &numbers).ok_or("a float type")?
        };
        writer.write(&info.name, &bytes).map_err(text)?;
    }
    let config = serde_json::to_vec(source.raw_config()).map_err(text)?;
    writer.write_file("config.json", &config).map_err(text)?;
    writer.finish().map_err(text)
}

/// Weights of 16 bits, those of converted layers and of a tied head too.
#[test]
fn fixtures_in_bf16_speak_the_same_in_both_forms() {
    let scratch = tempfile::tempdir().unwrap();
    let mut cases = Cases::new();
    let names = ["gpt_oss_mxfp4", "llama_tied_bias", "mistral_bf16"];
    for name in names {
        cases.run(name, || {
            let model = fixtures::model(name)?;
            let place = |what: &str| scratch.path().join(format!("{name}.{what}"));
            let source = Checkpoint::open(&model.folder).map_err(text)?;
            narrowed(&source, &place("bf16"))?;
            let options = "convert --calib none --kv-lora-rank max --layers all --dtype bf16";
            let options: Vec<&str> = options.split(' ').collect();
            mlac(&options, [&place("bf16"), &place("mla")])?;
            let ids = &model.io.input_ids[..PREFILL];
            same_tokens(&place("mla"), ids, source.config().num_hidden_layers)
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

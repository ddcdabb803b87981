//! Checkpoints of every supported architecture, exported and run in ONNX Runtime, give the logits
//! that transformers computed: a prefill of 24 tokens, then 32 decode steps with the cache.

use mlac_engines::ort::{CacheKind, Decoder, SessionOptions};
use mlac_graph::builders::GqaForm;
use mlac_model::Checkpoint;
use mlac_tests::cases::Cases;
use mlac_tests::compare::require_close;
use mlac_tests::decode::{decode, decode_padded};
use mlac_tests::export::{GQA_FORMS, export};
use mlac_tests::fixtures::{self, Fixture, MODELS, PREFILL};
use mlac_tests::{Outcome, runtime, text};

/// Of the logits' scale; two f32 implementations of these models differ by about 1e-6.
const TOLERANCE: f64 = 2e-5;
/// Of the scale of SmolLM2's logits: 30 layers.
const SMOLLM2_TOLERANCE: f64 = 1e-4;

#[test]
fn tiny_models_decode_as_transformers() {
    let mut cases = Cases::new();
    for model in fixtures::models().unwrap() {
        for form in GQA_FORMS {
            cases.run(format!("{} {form:?}", model.name), || check(&model, form));
        }
    }
    cases.finish(2 * MODELS);
}

fn check(model: &Fixture, form: GqaForm) -> Outcome {
    let folder = tempfile::tempdir().map_err(text)?;
    export(&model.folder, folder.path(), form)?;
    let io = &model.io;
    let expected = io.real(&io.logits);
    if io.padded() {
        let logits = decode_padded(folder.path(), io, PREFILL)?;
        return require_close(&io.real(&logits), &expected, &[io.vocab], TOLERANCE).map(drop);
    }
    let decoded = decode(folder.path(), io, PREFILL)?;
    require_close(&io.real(&decoded.logits), &expected, &io.shape(), TOLERANCE)?;

    let checkpoint = Checkpoint::open(&model.folder).map_err(text)?;
    let config = checkpoint.config();
    let kind = CacheKind::KeyValue {
        heads: config.num_key_value_heads,
        key_width: config.head_dim,
        value_width: config.head_dim,
    };
    if decoded.layouts.len() != config.num_hidden_layers
        || decoded.layouts.iter().any(|layout| layout.kind != kind)
    {
        return Err(format!("caches {:?}, expected {kind:?}", decoded.layouts));
    }
    let numbers = (config.num_hidden_layers * config.gqa_cache_width()) as f64;
    if (decoded.cached_per_token - numbers).abs() > 1e-9 {
        return Err(format!(
            "{} numbers cached per token, expected {numbers}",
            decoded.cached_per_token
        ));
    }
    Ok(())
}

#[test]
fn smollm2_decodes_as_transformers() {
    let oracle = fixtures::smollm2().unwrap();
    let gguf = runtime::smollm2().unwrap();
    let folder = tempfile::tempdir().unwrap();
    export(&gguf, folder.path(), GqaForm::Primitives).unwrap();
    let mut decoder = Decoder::open(folder.path(), &SessionOptions::default()).unwrap();
    let mut rows = Vec::new();
    let first = decoder.prefill(&oracle.input_ids[..PREFILL]).unwrap();
    rows.extend((0..PREFILL).map(|at| first.row(0, at).into_owned()));
    for &id in &oracle.input_ids[PREFILL..] {
        rows.push(decoder.step(id).unwrap().last(0).into_owned());
    }
    assert_eq!(rows.len(), oracle.top1.len());

    let mut cases = Cases::new();
    let probes = oracle.probe_ids.len();
    for (at, row) in rows.iter().enumerate() {
        cases.run(format!("token {at}"), || {
            let top = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            if top.map(|id| id as i64) != Some(oracle.top1[at]) {
                return Err(format!("top token {top:?}, expected {}", oracle.top1[at]));
            }
            let close = |what: &str, found: f64, expected: f64| {
                let error = (found - expected).abs() / f64::from(oracle.scale);
                if error <= SMOLLM2_TOLERANCE {
                    return Ok(());
                }
                Err(format!(
                    "{what} {found}, expected {expected}: {error:.1e} of the scale {}",
                    oracle.scale
                ))
            };
            let most = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|&x| f64::from(x - most).exp()).sum();
            let logsumexp = f64::from(most) + sum.ln();
            close("logsumexp", logsumexp, f64::from(oracle.logsumexp[at]))?;
            for (probe, &id) in oracle.probe_ids.iter().enumerate() {
                let expected = f64::from(oracle.probe_logits[at * probes + probe]);
                close(
                    &format!("logit {id}"),
                    f64::from(row[id as usize]),
                    expected,
                )?;
            }
            Ok(())
        });
    }
    cases.finish(48);
}

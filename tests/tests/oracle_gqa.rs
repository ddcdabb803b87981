//! Checkpoints of every supported architecture, exported and run in ONNX Runtime, give the logits
//! that transformers computed: a prefill of 24 tokens, then 32 decode steps with the cache.

use mlac_graph::builders::{DecoderOptions, GqaForm, Runtime};
use mlac_graph::ir::DType;
use mlac_model::Checkpoint;
use mlac_tests::cases::Cases;
use mlac_tests::compare::Difference;
use mlac_tests::decode::compare;
use mlac_tests::export::{export, standard, with_gqa};
use mlac_tests::fixtures::{self, Fixture, MODELS, PIECES, STEPWISE};
use mlac_tests::{Outcome, runtime, smollm2, text};

/// Of the logits' scale; two f32 implementations of these models differ by about 1e-6.
const TOLERANCE: f64 = 2e-5;
/// Of the logits' scale, for weights, activations and caches in f16.
const F16_TOLERANCE: f64 = 2e-2;

fn check(
    model: &Fixture,
    options: DecoderOptions,
    pieces: &[usize],
    tolerance: f64,
) -> Outcome<Difference> {
    let folder = tempfile::tempdir().map_err(text)?;
    export(&model.folder, folder.path(), options)?;
    let expected: Vec<f64> = model.io.logits.iter().map(|&x| f64::from(x)).collect();
    let checkpoint = Checkpoint::open(&model.folder).map_err(text)?;
    compare(
        folder.path(),
        checkpoint.config(),
        options,
        (&model.io, pieces),
        (&expected, tolerance),
    )
}

/// Every fixture in a form. The fused operator takes several tokens on top of a cache for one text
/// only, so batches are left out there.
fn check_all(options: DecoderOptions, pieces: &[usize], tolerance: f64) {
    let mut cases = Cases::new();
    for model in fixtures::models().expect("the committed fixtures") {
        let batched = options.gqa_form == GqaForm::GroupQueryAttention
            && pieces != STEPWISE
            && model.io.batch > 1;
        if !batched {
            cases.measure(&model.name, || check(&model, options, pieces, tolerance));
        }
    }
    cases.finish(MODELS - 4);
}

#[test]
fn primitives_decode_as_transformers() {
    check_all(standard(), &STEPWISE, TOLERANCE);
}

#[test]
fn primitives_take_several_tokens_on_top_of_a_cache() {
    check_all(standard(), &PIECES, TOLERANCE);
}

#[test]
fn the_fused_operator_decodes_as_transformers() {
    check_all(with_gqa(GqaForm::GroupQueryAttention), &STEPWISE, TOLERANCE);
}

#[test]
fn the_fused_operator_takes_several_tokens_on_top_of_a_cache() {
    check_all(with_gqa(GqaForm::GroupQueryAttention), &PIECES, TOLERANCE);
}

#[test]
fn the_graph_for_tensorrt_decodes_as_transformers() {
    let options = DecoderOptions {
        runtime: Runtime::TensorRt,
        ..standard()
    };
    check_all(options, &STEPWISE, TOLERANCE);
}

#[test]
fn f16_stays_close_to_transformers() {
    for runtime in [Runtime::Standard, Runtime::TensorRt] {
        let options = DecoderOptions {
            dtype: DType::F16,
            runtime,
            ..standard()
        };
        check_all(options, &STEPWISE, F16_TOLERANCE);
    }
}

#[test]
fn smollm2_decodes_as_transformers() {
    let gguf = runtime::smollm2().unwrap();
    let folder = tempfile::tempdir().unwrap();
    export(&gguf, folder.path(), standard()).unwrap();
    let mut cases = Cases::new();
    smollm2::compare(&mut cases, folder.path()).unwrap();
    cases.finish(48);
}

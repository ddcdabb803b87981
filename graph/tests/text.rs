//! The graphs of every builder as text.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    reason = "a test crate has no interface"
)]

mod common;

use common::{converted, gpt_oss, llama, qwen2, qwen3};
use mlac_graph::{
    ValidGraph,
    builders::{
        CacheProduct, DecoderOptions, GqaForm, LayerOptions, MlaForm, Runtime, StepForm,
        StepOptions, Tap, block_graph, decoder_graph, embed_graph, head_graph, layer_graph,
        rest_of_layer_graph, step_graph,
    },
    ir::DType,
};
use mlac_model::{ExpertFormat, ModelConfig};

fn text(graph: &ValidGraph) -> String {
    graph.graph().to_string()
}

fn decoder(cfg: &ModelConfig, options: DecoderOptions) -> String {
    text(&decoder_graph(cfg, &options).unwrap())
}

fn step(cfg: &ModelConfig, form: StepForm) -> String {
    let options = StepOptions {
        form,
        dtype: DType::F32,
        product: CacheProduct::default(),
    };
    text(&step_graph(cfg, 0, &options, None).unwrap())
}

#[test]
fn gqa_decoder() {
    insta::assert_snapshot!(decoder(&llama(1), DecoderOptions::default()));
}

#[test]
fn gqa_decoder_with_biases_and_a_window() {
    insta::assert_snapshot!(decoder(&qwen2(2), DecoderOptions::default()));
}

#[test]
fn gqa_decoder_by_operator_in_f16() {
    let options = DecoderOptions {
        dtype: DType::F16,
        gqa_form: GqaForm::GroupQueryAttention,
        ..DecoderOptions::default()
    };
    insta::assert_snapshot!(decoder(&llama(1), options));
}

#[test]
fn mla_decoder_absorbed() {
    let cfg = converted(llama(2), &[1]);
    insta::assert_snapshot!(decoder(&cfg, DecoderOptions::default()));
}

#[test]
fn mla_decoder_expanded() {
    let options = DecoderOptions {
        mla_form: MlaForm::Expanded,
        ..DecoderOptions::default()
    };
    insta::assert_snapshot!(decoder(&converted(llama(1), &[0]), options));
}

#[test]
fn mla_decoder_of_normed_keys() {
    let cfg = converted(qwen3(1), &[0]);
    insta::assert_snapshot!(decoder(&cfg, DecoderOptions::default()));
}

#[test]
fn mla_decoder_absorbed_for_tensorrt_in_f16() {
    let options = DecoderOptions {
        dtype: DType::F16,
        runtime: Runtime::TensorRt,
        ..DecoderOptions::default()
    };
    insta::assert_snapshot!(decoder(&converted(llama(2), &[1]), options));
}

#[test]
fn mla_decoder_expanded_for_tensorrt_in_f16() {
    let options = DecoderOptions {
        dtype: DType::F16,
        mla_form: MlaForm::Expanded,
        runtime: Runtime::TensorRt,
        ..DecoderOptions::default()
    };
    insta::assert_snapshot!(decoder(&converted(llama(1), &[0]), options));
}

#[test]
fn layer_with_projections_only() {
    let options = LayerOptions {
        taps: vec![Tap::Query, Tap::Key, Tap::Value],
        dtype: DType::F32,
        cached: false,
    };
    insta::assert_snapshot!(text(&layer_graph(&qwen3(1), 0, &options).unwrap()));
}

#[test]
fn layer_with_attention() {
    let options = LayerOptions {
        taps: vec![Tap::AttnOut, Tap::Heads],
        dtype: DType::F32,
        cached: false,
    };
    insta::assert_snapshot!(text(&layer_graph(&llama(1), 0, &options).unwrap()));
}

#[test]
fn layer_converted() {
    let options = LayerOptions {
        taps: vec![Tap::HiddenOut],
        dtype: DType::F32,
        cached: false,
    };
    let cfg = converted(llama(1), &[0]);
    insta::assert_snapshot!(text(&layer_graph(&cfg, 0, &options).unwrap()));
}

#[test]
fn layer_converted_with_cache() {
    let options = LayerOptions {
        taps: vec![Tap::Heads],
        dtype: DType::F32,
        cached: true,
    };
    let cfg = converted(llama(1), &[0]);
    insta::assert_snapshot!(text(&layer_graph(&cfg, 0, &options).unwrap()));
}

#[test]
fn rest_of_layer() {
    insta::assert_snapshot!(text(&rest_of_layer_graph(&llama(1), 0).unwrap()));
}

#[test]
fn both_ends() {
    let ends = [embed_graph(&llama(1)), head_graph(&qwen2(1))].map(|g| text(&g.unwrap()));
    insta::assert_snapshot!(ends.join("\n"));
}

#[test]
fn steps() {
    let mla = converted(llama(1), &[0]);
    let steps = [
        step(&llama(1), StepForm::GqaPrimitives),
        step(&llama(1), StepForm::GqaOperator),
        step(&mla, StepForm::MlaAbsorbed),
    ];
    insta::assert_snapshot!(steps.join("\n"));
}

/// The first layer has a window.
fn block(cfg: &ModelConfig, options: DecoderOptions) -> String {
    text(&block_graph(cfg, 0, &options, None).unwrap())
}

#[test]
fn gpt_oss_block_with_a_window() {
    let cfg = gpt_oss(1, ExpertFormat::Mxfp4);
    insta::assert_snapshot!(block(&cfg, DecoderOptions::default()));
}

#[test]
fn gpt_oss_block_converted_with_dense_experts() {
    let cfg = converted(gpt_oss(1, ExpertFormat::Dense), &[0]);
    insta::assert_snapshot!(block(&cfg, DecoderOptions::default()));
}

#[test]
fn gpt_oss_block_by_operator() {
    let options = DecoderOptions {
        gqa_form: GqaForm::GroupQueryAttention,
        ..DecoderOptions::default()
    };
    insta::assert_snapshot!(block(&gpt_oss(1, ExpertFormat::Dense), options));
}

#[test]
fn gpt_oss_blocks_for_tensorrt_in_f16() {
    let blocks = [MlaForm::Absorbed, MlaForm::Expanded].map(|mla_form| {
        let options = DecoderOptions {
            dtype: DType::F16,
            runtime: Runtime::TensorRt,
            mla_form,
            ..DecoderOptions::default()
        };
        block(&gpt_oss(1, ExpertFormat::Mxfp4), options)
    });
    insta::assert_snapshot!(blocks.join("\n"));
}

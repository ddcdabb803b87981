//! The form in standard operators, as the decoder has it: caches that grow, padding on the left, windows that roll.

use half::f16;
use mlac_engines::ort::{HostData, HostTensor, OrtSession, SessionOptions, Value};
use mlac_graph::builders::{CacheProduct, DecoderOptions, Runtime, latent_attention_graph};
use mlac_graph::ir::DType;
use mlac_graph::onnx::{MemoryWeights, to_bytes};
use mlac_model::{
    Architecture, MlaConfig, MlaEncoder, MlaLayer, ModelConfig, RopeScaling, RopeSpec,
};

use super::problem::{Kind, Problem, Spec};
use super::reference::Answer;
use crate::{Outcome, text};

/// What the rows of padding hold: finite, as those of real padding are, and nothing that could pass unseen.
const PADDING: f32 = 7.0;

/// Whether the decoder's graphs can have the problem: no pages, no trees, a type and a rotary key that graphs have.
pub fn has(spec: &Spec) -> bool {
    let rotary = spec.rope > 0 && spec.rope.is_multiple_of(2);
    spec.page.is_none() && !spec.tree && spec.kind != Kind::Bf16 && rotary
}

/// Forms in standard operators: both layouts of the score product, and `Attention` where `TensorRT` would get it.
pub const FORMS: [(Runtime, CacheProduct); 3] = [
    (Runtime::Standard, CacheProduct::QueryRows),
    (Runtime::Standard, CacheProduct::CacheRows),
    (Runtime::TensorRt, CacheProduct::QueryRows),
];

/// The decoder's attention over the problem's cached rows, right-aligned where sequences differ. The cache that it gives is
/// compared here, bit for bit; what a token without anything to see gets is only required to be finite.
pub fn standard(problem: &Problem, (runtime, product): (Runtime, CacheProduct)) -> Outcome<Answer> {
    let spec = &problem.spec;
    let options = DecoderOptions {
        dtype: match spec.kind {
            Kind::F32 => DType::F32,
            _ => DType::F16,
        },
        runtime,
        product,
        ..DecoderOptions::default()
    };
    let graph = latent_attention_graph(&config(spec), 0, &options).map_err(text)?;
    let mut weights = MemoryWeights::new();
    if let Some(sinks) = &problem.sinks {
        let name = "model.layers.0.self_attn.sinks";
        let sinks = sinks.clone();
        weights.insert(name, &[spec.heads], sinks).map_err(text)?;
    }
    let bytes = to_bytes(&graph, &weights).map_err(text)?;
    let options = SessionOptions::default();
    let mut session = OrtSession::from_bytes("standard", &bytes, &options).map_err(text)?;

    let (batch, tokens, width) = (problem.batch(), spec.query_tokens, problem.width());
    let past = spec.past.iter().max().copied().unwrap_or(0);
    let cached = spec.window.map_or(past, |window| past.min(window));
    let kept = spec.window.map_or(past + tokens, |w| w.min(past + tokens));
    let rows = |first: usize, count: usize| -> Vec<f32> {
        let slots = (0..batch).flat_map(|b| (first..first + count).map(move |slot| (b, slot)));
        slots
            .flat_map(|(b, slot)| row(problem, b, slot, past))
            .collect()
    };
    let float = |shape: &[usize], numbers| float(spec.kind, shape.to_vec(), numbers);
    let query = [batch, tokens, spec.heads, width];
    let new_rows = [batch, tokens, width];
    let cache = [batch, cached, width];
    let inputs = [
        ("query", float(&query, problem.query.clone())),
        ("new_rows", float(&new_rows, problem.new_rows.clone())),
        ("attention_mask", mask(problem, past)),
        ("past_latent.0", float(&cache, rows(past - cached, cached))),
    ];
    let values: Vec<(&str, Value)> = inputs
        .into_iter()
        .map(|(name, tensor)| Ok((name, Value::new(tensor).map_err(text)?)))
        .collect::<Outcome<_>>()?;
    let given: Vec<(&str, &Value)> = values.iter().map(|(n, v)| (*n, v)).collect();
    let out = session.run(&given).map_err(text)?;
    let present = out[1].to_host();
    let expected = rows(past + tokens - kept, kept);
    if present.shape != [batch, kept, width] || present.to_f32() != expected.as_slice() {
        return Err(format!("the cache of {kept} rows is not the last rows"));
    }
    let mut sums = out[0].to_host().to_f32().into_owned();
    if let Some(at) = sums.iter().position(|x| !x.is_finite()) {
        return Err(format!("sum {at} is {}", sums[at]));
    }
    let blind = problem.reference().lse.unwrap_or_default();
    for (sums, lse) in sums.chunks_mut(spec.rank).zip(blind) {
        if lse == f32::NEG_INFINITY {
            sums.fill(0.0);
        }
    }
    Ok(Answer {
        sums,
        lse: None,
        cache: None,
    })
}

fn float(kind: Kind, shape: Vec<usize>, numbers: Vec<f32>) -> HostTensor {
    let data = match kind {
        Kind::F32 => HostData::F32(numbers),
        _ => HostData::F16(numbers.into_iter().map(f16::from_f32).collect()),
    };
    HostTensor { shape, data }
}

/// The row in a slot of a batch whose longest sequence has `past` cached rows.
fn row(problem: &Problem, b: usize, slot: usize, past: usize) -> Vec<f32> {
    let (width, own) = (problem.width(), problem.spec.past[b]);
    let Some(position) = (slot + own).checked_sub(past) else {
        return vec![PADDING; width];
    };
    if let Some(row) = problem.history[b].get(position) {
        return row.clone();
    }
    let at = (b * problem.spec.query_tokens + position - own) * width;
    problem.new_rows[at..at + width].to_vec()
}

/// `attention_mask` `[batch, past + query_tokens]`: padding, and what the problem hides.
fn mask(problem: &Problem, past: usize) -> HostTensor {
    let total = past + problem.spec.query_tokens;
    let mut mask = Vec::new();
    for (b, &own) in problem.spec.past.iter().enumerate() {
        mask.extend((0..total).map(|slot| {
            let shown = |position: usize| match &problem.key_mask {
                Some(mask) => mask[b * problem.mask_length + position],
                None => 1,
            };
            (slot + own).checked_sub(past).map_or(0, shown)
        }));
    }
    HostTensor::i64([problem.batch(), total], mask)
}

/// A model of one layer with the problem's attention.
fn config(spec: &Spec) -> ModelConfig {
    let shape = MlaLayer {
        kv_lora_rank: spec.rank,
        qk_rope_head_dim: spec.rope,
        qk_nope_head_dim: 8,
        v_head_dim: 8,
        encoder: MlaEncoder::Hidden,
    };
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: 8,
        intermediate_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: spec.heads,
        num_key_value_heads: 1,
        head_dim: 8,
        vocab_size: 8,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-5,
        rope: RopeSpec {
            theta: 10000.0,
            scaling: RopeScaling::Default,
        },
        tie_word_embeddings: true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sinks: spec.sinks,
        moe: None,
        sliding_window: vec![spec.window],
        eos_token_ids: vec![],
        mla: Some(MlaConfig {
            layers: [(0, shape)].into(),
            attention_scale: f64::from(spec.scale),
            o_bias: false,
        }),
    }
}

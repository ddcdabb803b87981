//! The tensors a configuration implies, and the check that a checkpoint holds them.

use std::collections::HashMap;

use crate::{
    Dtype, Error, ExpertFormat, MlaEncoder, MlaLayer, ModelConfig, MoeConfig, TensorInfo,
    mxfp4::BLOCK, tensor::shape_text,
};

/// Name and shape of every tensor that a model of this configuration has, in forward order.
///
/// Linear weights are `[out, in]`; see [`crate::config`] for the letters. A tied `lm_head` is not
/// in the list.
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let mut list = vec![(
        "model.embed_tokens.weight".to_owned(),
        vec![config.vocab_size, hidden],
    )];
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: Vec<usize>| {
            list.push((format!("model.layers.{layer}.{name}"), shape));
        };
        add("input_layernorm.weight", vec![hidden]);
        match config.mla_layer(layer) {
            Some(mla) => mla_attention(config, mla, &mut add),
            None => gqa_attention(config, &mut add),
        }
        add("post_attention_layernorm.weight", vec![hidden]);
        if let Some(moe) = &config.moe {
            experts(config, moe, &mut add);
            continue;
        }
        for (name, out, inner) in [
            ("mlp.gate_proj", config.intermediate_size, hidden),
            ("mlp.up_proj", config.intermediate_size, hidden),
            ("mlp.down_proj", hidden, config.intermediate_size),
        ] {
            linear(name, out, inner, config.mlp_bias, &mut add);
        }
    }
    list.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !config.tie_word_embeddings {
        list.push(("lm_head.weight".to_owned(), vec![config.vocab_size, hidden]));
    }
    list
}

fn linear(
    name: &str,
    out: usize,
    inner: usize,
    bias: bool,
    add: &mut impl FnMut(&str, Vec<usize>),
) {
    add(&format!("{name}.weight"), vec![out, inner]);
    if bias {
        add(&format!("{name}.bias"), vec![out]);
    }
}

/// Router and experts; the rows of `gate_up_proj` alternate between gate and up.
fn experts(config: &ModelConfig, moe: &MoeConfig, add: &mut impl FnMut(&str, Vec<usize>)) {
    let (hidden, inner, count) = (
        config.hidden_size,
        config.intermediate_size,
        moe.num_experts,
    );
    linear("mlp.router", count, hidden, true, add);
    for (name, out, input) in [
        ("gate_up_proj", 2 * inner, hidden),
        ("down_proj", hidden, inner),
    ] {
        let name = format!("mlp.experts.{name}");
        match moe.format {
            ExpertFormat::Mxfp4 => {
                let blocks = input / BLOCK;
                add(
                    &format!("{name}{BLOCKS}"),
                    vec![count, out, blocks, BLOCK / 2],
                );
                add(&format!("{name}{SCALES}"), vec![count, out, blocks]);
            }
            ExpertFormat::Dense => add(&name, vec![count, input, out]),
        }
        add(&format!("{name}_bias"), vec![count, out]);
    }
}

/// What the names of MXFP4 tensors end with.
const BLOCKS: &str = "_blocks";
const SCALES: &str = "_scales";

/// Whether a tensor of this name holds bytes of MXFP4 and not numbers.
fn is_packed(config: &ModelConfig, name: &str) -> bool {
    config
        .moe
        .is_some_and(|moe| moe.format == ExpertFormat::Mxfp4)
        && name.contains(".mlp.experts.")
        && (name.ends_with(BLOCKS) || name.ends_with(SCALES))
}

fn gqa_attention(config: &ModelConfig, add: &mut impl FnMut(&str, Vec<usize>)) {
    let (hidden, d) = (config.hidden_size, config.head_dim);
    let (queries, keys) = (
        config.num_attention_heads * d,
        config.num_key_value_heads * d,
    );
    linear("self_attn.q_proj", queries, hidden, config.qkv_bias, add);
    linear("self_attn.k_proj", keys, hidden, config.qkv_bias, add);
    linear("self_attn.v_proj", keys, hidden, config.qkv_bias, add);
    if config.qk_norm {
        add("self_attn.q_norm.weight", vec![d]);
        add("self_attn.k_norm.weight", vec![d]);
    }
    linear("self_attn.o_proj", hidden, queries, config.o_bias, add);
    sinks(config, add);
}

fn sinks(config: &ModelConfig, add: &mut impl FnMut(&str, Vec<usize>)) {
    if config.sinks {
        add("self_attn.sinks", vec![config.num_attention_heads]);
    }
}

fn mla_attention(config: &ModelConfig, mla: &MlaLayer, add: &mut impl FnMut(&str, Vec<usize>)) {
    let (hidden, d, heads) = (
        config.hidden_size,
        config.head_dim,
        config.num_attention_heads,
    );
    let keys = config.num_key_value_heads * d;
    match mla.encoder {
        MlaEncoder::Hidden => {
            let queries = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim);
            linear("self_attn.q_proj", queries, hidden, config.qkv_bias, add);
            let row = mla.cache_width();
            linear(
                "self_attn.kv_a_proj_with_mqa",
                row,
                hidden,
                config.qkv_bias,
                add,
            );
        }
        MlaEncoder::KeptQuery => {
            linear("self_attn.q_proj", heads * d, hidden, config.qkv_bias, add);
            linear(
                "self_attn.kv_a_proj_with_mqa",
                mla.cache_width(),
                hidden,
                config.qkv_bias,
                add,
            );
            add(
                "self_attn.q_rope_proj.weight",
                vec![heads * mla.qk_rope_head_dim, d],
            );
        }
        MlaEncoder::NormedKey => {
            linear("self_attn.q_proj", heads * d, hidden, config.qkv_bias, add);
            add("self_attn.q_norm.weight", vec![d]);
            linear("self_attn.k_proj", keys, hidden, config.qkv_bias, add);
            add("self_attn.k_norm.weight", vec![d]);
            linear("self_attn.v_proj", keys, hidden, config.qkv_bias, add);
            add(
                "self_attn.kv_a_proj_with_mqa.weight",
                vec![mla.cache_width(), 2 * keys],
            );
            add(
                "self_attn.q_rope_proj.weight",
                vec![heads * mla.qk_rope_head_dim, d],
            );
        }
    }
    let up = heads * (mla.qk_nope_head_dim + mla.v_head_dim);
    add("self_attn.kv_b_proj.weight", vec![up, mla.kv_lora_rank]);
    let o_bias = config.mla.as_ref().is_some_and(|m| m.o_bias);
    linear(
        "self_attn.o_proj",
        hidden,
        heads * mla.v_head_dim,
        o_bias,
        add,
    );
    add("self_attn.rotary_inv_freq", vec![mla.qk_rope_head_dim / 2]);
    sinks(config, add);
}

/// Refuses a checkpoint that lacks a tensor, has one of another shape or dtype, or has one that a
/// model of this configuration would not use.
pub(super) fn check(
    config: &ModelConfig,
    tensors: &[TensorInfo],
    index: &HashMap<String, usize>,
    checkpoint: &str,
) -> Result<(), Error> {
    let mut used = vec![false; tensors.len()];
    for (name, shape) in expected_tensors(config) {
        let subject = || format!("{checkpoint}: tensor {name}");
        let Some(&at) = index.get(&name) else {
            return Err(Error::refusal(
                subject(),
                format!(
                    "a tensor {} as the configuration implies",
                    shape_text(&shape)
                ),
                "no such tensor",
                "check that config.json belongs to these weights",
            ));
        };
        let info = &tensors[at];
        if info.shape != shape {
            return Err(Error::refusal(
                subject(),
                format!("shape {} as the configuration implies", shape_text(&shape)),
                format!("shape {}", shape_text(&info.shape)),
                "check that config.json belongs to these weights",
            ));
        }
        if is_packed(config, &name) {
            if info.dtype != Dtype::U8 {
                return Err(Error::refusal(
                    subject(),
                    format!("dtype {}, as MXFP4 is stored", Dtype::U8),
                    format!("dtype {}", info.dtype),
                    "use the checkpoint as its publisher has it",
                ));
            }
        } else if !info.dtype.is_weight() {
            return Err(Error::refusal(
                subject(),
                format!("dtype {}, {} or {}", Dtype::F32, Dtype::F16, Dtype::BF16),
                format!("dtype {}", info.dtype),
                "use a checkpoint with weights of one of these types",
            ));
        }
        used[at] = true;
    }
    for (info, used) in tensors.iter().zip(used) {
        if !used && !is_redundant(config, info) {
            return Err(Error::refusal(
                format!("{checkpoint}: tensor {}", info.name),
                "only tensors that a model of this configuration uses",
                format!("an unused {} {}", info.dtype, shape_text(&info.shape)),
                "check that config.json belongs to these weights, or remove the tensor",
            ));
        }
    }
    Ok(())
}

/// Tensors that old files carry although the model computes or shares them: the rotary table of
/// each layer, and a tied head (its content is compared with the embedding by the caller).
fn is_redundant(config: &ModelConfig, info: &TensorInfo) -> bool {
    info.name.ends_with(".self_attn.rotary_emb.inv_freq")
        || (config.tie_word_embeddings && info.name == "lm_head.weight")
}

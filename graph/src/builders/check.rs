//! What a configuration must satisfy before a graph is built from it.

use mlac_model::{ExpertFormat, MlaEncoder, ModelConfig, Refusal, mxfp4::BLOCK};

use super::context::{GqaForm, LayerKernels, Runtime};
use crate::ir::DType;

/// Larger sizes than this are taken for damage; products of three stay far from overflow.
const LARGEST_SIZE: usize = 1 << 20;

/// Refuses a configuration whose parts contradict each other.
pub(super) fn config(cfg: &ModelConfig) -> Result<(), Refusal> {
    let sizes = [
        ("hidden_size", cfg.hidden_size),
        ("intermediate_size", cfg.intermediate_size),
        ("num_hidden_layers", cfg.num_hidden_layers),
        ("num_attention_heads", cfg.num_attention_heads),
        ("num_key_value_heads", cfg.num_key_value_heads),
        ("head_dim", cfg.head_dim),
        ("vocab_size", cfg.vocab_size),
    ];
    for (key, value) in sizes {
        require(
            key,
            (1..=LARGEST_SIZE).contains(&value),
            &format!("1 to {LARGEST_SIZE}"),
            value,
        )?;
    }
    let (heads, kv_heads) = (cfg.num_attention_heads, cfg.num_key_value_heads);
    require(
        "num_key_value_heads",
        heads % kv_heads == 0,
        &format!("a divisor of {heads}"),
        kv_heads,
    )?;
    require(
        "head_dim",
        cfg.head_dim.is_multiple_of(2),
        "an even number",
        cfg.head_dim,
    )?;
    let (layers, windows) = (cfg.num_hidden_layers, cfg.sliding_window.len());
    require(
        "sliding_window",
        windows == layers,
        &format!("one per layer, {layers}"),
        windows,
    )?;
    for window in cfg.sliding_window.iter().flatten() {
        require(
            "sliding_window",
            *window > 0,
            "at least 1 position",
            *window,
        )?;
    }
    experts(cfg)?;
    let Some(mla) = &cfg.mla else { return Ok(()) };
    let scale = mla.attention_scale;
    require(
        "attention_scale",
        scale.is_finite() && scale > 0.0,
        "a positive number",
        scale,
    )?;
    for (&layer, shape) in &mla.layers {
        require(
            "mla_layers",
            layer < layers,
            &format!("layers below {layers}"),
            layer,
        )?;
        let parts = [
            ("kv_lora_rank", shape.kv_lora_rank),
            ("qk_rope_head_dim", shape.qk_rope_head_dim),
            ("qk_nope_head_dim", shape.qk_nope_head_dim),
            ("v_head_dim", shape.v_head_dim),
        ];
        for (key, value) in parts {
            let good = (1..=LARGEST_SIZE).contains(&value);
            require(
                key,
                good,
                &format!("1 to {LARGEST_SIZE} in layer {layer}"),
                value,
            )?;
        }
        let rope = shape.qk_rope_head_dim;
        require("qk_rope_head_dim", rope % 2 == 0, "an even number", rope)?;
        if shape.encoder != MlaEncoder::Hidden {
            let normed = shape.encoder == MlaEncoder::NormedKey;
            require(
                "mla_encoder",
                cfg.qk_norm == normed,
                if normed {
                    "hidden or kept_query, the model has no q and k norm"
                } else {
                    "normed_key, the model has q and k norm"
                },
                shape.encoder.name(),
            )?;
            let (d, nope) = (cfg.head_dim, shape.qk_nope_head_dim);
            require(
                "qk_nope_head_dim",
                nope == d,
                &format!("head_dim, {d}"),
                nope,
            )?;
        }
    }
    Ok(())
}

fn experts(cfg: &ModelConfig) -> Result<(), Refusal> {
    let Some(moe) = cfg.moe else { return Ok(()) };
    let (count, chosen) = (moe.num_experts, moe.experts_per_token);
    require(
        "num_local_experts",
        (1..=LARGEST_SIZE).contains(&count),
        &format!("1 to {LARGEST_SIZE}"),
        count,
    )?;
    require(
        "num_experts_per_tok",
        (1..=count).contains(&chosen),
        &format!("1 to {count}"),
        chosen,
    )?;
    for (key, value) in [
        ("swiglu_limit", moe.swiglu_limit),
        ("swiglu_alpha", moe.swiglu_alpha),
    ] {
        let good = value.is_finite() && value > 0.0;
        require(key, good, "a positive number", value)?;
    }
    if moe.format == ExpertFormat::Dense {
        return Ok(());
    }
    for (key, value) in [
        ("hidden_size", cfg.hidden_size),
        ("intermediate_size", cfg.intermediate_size),
    ] {
        let good = value.is_multiple_of(BLOCK);
        require(key, good, &format!("a multiple of {BLOCK}"), value)?;
    }
    Ok(())
}

/// Refuses a layer that the model does not have.
pub(super) fn layer(cfg: &ModelConfig, layer: usize) -> Result<(), Refusal> {
    if layer < cfg.num_hidden_layers {
        return Ok(());
    }
    Err(Refusal::new(
        "layer of the graph",
        format!(
            "one of the model's {}, counted from 0",
            cfg.num_hidden_layers
        ),
        layer.to_string(),
        "name a layer of the model",
    ))
}

/// Refuses a graph for a GPU without converted layers, and one for ONNX Runtime whose converted layers do not all bring kernels.
pub(super) fn kernels(
    cfg: &ModelConfig,
    runtime: Runtime,
    kernels: &LayerKernels,
) -> Result<(), Refusal> {
    let layers = || cfg.mla.iter().flat_map(|mla| mla.layers.keys());
    if runtime.has_cuda_kernels() && layers().next().is_none() {
        return Err(Refusal::new(
            "model of a graph with LatentAttention on a GPU",
            "converted layers",
            "none",
            "convert the model first, or export the standard form",
        ));
    }
    let bare = layers().find(|layer| !kernels.contains_key(layer));
    match bare {
        Some(layer) if runtime == Runtime::OnnxRuntimeCuda => Err(Refusal::new(
            format!("layer {layer} of a graph for the CUDA execution provider"),
            "kernels that its node brings",
            "none",
            "build the graph with the kernels of every converted layer",
        )),
        _ => Ok(()),
    }
}

/// Refuses heads that `com.microsoft::GroupQueryAttention` does not take.
pub(super) fn operator_heads(cfg: &ModelConfig) -> Result<(), Refusal> {
    if GqaForm::GroupQueryAttention.takes(cfg) {
        return Ok(());
    }
    Err(Refusal::new(
        "form of the GQA layers",
        "a head_dim that 8 divides, which com.microsoft::GroupQueryAttention needs",
        cfg.head_dim.to_string(),
        "use primitives",
    ))
}

/// Refuses an element type in which a model cannot be computed.
pub(super) fn dtype(dtype: DType) -> Result<(), Refusal> {
    if dtype.is_float() {
        return Ok(());
    }
    Err(Refusal::new(
        "element type of the graph",
        "f32 or f16",
        dtype.to_string(),
        "choose a floating point type",
    ))
}

fn require(
    key: &str,
    good: bool,
    expected: &str,
    found: impl std::fmt::Display,
) -> Result<(), Refusal> {
    if good {
        return Ok(());
    }
    Err(Refusal::new(
        format!("configuration key {key}"),
        expected,
        found.to_string(),
        "check that config.json belongs to this model",
    ))
}

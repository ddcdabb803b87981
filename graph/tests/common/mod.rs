//! Tiny configurations, and checkpoints of zeros.

use mlac_graph::onnx::MemoryWeights;
use mlac_model::{
    Architecture, Dtype, ExpertFormat, MlaConfig, MlaEncoder, MlaLayer, ModelConfig, MoeConfig,
    RopeScaling, RopeSpec, checkpoint::expected_tensors,
};

/// Llama: H = 6, G = 2, d = 8, tied embedding, no biases.
pub fn llama(layers: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: 40,
        intermediate_size: 56,
        num_hidden_layers: layers,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 8,
        vocab_size: 97,
        max_position_embeddings: 512,
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
        sinks: false,
        moe: None,
        sliding_window: vec![None; layers],
        eos_token_ids: vec![],
        mla: None,
    }
}

/// Qwen2: biases on q, k, v, untied head, a window of 4 in the last layer.
pub fn qwen2(layers: usize) -> ModelConfig {
    let mut windows = vec![None; layers];
    windows[layers - 1] = Some(4);
    ModelConfig {
        architecture: Architecture::Qwen2,
        tie_word_embeddings: false,
        qkv_bias: true,
        sliding_window: windows,
        ..llama(layers)
    }
}

/// Qwen3: norms on q and k, d = 16.
pub fn qwen3(layers: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen3,
        head_dim: 16,
        qk_norm: true,
        ..llama(layers)
    }
}

/// GPT-OSS: biases, sinks, 5 experts of which 2 are chosen, a window of 4 in even layers.
pub fn gpt_oss(layers: usize, format: ExpertFormat) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::GptOss,
        hidden_size: 64,
        intermediate_size: 32,
        tie_word_embeddings: false,
        qkv_bias: true,
        o_bias: true,
        sinks: true,
        moe: Some(MoeConfig {
            num_experts: 5,
            experts_per_token: 2,
            swiglu_limit: 7.0,
            swiglu_alpha: 1.702,
            format,
        }),
        sliding_window: (0..layers).map(|i| (i % 2 == 0).then_some(4)).collect(),
        ..llama(layers)
    }
}

/// `cfg` with the listed layers converted, r = 12 and `d_r` = 4.
pub fn converted(cfg: ModelConfig, layers: &[usize]) -> ModelConfig {
    let shape = MlaLayer {
        kv_lora_rank: 12,
        qk_rope_head_dim: 4,
        qk_nope_head_dim: cfg.head_dim,
        v_head_dim: cfg.head_dim,
        encoder: MlaEncoder::of(cfg.architecture),
    };
    let mla = MlaConfig {
        layers: layers.iter().map(|&l| (l, shape)).collect(),
        attention_scale: (cfg.head_dim as f64).powf(-0.5),
        o_bias: true,
    };
    ModelConfig {
        mla: Some(mla),
        ..cfg
    }
}

/// All tensors of `cfg`, stored in a type and MXFP4, filled with zeros.
pub fn stored(cfg: &ModelConfig, dtype: Dtype) -> MemoryWeights {
    let mut weights = MemoryWeights::new();
    for (name, shape) in expected_tensors(cfg) {
        let packed = name.ends_with("_blocks") || name.ends_with("_scales");
        let dtype = if packed { Dtype::U8 } else { dtype };
        let bytes = vec![0; shape.iter().product::<usize>() * dtype.size()];
        weights.insert_stored(name, &shape, dtype, bytes).unwrap();
    }
    weights
}

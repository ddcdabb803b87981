//! Names, shapes, types and shards of the published GPT-OSS checkpoints.

use mlac_model::{Dtype, TensorInfo, mxfp4};
use serde_json::{Value, json};

/// Sizes of a GPT-OSS model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    /// Width of one expert.
    pub(crate) intermediate: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) experts: usize,
    pub(crate) vocab: usize,
    /// Id of `<|startoftext|>`; the other special tokens follow.
    pub(crate) first_special: usize,
    /// Largest shard in bytes of data.
    pub(crate) max_shard: usize,
}

impl Sizes {
    /// openai/gpt-oss-20b.
    pub(crate) const SMALL: Self = Self {
        layers: 24,
        hidden: 2880,
        intermediate: 2880,
        heads: 64,
        kv_heads: 8,
        head_dim: 64,
        experts: 32,
        vocab: 201_088,
        first_special: 199_998,
        max_shard: 4_800_000_000,
    };
    /// openai/gpt-oss-120b.
    pub(crate) const LARGE: Self = Self {
        layers: 36,
        experts: 128,
        ..Self::SMALL
    };

    /// All tensors in the order of the published files: layers by their number as text, then the
    /// embedding, the last norm and the head.
    pub(crate) fn tensors(&self) -> Vec<TensorInfo> {
        let (d, i, e) = (self.hidden, self.intermediate, self.experts);
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let blocks =
            |out: usize, inner: usize| vec![e, out, inner / mxfp4::BLOCK, mxfp4::BLOCK_BYTES];
        let scales = |out: usize, inner: usize| vec![e, out, inner / mxfp4::BLOCK];
        let mut numbers: Vec<String> = (0..self.layers).map(|layer| layer.to_string()).collect();
        numbers.sort();
        let mut tensors = Vec::new();
        for number in numbers {
            let mut add = |name: &str, dtype: Dtype, shape: Vec<usize>| {
                let name = format!("model.layers.{number}.{name}");
                tensors.push(TensorInfo::new(name, dtype, shape));
            };
            add("input_layernorm.weight", Dtype::BF16, vec![d]);
            add("self_attn.o_proj.bias", Dtype::BF16, vec![d]);
            add("self_attn.o_proj.weight", Dtype::BF16, vec![d, queries]);
            add("self_attn.q_proj.bias", Dtype::BF16, vec![queries]);
            add("self_attn.k_proj.bias", Dtype::BF16, vec![keys]);
            add("self_attn.v_proj.bias", Dtype::BF16, vec![keys]);
            add("self_attn.q_proj.weight", Dtype::BF16, vec![queries, d]);
            add("self_attn.k_proj.weight", Dtype::BF16, vec![keys, d]);
            add("self_attn.v_proj.weight", Dtype::BF16, vec![keys, d]);
            add("self_attn.sinks", Dtype::BF16, vec![self.heads]);
            add("mlp.router.bias", Dtype::BF16, vec![e]);
            add("mlp.router.weight", Dtype::BF16, vec![e, d]);
            for (name, out, inner) in [("gate_up_proj", 2 * i, d), ("down_proj", d, i)] {
                let name = format!("mlp.experts.{name}");
                add(&format!("{name}_bias"), Dtype::BF16, vec![e, out]);
                add(&format!("{name}_blocks"), Dtype::U8, blocks(out, inner));
                add(&format!("{name}_scales"), Dtype::U8, scales(out, inner));
            }
            add("post_attention_layernorm.weight", Dtype::BF16, vec![d]);
        }
        let embedding = vec![self.vocab, d];
        for (name, shape) in [
            ("model.embed_tokens.weight", embedding.clone()),
            ("model.norm.weight", vec![d]),
            ("lm_head.weight", embedding),
        ] {
            tensors.push(TensorInfo::new(name, Dtype::BF16, shape));
        }
        tensors
    }

    /// The shards with their names. OpenAI numbers them from 0 to the number after `of`; inside a
    /// shard the safetensors library orders by type, then by name.
    pub(crate) fn shards(&self) -> Result<Vec<(String, Vec<TensorInfo>)>, mlac_model::Error> {
        let mut groups: Vec<Vec<TensorInfo>> = vec![Vec::new()];
        let mut filled = 0;
        for info in self.tensors() {
            let bytes = info.byte_len()?;
            if filled > 0 && filled + bytes > self.max_shard {
                groups.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            if let Some(last) = groups.last_mut() {
                last.push(info);
            }
        }
        let last = groups.len() - 1;
        Ok(groups
            .into_iter()
            .enumerate()
            .map(|(at, mut tensors)| {
                tensors.sort_by(|a, b| {
                    let key = |info: &TensorInfo| std::cmp::Reverse(info.dtype.size());
                    key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
                });
                let name = match last {
                    0 => "model.safetensors".to_owned(),
                    _ => format!("model-{at:05}-of-{last:05}.safetensors"),
                };
                (name, tensors)
            })
            .collect())
    }

    /// `config.json`, with the published file's keys.
    pub(crate) fn config_json(&self) -> Value {
        let layer_types: Vec<&str> = (0..self.layers)
            .map(|layer| match layer % 2 {
                0 => "sliding_attention",
                _ => "full_attention",
            })
            .collect();
        json!({
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": true,
            "attention_dropout": 0.0,
            "eos_token_id": self.first_special + 4,
            "experts_per_token": self.experts.min(4),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initial_context_length": 4096,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "layer_types": layer_types,
            "max_position_embeddings": 131_072,
            "model_type": "gpt_oss",
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.experts.min(4),
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "output_router_logits": false,
            "pad_token_id": self.first_special + 1,
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": false,
            },
            "rope_theta": 150_000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": false,
            "transformers_version": "4.55.0.dev0",
            "use_cache": true,
            "vocab_size": self.vocab,
        })
    }

    /// `generation_config.json`: ends at `<|return|>`, `<|endoftext|>` and `<|call|>`.
    pub(crate) fn generation_json(&self) -> Value {
        let special = self.first_special;
        json!({
            "bos_token_id": special,
            "do_sample": true,
            "eos_token_id": [special + 4, special + 1, special + 14],
            "pad_token_id": special + 1,
            "transformers_version": "4.55.0.dev0",
        })
    }
}

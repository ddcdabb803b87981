//! Seeded random checkpoints of any size, so that benches need no download.

use std::path::Path;

use mlac_model::checkpoint::expected_tensors;
use mlac_model::tensor::bytes_from_f32;
use mlac_model::{Checkpoint, CheckpointWriter, Dtype, ModelConfig, TensorInfo};
use serde_json::json;

/// Shape of a random Llama.
#[derive(Debug, Clone, Copy)]
pub struct RandomLlama {
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Whether it is a GPT-OSS: biases, sinks, queries that a conversion keeps, and one expert in place of the MLP.
    pub gpt_oss: bool,
    /// Type of the tensors.
    pub dtype: Dtype,
}

impl RandomLlama {
    /// The attention of SmolLM2-135M, in bf16 as it is published.
    pub const SMOLLM2: Self = Self {
        layers: 1,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        intermediate: 1536,
        vocab: 512,
        gpt_oss: false,
        dtype: Dtype::BF16,
    };
    /// A layer with full attention of GPT-OSS-20B (64 query heads, 8 KV heads of 64), in bf16 as it is published.
    pub const GPT_OSS: Self = Self {
        layers: 1,
        hidden: 2880,
        heads: 64,
        kv_heads: 8,
        head_dim: 64,
        intermediate: 64,
        vocab: 512,
        gpt_oss: true,
        dtype: Dtype::BF16,
    };

    fn config_json(&self) -> serde_json::Value {
        if self.gpt_oss {
            return json!({
                "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"],
                "hidden_size": self.hidden, "intermediate_size": self.intermediate,
                "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
                "vocab_size": self.vocab, "max_position_embeddings": 65536,
                "rms_norm_eps": 1e-5, "rope_theta": 150_000.0, "hidden_act": "silu",
                "attention_bias": true, "tie_word_embeddings": false,
                "num_local_experts": 1, "num_experts_per_tok": 1, "swiglu_limit": 7.0,
                "layer_types": vec!["full_attention"; self.layers], "sliding_window": 128,
                "bos_token_id": 1, "eos_token_id": 2
            });
        }
        json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocab, "max_position_embeddings": 65536,
            "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "hidden_act": "silu",
            "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": true,
            "bos_token_id": 1, "eos_token_id": 2
        })
    }

    /// Writes the checkpoint to `folder`, which must not exist, and opens it.
    pub fn write(
        &self,
        folder: &Path,
        seed: u64,
    ) -> Result<Checkpoint, Box<dyn std::error::Error>> {
        let raw = self.config_json();
        let config = ModelConfig::from_json(&raw, "config.json")?;
        let tensors = expected_tensors(&config);
        let infos = tensors
            .iter()
            .map(|(n, s)| TensorInfo::new(n.as_str(), self.dtype, s.clone()))
            .collect();
        let writer = CheckpointWriter::create(folder, infos, 5 << 30)?;
        let mut random = Random(seed | 1);
        for (name, shape) in &tensors {
            let fan_in = shape.last().copied().unwrap_or(1) as f32;
            let scale = if shape.len() == 1 {
                0.0
            } else {
                fan_in.powf(-0.5)
            };
            let count = shape.iter().product();
            let offset = if shape.len() == 1 { 1.0 } else { 0.0 };
            let numbers: Vec<f32> = (0..count)
                .map(|_| offset + scale * random.number())
                .collect();
            let bytes = bytes_from_f32(self.dtype, &numbers).ok_or("expected a float type")?;
            writer.write(name, &bytes)?;
        }
        writer.write_file(
            "config.json",
            serde_json::to_string_pretty(&raw)?.as_bytes(),
        )?;
        writer.finish()?;
        Ok(Checkpoint::open(folder)?)
    }
}

/// xorshift64*, uniform in [-sqrt 3, sqrt 3]: variance 1.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let bits = (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32 / (1_u64 << 24) as f32;
        (bits * 2.0 - 1.0) * 3.0_f32.sqrt()
    }

    /// `count` numbers.
    pub fn many(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }
}

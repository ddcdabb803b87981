"""RoPE frequency tables and attention factors as transformers computes them, for many configurations."""

from __future__ import annotations

import torch
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

ROTARY = {
    "gpt_oss": GptOssRotaryEmbedding,
    "llama": LlamaRotaryEmbedding,
    "mistral": MistralRotaryEmbedding,
    "qwen2": Qwen2RotaryEmbedding,
    "qwen3": Qwen3RotaryEmbedding,
}


def model(model_type: str, hidden: int, heads: int, kv_heads: int, length: int, **rope) -> dict:
    """The keys of a config.json that decide a RoPE table, among the ones every reader asks for."""
    return {
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 1000,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **rope,
    }


def configurations() -> dict[str, dict]:
    """Settings of published models (by their published parameters), then the corners of each rule."""
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    return {
        "smollm2_135m": model("llama", 576, 9, 3, 8192, rope_theta=100000),
        "llama2_7b": model("llama", 4096, 32, 32, 4096, rope_theta=10000.0, rope_scaling=None),
        "llama31_8b": model(
            "llama", 4096, 32, 8, 131072, rope_theta=500000.0,
            rope_scaling={
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        ),
        "llama32_1b": model(
            "llama", 2048, 32, 8, 131072, head_dim=64, rope_theta=500000.0,
            rope_scaling={
                "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        ),
        "mistral_7b_v03": model("mistral", 4096, 32, 8, 32768, rope_theta=1000000.0, sliding_window=None),
        "qwen25_7b_long": model(
            "qwen2", 3584, 28, 4, 32768, rope_theta=1000000.0, use_sliding_window=False,
            rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        ),
        "qwen3_8b_long": model(
            "qwen3", 4096, 32, 8, 40960, head_dim=128, rope_theta=1000000, attention_bias=False,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        "gpt_oss_20b": model(
            "gpt_oss", 2880, 64, 8, 131072, head_dim=64, rope_theta=150000,
            rope_scaling={
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                "rope_type": "yarn", "truncate": False,
            },
        ),
        "default_new_keys": model(
            "llama", 256, 4, 2, 512, rope_parameters={"rope_theta": 1234.5, "rope_type": "default"}
        ),
        "linear": model("llama", 256, 4, 2, 512, rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 2.5}),
        "linear_new_keys": model(
            "llama", 256, 4, 2, 512, rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
        ),
        "yarn_defaults": model("llama", 256, 4, 2, 512, rope_theta=10000.0, rope_scaling=yarn),
        "yarn_no_truncation": model(
            "llama", 256, 4, 2, 512, rope_theta=10000.0, rope_scaling={**yarn, "truncate": False}
        ),
        "yarn_betas": model(
            "llama", 256, 4, 2, 512, rope_theta=10000.0, rope_scaling={**yarn, "beta_fast": 4.0, "beta_slow": 0.5}
        ),
        # Both correction bounds on the same component: the ramp has width 0.001.
        "yarn_equal_bounds": model(
            "llama", 256, 4, 2, 512, rope_theta=10000.0, rope_scaling={**yarn, "beta_fast": 40.0, "beta_slow": 20.0}
        ),
        # The upper bound is cut at the last component.
        "yarn_upper_bound": model(
            "llama", 64, 4, 2, 512, rope_theta=10.0, rope_scaling={**yarn, "beta_fast": 4.0, "beta_slow": 0.001}
        ),
        "yarn_attention_factor": model(
            "llama", 256, 4, 2, 512, rope_theta=10000.0, rope_scaling={**yarn, "attention_factor": 0.75}
        ),
        "yarn_mscale": model(
            "llama", 256, 4, 2, 512, rope_theta=10000.0,
            rope_scaling={**yarn, "mscale": 0.707, "mscale_all_dim": 1.0},
        ),
        # One of the two alone is not used.
        "yarn_mscale_alone": model(
            "llama", 256, 4, 2, 512, rope_theta=10000.0, rope_scaling={**yarn, "mscale": 0.707}
        ),
        "yarn_factor_one": model(
            "llama", 256, 4, 2, 64, rope_theta=10000.0, rope_scaling={**yarn, "factor": 1.0}
        ),
        "llama3_bands": model(
            "llama", 256, 4, 2, 512, rope_theta=10000.0,
            rope_scaling={
                "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 32.0,
                "original_max_position_embeddings": 256, "rope_type": "llama3",
            },
        ),
    }


def tables() -> list[dict]:
    """Name, configuration, inv_freq [head_dim / 2] (f32, radians per position) and the factor on cos and sin."""
    found = []
    for name, config in configurations().items():
        keys = {key: value for key, value in config.items() if key != "model_type"}
        rotary = ROTARY[config["model_type"]](AutoConfig.for_model(config["model_type"], **keys))
        assert rotary.inv_freq.dtype == torch.float32
        found.append(
            {
                "name": name,
                "config": config,
                "inv_freq": rotary.inv_freq.tolist(),
                "attention_factor": float(rotary.attention_scaling),
            }
        )
    return found

//! What makes a converted checkpoint a folder to publish: code that lets transformers load it, and
//! a model card with the measured figures.

mod card;

use mlac_model::Architecture;
use serde_json::{Value, json};

pub use card::{Card, Quality};

/// Python files that transformers runs with `trust_remote_code=True`.
pub struct RemoteCode {
    /// Name and content of each file.
    pub files: [(&'static str, &'static str); 2],
    /// The key `auto_map` of `config.json`, which names their classes.
    pub auto_map: Value,
}

/// The code for a family's MLA form, if there is some.
pub fn remote_code(architecture: Architecture) -> Option<RemoteCode> {
    match architecture {
        Architecture::GptOss => Some(RemoteCode {
            files: [
                (
                    "configuration_gpt_oss_mla.py",
                    include_str!("python/configuration_gpt_oss_mla.py"),
                ),
                (
                    "modeling_gpt_oss_mla.py",
                    include_str!("python/modeling_gpt_oss_mla.py"),
                ),
            ],
            auto_map: json!({
                "AutoConfig": "configuration_gpt_oss_mla.GptOssMlaConfig",
                "AutoModelForCausalLM": "modeling_gpt_oss_mla.GptOssMlaForCausalLM",
            }),
        }),
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 | Architecture::Qwen3 => {
            None
        }
    }
}

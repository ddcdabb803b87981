//! The model card: what was converted how, what it caches, and what was measured.

use std::fmt::Write as _;

use mlac_converter::CachePlan;
use mlac_model::ModelConfig;

use crate::cli::units::{show_bytes, show_tokens};
use crate::pipeline::convert::Record;

/// Contexts of the cache table, in tokens.
const CONTEXTS: [usize; 3] = [1 << 12, 1 << 15, 1 << 17];
/// Bytes of one cached number in the table.
const CACHED_BYTES: usize = 2;

/// Perplexity of the source and the converted model on one text.
#[derive(Debug, Clone, PartialEq)]
pub struct Quality {
    /// The text's file name.
    pub text: String,
    /// Windows and tokens in a window.
    pub windows: (usize, usize),
    /// The source's perplexity.
    pub original: f64,
    /// The converted model's.
    pub converted: f64,
}

/// What the card is made from.
#[derive(Debug, Clone, Copy)]
pub struct Card<'a> {
    /// The name of the source's folder or file.
    pub source: &'a str,
    /// The converted configuration.
    pub config: &'a ModelConfig,
    /// What the conversion recorded.
    pub record: &'a Record,
    /// Quality, where it was measured.
    pub quality: Option<&'a Quality>,
}

impl Card<'_> {
    /// `README.md` of the folder.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        self.head(&mut out);
        self.cache(&mut out);
        self.quality(&mut out);
        self.conversion(&mut out);
        self.usage(&mut out);
        out
    }

    fn model_type(&self) -> String {
        format!("{}_mla", self.config.architecture.model_type())
    }

    fn head(&self, out: &mut String) {
        let count = self.record.layers.len();
        let _ = write!(
            out,
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- mla\n- {}\n---\n\n\
             # {} with multi-head latent attention\n\n\
             {count} of {} attention layers of `{}` were converted from grouped-query attention to multi-head \
             latent attention by mlac {}. All other tensors are the source's, byte for byte.\n",
            self.model_type(),
            self.source,
            self.config.num_hidden_layers,
            self.source,
            self.record.mlac,
        );
        if let Some(refine) = &self.record.refine {
            let _ = write!(
                out,
                "\nThe conversion is **not free of training**: every converted layer was refined by {} gradient steps \
                 towards the source layer's attention output on the calibration text. No other weights were trained.\n",
                refine.steps
            );
        }
    }

    fn cache(&self, out: &mut String) {
        let plan = CachePlan::of(self.config, CACHED_BYTES);
        let _ = write!(
            out,
            "\n## Cache\n\nBytes of one sequence, {CACHED_BYTES} bytes a number. Layers with a sliding window hold at \
             most the window.\n\n| context | GQA | this model | share |\n|---|---|---|---|\n"
        );
        for context in CONTEXTS {
            let (gqa, mla) = (plan.gqa_bytes(context), plan.mla_bytes(context));
            let _ = writeln!(
                out,
                "| {} | {} | {} | {:.1} % |",
                show_tokens(context),
                show_bytes(gqa),
                show_bytes(mla),
                100.0 * mla as f64 / gqa.max(1) as f64
            );
        }
    }

    fn quality(&self, out: &mut String) {
        out.push_str("\n## Quality\n\n");
        let Some(quality) = self.quality else {
            out.push_str(
                "Perplexity was not measured. Measure it before use: `mlac eval DIR --text FILE`.\n",
            );
            return;
        };
        let _ = writeln!(
            out,
            "Perplexity on `{}`, {} windows of {} tokens: {:.3}, source {:.3} (x {:.3}).",
            quality.text,
            quality.windows.0,
            quality.windows.1,
            quality.converted,
            quality.original,
            quality.converted / quality.original
        );
    }

    fn conversion(&self, out: &mut String) {
        let record = self.record;
        let calibration = &record.calibration;
        let _ = write!(
            out,
            "\n## Conversion\n\nMethod `{}`, calibration: {}. Errors are relative squared errors of the attention \
             output on calibration rows. `mlac.json` holds the recipe, the digests of the source's tensors and the \
             same figures.\n\n| layer | latent | rotary key | error | after refit |\n|---|---|---|---|---|\n",
            record.method,
            if calibration.windows == 0 {
                "none, statistics come from the weights".to_owned()
            } else {
                format!(
                    "{} windows of {} tokens of `{}`",
                    calibration.windows, calibration.window, calibration.text
                )
            }
        );
        let figure = |x: Option<f64>| x.map_or("not measured".to_owned(), |x| format!("{x:.4}"));
        for layer in &record.layers {
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} |",
                layer.layer,
                layer.kv_lora_rank,
                layer.qk_rope_head_dim,
                figure(layer.refit_error_before.or(layer.output_error)),
                figure(layer.refit_error)
            );
        }
        if let Some(refine) = &record.refine {
            let _ = write!(
                out,
                "\nRefinement: {} steps a layer, {} query rows a step, rate {}. Errors on calibration windows that \
                 were not trained on:\n\n| layer | before | after | share of the way taken |\n|---|---|---|---|\n",
                refine.steps, refine.rows, refine.rate
            );
            for layer in &record.layers {
                let Some(refined) = &layer.refined else {
                    continue;
                };
                let _ = writeln!(
                    out,
                    "| {} | {:.4} | {:.4} | {:.1} |",
                    layer.layer, refined.error_before, refined.error_after, refined.share
                );
            }
        }
    }

    fn usage(&self, out: &mut String) {
        out.push_str("\n## Use\n\n");
        if super::remote_code(self.config.architecture).is_some() {
            out.push_str(
                "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                 model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True, dtype=\"auto\")\n\
                 tokenizer = AutoTokenizer.from_pretrained(DIR)\n```\n\n\
                 The cache of converted layers is the latent. For ONNX and engines: `mlac export DIR -o onnx/`.\n",
            );
        } else {
            out.push_str(
                "`mlac export DIR -o onnx/` writes ONNX graphs with the latent cache. There is no code for \
                 transformers for this family yet.\n",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use mlac_model::{MlaConfig, MlaEncoder, MlaLayer};
    use serde_json::json;

    use super::*;
    use crate::pipeline::convert::CalibrationRecord;

    fn config() -> ModelConfig {
        let json = json!({
            "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96,
            "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0,
            "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
        });
        let mut config = ModelConfig::from_json(&json, "config.json").unwrap();
        let layer = MlaLayer {
            kv_lora_rank: 24,
            qk_rope_head_dim: 8,
            qk_nope_head_dim: 16,
            v_head_dim: 16,
            encoder: MlaEncoder::KeptQuery,
        };
        config.mla = Some(MlaConfig {
            layers: [(1, layer)].into(),
            attention_scale: 0.25,
            o_bias: true,
        });
        config
    }

    #[test]
    fn the_card_says_what_was_measured_and_what_was_not() {
        let record = Record {
            mlac: "0.1.0".into(),
            source: [].into(),
            method: "recipe".into(),
            recipe: json!(null),
            calibration: CalibrationRecord {
                text: "none".into(),
                tokens_sha256: String::new(),
                windows: 0,
                window: 0,
                seed: 0,
                sequential: false,
            },
            refine: None,
            gqa_cache_numbers: 128,
            mla_cache_numbers: 96,
            layers: vec![],
        };
        let config = config();
        let mut card = Card {
            source: "tiny",
            config: &config,
            record: &record,
            quality: None,
        };
        let text = card.markdown();
        assert!(text.contains("Perplexity was not measured"), "{text}");
        // 2 layers of 64 numbers, one of them never more than 128 tokens; then 64 against 32.
        let (gqa, mla) = (2 * 64 * (4096 + 128), 2 * (32 * 4096 + 64 * 128));
        let row = format!("| 4K | {} | {} |", show_bytes(gqa), show_bytes(mla));
        assert!(text.contains(&row), "{row} is not in\n{text}");
        assert!(text.contains("trust_remote_code=True"));
        let quality = Quality {
            text: "test.txt".into(),
            windows: (8, 2048),
            original: 10.0,
            converted: 11.0,
        };
        card.quality = Some(&quality);
        let text = card.markdown();
        assert!(!text.contains("training"), "{text}");
        assert!(text.contains("11.000, source 10.000 (x 1.100)"), "{text}");
    }
}

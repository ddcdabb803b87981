//! What a report says, as data: written to `report.json`, drawn by [`super::html`].

use mlac_converter::RefineReport;
use serde::{Deserialize, Serialize};

/// How the converted layers of the ONNX folder are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// ONNX's own operators, for any runtime.
    Standard,
    /// mlac's operators for ONNX Runtime.
    Ort,
}

impl Form {
    /// What a reader of a report is told.
    pub fn words(self) -> &'static str {
        match self {
            Self::Standard => "standard: ONNX's own operators",
            Self::Ort => {
                "ort: mlac::LatentAttention over a cache in place, prompts and steps in one graph"
            }
        }
    }
}

/// Cache of the whole model at one context.
#[derive(Debug, Clone, Serialize)]
pub struct CachePoint {
    /// Tokens in the context.
    pub context: usize,
    /// Bytes of the GQA cache.
    pub gqa_bytes: u64,
    /// Bytes of the converted model's cache.
    pub mla_bytes: u64,
}

/// One converted layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerRow {
    /// Index of the layer.
    pub layer: usize,
    /// Numbers in the latent.
    pub kv_lora_rank: usize,
    /// Numbers in the rotary key.
    pub qk_rope_head_dim: usize,
    /// Relative squared error of the attention output on sampled calibration rows, with the original `W_o`.
    pub output_error: Option<f64>,
    /// Relative squared error against the original stream's attention output, with the original `W_o`.
    pub refit_error_before: Option<f64>,
    /// The same with the refitted `W_o`; absent without refit.
    pub refit_error: Option<f64>,
    /// Relative distance of the converted residual stream from the original one after this layer.
    pub stream_error: Option<f64>,
    /// What gradient steps gave; absent without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refined: Option<RefineReport>,
    /// Eigenvalues of the joint second moment, largest first, as shares of their sum.
    pub spectrum: Vec<f64>,
    /// Chosen balance of keys and values.
    pub beta: f64,
    /// Components of each frequency that keep their rotation, `[d/2]`.
    pub kept_by_frequency: Vec<usize>,
    /// Remarks on regularisation.
    pub notes: Vec<String>,
}

/// Perplexity of both models on one text.
#[derive(Debug, Clone, Serialize)]
pub struct PerplexityRow {
    /// The text's file name.
    pub text: String,
    /// Tokens in a window.
    pub window: usize,
    /// Windows from the start.
    pub windows: usize,
    /// The original's perplexity.
    pub original: f64,
    /// The converted model's perplexity.
    pub converted: f64,
    /// Their ratio.
    pub ratio: f64,
    /// Command that gives the original's figure.
    pub command_original: String,
    /// Command that gives the converted model's figure.
    pub command_converted: String,
}

/// Decode time at one context.
#[derive(Debug, Clone, Serialize)]
pub struct DecodePoint {
    /// Cached tokens before the step.
    pub context: usize,
    /// Median milliseconds of a step of the GQA model in standard operators.
    pub gqa_ms: f64,
    /// The same with ONNX Runtime's own operator, `GroupQueryAttention`, where it takes the model's heads.
    pub gqa_operator_ms: Option<f64>,
    /// Median milliseconds of a step of the MLA model.
    pub mla_ms: f64,
}

/// One comparison of logits.
#[derive(Debug, Clone, Serialize)]
pub struct ParityRow {
    /// What was compared with what.
    pub what: String,
    /// The figures.
    pub figures: mlac_engines::parity::Parity,
    /// Whether they are within the tolerance; absent where none applies (a lossy conversion).
    pub passed: Option<bool>,
    /// Command that gives them.
    pub command: String,
}

/// One engine.
#[derive(Debug, Clone, Serialize)]
pub struct EngineRow {
    /// File name.
    pub file: String,
    /// GPU architecture it runs on.
    pub target: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Seconds TensorRT took to build it.
    pub seconds: f64,
    /// How its attention was built.
    pub attention: String,
    /// Whether it was run: engines built on a machine without a GPU were not.
    pub ran: String,
}

/// Seconds of one stage.
#[derive(Debug, Clone, Serialize)]
pub struct StageTime {
    /// The stage.
    pub stage: String,
    /// Wall seconds.
    pub seconds: f64,
}

/// The context at which a report sums up the cache in one figure.
pub const HEADLINE_CONTEXT: usize = 1 << 15;

impl Report {
    /// The cache at the context that stands for all.
    pub fn headline(&self) -> Option<&CachePoint> {
        self.cache.iter().find(|p| p.context == HEADLINE_CONTEXT)
    }

    /// Share of the source's cache that is left there.
    pub fn cache_share(&self) -> f64 {
        self.headline()
            .map_or(1.0, |p| p.mla_bytes as f64 / p.gqa_bytes.max(1) as f64)
    }
}

/// Everything `mlac compile` found out.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of mlac.
    pub version: String,
    /// The command that was run.
    pub command: String,
    /// Source model.
    pub source: String,
    /// One line on the model's shape.
    pub shape: String,
    /// How the converted layers are written in `onnx/`.
    pub form: Form,
    /// Numbers that all layers of the source cache of one token, inside every sliding window.
    pub gqa_cache_numbers: usize,
    /// The same after conversion.
    pub mla_cache_numbers: usize,
    /// Bytes of one cached number in the tables below.
    pub cache_dtype_bytes: u64,
    /// Cache by context; the emitted graph's inputs hold as much at each of these.
    pub cache: Vec<CachePoint>,
    /// Converted layers.
    pub layers: Vec<LayerRow>,
    /// Quality, where measured.
    pub perplexity: Option<PerplexityRow>,
    /// Decode times.
    pub decode: Vec<DecodePoint>,
    /// Where decode times come from.
    pub decode_command: String,
    /// Why `GroupQueryAttention` is not among them, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operator_left_out: Option<String>,
    /// Parity.
    pub parity: Vec<ParityRow>,
    /// Engines.
    pub engines: Vec<EngineRow>,
    /// Prompt and continuation by the converted model.
    pub prompt: String,
    /// The continuation.
    pub generated: String,
    /// Stages and their time.
    pub times: Vec<StageTime>,
    /// Peak resident memory in bytes.
    pub peak_memory: u64,
}

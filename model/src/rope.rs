//! Rotary position embedding: the frequency table and the attention factor of a model.
//!
//! Half-split convention (Hugging Face Llama): component `l` of a head of `head_dim` numbers pairs
//! with component `l + head_dim / 2`, and position `s` turns the pair by `s * inv_freq[l]` radians.

/// How the base frequencies are changed for long contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// `inv_freq[l] = theta^(-2l/d)`.
    Default,
    /// All frequencies divided by `factor` (position interpolation).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's piecewise rule.
    Llama3 {
        /// Divisor of the slow frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided fully.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the original training.
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al. 2023), as transformers' `_compute_yarn_parameters` has it.
    Yarn {
        /// Divisor of the slow frequencies.
        factor: f64,
        /// Rotations at the original length above which a frequency is kept.
        beta_fast: f64,
        /// Rotations at the original length below which a frequency is divided fully.
        beta_slow: f64,
        /// Context length of the original training.
        original_max_position_embeddings: usize,
        /// Factor on cos and sin; `None`: derived from `mscale`, `mscale_all_dim`, `factor`.
        attention_factor: Option<f64>,
        /// DeepSeek's `mscale`, when given.
        mscale: Option<f64>,
        /// DeepSeek's `mscale_all_dim`, when given.
        mscale_all_dim: Option<f64>,
        /// Whether correction bounds are rounded to whole components (GPT-OSS: false).
        truncate: bool,
    },
}

/// Rotary embedding of a model: base and scaling.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    /// Long-context rule.
    pub scaling: RopeScaling,
}

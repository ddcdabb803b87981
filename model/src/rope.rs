//! Rotary position embedding: the frequency table and the attention factor of a model.
//!
//! Half-split convention (Hugging Face Llama): component `l` of a head of `head_dim` numbers pairs
//! with component `l + head_dim / 2`, and position `s` turns the pair by `s * inv_freq[l]` radians.

use std::f64::consts::PI;

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
    /// `YaRN` (Peng et al. 2023), as transformers' `_compute_yarn_parameters` has it.
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
        /// `DeepSeek`'s `mscale`, when given.
        mscale: Option<f64>,
        /// `DeepSeek`'s `mscale_all_dim`, when given.
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

/// What the rotation needs: one frequency per pair and the factor on cos and sin.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    /// Radians per position of pair `l`, `head_dim / 2` numbers.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin; 1 unless `YaRN`.
    pub attention_factor: f64,
}

impl RopeSpec {
    /// The frequencies of a head of `head_dim` numbers (even).
    ///
    /// Follows transformers' `modeling_rope_utils` operation by operation, in f32 where it works
    /// in f32, because the trained model saw those rounded frequencies.
    pub fn table(&self, head_dim: usize) -> RopeTable {
        let base: Vec<f32> = (0..head_dim / 2)
            .map(|l| (self.theta as f32).powf((2 * l) as f32 / head_dim as f32))
            .collect();
        match &self.scaling {
            RopeScaling::Default => RopeTable {
                inv_freq: base.iter().map(|f| 1.0 / f).collect(),
                attention_factor: 1.0,
            },
            RopeScaling::Linear { factor } => RopeTable {
                inv_freq: base.iter().map(|f| 1.0 / f / *factor as f32).collect(),
                attention_factor: 1.0,
            },
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => RopeTable {
                inv_freq: base
                    .iter()
                    .map(|f| {
                        llama3_frequency(
                            1.0 / f,
                            *factor as f32,
                            *low_freq_factor as f32,
                            *high_freq_factor as f32,
                            *original_max_position_embeddings as f32,
                        )
                    })
                    .collect(),
                attention_factor: 1.0,
            },
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate,
            } => {
                let correction = |rotations: f64| {
                    let length = *original_max_position_embeddings as f64;
                    head_dim as f64 * (length / (rotations * 2.0 * PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (correction(*beta_fast), correction(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                low = low.max(0.0);
                high = high.min(head_dim as f64 - 1.0);
                if (high - low) == 0.0 {
                    high += 0.001;
                }
                let inv_freq = base
                    .iter()
                    .enumerate()
                    .map(|(l, f)| {
                        let ramp = ((l as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                        let keep = 1.0 - ramp;
                        1.0 / (*factor as f32 * f) * (1.0 - keep) + 1.0 / f * keep
                    })
                    .collect();
                RopeTable {
                    inv_freq,
                    attention_factor: attention_factor.unwrap_or_else(|| {
                        yarn_attention_factor(*factor, *mscale, *mscale_all_dim)
                    }),
                }
            }
        }
    }
}

/// Llama 3.1: frequencies whose wavelength exceeds `length / low` are divided by `factor`, those
/// below `length / high` are kept, those between are blended.
fn llama3_frequency(inv_freq: f32, factor: f32, low: f32, high: f32, length: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / inv_freq;
    if wavelength > length / low {
        inv_freq / factor
    } else if wavelength < length / high {
        inv_freq
    } else {
        let smooth = (length / wavelength - low) / (high - low);
        (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
    }
}

/// `0.1 m ln(factor) + 1`, or the ratio of two of them when both `mscale`s are given and not 0.
fn yarn_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let scale = |m: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * m * factor.ln() + 1.0
        }
    };
    match (mscale, mscale_all_dim) {
        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
        _ => scale(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yarn(factor: f64, original: usize, fast: f64, slow: f64) -> RopeScaling {
        RopeScaling::Yarn {
            factor,
            beta_fast: fast,
            beta_slow: slow,
            original_max_position_embeddings: original,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        }
    }

    fn llama3(factor: f64, original: usize) -> RopeScaling {
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: original,
        }
    }

    /// theta, factor on cos and sin, and the 8 frequencies of a head of 16 numbers, as transformers
    /// 5.23 (`LlamaRotaryEmbedding`, f32) computes them; one line for each rule of the test.
    const TRANSFORMERS: &str = "
        10000.0 1.0 1.0 0.31622776 0.1 0.03162278 0.01 0.0031622779 0.001 0.0003162278
        1000000.0 1.0 1.0 0.17782794 0.03162278 0.0056234132 0.001 0.00017782794 3.1622774e-05 5.6234135e-06
        10000.0 1.0 0.4 0.1264911 0.04 0.012649111 0.0039999997 0.0012649111 0.00040000002 0.00012649111
        500000.0 1.0 1.0 0.19392276 0.03760603 0.007292665 0.000524846 3.4281024e-05 6.6478697e-06 1.2891732e-06
        10000.0 1.0 1.0 0.31622776 0.1 0.017090308 0.0003125 9.882118e-05 3.125e-05 9.882118e-06
        1000000.0 1.138629436111989 1.0 0.17782794 0.03162278 0.00421756 0.0005 4.4456985e-05 7.905694e-06 1.4058534e-06
        150000.0 1.3465735902799727 1.0 0.225418 0.050813273 0.0067949593 0.00045648392 1.8188337e-05 4.0999785e-06 9.2420896e-07
        10000.0 0.9210423553163399 1.0 0.31622776 0.1 0.03162278 0.0067499992 0.0011067971 2.5e-05 7.9056945e-06
        10000.0 1.25 1.0 0.31622776 0.1 0.025693506 0.0062499996 0.0013834966 0.00025 7.905695e-05";

    #[test]
    fn tables_are_those_of_transformers() {
        let mut untruncated = yarn(32.0, 4096, 32.0, 1.0);
        let mut mscaled = yarn(40.0, 4096, 16.0, 2.0);
        let mut fixed = yarn(4.0, 2048, 32.0, 1.0);
        if let RopeScaling::Yarn { truncate, .. } = &mut untruncated {
            *truncate = false;
        }
        if let RopeScaling::Yarn {
            mscale,
            mscale_all_dim,
            ..
        } = &mut mscaled
        {
            (*mscale, *mscale_all_dim) = (Some(0.707), Some(1.0));
        }
        if let RopeScaling::Yarn {
            attention_factor, ..
        } = &mut fixed
        {
            *attention_factor = Some(1.25);
        }
        let rules = [
            RopeScaling::Default,
            RopeScaling::Default,
            RopeScaling::Linear { factor: 2.5 },
            llama3(8.0, 8192),
            llama3(32.0, 512),
            yarn(4.0, 32768, 32.0, 1.0),
            untruncated,
            mscaled,
            fixed,
        ];
        let lines: Vec<&str> = TRANSFORMERS.trim().lines().collect();
        assert_eq!(lines.len(), rules.len());
        for (line, scaling) in lines.into_iter().zip(rules) {
            let mut numbers = line
                .split_whitespace()
                .map(|number| number.parse::<f64>().unwrap());
            let (theta, factor) = (numbers.next().unwrap(), numbers.next().unwrap());
            let table = RopeSpec {
                theta,
                scaling: scaling.clone(),
            }
            .table(16);
            assert!(
                (table.attention_factor - factor).abs() < 1e-12,
                "{scaling:?}"
            );
            assert_eq!(table.inv_freq.len(), 8);
            for &found in &table.inv_freq {
                let expected = numbers.next().unwrap();
                // A few units in the last place: torch has its own f32 power.
                let off = (f64::from(found) / expected - 1.0).abs();
                assert!(off < 5e-7, "{scaling:?}: {found} {expected}");
            }
        }
    }

    #[test]
    fn factor_one_scales_nothing() {
        let plain = RopeSpec {
            theta: 10_000.0,
            scaling: RopeScaling::Default,
        }
        .table(64);
        for scaling in [
            RopeScaling::Linear { factor: 1.0 },
            llama3(1.0, 128),
            yarn(1.0, 128, 32.0, 1.0),
        ] {
            let table = RopeSpec {
                theta: 10_000.0,
                scaling,
            }
            .table(64);
            assert!((table.attention_factor - 1.0).abs() < 1e-15);
            for (found, expected) in table.inv_freq.iter().zip(&plain.inv_freq) {
                assert!((found / expected - 1.0).abs() < 5e-7);
            }
        }
    }
}

//! Which layers are converted, and to which ranks.

use mlac_converter::{AttentionShape, Budget, CachePlan, RankChoice};
use mlac_model::{ModelConfig, Refusal};

use super::convert::LayerPlan;
use crate::error::Error;

/// Which layers to convert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerChoice {
    /// Layers without a sliding window.
    Full,
    /// All layers.
    All,
    /// These.
    List(Vec<usize>),
}

impl LayerChoice {
    /// Reads `full`, `all` or `1,3,5`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        match text {
            "full" => Ok(Self::Full),
            "all" => Ok(Self::All),
            list => list
                .split(',')
                .map(|n| n.trim().parse())
                .collect::<Result<Vec<usize>, _>>()
                .map(Self::List)
                .map_err(|_| {
                    Refusal::new(
                        "--layers",
                        "full, all or a list such as 1,3,5",
                        format!("{list:?}"),
                        "name layers by their index from 0",
                    )
                    .into()
                }),
        }
    }

    fn indices(&self, config: &ModelConfig) -> Result<Vec<usize>, Error> {
        let count = config.num_hidden_layers;
        let mut chosen = match self {
            Self::All => (0..count).collect(),
            Self::Full => (0..count)
                .filter(|&i| config.sliding_window[i].is_none())
                .collect::<Vec<_>>(),
            Self::List(list) => list.clone(),
        };
        chosen.sort_unstable();
        chosen.dedup();
        let found = match chosen.last() {
            None => "none: every layer has a sliding window".to_owned(),
            Some(&last) if last >= count => last.to_string(),
            Some(_) => return Ok(chosen),
        };
        Err(Refusal::new(
            "--layers",
            format!("at least one layer, each from 0 to {}", count - 1),
            found,
            "name other layers, or all",
        )
        .into())
    }
}

/// What the user asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct RankRequest {
    /// Budget or ranks.
    pub budget: Budget,
    /// Layers.
    pub layers: LayerChoice,
    /// What ranks are multiples of.
    pub align: usize,
}

impl RankRequest {
    /// From the options `--budget`, `--kv-lora-rank`, `--rope-dim`, `--layers`.
    pub fn resolve(
        budget: Option<f64>,
        kv_lora_rank: Option<&str>,
        rope_dim: Option<usize>,
        layers: &str,
        align: usize,
        config: &ModelConfig,
    ) -> Result<Self, Error> {
        let shape = AttentionShape::of(config);
        let budget = match (budget, kv_lora_rank, rope_dim) {
            (Some(fraction), ..) => Budget::Fraction(fraction),
            (None, Some("max"), None) => Budget::Exact,
            (None, Some("max"), Some(qk_rope_head_dim)) => Budget::Ranks(RankChoice {
                kv_lora_rank: shape.stacked_width().saturating_sub(qk_rope_head_dim),
                qk_rope_head_dim,
            }),
            (None, Some(rank), Some(qk_rope_head_dim)) => {
                let kv_lora_rank = rank.parse().map_err(|_| {
                    Refusal::new(
                        "--kv-lora-rank",
                        "a number or max",
                        format!("{rank:?}"),
                        "give for example 128",
                    )
                })?;
                Budget::Ranks(RankChoice {
                    kv_lora_rank,
                    qk_rope_head_dim,
                })
            }
            (None, ..) => {
                return Err(Refusal::new(
                    "size of the cache",
                    "--budget F, or --kv-lora-rank R with --rope-dim D, or --kv-lora-rank max",
                    "none of them complete",
                    "give for example --budget 0.5",
                )
                .into());
            }
        };
        Ok(Self {
            budget,
            layers: LayerChoice::parse(layers)?,
            align,
        })
    }

    /// The layers to convert with their ranks, and remarks on them.
    pub fn plan(&self, config: &ModelConfig) -> Result<(Vec<LayerPlan>, Option<String>), Error> {
        let shape = AttentionShape::of(config);
        let chosen = self.budget.ranks(&shape, self.align)?;
        let plans = self
            .layers
            .indices(config)?
            .into_iter()
            .map(|layer| LayerPlan {
                layer,
                ranks: chosen.ranks,
            })
            .collect();
        Ok((plans, chosen.note))
    }
}

/// Cache of the emitted graphs.
pub fn cache_plan(config: &ModelConfig, layers: &[LayerPlan], element_bytes: u64) -> CachePlan {
    CachePlan::new(config, element_bytes as usize, |layer| {
        layers.iter().find(|p| p.layer == layer).map(|p| p.ranks)
    })
}

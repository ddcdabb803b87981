//! Cache sizes of a model before and after conversion, before any work.

use mlac_model::ModelConfig;
use serde::{Deserialize, Serialize};

use crate::layer::{AttentionShape, RankChoice};

/// The cache of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerCache {
    /// Index of the layer.
    pub layer: usize,
    /// Numbers cached per token by GQA, 2 * G * d.
    pub gqa_width: usize,
    /// Ranks, where the layer is converted.
    pub converted: Option<RankChoice>,
    /// Positions the layer attends to; its cache never holds more.
    pub sliding_window: Option<usize>,
}

impl LayerCache {
    /// Numbers cached per token after conversion.
    pub fn width(&self) -> usize {
        self.converted.map_or(self.gqa_width, |r| r.width())
    }

    /// Tokens held at a context.
    fn held(&self, context: usize) -> usize {
        self.sliding_window.map_or(context, |w| w.min(context))
    }
}

/// The cache of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachePlan {
    /// All layers.
    pub layers: Vec<LayerCache>,
    /// Bytes of one cached number.
    pub element_bytes: usize,
}

impl CachePlan {
    /// The cache of a model in which `ranks(layer)` gives the ranks of converted layers.
    pub fn new(
        config: &ModelConfig,
        element_bytes: usize,
        ranks: impl Fn(usize) -> Option<RankChoice>,
    ) -> Self {
        let shape = AttentionShape::of(config);
        let layers = (0..config.num_hidden_layers)
            .map(|layer| LayerCache {
                layer,
                gqa_width: shape.stacked_width(),
                converted: ranks(layer),
                sliding_window: config.sliding_window.get(layer).copied().flatten(),
            })
            .collect();
        Self {
            layers,
            element_bytes,
        }
    }

    /// The cache of a model whose converted layers, if any, are in its configuration.
    pub fn of(config: &ModelConfig, element_bytes: usize) -> Self {
        Self::new(config, element_bytes, |layer| {
            config.mla_layer(layer).map(|mla| RankChoice {
                kv_lora_rank: mla.kv_lora_rank,
                qk_rope_head_dim: mla.qk_rope_head_dim,
            })
        })
    }

    /// Bytes per sequence at a context of `context` tokens, without conversion.
    pub fn gqa_bytes(&self, context: usize) -> u64 {
        self.bytes(context, |l| l.gqa_width)
    }

    /// Bytes per sequence at a context of `context` tokens, with conversion.
    pub fn mla_bytes(&self, context: usize) -> u64 {
        self.bytes(context, LayerCache::width)
    }

    /// Numbers that all layers cache of one token while it is inside every window, without and with
    /// conversion.
    pub fn numbers_per_token(&self) -> (usize, usize) {
        let sum = |width: fn(&LayerCache) -> usize| self.layers.iter().map(width).sum();
        (sum(|l| l.gqa_width), sum(LayerCache::width))
    }

    /// Bytes one more token costs beyond all windows, without and with conversion.
    pub fn bytes_per_token(&self) -> (u64, u64) {
        let full = || self.layers.iter().filter(|l| l.sliding_window.is_none());
        let bytes = |n: usize| (n * self.element_bytes) as u64;
        (
            bytes(full().map(|l| l.gqa_width).sum()),
            bytes(full().map(LayerCache::width).sum()),
        )
    }

    /// Expected speed-up of a decode step that reads every weight and the whole cache once and is
    /// bound by memory: `(weights + batch * gqa) / (weights + batch * mla)` in bytes.
    pub fn decode_speedup(&self, context: usize, batch: usize, weight_bytes: u64) -> f64 {
        let total = |cache: u64| weight_bytes as f64 + batch as f64 * cache as f64;
        let after = total(self.mla_bytes(context));
        if after > 0.0 {
            total(self.gqa_bytes(context)) / after
        } else {
            1.0
        }
    }

    fn bytes(&self, context: usize, width: impl Fn(&LayerCache) -> usize) -> u64 {
        self.layers
            .iter()
            .map(|l| (width(l) * l.held(context) * self.element_bytes) as u64)
            .sum()
    }
}

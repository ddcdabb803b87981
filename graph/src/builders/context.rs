//! What the parts of one graph share: options, axes, masks and rotation tables.

use std::{collections::BTreeMap, sync::Arc};

use mlac_model::ModelConfig;

use super::{
    mask,
    rope::{self, Angles, RotaryForm},
};
use crate::{
    error::NodeError,
    ir::{DType, Dim, GraphBuilder, ValueId},
};

/// How an MLA layer computes attention. Both compute the same function from the same cache and weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MlaForm {
    /// Queries go to the latent: few new tokens against a long cache (decode).
    #[default]
    Absorbed,
    /// The cache becomes keys and values of every head: many new tokens (prefill).
    Expanded,
}

/// How a GQA layer computes attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GqaForm {
    /// Matrix products and a softmax.
    #[default]
    Primitives,
    /// `com.microsoft::GroupQueryAttention`, which only ONNX Runtime knows. It takes several new
    /// tokens on top of a cache only for a batch of one.
    GroupQueryAttention,
}

impl GqaForm {
    /// Whether layers of a model can be written so: the operator takes heads of a multiple of 8 numbers.
    pub fn takes(self, cfg: &ModelConfig) -> bool {
        self == Self::Primitives || cfg.head_dim.is_multiple_of(8)
    }
}

/// What will run the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Runtime {
    /// Any runtime of opset 23; fastest in ONNX Runtime on a CPU.
    #[default]
    Standard,
    /// `TensorRT`: attention through the `Attention` operator where it can be fused (f16, heads
    /// of a multiple of 8 and at most 256 numbers), rotation in primitives, no operator outside ONNX's own domain.
    TensorRt,
    /// ONNX Runtime with mlac's library of operators: MLA layers are `mlac::LatentAttention` over a cache of fixed capacity
    /// that is kept in place, for prompts and steps alike, and linear layers with weights of 16 bits are `mlac::Linear16`.
    OnnxRuntime,
    /// ONNX Runtime's CUDA execution provider with mlac's library of operators: as [`Runtime::OnnxRuntime`], but every node of
    /// `mlac::LatentAttention` brings its kernels, no cache is a ring, and experts are in standard operators.
    OnnxRuntimeCuda,
    /// Enterprise `TensorRT` with mlac's plugin: as [`Runtime::TensorRt`], but MLA layers are the plugin `LatentAttention`.
    /// `TensorRT` for RTX has no plugins and must not be given such a graph.
    TensorRtPlugin,
}

impl Runtime {
    /// Whether MLA layers are `mlac::LatentAttention`.
    pub fn has_latent_attention(self) -> bool {
        matches!(
            self,
            Self::OnnxRuntime | Self::OnnxRuntimeCuda | Self::TensorRtPlugin
        )
    }

    /// Whether MLA layers run on mlac's CUDA kernels: they are f16, and know how many tokens are cached, `past_lengths`, but no
    /// padding.
    pub fn has_cuda_kernels(self) -> bool {
        matches!(self, Self::OnnxRuntimeCuda | Self::TensorRtPlugin)
    }

    /// Whether linear layers in f32 multiply by 16-bit tensors as they are, with `mlac::Linear16`.
    pub fn has_linear16(self) -> bool {
        self == Self::OnnxRuntime
    }

    /// Whether a `TensorRT` runs the graph.
    pub fn is_tensorrt(self) -> bool {
        matches!(self, Self::TensorRt | Self::TensorRtPlugin)
    }
}

/// By converted layer the bytes that its node of `mlac::LatentAttention` brings for [`Runtime::OnnxRuntimeCuda`]: cubins with
/// their recipes.
pub type LayerKernels = BTreeMap<usize, Arc<[u8]>>;

/// Which side of the score product the cache is on in the absorbed form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheProduct {
    /// `q [H*seq, w] x cache^T`: scores come in the layout of the softmax.
    #[default]
    QueryRows,
    /// `cache [total, w] x q^T`: the cache is read in its own layout, scores are transposed.
    CacheRows,
}

/// The largest head that `TensorRT`'s fused attention takes.
const LARGEST_FUSED_HEAD: usize = 256;

/// Dynamic axes of one graph.
#[derive(Debug, Clone)]
pub(super) struct Axes {
    /// Sequences.
    pub(super) batch: Dim,
    /// New tokens.
    pub(super) seq: Dim,
    /// Tokens seen so far, which layers without a window have cached; the constant 0 in a graph
    /// without cache.
    pub(super) past: Dim,
}

impl Axes {
    /// Tokens seen so far and new ones.
    pub(super) fn total(&self) -> Dim {
        &self.past + &self.seq
    }

    /// Rows that a layer has cached: with a window at most that many, the last ones.
    pub(super) fn cached(&self, window: Option<usize>) -> Dim {
        match window {
            Some(window) if self.past.as_constant().is_none() => {
                Dim::symbol(&format!("past_w{window}"))
            }
            _ => self.past.clone(),
        }
    }

    /// Rows of a layer's cache that is kept in place: with a window a ring of at least that many.
    pub(super) fn capacity(window: Option<usize>) -> Dim {
        match window {
            Some(window) => Dim::symbol(&format!("capacity_w{window}")),
            None => "capacity".into(),
        }
    }

    /// Cached and new rows of a layer.
    pub(super) fn rows(&self, window: Option<usize>) -> Dim {
        &self.cached(window) + &self.seq
    }
}

/// State shared by the layers of one graph.
pub(super) struct Context<'a> {
    pub(super) cfg: &'a ModelConfig,
    pub(super) dtype: DType,
    pub(super) runtime: Runtime,
    pub(super) mla_form: MlaForm,
    pub(super) gqa_form: GqaForm,
    pub(super) product: CacheProduct,
    pub(super) axes: Axes,
    /// i64 `[batch, seq]`.
    pub(super) positions: ValueId,
    /// i64 `[batch, total]`, 0 for padding; `None`: no padding.
    pub(super) attention_mask: Option<ValueId>,
    pub(super) biases: BTreeMap<(Option<usize>, DType), ValueId>,
    pub(super) gqa_angles: Option<Angles>,
    pub(super) positions_f32: Option<ValueId>,
    /// f32 `[65536, 4]`, the FP4 numbers of two bytes.
    pub(super) fp4_quads: Option<ValueId>,
    /// Lengths as `GroupQueryAttention` wants them, by window: i32 `[batch]` and i32 scalar.
    pub(super) lengths: BTreeMap<Option<usize>, (ValueId, ValueId)>,
    /// Cached tokens of every sequence as `LatentAttention` wants them, i32 `[batch]`.
    pub(super) past_lengths: Option<ValueId>,
    /// What the nodes of `LatentAttention` bring.
    pub(super) kernels: LayerKernels,
}

impl<'a> Context<'a> {
    /// A context in standard form without padding.
    pub(super) fn new(cfg: &'a ModelConfig, dtype: DType, axes: Axes, positions: ValueId) -> Self {
        Self {
            cfg,
            dtype,
            runtime: Runtime::default(),
            mla_form: MlaForm::default(),
            gqa_form: GqaForm::default(),
            product: CacheProduct::default(),
            axes,
            positions,
            attention_mask: None,
            biases: BTreeMap::new(),
            gqa_angles: None,
            positions_f32: None,
            fp4_quads: None,
            lengths: BTreeMap::new(),
            past_lengths: None,
            kernels: LayerKernels::new(),
        }
    }

    /// Whether heads of `width` numbers go through the `Attention` operator. `TensorRt` for RTX 1.7
    /// refuses to build it where it has no fused kernel: in f32 for several new tokens, and for
    /// widths that are not a multiple of 8.
    ///
    /// The operator has no input for sinks, and a cached row that stands for them would have to be
    /// put in front of the whole cache in every step; so layers with sinks use products and a softmax.
    pub(super) fn fuses(&self, width: usize) -> bool {
        !self.cfg.sinks
            && self.runtime.is_tensorrt()
            && self.dtype == DType::F16
            && width <= LARGEST_FUSED_HEAD
            && width.is_multiple_of(8)
    }

    pub(super) fn rotary_form(&self) -> RotaryForm {
        if self.runtime.is_tensorrt() {
            RotaryForm::Primitives
        } else {
            RotaryForm::Operator
        }
    }

    /// What is added to the scores of a layer, `[batch or 1, 1, seq, rows]`, built once per window
    /// and type; `None` when a single new token sees everything.
    pub(super) fn bias(
        &mut self,
        b: &mut GraphBuilder,
        window: Option<usize>,
        dtype: DType,
    ) -> Result<Option<ValueId>, NodeError> {
        if self.attention_mask.is_none() && window.is_none() && self.axes.seq.is_one() {
            return Ok(None);
        }
        if let Some(&bias) = self.biases.get(&(window, dtype)) {
            return Ok(Some(bias));
        }
        let bias = mask::bias(b, &self.axes, self.attention_mask, window, dtype)?;
        self.biases.insert((window, dtype), bias);
        Ok(Some(bias))
    }

    /// The rotation of the GQA layers, built once.
    pub(super) fn gqa_angles(&mut self, b: &mut GraphBuilder) -> Result<Angles, NodeError> {
        if let Some(angles) = self.gqa_angles {
            return Ok(angles);
        }
        let table = self.cfg.rope.table(self.cfg.head_dim);
        let inv_freq = rope::constant_table(b, &table.inv_freq);
        let angles = self.angles(b, "rope", inv_freq, table.attention_factor)?;
        self.gqa_angles = Some(angles);
        Ok(angles)
    }

    /// Cosines and sines of a table of frequencies, f32 `[n]`.
    pub(super) fn angles(
        &mut self,
        b: &mut GraphBuilder,
        name: &str,
        inv_freq: ValueId,
        factor: f64,
    ) -> Result<Angles, NodeError> {
        let positions = match self.positions_f32 {
            Some(positions) => positions,
            None => rope::positions_f32(b, self.positions)?,
        };
        self.positions_f32 = Some(positions);
        b.top_level(|b| rope::angles(b, name, positions, inv_freq, factor, self.dtype))
    }
}

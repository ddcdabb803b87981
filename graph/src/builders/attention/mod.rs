//! Self-attention of one layer, from the normed input to the output projection.

pub(super) mod gqa;
pub(super) mod latent;
pub(super) mod mla;
mod softmax;

use super::context::{Axes, Context, Runtime};
use crate::{
    error::NodeError,
    ir::{DType, Dim, GraphBuilder, Transform, ValueId, WeightRef},
};

/// The heads' outputs of one layer and its cache.
pub(super) struct Attended {
    /// `[batch, seq, H*d_v]`.
    pub(super) heads: ValueId,
    /// Output name and value of each cache.
    pub(super) present: Vec<(String, ValueId)>,
}

/// What the queries of one layer meet.
#[derive(Clone)]
struct Reach {
    /// How many tokens a query sees, itself counted.
    window: Option<usize>,
    /// Cached and new rows.
    rows: Dim,
    /// One score per head that takes part in the softmax and is dropped, `[H]` of the checkpoint.
    sinks: Option<String>,
}

impl Reach {
    fn of(cx: &Context<'_>, layer: usize) -> Self {
        let window = cx.cfg.sliding_window[layer];
        let sinks = || format!("model.layers.{layer}.self_attn.sinks");
        Self {
            window,
            rows: cx.axes.rows(window),
            sinks: cx.cfg.sinks.then(sinks),
        }
    }

    /// The sinks in `shape`.
    fn sinks(
        &self,
        b: &mut GraphBuilder,
        heads: usize,
        shape: &[usize],
        dtype: DType,
    ) -> Option<ValueId> {
        let name = self.sinks.clone()?;
        Some(b.weight(WeightRef {
            name,
            source_shape: vec![heads],
            transform: Transform::AsIs,
            dtype,
            shape: shape.to_vec(),
        }))
    }
}

/// The layer's output projection, with its bias: `heads [batch, seq, H*d_v]` to `[batch, seq, D]`.
pub(super) fn output_projection(
    b: &mut GraphBuilder,
    cx: &Context<'_>,
    layer: usize,
    heads: ValueId,
) -> Result<ValueId, NodeError> {
    let cfg = cx.cfg;
    let tensor = format!("model.layers.{layer}.self_attn.o_proj");
    let width = heads_width(cx, layer);
    b.linear(
        "o",
        heads,
        &tensor,
        cfg.hidden_size,
        width,
        cfg.layer_o_bias(layer),
    )
}

/// Numbers of all heads' outputs of one layer together, H*`d_v`.
pub(super) fn heads_width(cx: &Context<'_>, layer: usize) -> usize {
    let v = cx
        .cfg
        .mla_layer(layer)
        .map_or(cx.cfg.head_dim, |m| m.v_head_dim);
    cx.cfg.num_attention_heads * v
}

/// Declares the cache inputs of a layer in the order of their use.
pub(super) fn past_inputs(b: &mut GraphBuilder, cx: &Context<'_>, layer: usize) -> Vec<ValueId> {
    let window = cx.cfg.sliding_window[layer];
    let past = cx.axes.cached(window);
    let batch = cx.axes.batch.clone();
    if let Some(shape) = cx.cfg.mla_layer(layer) {
        let past = match cx.runtime {
            // Kernels have no rings.
            Runtime::OnnxRuntimeCuda => Axes::capacity(None),
            runtime if runtime.has_latent_attention() => Axes::capacity(window),
            _ => past,
        };
        let name = super::past_latent_name(layer);
        return vec![b.input(
            &name,
            cx.dtype,
            vec![batch, past, shape.cache_width().into()],
        )];
    }
    let (groups, d) = (cx.cfg.num_key_value_heads, cx.cfg.head_dim);
    let shape = vec![batch, groups.into(), past, d.into()];
    ["key", "value"]
        .map(|part| b.input(&super::past_kv_name(layer, part), cx.dtype, shape.clone()))
        .to_vec()
}

/// `past` and `new` along `axis`; `new` alone in a graph without cache.
fn append(
    b: &mut GraphBuilder,
    name: &str,
    past: Option<ValueId>,
    new: ValueId,
    axis: usize,
) -> Result<ValueId, NodeError> {
    match past {
        Some(past) => b.concat(name, &[past, new], axis),
        None => Ok(new),
    }
}

/// What is kept of the rows of `cache` for the next step: all, or the window's last ones.
fn keep(
    b: &mut GraphBuilder,
    name: &str,
    window: Option<usize>,
    cache: ValueId,
    axis: usize,
) -> Result<ValueId, NodeError> {
    match window {
        Some(window) => b.tail(name, cache, axis, window, &format!("present_w{window}")),
        None => Ok(cache),
    }
}

/// `[batch, seq, heads*n]` to `[batch, heads, seq, n]`.
fn to_heads(
    b: &mut GraphBuilder,
    name: &str,
    x: ValueId,
    heads: usize,
) -> Result<ValueId, NodeError> {
    let x = by_head(b, &format!("{name}.by_head"), x, heads)?;
    b.transpose(name, x, &[0, 2, 1, 3])
}

/// `[batch, seq, heads*n]` to `[batch, seq, heads, n]`.
fn by_head(
    b: &mut GraphBuilder,
    name: &str,
    x: ValueId,
    heads: usize,
) -> Result<ValueId, NodeError> {
    let [batch, seq, width] =
        <[Dim; 3]>::try_from(b.shape(x).to_vec()).map_err(|_| rank(name, 3))?;
    let n = width.as_known().unwrap_or(0) / heads;
    b.reshape(name, x, &[batch, seq, heads.into(), n.into()])
}

/// `[batch, heads, seq, n]` to `[batch, seq, heads*n]`.
fn from_heads(b: &mut GraphBuilder, name: &str, x: ValueId) -> Result<ValueId, NodeError> {
    let x = b.transpose(&format!("{name}.by_token"), x, &[0, 2, 1, 3])?;
    merge_heads(b, name, x)
}

/// `[batch, seq, heads, n]` to `[batch, seq, heads*n]`.
fn merge_heads(b: &mut GraphBuilder, name: &str, x: ValueId) -> Result<ValueId, NodeError> {
    let [batch, seq, heads, n] =
        <[Dim; 4]>::try_from(b.shape(x).to_vec()).map_err(|_| rank(name, 4))?;
    b.reshape(name, x, &[batch, seq, &heads * &n])
}

fn rank(node: &str, axes: usize) -> NodeError {
    NodeError {
        node: node.to_owned(),
        expected: format!("a tensor with {axes} axes"),
        found: "another number of axes".to_owned(),
    }
}

/// The type in which scores meet the mask and pass the softmax.
const SOFTMAX_DTYPE: DType = DType::F32;

//! One layer without cache, for calibration.

use std::collections::BTreeMap;

use mlac_model::{ModelConfig, Refusal};

use super::{
    attention::{self, gqa, mla},
    check,
    context::{Axes, Context, MlaForm},
    decoder::{after_attention, attention_input, stored_types},
};
use crate::{
    error::Error,
    ir::{DType, Dim, GraphBuilder, ValueId},
    onnx::WeightSource,
    validate::ValidGraph,
};

/// A value inside a layer that the caller wants to see; each is an output of its own name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tap {
    /// `hidden_out` `[batch, seq, D]`: the residual stream after the layer.
    HiddenOut,
    /// `attn_in` `[batch, seq, D]`: after the layer's first norm.
    AttnIn,
    /// `query` `[batch, seq, H, d]`: after bias and norm, before rotation. GQA layers only.
    Query,
    /// `key` `[batch, seq, G, d]`: after bias and norm, before rotation. GQA layers only.
    Key,
    /// `value` `[batch, seq, G, d]`: after bias. GQA layers only.
    Value,
    /// `heads` `[batch, seq, H*d_v]`: outputs of all heads, before the output projection.
    Heads,
    /// `attn_out` `[batch, seq, D]`: after the output projection and its bias.
    AttnOut,
}

impl Tap {
    /// Name of the output.
    pub fn name(self) -> &'static str {
        match self {
            Self::HiddenOut => "hidden_out",
            Self::AttnIn => "attn_in",
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::Heads => "heads",
            Self::AttnOut => "attn_out",
        }
    }

    fn is_projection(self) -> bool {
        matches!(self, Self::Query | Self::Key | Self::Value)
    }
}

/// What a layer graph gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerOptions {
    /// Wanted outputs, in this order; distinct, at least one.
    pub taps: Vec<Tap>,
    /// Type of weights and values; f32 for statistics.
    pub dtype: DType,
    /// Whether the layer continues a sequence: it then has the caches of [`super::decoder_graph`] as
    /// further inputs and, after the taps, as outputs.
    pub cached: bool,
}

/// One decoder layer over whole sequences, causal, with the layer's window.
///
/// Inputs: `hidden` `[batch, seq, D]`, the residual stream before the layer, and `position_ids` i64
/// `[batch, seq]` when a tap needs attention ([`Tap::HiddenOut`], [`Tap::Heads`], [`Tap::AttnOut`]).
/// Outputs: the taps under [`Tap::name`]. What no tap needs is not computed.
/// Scores take `4 * batch * H * seq * total` bytes while the layer runs: long sequences go through a
/// [`cached`](LayerOptions::cached) layer piece by piece, which also leaves out most of the scores that
/// the causal mask hides.
pub fn layer_graph(
    cfg: &ModelConfig,
    layer: usize,
    options: &LayerOptions,
) -> Result<ValidGraph, Error> {
    build_layer(cfg, layer, options, BTreeMap::new())
}

/// [`layer_graph`] whose large weights keep the 16 bits in which `source` has them, as in
/// [`decoder_graph_as_stored`](super::decoder_graph_as_stored).
pub fn layer_graph_as_stored(
    cfg: &ModelConfig,
    layer: usize,
    options: &LayerOptions,
    source: &dyn WeightSource,
) -> Result<ValidGraph, Error> {
    let stored = stored_types(cfg, options.dtype, source);
    build_layer(cfg, layer, options, stored)
}

fn build_layer(
    cfg: &ModelConfig,
    layer: usize,
    options: &LayerOptions,
    stored: BTreeMap<String, DType>,
) -> Result<ValidGraph, Error> {
    check::config(cfg)?;
    check::layer(cfg, layer)?;
    check::dtype(options.dtype)?;
    check_taps(cfg, layer, &options.taps)?;
    let mut builder = GraphBuilder::new(&format!("layer.{layer}"));
    builder.keep_stored(stored);
    let b = &mut builder;
    let past: Dim = if options.cached {
        "past".into()
    } else {
        Dim::known(0)
    };
    let (hidden, mut cx) = sequence_inputs(b, cfg, options.dtype, past);
    let past = if options.cached {
        attention::past_inputs(b, &cx, layer)
    } else {
        vec![]
    };
    let x = attention_input(b, &cx, layer, hidden)?;
    let mut found = vec![(Tap::AttnIn, x)];
    let attended = if let Some(&shape) = cfg.mla_layer(layer) {
        let past = past.first().copied();
        b.scope("attn", |b| mla::attend(b, &mut cx, layer, shape, x, past))?
    } else {
        let p = b.scope("attn", |b| gqa::project(b, &cx, layer, x))?;
        let (heads, groups) = (cfg.num_attention_heads, cfg.num_key_value_heads);
        let taps = [
            (Tap::Query, p.query, heads),
            (Tap::Key, p.key, groups),
            (Tap::Value, p.value, groups),
        ];
        for (tap, value, count) in taps {
            let shape = [
                cx.axes.batch.clone(),
                cx.axes.seq.clone(),
                count.into(),
                cfg.head_dim.into(),
            ];
            found.push((
                tap,
                b.reshape(&format!("{}_by_head", tap.name()), value, &shape)?,
            ));
        }
        b.scope("attn", |b| gqa::attend(b, &mut cx, layer, &p, &past))?
    };
    found.push((Tap::Heads, attended.heads));
    let out = b.scope("attn", |b| {
        attention::output_projection(b, &cx, layer, attended.heads)
    })?;
    found.push((Tap::AttnOut, out));
    let hidden_out = after_attention(b, &mut cx, layer, hidden, out)?;
    found.push((Tap::HiddenOut, hidden_out));
    for tap in &options.taps {
        if let Some((_, value)) = found.iter().find(|(t, _)| t == tap) {
            b.output(tap.name(), *value);
        }
    }
    for (name, value) in attended.present {
        b.output(&name, value);
    }
    builder.finish()
}

fn check_taps(cfg: &ModelConfig, layer: usize, taps: &[Tap]) -> Result<(), Refusal> {
    let refuse = |expected: &str, found: &str, fix: &str| {
        Err(Refusal::new(
            format!("taps of layer {layer}"),
            expected,
            found,
            fix,
        ))
    };
    if taps.is_empty() {
        return refuse("at least one tap", "none", "name a value to look at");
    }
    for (i, tap) in taps.iter().enumerate() {
        if taps[..i].contains(tap) {
            return refuse("distinct taps", tap.name(), "name each tap once");
        }
        if tap.is_projection() && cfg.mla_layer(layer).is_some() {
            let fix = "tap the layer of the original model";
            return refuse("taps that a converted layer has", tap.name(), fix);
        }
    }
    Ok(())
}

/// The rest of a layer after the heads: output projection, residual and MLP or experts, so that a refit
/// projection need not rerun attention.
///
/// Inputs: `hidden` f32 `[batch, seq, D]`, the residual stream before the layer, and `attn_heads` f32
/// `[batch, seq, H*d_v]`. Outputs: `attn_out` and `hidden_out`, f32 `[batch, seq, D]`.
pub fn rest_of_layer_graph(cfg: &ModelConfig, layer: usize) -> Result<ValidGraph, Error> {
    build_rest(cfg, layer, BTreeMap::new())
}

/// [`rest_of_layer_graph`] whose large weights keep the 16 bits in which `source` has them, as in
/// [`decoder_graph_as_stored`](super::decoder_graph_as_stored).
pub fn rest_of_layer_graph_as_stored(
    cfg: &ModelConfig,
    layer: usize,
    source: &dyn WeightSource,
) -> Result<ValidGraph, Error> {
    build_rest(cfg, layer, stored_types(cfg, DType::F32, source))
}

fn build_rest(
    cfg: &ModelConfig,
    layer: usize,
    stored: BTreeMap<String, DType>,
) -> Result<ValidGraph, Error> {
    check::config(cfg)?;
    check::layer(cfg, layer)?;
    let mut b = GraphBuilder::new(&format!("rest_of_layer.{layer}"));
    b.keep_stored(stored);
    let (hidden, mut cx) = sequence_inputs(&mut b, cfg, DType::F32, Dim::known(0));
    let width = attention::heads_width(&cx, layer);
    let shape = vec![cx.axes.batch.clone(), cx.axes.seq.clone(), width.into()];
    let heads = b.input("attn_heads", DType::F32, shape);
    let out = b.scope("attn", |b| {
        attention::output_projection(b, &cx, layer, heads)
    })?;
    let hidden_out = after_attention(&mut b, &mut cx, layer, hidden, out)?;
    b.output(Tap::AttnOut.name(), out);
    b.output(Tap::HiddenOut.name(), hidden_out);
    b.finish()
}

/// Declares `hidden` and `position_ids` and makes the context of a graph without padding.
fn sequence_inputs<'a>(
    b: &mut GraphBuilder,
    cfg: &'a ModelConfig,
    dtype: DType,
    past: Dim,
) -> (ValueId, Context<'a>) {
    let axes = Axes {
        batch: "batch".into(),
        seq: "seq".into(),
        past,
    };
    let tokens = vec![axes.batch.clone(), axes.seq.clone()];
    let mut stream = tokens.clone();
    stream.push(cfg.hidden_size.into());
    let hidden = b.input("hidden", dtype, stream);
    let positions = b.input("position_ids", DType::I64, tokens);
    let mut cx = Context::new(cfg, dtype, axes, positions);
    cx.mla_form = MlaForm::Expanded;
    (hidden, cx)
}

//! The whole model with its caches.

use std::collections::BTreeMap;

use mlac_model::{Dtype, ModelConfig, Refusal, checkpoint::expected_tensors};

use super::{
    attention::{self, Attended, gqa, latent, mla},
    check,
    context::{Axes, CacheProduct, Context, GqaForm, LayerKernels, MlaForm, Runtime},
    head,
    mlp::mlp,
    moe::moe,
    norm::rms_norm,
};
use crate::{
    error::{Error, NodeError},
    ir::{DType, GraphBuilder, ValueId},
    onnx::WeightSource,
    validate::{PAST_LENGTHS, ValidGraph},
};

/// What kind of decoder graph is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderOptions {
    /// Type of weights, caches and logits: f32 or f16. With f16, rotation angles, norms and the
    /// softmax are computed in f32.
    pub dtype: DType,
    /// Form of the converted layers.
    pub mla_form: MlaForm,
    /// Form of the other layers.
    pub gqa_form: GqaForm,
    /// What will run the graph.
    pub runtime: Runtime,
    /// Layout of the score product of absorbed layers outside fused attention.
    pub product: CacheProduct,
}

impl Default for DecoderOptions {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            mla_form: MlaForm::default(),
            gqa_form: GqaForm::default(),
            runtime: Runtime::default(),
            product: CacheProduct::default(),
        }
    }
}

/// The decoder with caches; `batch`, `seq`, `past` and `past_w{W}` are dynamic and the pasts may be 0.
///
/// Inputs: `input_ids` i64 `[batch, seq]`, `position_ids` i64 `[batch, seq]`, `attention_mask` i64
/// `[batch, past+seq]` (0: padding, which may stand on the left), and per layer
/// `past_key_values.{i}.key`, `past_key_values.{i}.value` `[batch, G, cached, d]`, or for a converted
/// layer `past_latent.{i}` `[batch, cached, r+d_r]`.
/// Outputs: `logits` `[batch, seq, vocab]`, then per layer `present.{i}.key`, `present.{i}.value`
/// `[batch, G, kept, d]`, or `present_latent.{i}` `[batch, kept, r+d_r]`.
/// Caches and logits have the type of the model.
///
/// With [`Runtime::has_latent_attention`] the cache of a converted layer is `past_latent.{i}` `[batch, capacity, r+d_r]`, with a
/// window `[batch, capacity_w{W}, r+d_r]`, and `present_latent.{i}` has the same shape: bind both to one buffer. Its rows are those of
/// `docs/latent-attention.md`; `past` is what `attention_mask` has more columns than `input_ids`. For
/// [`Runtime::has_cuda_kernels`] `past_lengths` i32 `[batch]` stands in the place of `attention_mask`: there is no padding. For
/// [`Runtime::OnnxRuntimeCuda`] every converted layer's cache is `[batch, capacity, r+d_r]`, with or without a window.
///
/// `past` is the number of tokens seen so far. Without a window a layer has cached them all: `cached` is
/// `past`, `kept` is `past+seq`. With a window W it has cached the last ones: `cached` is `past_w{W}`,
/// which the caller makes `min(past, W)`, and `kept` is `present_w{W}`, which is `min(past+seq, W)`.
pub fn decoder_graph(cfg: &ModelConfig, options: &DecoderOptions) -> Result<ValidGraph, Error> {
    build_decoder(cfg, *options, BTreeMap::new(), LayerKernels::new())
}

/// [`decoder_graph`] for [`Runtime::OnnxRuntimeCuda`], whose converted layers bring these kernels.
pub fn decoder_graph_with_kernels(
    cfg: &ModelConfig,
    options: &DecoderOptions,
    kernels: LayerKernels,
) -> Result<ValidGraph, Error> {
    build_decoder(cfg, *options, BTreeMap::new(), kernels)
}

/// [`decoder_graph`] whose large weights keep the 16 bits in which `source` has them, so that the data file
/// is no larger than the checkpoint. They are cast where they are read, which is exact, or multiplied by as
/// they are ([`Runtime::has_linear16`]). Only for f32: in a
/// f16 graph weights have 16 bits anyway.
pub fn decoder_graph_as_stored(
    cfg: &ModelConfig,
    options: &DecoderOptions,
    source: &dyn WeightSource,
) -> Result<ValidGraph, Error> {
    let stored = stored_types(cfg, options.dtype, source);
    build_decoder(cfg, *options, stored, LayerKernels::new())
}

/// The 16-bit tensors of `source` that a graph of `dtype` can keep as they are.
pub(super) fn stored_types(
    cfg: &ModelConfig,
    dtype: DType,
    source: &dyn WeightSource,
) -> BTreeMap<String, DType> {
    if dtype != DType::F32 {
        return BTreeMap::new();
    }
    expected_tensors(cfg)
        .into_iter()
        .filter_map(|(name, _)| {
            let stored = match source.dtype(&name)? {
                Dtype::BF16 => DType::BF16,
                Dtype::F16 => DType::F16,
                _ => return None,
            };
            Some((name, stored))
        })
        .collect()
}

/// Refuses options that do not fit the model or each other.
fn check_options(cfg: &ModelConfig, options: DecoderOptions) -> Result<(), Refusal> {
    check::config(cfg)?;
    check::dtype(options.dtype)?;
    let operator = options.gqa_form == GqaForm::GroupQueryAttention;
    if operator && options.runtime == Runtime::OnnxRuntimeCuda {
        return Err(Refusal::new(
            "form of the GQA layers",
            "primitives: on a GPU the operator was not looked at",
            "com.microsoft::GroupQueryAttention",
            "leave the layers' form out",
        ));
    }
    if operator && options.runtime.is_tensorrt() {
        return Err(Refusal::new(
            "form of the GQA layers",
            "operators that TensorRT knows",
            "com.microsoft::GroupQueryAttention",
            "use primitives for TensorRT",
        ));
    }
    if operator {
        check::operator_heads(cfg)?;
    }
    if options.runtime.has_latent_attention() && options.mla_form == MlaForm::Expanded {
        return Err(Refusal::new(
            "form of the MLA layers",
            "absorbed: LatentAttention serves prompts and steps",
            "expanded",
            "write one decoder graph",
        ));
    }
    if options.runtime.has_cuda_kernels() && options.dtype != DType::F16 {
        return Err(Refusal::new(
            "element type of a graph with LatentAttention on a GPU",
            "f16, which its kernels take",
            options.dtype.to_string(),
            "export with --dtype f16",
        ));
    }
    Ok(())
}

/// The axes of a graph with caches.
fn cached_axes() -> Axes {
    Axes {
        batch: "batch".into(),
        seq: "seq".into(),
        past: "past".into(),
    }
}

/// Declares `position_ids` and `attention_mask` and makes the context of a graph with caches.
fn cached_inputs<'a>(
    b: &mut GraphBuilder,
    cfg: &'a ModelConfig,
    options: DecoderOptions,
) -> Context<'a> {
    let axes = cached_axes();
    let tokens = vec![axes.batch.clone(), axes.seq.clone()];
    let positions = b.input("position_ids", DType::I64, tokens);
    let slots = vec![axes.batch.clone(), axes.total()];
    let lengths = vec![axes.batch.clone()];
    let mut cx = Context::new(cfg, options.dtype, axes, positions);
    if options.runtime.has_cuda_kernels() {
        // The kernels know lengths and no padding.
        cx.past_lengths = Some(b.input(PAST_LENGTHS, DType::I32, lengths));
    } else {
        cx.attention_mask = Some(b.input("attention_mask", DType::I64, slots));
    }
    cx.mla_form = options.mla_form;
    cx.gqa_form = options.gqa_form;
    cx.runtime = options.runtime;
    cx.product = options.product;
    cx
}

/// One layer of [`decoder_graph`] with its caches, for engines and measurements of single layers.
///
/// Inputs: `hidden` `[batch, seq, D]` of the graph's type, then as the decoder has them `position_ids`,
/// `attention_mask` and the layer's caches. Outputs: `hidden_out` `[batch, seq, D]` and the caches. With a
/// `source`, weights are kept as in [`decoder_graph_as_stored`].
pub fn block_graph(
    cfg: &ModelConfig,
    layer: usize,
    options: &DecoderOptions,
    source: Option<&dyn WeightSource>,
) -> Result<ValidGraph, Error> {
    check_options(cfg, *options)?;
    check::layer(cfg, layer)?;
    let mut b = GraphBuilder::new(&format!("block.{layer}"));
    if let Some(source) = source {
        keep(
            &mut b,
            stored_types(cfg, options.dtype, source),
            options.runtime,
        );
    }
    let axes = cached_axes();
    let stream = vec![axes.batch, axes.seq, cfg.hidden_size.into()];
    let hidden = b.input("hidden", options.dtype, stream);
    let mut cx = cached_inputs(&mut b, cfg, *options);
    let past = attention::past_inputs(&mut b, &cx, layer);
    let (out, attended) = decoder_layer(&mut b, &mut cx, layer, hidden, &past)?;
    b.output("hidden_out", out);
    for (name, value) in attended.present {
        b.output(&name, value);
    }
    b.finish()
}

/// The attention of one converted layer as `docs/latent-attention.md` has it, in the form of the runtime, for comparisons of the
/// forms with each other and with the page.
///
/// Inputs: `query` `[batch, seq, H, r+d_r]`, `new_rows` `[batch, seq, r+d_r]`, and as the decoder has them `attention_mask` (or
/// `past_lengths`) and the layer's cache. Outputs: `sums` `[batch, seq, H, r]` and the cache. The layer's scale, window and
/// sinks are those of the configuration. A token that sees nothing has sums of 0 from the node; from
/// standard operators finite ones of no meaning.
pub fn latent_attention_graph(
    cfg: &ModelConfig,
    layer: usize,
    options: &DecoderOptions,
) -> Result<ValidGraph, Error> {
    check_options(cfg, *options)?;
    check::layer(cfg, layer)?;
    let refuse = |expected: &str, found: &str, fix: &str| {
        let subject = format!("attention of layer {layer} over latents");
        Error::Refused(Refusal::new(subject, expected, found, fix))
    };
    let Some(&shape) = cfg.mla_layer(layer) else {
        let (expected, fix) = ("a converted layer", "choose one that is");
        return Err(refuse(expected, "one that is not converted", fix));
    };
    if options.mla_form == MlaForm::Expanded {
        let fix = "choose the absorbed form";
        return Err(refuse(
            "queries that meet latents",
            "the expanded form",
            fix,
        ));
    }
    let mut b = GraphBuilder::new(&format!("latent_attention.{layer}"));
    // Before the others, so that the sizes of a step are read off what it must have.
    let Axes { batch, seq, .. } = cached_axes();
    let (heads, width) = (cfg.num_attention_heads.into(), shape.cache_width().into());
    let by_head = vec![batch.clone(), seq.clone(), heads, width];
    let query = b.input("query", options.dtype, by_head);
    let rows = vec![batch, seq, shape.cache_width().into()];
    let new_rows = b.input("new_rows", options.dtype, rows);
    let mut cx = cached_inputs(&mut b, cfg, *options);
    latent::alone(&mut b, &mut cx, layer, shape, query, new_rows)?;
    b.finish()
}

/// Tensors that keep their types, and linear layers that multiply by them where the runtime can.
pub(super) fn keep(b: &mut GraphBuilder, stored: BTreeMap<String, DType>, runtime: Runtime) {
    b.keep_stored(stored);
    if runtime.has_linear16() {
        b.multiply_stored();
    }
}

fn build_decoder(
    cfg: &ModelConfig,
    options: DecoderOptions,
    stored: BTreeMap<String, DType>,
    kernels: LayerKernels,
) -> Result<ValidGraph, Error> {
    check_options(cfg, options)?;
    check::kernels(cfg, options.runtime, &kernels)?;
    let mut b = GraphBuilder::new("decoder");
    keep(&mut b, stored, options.runtime);
    let axes = cached_axes();
    let ids = b.input("input_ids", DType::I64, vec![axes.batch, axes.seq]);
    let mut cx = cached_inputs(&mut b, cfg, options);
    cx.kernels = kernels;
    let layers = 0..cfg.num_hidden_layers;
    let pasts: Vec<_> = layers
        .map(|layer| attention::past_inputs(&mut b, &cx, layer))
        .collect();

    let mut hidden = head::embed(&mut b, cfg, ids, options.dtype)?;
    let mut presents = vec![];
    for (layer, past) in pasts.iter().enumerate() {
        hidden = b.scope(&format!("layers.{layer}"), |b| {
            let (out, attended) = decoder_layer(b, &mut cx, layer, hidden, past)?;
            presents.extend(attended.present);
            Ok::<_, NodeError>(out)
        })?;
    }
    let logits = head::head(&mut b, cfg, hidden)?;
    b.output("logits", logits);
    for (name, value) in presents {
        b.output(&name, value);
    }
    b.finish()
}

/// One layer: the residual stream `[batch, seq, D]` after it, and what attention gave.
fn decoder_layer(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    layer: usize,
    hidden: ValueId,
    past: &[ValueId],
) -> Result<(ValueId, Attended), NodeError> {
    let x = attention_input(b, cx, layer, hidden)?;
    let attended = attend(b, cx, layer, x, past)?;
    let out = b.scope("attn", |b| {
        attention::output_projection(b, cx, layer, attended.heads)
    })?;
    Ok((after_attention(b, cx, layer, hidden, out)?, attended))
}

/// The residual stream after the layer's first norm.
pub(super) fn attention_input(
    b: &mut GraphBuilder,
    cx: &Context<'_>,
    layer: usize,
    hidden: ValueId,
) -> Result<ValueId, NodeError> {
    let tensor = format!("model.layers.{layer}.input_layernorm");
    rms_norm(b, "input_norm", hidden, &tensor, cx.cfg.rms_norm_eps)
}

/// Attention of the layer's form over the normed input.
pub(super) fn attend(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    layer: usize,
    x: ValueId,
    past: &[ValueId],
) -> Result<Attended, NodeError> {
    b.scope("attn", |b| {
        if let Some(&shape) = cx.cfg.mla_layer(layer) {
            mla::attend(b, cx, layer, shape, x, past.first().copied())
        } else {
            let projected = gqa::project(b, cx, layer, x)?;
            gqa::attend(b, cx, layer, &projected, past)
        }
    })
}

/// The rest of a layer: adds the attention's output to the residual stream, then the MLP's or the
/// experts'.
pub(super) fn after_attention(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    layer: usize,
    hidden: ValueId,
    attention: ValueId,
) -> Result<ValueId, NodeError> {
    let hidden = b.add("attn_residual", hidden, attention)?;
    let prefix = format!("model.layers.{layer}");
    let tensor = format!("{prefix}.post_attention_layernorm");
    let x = rms_norm(b, "post_norm", hidden, &tensor, cx.cfg.rms_norm_eps)?;
    let x = match cx.cfg.moe {
        Some(experts) => moe(b, cx, experts, &prefix, x)?,
        None => mlp(b, cx.cfg, &prefix, x)?,
    };
    b.add("mlp_residual", hidden, x)
}

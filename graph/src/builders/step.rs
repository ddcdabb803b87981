//! One decode step of one layer's attention, and the experts of one layer, for benchmarks.

use mlac_model::{ModelConfig, Refusal};

use super::{
    attention, check,
    context::{Axes, CacheProduct, Context, GqaForm, MlaForm, Runtime},
    decoder,
    moe::moe,
};
use crate::{
    error::Error,
    ir::{DType, Dim, GraphBuilder},
    onnx::WeightSource,
    validate::ValidGraph,
};

/// Which attention is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepForm {
    /// GQA in matrix products and a softmax.
    GqaPrimitives,
    /// GQA as `com.microsoft::GroupQueryAttention`.
    GqaOperator,
    /// The same with linear layers that multiply by 16-bit weights as they are, as [`Runtime::OnnxRuntime`] has them.
    GqaOperatorStored,
    /// MLA in absorbed form.
    MlaAbsorbed,
    /// MLA as [`Runtime::OnnxRuntime`] has it: `mlac::LatentAttention` over a cache `[batch, capacity, r+d_r]` that is kept in place,
    /// and linear layers that multiply by 16-bit weights as they are.
    MlaOperator,
}

impl StepForm {
    /// A short name for messages and file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::GqaPrimitives => "gqa_primitives",
            Self::GqaOperator => "gqa_operator",
            Self::GqaOperatorStored => "gqa_operator_stored",
            Self::MlaAbsorbed => "mla_absorbed",
            Self::MlaOperator => "mla_operator",
        }
    }
}

/// What kind of step is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepOptions {
    /// Which attention; must be the one that the layer has.
    pub form: StepForm,
    /// Type of weights, caches and results.
    pub dtype: DType,
    /// Layout of the score product of the absorbed form.
    pub product: CacheProduct,
}

/// Attention of one layer for one new token per sequence: projections, rotation, cache, softmax and
/// output projection, without norms and MLP.
///
/// Inputs: `hidden` `[batch, 1, D]`, `position_ids` i64 `[batch, 1]` and the caches of the layer under
/// their names in the decoder, with `past`, `past_w{W}` or `capacity` dynamic. Outputs: `attn_out` `[batch, 1, D]` and the present
/// caches. No padding; the layer's window applies. With a `source`, weights are kept as in
/// [`decoder_graph_as_stored`](super::decoder_graph_as_stored).
pub fn step_graph(
    cfg: &ModelConfig,
    layer: usize,
    options: &StepOptions,
    source: Option<&dyn WeightSource>,
) -> Result<ValidGraph, Error> {
    check::config(cfg)?;
    check::layer(cfg, layer)?;
    check::dtype(options.dtype)?;
    let is_mla = cfg.mla_layer(layer).is_some();
    let wants_mla = matches!(options.form, StepForm::MlaAbsorbed | StepForm::MlaOperator);
    if is_mla != wants_mla {
        return Err(Error::Refused(Refusal::new(
            format!("attention of layer {layer}"),
            if is_mla {
                "the MLA form, the layer is converted"
            } else {
                "a GQA form"
            },
            options.form.name(),
            "choose a layer of that form",
        )));
    }
    let mut b = GraphBuilder::new(&format!("step.{layer}"));
    let by_operators = matches!(
        options.form,
        StepForm::GqaOperatorStored | StepForm::MlaOperator
    );
    let runtime = if by_operators {
        Runtime::OnnxRuntime
    } else {
        Runtime::Standard
    };
    if let Some(source) = source {
        let stored = decoder::stored_types(cfg, options.dtype, source);
        decoder::keep(&mut b, stored, runtime);
    }
    let axes = Axes {
        batch: "batch".into(),
        seq: Dim::known(1),
        past: "past".into(),
    };
    let tokens = vec![axes.batch.clone(), axes.seq.clone()];
    let mut stream = tokens.clone();
    stream.push(cfg.hidden_size.into());
    let hidden = b.input("hidden", options.dtype, stream);
    let positions = b.input("position_ids", DType::I64, tokens);
    let mut cx = Context::new(cfg, options.dtype, axes, positions);
    cx.mla_form = MlaForm::Absorbed;
    cx.product = options.product;
    cx.runtime = runtime;
    if matches!(
        options.form,
        StepForm::GqaOperator | StepForm::GqaOperatorStored
    ) {
        check::operator_heads(cfg)?;
        cx.gqa_form = GqaForm::GroupQueryAttention;
    }
    if options.form == StepForm::MlaOperator {
        // Without padding a new token's position is the number of tokens before it.
        let past = b.reshape("past", positions, &[cx.axes.batch.clone()])?;
        cx.past_lengths = Some(b.cast("past_lengths", past, DType::I32)?);
    }
    let past = attention::past_inputs(&mut b, &cx, layer);
    let attended = decoder::attend(&mut b, &mut cx, layer, hidden, &past)?;
    let out = attention::output_projection(&mut b, &cx, layer, attended.heads)?;
    b.output("attn_out", out);
    for (name, value) in attended.present {
        b.output(&name, value);
    }
    b.finish()
}

/// The experts of one layer with their router, without norm and residual.
///
/// Input: `hidden` f32 `[batch, seq, D]`, normed. Output: `experts_out`, the same.
///
/// # Errors
/// A model without experts is refused.
pub fn experts_graph(
    cfg: &ModelConfig,
    layer: usize,
    runtime: Runtime,
) -> Result<ValidGraph, Error> {
    check::config(cfg)?;
    check::layer(cfg, layer)?;
    let Some(experts) = cfg.moe else {
        return Err(Error::Refused(Refusal::new(
            format!("experts of layer {layer}"),
            "a model with experts",
            format!("{:?}", cfg.architecture),
            "choose a checkpoint of GPT-OSS",
        )));
    };
    let mut b = GraphBuilder::new(&format!("experts.{layer}"));
    let axes = Axes {
        batch: "batch".into(),
        seq: "seq".into(),
        past: Dim::known(0),
    };
    let tokens = vec![axes.batch.clone(), axes.seq.clone()];
    let mut stream = tokens.clone();
    stream.push(cfg.hidden_size.into());
    let hidden = b.input("hidden", DType::F32, stream);
    // Experts know no positions; nothing uses the input, so the graph has none.
    let positions = b.input("position_ids", DType::I64, tokens);
    let mut cx = Context::new(cfg, DType::F32, axes, positions);
    cx.runtime = runtime;
    let out = moe(
        &mut b,
        &mut cx,
        experts,
        &format!("model.layers.{layer}"),
        hidden,
    )?;
    b.output("experts_out", out);
    b.finish()
}

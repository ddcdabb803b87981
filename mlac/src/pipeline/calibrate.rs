//! The walk over the layers: statistics from the converted stream, targets from the original one.
//!
//! Sequential calibration as GPTQ does it (Frantar et al. 2022): a layer is converted with the
//! statistics of the input it will really get, that of the already converted layers below, and its
//! output projection is fitted to what the original model put out.

use mlac_converter::{
    Attention, AttentionShape, LayerFactors, LayerReport, LayerStatistics, LayerWeights, Matrix,
    MlaTensors, Projection, RefineReport, Rotary, StatisticsOptions, WindowActivations, compose,
    convert_layer, convert_layer_svd, convert_layer_transmla, prior_statistics,
};
use mlac_engines::ort::{HostTensor, SessionOptions, Value};
use mlac_graph::builders::{Tap, layer_graph, rest_of_layer_graph};
use mlac_graph::onnx::{MemoryWeights, Overlay};
use mlac_model::{Checkpoint, MlaEncoder, ModelConfig};

use super::convert::{LayerPlan, Method};
use super::gradients::Gradients;
use super::refine::{Converted, Refinement, fit_output};
use super::refined_layers::Kept;
use super::store::Store;
use super::streams::{GraphRunner, HiddenStates, numbers, taps};
use crate::error::Error;

/// What one layer's conversion left.
pub struct ConvertedLayer {
    /// The layer's new tensors.
    pub tensors: MlaTensors,
    /// What the converter reports.
    pub report: LayerReport,
    /// Relative distance of the two residual streams after the layer.
    pub stream_error: Option<f64>,
    /// What gradient steps gave, where some were asked for.
    pub refined: Option<RefineReport>,
}

/// The attention weights of one layer, read from the checkpoint as f32.
pub fn layer_weights(checkpoint: &Checkpoint, layer: usize) -> Result<LayerWeights, Error> {
    let config = checkpoint.config();
    let (hidden, d) = (config.hidden_size, config.head_dim);
    let (queries, keys) = (
        config.num_attention_heads * d,
        config.num_key_value_heads * d,
    );
    let prefix = format!("model.layers.{layer}");
    let vector = |name: &str, size: usize| checkpoint.f32(&format!("{prefix}.{name}"), &[size]);
    let projection = |name: &str, out: usize, inner: usize, bias: bool| -> Result<_, Error> {
        let data = checkpoint.f32(&format!("{prefix}.self_attn.{name}.weight"), &[out, inner])?;
        let bias = bias
            .then(|| vector(&format!("self_attn.{name}.bias"), out))
            .transpose()?;
        Ok(Projection {
            weight: Matrix::from_vec(out, inner, data),
            bias,
        })
    };
    let norm = |name: &str| -> Result<Option<Vec<f32>>, Error> {
        if !config.qk_norm {
            return Ok(None);
        }
        Ok(Some(vector(&format!("self_attn.{name}.weight"), d)?))
    };
    let sinks = config
        .sinks
        .then(|| vector("self_attn.sinks", config.num_attention_heads))
        .transpose()?;
    Ok(LayerWeights {
        layer,
        attention: Attention {
            sinks,
            ..attention(config, layer)
        },
        encoder: MlaEncoder::of(config.architecture),
        q: projection("q_proj", queries, hidden, config.qkv_bias)?,
        k: projection("k_proj", keys, hidden, config.qkv_bias)?,
        v: projection("v_proj", keys, hidden, config.qkv_bias)?,
        o: projection("o_proj", hidden, queries, config.o_bias)?,
        input_norm: Some(vector("input_layernorm.weight", hidden)?),
        q_norm: norm("q_norm")?,
        k_norm: norm("k_norm")?,
    })
}

/// How layer `layer` of the source attends, apart from sinks.
fn attention(config: &ModelConfig, layer: usize) -> Attention {
    let table = config.rope.table(config.head_dim);
    Attention {
        shape: AttentionShape::of(config),
        rotary: Rotary {
            inv_freq: table.inv_freq,
            attention_factor: table.attention_factor,
        },
        scale: (config.head_dim as f64).powf(-0.5),
        sliding_window: config.sliding_window[layer],
        sinks: None,
    }
}

/// Both streams and how they are run.
pub struct Walk<'a> {
    checkpoint: &'a Checkpoint,
    /// The source's configuration with the MLA form of every layer that will be converted.
    converted: &'a ModelConfig,
    options: SessionOptions,
    statistics: StatisticsOptions,
    sequential: bool,
    original: HiddenStates,
    /// The converted stream, from the first converted layer on.
    stream: Option<HiddenStates>,
    /// Gradient steps on the converted layers, if any.
    pub refinement: Option<Refinement<'a>>,
    /// Gradients of the original model's loss, if they were taken.
    pub gradients: Option<&'a Gradients>,
}

impl<'a> Walk<'a> {
    /// Embeds the windows.
    pub fn start(
        checkpoint: &'a Checkpoint,
        converted: &'a ModelConfig,
        windows: &[&[u32]],
        options: SessionOptions,
        statistics: StatisticsOptions,
        sequential: bool,
    ) -> Result<Self, Error> {
        let original = HiddenStates::embed(checkpoint.config(), checkpoint, windows, &options)?;
        Ok(Self {
            checkpoint,
            converted,
            options,
            statistics,
            sequential,
            original,
            stream: None,
            refinement: None,
            gradients: None,
        })
    }

    /// Passes a layer that is not converted.
    pub fn pass(&mut self, layer: usize) -> Result<(), Error> {
        if let Some(refinement) = &mut self.refinement {
            refinement.reach(self.checkpoint, layer, None)?;
        }
        let config = self.checkpoint.config();
        self.original
            .advance(config, self.checkpoint, layer, &self.options)?;
        if let Some(stream) = &mut self.stream {
            stream.advance(config, self.checkpoint, layer, &self.options)?;
        }
        Ok(())
    }

    /// Converts a layer and moves both streams over it.
    pub fn convert(&mut self, plan: &LayerPlan, method: &Method) -> Result<ConvertedLayer, Error> {
        let weights = layer_weights(self.checkpoint, plan.layer)?;
        if let Some(refinement) = &mut self.refinement {
            refinement.reach(self.checkpoint, plan.layer, Some(plan))?;
        }
        let targets = self.run_original(plan.layer)?;
        let stream = match self.stream.take() {
            Some(stream) => stream,
            None => targets.input.copy()?,
        };
        let kept = |refinement: &Refinement<'_>| refinement.take_up(&weights, plan);
        if let Some(kept) = self.refinement.as_ref().and_then(kept) {
            return self.take_up(plan.layer, stream, kept);
        }
        let source = if self.sequential {
            &stream
        } else {
            &targets.input
        };
        let statistics = gather(
            self.checkpoint,
            &weights,
            source,
            self.gradients,
            self.statistics,
            &self.options,
        )?;
        let (mut factors, mut report) = run_method(&weights, &statistics, plan, method)?;

        let mut tensors = compose(&weights, &factors)?;
        if !self.sequential && method.refit().is_none() && self.refinement.is_none() {
            return Ok(ConvertedLayer {
                tensors,
                report,
                stream_error: None,
                refined: None,
            });
        }
        let mut heads =
            self.run_converted(plan.layer, &in_memory(plan.layer, &tensors)?, &stream)?;
        let refit = method.refit();
        let wanted = match refit {
            Some(options) if options.compensate => targets.compensated(&stream)?,
            _ => targets.attention,
        };
        let all: Vec<usize> = (0..heads.count()).collect();
        if let Some(options) = refit {
            let fitted = fit_output(&weights, &weights.o, &heads, &wanted, &all, options)?;
            report.refit_error_before = Some(fitted.error_before);
            report.refit_error_after = Some(fitted.error_after);
            factors.o = Some(fitted.o);
            factors.o_bias = fitted.bias;
            tensors = compose(&weights, &factors)?;
        }
        let mut refined = None;
        if let Some(refinement) = &self.refinement {
            let result = refinement.run(&Converted {
                checkpoint: self.checkpoint,
                weights: &weights,
                statistics: &statistics,
                factors: &factors,
                heads: &heads,
                stream: &stream,
                targets: &wanted,
                refit,
                session: &self.options,
            })?;
            if let Some(better) = result.factors {
                factors = better;
                tensors = compose(&weights, &factors)?;
                heads =
                    self.run_converted(plan.layer, &in_memory(plan.layer, &tensors)?, &stream)?;
                if let Some(options) = refit {
                    let refined = &tensors.o_proj;
                    let fitted = fit_output(&weights, refined, &heads, &wanted, &all, options)?;
                    report.refit_error_after = Some(fitted.error_after);
                    factors.o = Some(fitted.o);
                    factors.o_bias = fitted.bias;
                    tensors = compose(&weights, &factors)?;
                }
            }
            refinement.keep(plan.layer, &tensors, &report, &result.report)?;
            refined = Some(result.report);
        }
        drop(statistics);
        let stream = self.finish_layer(
            plan.layer,
            &in_memory(plan.layer, &tensors)?,
            stream,
            &heads,
        )?;
        let stream_error = Some(stream.relative_distance(&self.original)?);
        self.stream = Some(stream);
        Ok(ConvertedLayer {
            tensors,
            report,
            stream_error,
            refined,
        })
    }

    /// Moves both streams over a layer that an earlier run refined.
    fn take_up(
        &mut self,
        layer: usize,
        stream: HiddenStates,
        kept: Kept,
    ) -> Result<ConvertedLayer, Error> {
        let tensors = in_memory(layer, &kept.tensors)?;
        let heads = self.run_converted(layer, &tensors, &stream)?;
        let stream = self.finish_layer(layer, &tensors, stream, &heads)?;
        let stream_error = Some(stream.relative_distance(&self.original)?);
        self.stream = Some(stream);
        Ok(ConvertedLayer {
            tensors: kept.tensors,
            report: kept.report,
            stream_error,
            refined: Some(kept.refined),
        })
    }

    /// Runs the original layer on the original stream; keeps its input and attention outputs.
    fn run_original(&mut self, layer: usize) -> Result<Targets, Error> {
        let config = self.checkpoint.config();
        let wanted = taps(config, &[Tap::HiddenOut, Tap::AttnOut]);
        let graph = layer_graph(config, layer, &wanted)?;
        let subject = format!("layer {layer}");
        let mut runner = GraphRunner::open(&subject, &graph, self.checkpoint, &self.options)?;
        let input = self.original.copy()?;
        let shape = [1, input.tokens, self.converted.hidden_size];
        let mut attention = Store::new(input.windows.count(), &shape)?;
        for i in 0..input.windows.count() {
            let mut out = input.run(&mut runner, i)?;
            attention.push(out.remove(1))?;
            self.original.windows.set(i, out.remove(0))?;
        }
        Ok(Targets { input, attention })
    }

    /// Head outputs of the converted layer on `stream`.
    fn run_converted(
        &self,
        layer: usize,
        tensors: &MemoryWeights,
        stream: &HiddenStates,
    ) -> Result<Store, Error> {
        let graph = layer_graph(self.converted, layer, &taps(self.converted, &[Tap::Heads]))?;
        let source = Overlay::new(tensors, self.checkpoint);
        let subject = format!("converted layer {layer}");
        let mut runner = GraphRunner::open(&subject, &graph, &source, &self.options)?;
        let width = self.converted.num_attention_heads * self.converted.head_dim;
        let mut heads = Store::new(stream.windows.count(), &[1, stream.tokens, width])?;
        for i in 0..stream.windows.count() {
            heads.push(stream.run(&mut runner, i)?.remove(0))?;
        }
        Ok(heads)
    }

    /// Output projection, residual and MLP of the converted layer.
    fn finish_layer(
        &self,
        layer: usize,
        tensors: &MemoryWeights,
        mut stream: HiddenStates,
        heads: &Store,
    ) -> Result<HiddenStates, Error> {
        let graph = rest_of_layer_graph(self.converted, layer)?;
        let source = Overlay::new(tensors, self.checkpoint);
        let subject = format!("rest of converted layer {layer}");
        let mut runner = GraphRunner::open(&subject, &graph, &source, &self.options)?;
        for i in 0..heads.count() {
            let (hidden, heads) = (stream.windows.get(i)?, heads.get(i)?);
            let inputs = [("hidden", &hidden), ("attn_heads", &heads)];
            let out = runner.run_for(Tap::HiddenOut.name(), &inputs)?;
            stream.windows.set(i, out)?;
        }
        Ok(stream)
    }
}

/// Statistics of a layer: queries, keys and values of its original weights on `source`, and gradients where
/// they were taken.
pub fn gather(
    checkpoint: &Checkpoint,
    weights: &LayerWeights,
    source: &HiddenStates,
    gradients: Option<&Gradients>,
    statistics: StatisticsOptions,
    options: &SessionOptions,
) -> Result<LayerStatistics, Error> {
    let layer = weights.layer;
    let config = checkpoint.config();
    let wanted = taps(config, &[Tap::Query, Tap::Key, Tap::Value]);
    let graph = layer_graph(config, layer, &wanted)?;
    let subject = format!("projections of layer {layer}");
    let mut runner = GraphRunner::open(&subject, &graph, checkpoint, options)?;
    let mut sums = LayerStatistics::new(layer, &weights.attention, &weights.o.weight, statistics)?;
    for i in 0..source.windows.count() {
        let out = source.run(&mut runner, i)?;
        sums.accumulate(&WindowActivations {
            tokens: source.tokens,
            q: numbers(&out[0])?,
            k: numbers(&out[1])?,
            v: numbers(&out[2])?,
        })?;
    }
    if let Some(gradients) = gradients {
        sums.gradient = gradients.of(layer)?;
    }
    Ok(sums)
}

/// What the original layer did.
struct Targets {
    input: HiddenStates,
    attention: Store,
}

impl Targets {
    /// What the converted layer should put out so that its residual stream, `stream` before the layer,
    /// joins the original one again: the original attention output and how far the stream is off.
    fn compensated(self, stream: &HiddenStates) -> Result<Store, Error> {
        let mut wanted = self.attention;
        for i in 0..wanted.count() {
            let (attention, original, converted) = (
                wanted.get(i)?,
                self.input.windows.get(i)?,
                stream.windows.get(i)?,
            );
            let sum = numbers(&attention)?
                .iter()
                .zip(numbers(&original)?)
                .zip(numbers(&converted)?)
                .map(|((a, h), c)| a + (h - c))
                .collect();
            wanted.set(i, Value::new(HostTensor::f32(attention.shape(), sum))?)?;
        }
        Ok(wanted)
    }
}

/// Converts a layer from its weights alone.
pub fn convert_from_weights(
    checkpoint: &Checkpoint,
    plan: &LayerPlan,
    method: &Method,
) -> Result<ConvertedLayer, Error> {
    let weights = layer_weights(checkpoint, plan.layer)?;
    let statistics = prior_statistics(&weights, mlac_converter::DistancePrior::default())?;
    let (factors, report) = run_method(&weights, &statistics, plan, method)?;
    let tensors = compose(&weights, &factors)?;
    Ok(ConvertedLayer {
        tensors,
        report,
        stream_error: None,
        refined: None,
    })
}

fn run_method(
    weights: &LayerWeights,
    statistics: &LayerStatistics,
    plan: &LayerPlan,
    method: &Method,
) -> Result<(LayerFactors, LayerReport), Error> {
    Ok(match method {
        Method::Recipe(recipe) => convert_layer(weights, statistics, plan.ranks, recipe)?,
        Method::TransMla(options) => {
            convert_layer_transmla(weights, statistics, plan.ranks, *options)?
        }
        Method::Svd => convert_layer_svd(weights, plan.ranks)?,
    })
}

/// The converted tensors under their checkpoint names, as a source for graphs.
pub fn in_memory(layer: usize, tensors: &MlaTensors) -> Result<MemoryWeights, Error> {
    let mut memory = MemoryWeights::new();
    for (name, shape, data) in tensors.named() {
        memory.insert(tensor_name(layer, name), &shape, data.to_vec())?;
    }
    Ok(memory)
}

/// Name of an attention tensor in the checkpoint.
pub fn tensor_name(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.self_attn.{name}")
}

//! A budget for all layers together: measures how each layer's error falls with its ranks and what
//! each layer's error costs the model, and gives the ranks where they help most.
//!
//! Everything is measured on the original model. For each layer: statistics of a few calibration
//! windows, the error of its output at a grid of ranks, and one conversion at the ranks an even
//! budget would give, of which the *probes* see the effect: short texts run through the model with
//! only this layer converted, and the Kullback-Leibler divergence of their next-token
//! distributions from the original's, divided by the layer's error, is the layer's price.

use mlac_converter::allocate::{LayerCurve, allocate, curve, grid, step};
use mlac_converter::{
    AttentionShape, LayerReport, MlaTensors, Recipe, StatisticsOptions, compose, convert_layer,
};
use mlac_engines::ort::{SessionOptions, Value};
use mlac_graph::builders::{Tap, layer_graph};
use mlac_graph::onnx::Overlay;
use mlac_model::{Checkpoint, ModelConfig, Refusal};

use super::calibrate::{gather, in_memory, layer_weights};
use super::convert::{LayerPlan, converted_config};
use super::gradients::Gradients;
use super::store::Store;
use super::streams::{GraphRunner, HiddenStates, numbers, taps};
use super::subject::Head;
use crate::error::Error;
use crate::progress::Progress;

/// Calibration windows that errors are measured on.
const WINDOWS: usize = 4;
/// Texts that prices are measured on: the beginnings of this many calibration windows. With 2 of them prices are 20 % (a standard
/// deviation of logarithms) off those with 8.
const PROBES: usize = 4;
/// Tokens of a probe.
const PROBE_TOKENS: usize = 512;
/// Relative squared errors below this are rounding of f32; a price is not taken from less.
const ROUNDING: f64 = 1e-10;
/// Distance of the positions whose predictions are compared.
const STRIDE: usize = 4;

/// What is to be distributed.
pub struct AllocateRequest<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// Calibration windows.
    pub windows: &'a [&'a [u32]],
    /// The layers with the ranks of an even budget.
    pub even: &'a [LayerPlan],
    /// Numbers per token for all of them.
    pub budget: usize,
    /// What ranks are multiples of.
    pub align: usize,
    /// The recipe.
    pub recipe: &'a Recipe,
    /// Gradients of the model's loss, if they were taken.
    pub gradients: Option<&'a Gradients>,
    /// Statistics.
    pub statistics: StatisticsOptions,
    /// Threads for ONNX Runtime.
    pub threads: usize,
}

impl AllocateRequest<'_> {
    fn step(&self) -> usize {
        let shape = AttentionShape::of(self.checkpoint.config());
        step(&shape, self.align, self.budget / self.even.len().max(1))
    }
}

/// Gives every layer of the request its ranks.
pub fn distribute(
    request: &AllocateRequest<'_>,
    progress: Progress,
) -> Result<Vec<LayerPlan>, Error> {
    let curves = measure(request, progress)?;
    let ranks = allocate(&curves, request.budget, request.step())?;
    let plans = curves.iter().zip(ranks).map(|(curve, ranks)| LayerPlan {
        layer: curve.layer,
        ranks,
    });
    Ok(plans.collect())
}

/// The curve and the price of every layer.
fn measure(request: &AllocateRequest<'_>, progress: Progress) -> Result<Vec<LayerCurve>, Error> {
    let checkpoint = request.checkpoint;
    let config = checkpoint.config();
    let options = SessionOptions::default().with_threads(request.threads);
    let converted = converted_config(config, request.even);
    let spread = |count: usize| -> Vec<&[u32]> {
        let count = count.min(request.windows.len());
        (0..count)
            .map(|i| request.windows[i * request.windows.len() / count])
            .collect()
    };
    let probes: Vec<&[u32]> = spread(PROBES)
        .into_iter()
        .map(|w| &w[..w.len().min(PROBE_TOKENS)])
        .collect();
    let mut original = HiddenStates::embed(config, checkpoint, &spread(WINDOWS), &options)?;
    let mut probe = HiddenStates::embed(config, checkpoint, &probes, &options)?;
    let shape = [1, probe.tokens, config.hidden_size];
    // Every probe with layer 0 converted, then every probe with the next one converted, and so on.
    let mut disturbed = HiddenStates {
        windows: Store::new(probes.len() * request.even.len(), &shape)?,
        positions: probe.positions.clone(),
        tokens: probe.tokens,
    };
    let (mut curves, mut errors) = (Vec::new(), Vec::new());
    let stage = progress.stage("distributing the budget", config.num_hidden_layers as u64);
    for layer in 0..config.num_hidden_layers {
        stage.doing(format!("layer {layer}"));
        let mut newly = Vec::new();
        if let Some(plan) = request.even.iter().find(|p| p.layer == layer) {
            let weights = layer_weights(checkpoint, layer)?;
            let statistics = gather(
                checkpoint,
                &weights,
                &original,
                request.gradients,
                request.statistics,
                &options,
            )?;
            let (factors, report) =
                convert_layer(&weights, &statistics, plan.ranks, request.recipe)?;
            let grid = grid(&weights.attention.shape, request.step());
            curves.push(LayerCurve {
                layer,
                points: curve(&weights, &statistics, request.recipe, &grid, report.beta)?,
                price: 0.0,
            });
            errors.push(measured_error(&report)?);
            let tensors = compose(&weights, &factors)?;
            newly = disturb(&converted, checkpoint, layer, &tensors, &probe, &options)?;
        }
        let mut streams = vec![&mut probe, &mut disturbed];
        // Statistics are wanted up to the last layer to convert.
        if request.even.last().is_some_and(|p| p.layer > layer) {
            streams.push(&mut original);
        }
        HiddenStates::advance_all(&mut streams, config, checkpoint, layer, &options)?;
        for states in newly {
            disturbed.windows.push(states)?;
        }
        stage.step();
    }
    let divergences = divergences(checkpoint, &probe, &disturbed, &options)?;
    for ((curve, divergence), error) in curves.iter_mut().zip(divergences).zip(errors) {
        curve.price = divergence / error.max(ROUNDING);
    }
    Ok(curves)
}

/// The error of the layer at even ranks, whose effect the probes see.
fn measured_error(report: &LayerReport) -> Result<f64, Error> {
    report.error.ok_or_else(|| {
        Refusal::new(
            format!("price of layer {}", report.layer),
            "an error of the layer's output, measured on calibration windows",
            "none",
            "report this as a defect of mlac",
        )
        .into()
    })
}

/// Every probe after `layer` in its converted form.
fn disturb(
    converted: &ModelConfig,
    checkpoint: &Checkpoint,
    layer: usize,
    tensors: &MlaTensors,
    probe: &HiddenStates,
    options: &SessionOptions,
) -> Result<Vec<Value>, Error> {
    let graph = layer_graph(converted, layer, &taps(converted, &[Tap::HiddenOut]))?;
    let memory = in_memory(layer, tensors)?;
    let source = Overlay::new(&memory, checkpoint);
    let subject = format!("converted layer {layer}");
    let mut runner = GraphRunner::open(&subject, &graph, &source, options)?;
    (0..probe.windows.count())
        .map(|i| Ok(probe.run(&mut runner, i)?.remove(0)))
        .collect()
}

/// Mean divergence of the predictions of the disturbed probes of each layer from the original's, in
/// nats per token.
fn divergences(
    checkpoint: &Checkpoint,
    probe: &HiddenStates,
    disturbed: &HiddenStates,
    options: &SessionOptions,
) -> Result<Vec<f64>, Error> {
    let hidden = checkpoint.config().hidden_size;
    let mut head = Head::open(checkpoint, options)?;
    let probes = probe.windows.count();
    let mut sums = vec![0.0; disturbed.windows.count() / probes];
    for p in 0..probes {
        let mut predictions = |states: &HiddenStates, i: usize| -> Result<Vec<f32>, Error> {
            let value = states.windows.get(i)?;
            let rows: Vec<f32> = numbers(&value)?
                .chunks(hidden)
                .step_by(STRIDE)
                .flatten()
                .copied()
                .collect();
            head.logits(&rows)
        };
        let expected = predictions(probe, p)?;
        for (layer, sum) in sums.iter_mut().enumerate() {
            let found = predictions(disturbed, layer * probes + p)?;
            *sum += mean_divergence(&expected, &found, checkpoint.config().vocab_size);
        }
    }
    Ok(sums.into_iter().map(|s| s / probes as f64).collect())
}

/// Mean of KL(softmax(expected) | softmax(found)) over rows of `vocab` logits.
fn mean_divergence(expected: &[f32], found: &[f32], vocab: usize) -> f64 {
    use rayon::prelude::*;
    let rows = expected.len() / vocab;
    let total: f64 = expected
        .par_chunks(vocab)
        .zip(found.par_chunks(vocab))
        .map(|(p, q)| mlac_engines::parity::divergence(p, q))
        .sum();
    total / rows.max(1) as f64
}

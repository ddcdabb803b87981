//! `--refine`: gradient steps on every converted layer, after its closed forms.
//!
//! What held-out windows say is to be what new text would say: for the comparison the output
//! projection is fitted to the other windows only. A layer that got better there has its projection
//! fitted once more, to all windows.

use std::path::PathBuf;

use mlac_converter::refine::{Refined, TakeWindow, divide, refine};
use mlac_converter::{
    LayerFactors, LayerReport, LayerStatistics, LayerWeights, MlaTensors, OutputRefit, Projection,
    RefineOptions, RefineReport, RefineWindows, RefitOptions, Refitted, WindowActivations,
};
use mlac_engines::ort::SessionOptions;
use mlac_graph::builders::{Tap, layer_graph};
use mlac_model::Checkpoint;

use super::convert::LayerPlan;
use super::refined_layers::{Kept, RefinedLayers};
use super::store::Store;
use super::streams::{GraphRunner, HiddenStates, numbers, taps};
use crate::error::Error;
use crate::progress::{Progress, Stage};

/// Gradient steps to do.
#[derive(Debug, Clone, PartialEq)]
pub struct RefineRequest {
    /// How.
    pub options: RefineOptions,
    /// Where refined layers lie until the whole conversion is done.
    pub folder: PathBuf,
}

/// The refinement of a walk over the layers.
pub struct Refinement<'a> {
    options: RefineOptions,
    layers: RefinedLayers,
    progress: Progress,
    stage: &'a Stage,
    /// Of the layer that is being converted.
    key: String,
}

/// A converted layer with everything a refinement looks at.
pub struct Converted<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// The original weights.
    pub weights: &'a LayerWeights,
    /// Statistics of the layer's input.
    pub statistics: &'a LayerStatistics,
    /// The closed forms.
    pub factors: &'a LayerFactors,
    /// Head outputs they give on `stream`.
    pub heads: &'a Store,
    /// The converted layers' stream before this layer.
    pub stream: &'a HiddenStates,
    /// What the layer should put out.
    pub targets: &'a Store,
    /// How the output projection is fitted, if it is.
    pub refit: Option<RefitOptions>,
    /// How graphs are run.
    pub session: &'a SessionOptions,
}

impl<'a> Refinement<'a> {
    /// A refinement whose layers depend on `foundation` and the layers below them.
    pub fn new(
        request: &RefineRequest,
        foundation: &str,
        progress: Progress,
        stage: &'a Stage,
    ) -> Self {
        Self {
            options: request.options,
            layers: RefinedLayers::new(&request.folder, foundation),
            progress,
            stage,
            key: String::new(),
        }
    }

    /// Comes to the next layer, which is converted as planned or passed.
    pub fn reach(
        &mut self,
        checkpoint: &Checkpoint,
        layer: usize,
        plan: Option<&LayerPlan>,
    ) -> Result<(), Error> {
        self.key = self.layers.key(checkpoint, layer, plan)?;
        Ok(())
    }

    /// The layer as an earlier run of this request left it.
    pub fn take_up(&self, weights: &LayerWeights, plan: &LayerPlan) -> Option<Kept> {
        match self.layers.read(weights, plan.ranks, &self.key) {
            Ok(kept) => kept,
            Err(reason) => {
                self.progress.note(&format!(
                    "layer {}: {reason}; it is refined again",
                    plan.layer
                ));
                None
            }
        }
    }

    /// Keeps the layer for a repeated run.
    pub fn keep(
        &self,
        layer: usize,
        tensors: &MlaTensors,
        report: &LayerReport,
        refined: &RefineReport,
    ) -> Result<(), Error> {
        self.layers
            .write(layer, &self.key, tensors, report, refined)
    }

    /// Refines a layer.
    pub fn run(&self, layer: &Converted<'_>) -> Result<Refined, Error> {
        let windows = Windows::of(layer)?;
        let mut factors = layer.factors.clone();
        if let (Some(options), Some(_)) = (layer.refit, &factors.o) {
            let (_, training) = divide(windows.count());
            let fitted = fit_output(
                layer.weights,
                &layer.weights.o,
                layer.heads,
                layer.targets,
                &training,
                options,
            )?;
            factors.o = Some(fitted.o);
            factors.o_bias = fitted.bias;
        }
        let index = layer.weights.layer;
        let line = (self.options.steps / 4).max(1);
        refine(
            layer.weights,
            layer.statistics,
            &factors,
            layer.refit.is_some_and(|r| r.fit_bias),
            &windows,
            &self.options,
            &mut |p| {
                let text = format!(
                    "refining layer {index}, step {} of {}, error {:.4}",
                    p.step, p.steps, p.error
                );
                if p.step % line == 0 {
                    self.stage.line(&text);
                }
                self.stage.doing(text);
            },
        )
    }
}

/// Fits the output projection of a layer, with ridge towards `original`, on some windows.
pub fn fit_output(
    weights: &LayerWeights,
    original: &Projection,
    heads: &Store,
    targets: &Store,
    windows: &[usize],
    options: RefitOptions,
) -> Result<Refitted, Error> {
    let shape = weights.attention.shape;
    let mut refit = OutputRefit::new(weights.layer, &shape);
    for &i in windows {
        let (heads, target) = (heads.get(i)?, targets.get(i)?);
        let (heads, target) = (numbers(&heads)?, numbers(&target)?);
        refit.accumulate(target.len() / shape.hidden, heads, target)?;
    }
    Ok(refit.solve(original, options)?)
}

/// Queries, keys and values of every window, and what should come out.
struct Windows<'a> {
    tokens: usize,
    queries: Store,
    keys: Store,
    values: Store,
    targets: &'a Store,
}

impl<'a> Windows<'a> {
    fn of(layer: &Converted<'a>) -> Result<Self, Error> {
        let config = layer.checkpoint.config();
        let index = layer.weights.layer;
        let wanted = taps(config, &[Tap::Query, Tap::Key, Tap::Value]);
        let graph = layer_graph(config, index, &wanted)?;
        let subject = format!("projections of layer {index}");
        let mut runner = GraphRunner::open(&subject, &graph, layer.checkpoint, layer.session)?;
        let (stream, shape) = (layer.stream, layer.weights.attention.shape);
        let store = |heads: usize| {
            let shape = [1, stream.tokens, heads, shape.head_dim];
            Store::new(stream.windows.count(), &shape)
        };
        let mut windows = Self {
            tokens: stream.tokens,
            queries: store(shape.query_heads)?,
            keys: store(shape.kv_heads)?,
            values: store(shape.kv_heads)?,
            targets: layer.targets,
        };
        for i in 0..stream.windows.count() {
            let mut out = stream.run(&mut runner, i)?;
            windows.values.push(out.remove(2))?;
            windows.keys.push(out.remove(1))?;
            windows.queries.push(out.remove(0))?;
        }
        Ok(windows)
    }
}

impl RefineWindows for Windows<'_> {
    type Error = Error;

    fn count(&self) -> usize {
        self.queries.count()
    }

    fn visit(&self, window: usize, take: &mut TakeWindow<'_>) -> Result<(), Error> {
        let (q, k) = (self.queries.get(window)?, self.keys.get(window)?);
        let (v, target) = (self.values.get(window)?, self.targets.get(window)?);
        let activations = WindowActivations {
            tokens: self.tokens,
            q: numbers(&q)?,
            k: numbers(&k)?,
            v: numbers(&v)?,
        };
        Ok(take(&activations, numbers(&target)?)?)
    }
}

//! Refinement: gradient steps on the matrices a conversion made.
//!
//! The closed forms are best for errors that are small and independent between tokens. From there
//! a few hundred steps of Adam (Kingma and Ba 2015) fit the encoder, the decoders, the rotary
//! queries and, where it was refitted, the output projection to the layer as it is, softmax
//! included: `min sum_t |W_o o_t + b - T_t|^2` over sampled query rows t of one calibration window
//! per step and all keys they see. T is what the caller wants there (what the original layer put out
//! on the original stream, and what the converted stream lacks); the activations are what the
//! converted layer will really get. The gradient is candle's, of the forward pass in `objective`;
//! the coordinates in which all matrices take the same step size are in `coordinates`.
//!
//! Some windows are held out: of several shares of the way the best one there is taken, and none if
//! the layer was best as it was. They are judged by the reference forward of `error_eval`,
//! which shares no code with the one that is differentiated.
//!
//! A step holds about ten matrices `[H * rows, keys]` of f32 besides the parameters.

mod adam;
mod coordinates;
mod objective;
#[cfg(test)]
mod tests;

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};

use crate::attention::RotationTable;
use crate::error::{Error, refuse};
use crate::error_eval::converted_heads;
use crate::layer::{LayerFactors, LayerWeights};
use crate::linalg::Matrix;
use crate::statistics::{
    LayerStatistics, WindowActivations, WindowSample, split_mix, stratified_positions,
};
use adam::Adam;
use coordinates::{Coordinates, Deltas, Parameters};
use objective::Objective;

/// How a layer is refined.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RefineOptions {
    /// Gradient steps; 0 leaves the layer as it is.
    pub steps: usize,
    /// Query rows of the one window of a step.
    pub rows: usize,
    /// Largest step relative to the root mean square of each matrix in its coordinates; falls to 0
    /// as a half cosine.
    pub rate: f64,
    /// Seed of the order of windows and of the rows.
    pub seed: u64,
}

impl Default for RefineOptions {
    fn default() -> Self {
        Self {
            steps: 0,
            rows: 128,
            rate: 0.003,
            seed: 0,
        }
    }
}

impl RefineOptions {
    /// Refuses options that cannot mean anything.
    pub fn check(&self) -> Result<(), Error> {
        if self.rows == 0 {
            return Err(refuse(
                "--refine-rows",
                "at least 1 query row a step",
                "0",
                "leave it out for 128",
            ));
        }
        if !(self.rate > 0.0 && self.rate <= 0.1) {
            return Err(refuse(
                "--refine-rate",
                "a number above 0 and at most 0.1",
                self.rate.to_string(),
                "leave it out for 0.003",
            ));
        }
        Ok(())
    }
}

/// Takes the activations of a window and what the layer should put out there, `[L, D]` with the
/// bias of `o_proj`.
pub type TakeWindow<'a> = dyn FnMut(&WindowActivations<'_>, &[f32]) -> Result<(), Error> + 'a;

/// The calibration windows as the converted layer gets them.
pub trait RefineWindows {
    /// What reading a window may fail with.
    type Error: From<Error>;

    /// How many there are.
    fn count(&self) -> usize;

    /// Gives window `window` to `take`, once.
    fn visit(&self, window: usize, take: &mut TakeWindow<'_>) -> Result<(), Self::Error>;
}

/// How far a refinement is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RefineProgress {
    /// Steps done.
    pub step: usize,
    /// Of how many.
    pub steps: usize,
    /// Relative squared error on the rows of the last steps (a running mean).
    pub error: f64,
}

/// What refining a layer gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RefineReport {
    /// Steps that were done.
    pub steps: usize,
    /// Windows the steps were done on.
    pub windows: usize,
    /// Windows that were not trained on, on which both errors are measured.
    pub held_out: usize,
    /// Relative squared error of the attention output before, against the original's.
    pub error_before: f64,
    /// And after; that of the layer as it was given when the steps did not lower it.
    pub error_after: f64,
    /// How much of the way is taken, from 0 to 1: the share that is best on held-out windows.
    pub share: f64,
    /// Why the steps were not taken, in words.
    pub note: Option<String>,
}

/// A refined layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Refined {
    /// The better factors; `None`: those that were given are as good.
    pub factors: Option<LayerFactors>,
    /// The figures.
    pub report: RefineReport,
}

/// Query rows of each held-out window on which errors are measured.
const HELD_OUT_ROWS: usize = 256;
/// One window of so many is held out, at least one.
const HELD_OUT_SHARE: usize = 8;
/// Query rows of a training window from which the size of head outputs is taken.
const HEAD_ROWS: usize = 64;
/// Training windows for the same.
const HEAD_WINDOWS: usize = 4;
/// Below this error a layer is exact to the rounding of f32, and there is nothing to gain.
const SMALLEST_ERROR: f64 = 1e-9;
/// Shares of the way that are tried.
const SHARES: [f64; 4] = [1.0, 0.7, 0.4, 0.2];
/// Share of the last step in the running mean of the error.
const NEWEST: f64 = 0.1;

/// Refines the factors of one layer; `output_bias`: whether the bias of a refitted `o_proj` moves
/// too (`o_proj` itself does where `factors.o` is there).
pub fn refine<W: RefineWindows>(
    weights: &LayerWeights,
    statistics: &LayerStatistics,
    factors: &LayerFactors,
    output_bias: bool,
    windows: &W,
    options: &RefineOptions,
    progress: &mut dyn FnMut(RefineProgress),
) -> Result<Refined, W::Error> {
    options.check()?;
    check(weights, factors, windows.count())?;
    let (held_out, training) = divide(windows.count());
    let layer = Refining {
        weights,
        statistics,
        windows,
    };
    let judge = layer.samples(&held_out, HELD_OUT_ROWS)?;
    let error_before = error(weights, factors, &judge);
    let mut report = RefineReport {
        steps: 0,
        windows: training.len(),
        held_out: held_out.len(),
        error_before,
        error_after: error_before,
        share: 0.0,
        note: None,
    };
    if options.steps == 0 || error_before < SMALLEST_ERROR {
        let exact = "the layer is exact to rounding, nothing was refined";
        report.note = (options.steps > 0).then(|| exact.to_owned());
        return Ok(Refined {
            factors: None,
            report,
        });
    }
    let some: Vec<usize> = training.iter().copied().take(HEAD_WINDOWS).collect();
    let heads: Vec<Matrix<f32>> = layer
        .samples(&some, HEAD_ROWS)?
        .iter()
        .map(|sample| converted_heads(&weights.attention, factors, sample))
        .collect();
    let coordinates = Coordinates::new(statistics, factors, &heads)?;
    let descent = Descent {
        layer: &layer,
        factors,
        coordinates: &coordinates,
        training: &training,
        output_bias,
        options,
    };
    let (deltas, steps) = descent.run(progress)?;
    report.steps = steps;
    let Some(deltas) = deltas else {
        report.note = Some(format!(
            "step {steps} of the refinement gave no finite error; the layer stays as it was"
        ));
        return Ok(Refined {
            factors: None,
            report,
        });
    };
    // Part of the way may be better than all of it: the whole fits the training windows best.
    let mut best = (error_before, None);
    let mut whole = f64::NAN;
    for share in SHARES {
        let moved = coordinates.moved(weights, factors, &deltas.times(share));
        let error = error(weights, &moved, &judge);
        if whole.is_nan() {
            whole = error;
        }
        // A comparison that a NaN fails.
        if error < best.0 {
            best = (error, Some((share, moved)));
        }
    }
    let (error_after, taken) = best;
    report.error_after = error_after;
    report.share = taken.as_ref().map_or(0.0, |(share, _)| *share);
    if taken.is_none() {
        report.note = Some(format!(
            "refinement did not lower the error on held-out windows ({error_before:.3e} to \
             {whole:.3e}); the layer stays as it was"
        ));
    }
    Ok(Refined {
        factors: taken.map(|(_, factors)| factors),
        report,
    })
}

fn check(weights: &LayerWeights, factors: &LayerFactors, windows: usize) -> Result<(), Error> {
    weights.check()?;
    factors.ranks.check(&weights.attention.shape)?;
    if factors.shape != weights.attention.shape {
        return Err(refuse(
            format!("factors of layer {}", weights.layer),
            format!("those of {:?}", weights.attention.shape),
            format!("{:?}", factors.shape),
            "refine the factors that were made from these weights",
        ));
    }
    if windows < 2 {
        return Err(refuse(
            "--refine",
            "at least 2 calibration windows, of which one is not trained on",
            windows.to_string(),
            "raise --calib-windows",
        ));
    }
    Ok(())
}

/// Held-out windows, spread over all, and the others, which are trained on. A closed form that was
/// fitted to held-out windows looks better there than it is.
pub fn divide(windows: usize) -> (Vec<usize>, Vec<usize>) {
    let count = (windows / HELD_OUT_SHARE).max(1);
    let held_out: Vec<usize> = (0..count)
        .map(|i| (2 * i + 1) * windows / (2 * count))
        .collect();
    let training = (0..windows).filter(|w| !held_out.contains(w)).collect();
    (held_out, training)
}

/// The layer's own output projection and bias, refitted or not.
fn output<'a>(
    weights: &'a LayerWeights,
    factors: &LayerFactors,
) -> (std::borrow::Cow<'a, Matrix<f32>>, Option<Vec<f32>>) {
    use std::borrow::Cow;
    let o = factors
        .o
        .as_ref()
        .map_or(Cow::Borrowed(&weights.o.weight), |o| Cow::Owned(o.cast()));
    let bias = match &factors.o_bias {
        Some(bias) => Some(bias.iter().map(|&x| x as f32).collect()),
        None => weights.o.bias.clone(),
    };
    (o, bias)
}

/// `sum |W_o o_t + b - T_t|^2 / sum |T_t|^2` over the rows of `samples`, by the reference forward.
fn error(weights: &LayerWeights, factors: &LayerFactors, samples: &[WindowSample]) -> f64 {
    let (o, bias) = output(weights, factors);
    let (mut difference, mut energy) = (0.0, 0.0);
    for sample in samples {
        let Some(targets) = &sample.targets else {
            continue;
        };
        let found = converted_heads(&weights.attention, factors, sample).times_transposed(&o);
        for t in 0..found.rows() {
            for (j, (x, y)) in found.row(t).iter().zip(targets.row(t)).enumerate() {
                let b = bias.as_ref().map_or(0.0, |b| b[j]);
                difference += f64::from(x + b - y).powi(2);
                energy += f64::from(*y).powi(2);
            }
        }
    }
    if energy > 0.0 {
        difference / energy
    } else {
        0.0
    }
}

/// A layer with its windows.
struct Refining<'a, W> {
    weights: &'a LayerWeights,
    statistics: &'a LayerStatistics,
    windows: &'a W,
}

impl<W: RefineWindows> Refining<'_, W> {
    /// Window `window` with about `rows` spread query rows and their targets.
    fn sample(&self, window: usize, rows: usize, seed: u64) -> Result<WindowSample, W::Error> {
        let mut sample = None;
        self.windows.visit(window, &mut |activations, targets| {
            self.statistics.check_window(activations)?;
            self.statistics.check_target(activations, targets)?;
            let positions = stratified_positions(activations.tokens, rows, seed);
            let shape = &self.weights.attention.shape;
            sample = Some(WindowSample::new(
                activations,
                shape,
                positions,
                Some(targets),
            ));
            Ok(())
        })?;
        sample.ok_or_else(|| {
            refuse(
                format!(
                    "calibration window {window} of layer {}",
                    self.weights.layer
                ),
                "its activations",
                "nothing",
                "report this as a defect of mlac",
            )
            .into()
        })
    }

    fn samples(&self, windows: &[usize], rows: usize) -> Result<Vec<WindowSample>, W::Error> {
        windows
            .iter()
            .map(|&w| self.sample(w, rows, split_mix(w as u64)))
            .collect()
    }
}

/// The steps.
struct Descent<'a, W> {
    layer: &'a Refining<'a, W>,
    factors: &'a LayerFactors,
    coordinates: &'a Coordinates,
    training: &'a [usize],
    output_bias: bool,
    options: &'a RefineOptions,
}

impl<W: RefineWindows> Descent<'_, W> {
    /// What the steps add to the parameters (`None` when an error was not finite) and how many
    /// were done.
    fn run(
        &self,
        progress: &mut dyn FnMut(RefineProgress),
    ) -> Result<(Option<Deltas>, usize), W::Error> {
        let (parameters, mut adam, objective) = self.start().map_err(Error::from)?;
        let mut table = RotationTable::new(&self.factors.inv_freq, 0);
        let mut mean = 0.0;
        for step in 0..self.options.steps {
            let sample = self.layer.sample(
                self.window_of(step),
                self.options.rows,
                split_mix(self.options.seed ^ split_mix(step as u64)),
            )?;
            if table.positions() < sample.stacked.rows() {
                table = RotationTable::new(&self.factors.inv_freq, sample.stacked.rows());
            }
            let mut run = || -> Result<f64, candle_core::Error> {
                let batch = objective.batch(&sample, &table)?;
                let error = objective.error(&parameters.layer()?, &batch)?;
                let value = f64::from(error.to_scalar::<f32>()?);
                if value.is_finite() {
                    adam.step(&error.backward()?, self.rate(step))?;
                }
                Ok(value)
            };
            let error = run().map_err(Error::from)?;
            if !error.is_finite() {
                return Ok((None, step + 1));
            }
            mean = if step == 0 {
                error
            } else {
                mean + NEWEST * (error - mean)
            };
            progress(RefineProgress {
                step: step + 1,
                steps: self.options.steps,
                error: mean,
            });
        }
        let deltas = parameters.deltas().map_err(Error::from)?;
        Ok((Some(deltas), self.options.steps))
    }

    /// Deltas of 0, the optimizer that moves them, and what it lowers.
    fn start(&self) -> Result<(Parameters, Adam, Objective<'_>), candle_core::Error> {
        let weights = self.layer.weights;
        let (o, bias) = output(weights, self.factors);
        let device = device()?;
        let on = (DType::F32, &device);
        let parameters = self.coordinates.parameters(
            weights,
            self.factors,
            (&o, bias.as_deref()),
            self.output_bias,
            on,
        )?;
        let adam = Adam::new(parameters.moving(), self.coordinates.sizes(&parameters)?)?;
        let latent = self.factors.ranks.kv_lora_rank;
        let objective = Objective::new(&weights.attention, latent, on)?;
        Ok((parameters, adam, objective))
    }

    /// Every training window once before any comes again, each time in another order.
    fn window_of(&self, step: usize) -> usize {
        let (round, at) = (step / self.training.len(), step % self.training.len());
        let mut order: Vec<usize> = self.training.to_vec();
        let seed = split_mix(!self.options.seed ^ split_mix(round as u64));
        order.sort_by_key(|&w| split_mix(seed ^ w as u64));
        order[at]
    }

    /// Rises over a tenth of the steps, then falls to 0 as a half cosine.
    fn rate(&self, step: usize) -> f64 {
        let steps = self.options.steps as f64;
        let rise = ((step + 1) as f64 / (steps / 10.0).max(1.0)).min(1.0);
        let fall = 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps).cos());
        self.options.rate * rise * fall
    }
}

/// The first CUDA device when it was built in and is there, else the processor.
fn device() -> Result<Device, candle_core::Error> {
    if cfg!(feature = "cuda") {
        Device::cuda_if_available(0)
    } else {
        Ok(Device::Cpu)
    }
}

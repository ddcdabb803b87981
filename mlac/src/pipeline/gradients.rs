//! A walk down the original model: what the loss feels of every layer's keys and values.
//!
//! Up once in ONNX Runtime, keeping every layer's input and what its attention adds; then down from the
//! logits through the converter's backward passes. One layer's weights are in memory at a time; the
//! kept states are in unnamed files (`2 * layers * windows * window * hidden * 4` bytes).

use std::collections::BTreeMap;

use mlac_converter::gradient::{
    DecoderLayer, Expert, Experts, GatedMlp, Mlp, TokenGradients, head_gradient,
};
use mlac_converter::{AttentionShape, Matrix, Projection};
use mlac_engines::ort::SessionOptions;
use mlac_graph::builders::{Tap, layer_graph};
use mlac_model::{Checkpoint, ExpertFormat, ModelConfig, MoeConfig};

use super::calibrate::layer_weights;
use super::store::Store;
use super::streams::{GraphRunner, HiddenStates, f32_value, numbers, taps};
use crate::error::Error;
use crate::progress::Progress;

/// Calibration windows that gradients are taken on.
const WINDOWS: usize = 4;

/// By layer, the metric `[2*G*d, 2*G*d]` in which the loss sees errors of keys and values.
pub struct Gradients {
    metrics: Store,
    /// Place of a layer's metric.
    places: BTreeMap<usize, usize>,
}

impl Gradients {
    /// The metric of a layer, if it was asked for.
    pub fn of(&self, layer: usize) -> Result<Option<Matrix<f64>>, Error> {
        let Some(&place) = self.places.get(&layer) else {
            return Ok(None);
        };
        let value = self.metrics.get(place)?;
        let width = value.shape()[0];
        let metric = Matrix::from_vec(width, width, numbers(&value)?.to_vec());
        Ok(Some(metric.cast()))
    }

    /// No layer yet of `layers`, whose metrics are `[width, width]`.
    pub(super) fn empty(layers: usize, width: usize) -> Result<Self, Error> {
        Ok(Self {
            metrics: Store::new(layers, &[width, width])?,
            places: BTreeMap::new(),
        })
    }

    /// The layers it has, ascending.
    pub(super) fn layers(&self) -> impl Iterator<Item = usize> {
        self.places.keys().copied()
    }

    pub(super) fn push(&mut self, layer: usize, metric: &Matrix<f64>) -> Result<(), Error> {
        self.places.insert(layer, self.metrics.count());
        let shape = [metric.rows(), metric.cols()];
        self.metrics
            .push(f32_value(shape, metric.cast().into_data())?)
    }
}

/// Takes the gradients of a model at the layers `wanted`; one step down is one layer.
pub fn take(
    checkpoint: &Checkpoint,
    windows: &[&[u32]],
    wanted: &[usize],
    seed: u64,
    options: &SessionOptions,
    progress: Progress,
) -> Result<Gradients, Error> {
    let config = checkpoint.config();
    let width = AttentionShape::of(config).stacked_width();
    let count = WINDOWS.min(windows.len());
    let chosen: Vec<&[u32]> = (0..count)
        .map(|i| windows[i * windows.len() / count])
        .collect();
    let layers = config.num_hidden_layers;
    let lowest = wanted.iter().copied().min().unwrap_or(layers);
    let stage = progress.stage("gradients of the loss", (2 * layers - lowest) as u64);
    let mut states = HiddenStates::embed(config, checkpoint, &chosen, options)?;
    let mut passed = Vec::with_capacity(layers);
    for layer in 0..layers {
        stage.doing(format!("up through layer {layer}"));
        passed.push(up(config, checkpoint, layer, &mut states, options)?);
        stage.step();
    }
    stage.doing("output head");
    let mut gradients = at_the_head(checkpoint, &states, seed)?;
    drop(states);
    let mut found = Gradients::empty(wanted.len(), width)?;
    for (layer, passed) in passed.into_iter().enumerate().skip(lowest).rev() {
        stage.doing(format!("down through layer {layer}"));
        let tokens = down(checkpoint, layer, &passed, &mut gradients)?;
        if wanted.contains(&layer) {
            found.push(layer, &tokens.metric()?)?;
        }
        stage.step();
    }
    Ok(found)
}

/// Takes the gradients `[tokens, D]` of every window from a layer's output to its input; those at its keys and
/// values.
fn down(
    checkpoint: &Checkpoint,
    layer: usize,
    passed: &Passed,
    gradients: &mut [Matrix<f32>],
) -> Result<TokenGradients, Error> {
    let weights = decoder_layer(checkpoint, layer)?;
    let mlp = mlp(checkpoint, layer)?;
    let mut tokens = TokenGradients::default();
    for (i, gradient) in gradients.iter_mut().enumerate() {
        let states = |store: &Store| -> Result<Matrix<f32>, Error> {
            let rows = numbers(&store.get(i)?)?.to_vec();
            Ok(Matrix::from_vec(gradient.rows(), gradient.cols(), rows))
        };
        let (input, attended) = (states(&passed.input)?, states(&passed.attended)?);
        let back = weights.backward(&input, &attended, &*mlp, gradient)?;
        tokens.push(back.stacked, back.stacked_gradient)?;
        *gradient = back.input;
    }
    Ok(tokens)
}

/// What is kept of a layer on the way up.
struct Passed {
    input: Store,
    attended: Store,
}

/// Carries `states` through a layer.
fn up(
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    layer: usize,
    states: &mut HiddenStates,
    options: &SessionOptions,
) -> Result<Passed, Error> {
    let wanted = taps(config, &[Tap::HiddenOut, Tap::AttnOut]);
    let graph = layer_graph(config, layer, &wanted)?;
    let mut runner = GraphRunner::open(&format!("layer {layer}"), &graph, checkpoint, options)?;
    let (count, shape) = (
        states.windows.count(),
        [1, states.tokens, config.hidden_size],
    );
    let mut input = Store::in_file(count, &shape)?;
    let mut attended = Store::in_file(count, &shape)?;
    for i in 0..count {
        input.push(states.windows.get(i)?)?;
        let mut out = states.run(&mut runner, i)?;
        attended.push(out.remove(1))?;
        states.windows.set(i, out.remove(0))?;
    }
    Ok(Passed { input, attended })
}

/// Gradients `[tokens, D]` of every window at the last hidden states.
fn at_the_head(
    checkpoint: &Checkpoint,
    states: &HiddenStates,
    seed: u64,
) -> Result<Vec<Matrix<f32>>, Error> {
    let config = checkpoint.config();
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let name = if config.tie_word_embeddings {
        "model.embed_tokens.weight"
    } else {
        "lm_head.weight"
    };
    let table = Matrix::from_vec(vocab, hidden, checkpoint.f32(name, &[vocab, hidden])?);
    let norm = checkpoint.f32("model.norm.weight", &[hidden])?;
    let epsilon = config.rms_norm_eps as f32;
    (0..states.windows.count())
        .map(|i| {
            let rows = numbers(&states.windows.get(i)?)?.to_vec();
            let rows = Matrix::from_vec(states.tokens, hidden, rows);
            Ok(head_gradient(
                &rows,
                &norm,
                epsilon,
                &table,
                seed ^ i as u64,
            )?)
        })
        .collect()
}

/// The weights of a layer but for its MLP.
fn decoder_layer(checkpoint: &Checkpoint, layer: usize) -> Result<DecoderLayer, Error> {
    let config = checkpoint.config();
    let norm = format!("model.layers.{layer}.post_attention_layernorm.weight");
    Ok(DecoderLayer {
        attention: layer_weights(checkpoint, layer)?,
        post_norm: checkpoint.f32(&norm, &[config.hidden_size])?,
        epsilon: config.rms_norm_eps as f32,
    })
}

/// The layer's MLP; of experts only the router, they are read one at a time.
fn mlp(checkpoint: &Checkpoint, layer: usize) -> Result<Box<dyn Mlp + '_>, Error> {
    let config = checkpoint.config();
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let prefix = format!("model.layers.{layer}.mlp");
    let projection = |name: &str, out: usize, width: usize, bias: bool| {
        let tensor = format!("{prefix}.{name}");
        let data = checkpoint.f32(&format!("{tensor}.weight"), &[out, width])?;
        let bias = bias
            .then(|| checkpoint.f32(&format!("{tensor}.bias"), &[out]))
            .transpose()?;
        Ok::<_, Error>(Projection {
            weight: Matrix::from_vec(out, width, data),
            bias,
        })
    };
    let Some(moe) = config.moe else {
        let bias = config.mlp_bias;
        return Ok(Box::new(GatedMlp {
            gate: projection("gate_proj", inner, hidden, bias)?,
            up: projection("up_proj", inner, hidden, bias)?,
            down: projection("down_proj", hidden, inner, bias)?,
        }));
    };
    let router = projection("router", moe.num_experts, hidden, true)?;
    Ok(Box::new(Experts {
        router,
        experts_per_token: moe.experts_per_token,
        limit: moe.swiglu_limit as f32,
        alpha: moe.swiglu_alpha as f32,
        load: move |expert| {
            let read = |name: &str, out: usize, width: usize| {
                let tensor = format!("{prefix}.experts.{name}");
                expert_projection(checkpoint, &moe, &tensor, [out, width], expert)
            };
            Ok(Expert {
                gate_up: read("gate_up_proj", 2 * inner, hidden)?,
                down: read("down_proj", hidden, inner)?,
            })
        },
    }))
}

/// One expert's projection `[out, in]` with its bias.
fn expert_projection(
    checkpoint: &Checkpoint,
    moe: &MoeConfig,
    tensor: &str,
    [out, width]: [usize; 2],
    expert: usize,
) -> Result<Projection, mlac_model::Error> {
    let (count, this) = (moe.num_experts, expert..expert + 1);
    let weight = match moe.format {
        ExpertFormat::Mxfp4 => Matrix::from_vec(
            out,
            width,
            checkpoint.mxfp4_rows(tensor, &[count, out, width], this.clone())?,
        ),
        ExpertFormat::Dense => {
            let data = checkpoint.f32_rows(tensor, &[count, width, out], this.clone())?;
            Matrix::from_vec(width, out, data).transpose()
        }
    };
    let bias = checkpoint.f32_rows(&format!("{tensor}_bias"), &[count, out], this)?;
    Ok(Projection {
        weight,
        bias: Some(bias),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Through whole models: the derivative of a fixed mix of the last hidden states along a fixed change of the
    /// embeddings, against a small step in ONNX Runtime.
    #[test]
    fn the_way_down_is_the_way_up_turned_round() {
        mlac_engines::ort::load().unwrap();
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        for name in [
            "llama_tied_bias",
            "llama_yarn",
            "qwen2_window",
            "qwen3_bias_window_yarn",
            "mistral_window",
            "gpt_oss_dense",
            "gpt_oss_mxfp4",
        ] {
            let checkpoint = Checkpoint::open(fixtures.join(name)).unwrap();
            let config = checkpoint.config();
            let options = SessionOptions::default();
            let ids: Vec<u32> = (0..40).map(|i| i * 7 % config.vocab_size as u32).collect();
            let size = ids.len() * config.hidden_size;
            let mix: Vec<f32> = (0..size)
                .map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0)
                .collect();
            let change = |i: usize| ((i * 53 % 89) as f32 - 44.0) / 44.0;
            let start = HiddenStates::embed(config, &checkpoint, &[&ids], &options).unwrap();
            let start = numbers(&start.windows.get(0).unwrap()).unwrap().to_vec();
            let length = start.iter().map(|x| x * x).sum::<f32>().sqrt() / (size as f32).sqrt();
            let run = |step: f32| {
                let mut states =
                    HiddenStates::embed(config, &checkpoint, &[&ids], &options).unwrap();
                let moved = start.iter().enumerate().map(|(i, x)| x + step * change(i));
                let moved = f32_value([1, ids.len(), config.hidden_size], moved.collect());
                states.windows.set(0, moved.unwrap()).unwrap();
                let layers = 0..config.num_hidden_layers;
                let passed: Vec<Passed> = layers
                    .map(|layer| up(config, &checkpoint, layer, &mut states, &options).unwrap())
                    .collect();
                let out = states.windows.get(0).unwrap();
                let out = numbers(&out).unwrap().iter().zip(&mix);
                let sum: f64 = out.map(|(x, m)| f64::from(*x) * f64::from(*m)).sum();
                (sum, passed)
            };
            let step = 2e-3 * length;
            let expected = (run(step).0 - run(-step).0) / f64::from(2.0 * step);
            let mut gradients = [Matrix::from_vec(ids.len(), config.hidden_size, mix.clone())];
            for (layer, passed) in run(0.0).1.iter().enumerate().rev() {
                let tokens = down(&checkpoint, layer, passed, &mut gradients).unwrap();
                assert!((tokens.metric().unwrap().trace() - 1.0).abs() < 1e-9);
            }
            let rows = gradients[0].data().iter().enumerate();
            let found: f64 = rows
                .map(|(i, g)| f64::from(*g) * f64::from(change(i)))
                .sum();
            assert!(
                (found - expected).abs() < 1e-2 * expected.abs(),
                "{name}: {found} by gradients, {expected} by a step"
            );
        }
    }
}

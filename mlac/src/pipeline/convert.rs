//! GQA checkpoint to MLA checkpoint: plan, statistics, factors, shards.

use std::collections::{BTreeMap, HashSet};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use mlac_converter::{
    RankChoice, Recipe, RefineOptions, RefitOptions, StatisticsOptions, TransMla,
};
use mlac_engines::ort::SessionOptions;
use mlac_model::checkpoint::{CheckpointWriter, copy_tensors, expected_tensors};
use mlac_model::config::mla_config_json;
use mlac_model::tensor::{bytes_from_f32, check_finite, f32_from_bytes};
use mlac_model::{
    Checkpoint, Dtype, MlaConfig, MlaEncoder, MlaLayer, ModelConfig, Refusal, TensorInfo,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::calibrate::{ConvertedLayer, Walk, convert_from_weights, tensor_name};
use super::gradients::Gradients;
use super::ranks::cache_plan;
use super::refine::{RefineRequest, Refinement};
use crate::error::Error;
use crate::progress::Progress;
use crate::release::{Card, remote_code};
use crate::report::data::LayerRow;
use crate::windows::Windows;

/// Which mathematics converts a layer.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// mlac's recipe.
    Recipe(Recipe),
    /// TransMLA, the baseline people know.
    TransMla(TransMla),
    /// Low rank of the weights.
    Svd,
}

impl Method {
    /// How the output projection is refitted, if it is.
    pub fn refit(&self) -> Option<RefitOptions> {
        match self {
            Self::Recipe(recipe) => recipe.refit,
            Self::TransMla(_) | Self::Svd => None,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Recipe(_) => "recipe",
            Self::TransMla(_) => "transmla",
            Self::Svd => "svd",
        }
    }
}

/// Where statistics come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Calibration {
    /// The weights alone.
    Weights,
    /// Windows of a text.
    Text {
        /// The text.
        path: PathBuf,
        /// Windows, spread over it.
        windows: usize,
        /// Tokens in a window.
        window: usize,
        /// Moves the windows inside their shares of the text.
        seed: u64,
        /// Query rows sampled in a window.
        query_rows: usize,
    },
}

/// One layer to convert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerPlan {
    /// Index.
    pub layer: usize,
    /// r and `d_r`.
    pub ranks: RankChoice,
}

/// A conversion to do.
pub struct ConvertRequest<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// Folder to write.
    pub output: &'a Path,
    /// Layers and their ranks, in order.
    pub layers: Vec<LayerPlan>,
    /// Mathematics.
    pub method: Method,
    /// Whether statistics come from the converted layers below.
    pub sequential: bool,
    /// Statistics.
    pub calibration: Calibration,
    /// Type of converted tensors.
    pub dtype: Dtype,
    /// Largest shard in bytes.
    pub max_shard: u64,
    /// Threads for ONNX Runtime.
    pub threads: usize,
    /// Gradients of the model's loss, if they were taken.
    pub gradients: Option<Gradients>,
    /// Gradient steps on the converted layers, if any.
    pub refine: Option<RefineRequest>,
}

impl ConvertRequest<'_> {
    /// Whether output projections are fitted anew; without calibration there is nothing to fit to.
    fn refits_output(&self) -> bool {
        self.method.refit().is_some() && self.calibration != Calibration::Weights
    }
}

/// `mlac.json`: what was done to which input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Version of mlac.
    pub mlac: String,
    /// Digests of the source's tensors (SHA-256), by name.
    pub source: BTreeMap<String, String>,
    /// Method and its choices.
    pub method: String,
    /// The recipe, as text.
    pub recipe: serde_json::Value,
    /// Where statistics come from.
    pub calibration: CalibrationRecord,
    /// Gradient steps on every converted layer; absent in a conversion without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refine: Option<RefineOptions>,
    /// Numbers that all layers cache of one token, inside every sliding window, before.
    pub gqa_cache_numbers: usize,
    /// And after.
    pub mla_cache_numbers: usize,
    /// Converted layers.
    pub layers: Vec<LayerRow>,
}

/// Where statistics came from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CalibrationRecord {
    /// File name of the text, or `none`.
    pub text: String,
    /// SHA-256 of the token ids used.
    pub tokens_sha256: String,
    /// Windows used.
    pub windows: usize,
    /// Tokens in a window.
    pub window: usize,
    /// Which windows of the text: `--calib-seed`.
    pub seed: u64,
    /// Whether errors of converted layers were seen by later ones.
    pub sequential: bool,
}

/// The source's configuration with the MLA form of the planned layers.
pub fn converted_config(source: &ModelConfig, layers: &[LayerPlan]) -> ModelConfig {
    let encoder = MlaEncoder::of(source.architecture);
    let layers = layers
        .iter()
        .map(|plan| {
            let form = MlaLayer {
                kv_lora_rank: plan.ranks.kv_lora_rank,
                qk_rope_head_dim: plan.ranks.qk_rope_head_dim,
                qk_nope_head_dim: source.head_dim,
                v_head_dim: source.head_dim,
                encoder,
            };
            (plan.layer, form)
        })
        .collect();
    ModelConfig {
        mla: Some(MlaConfig {
            layers,
            attention_scale: (source.head_dim as f64).powf(-0.5),
            o_bias: source.o_bias,
        }),
        ..source.clone()
    }
}

/// Converts and writes; returns what `mlac.json` says.
pub fn convert(request: &ConvertRequest<'_>, progress: Progress) -> Result<Record, Error> {
    let checkpoint = request.checkpoint;
    let source = checkpoint.config();
    refuse_converted(checkpoint)?;
    let config = converted_config(source, &request.layers);
    let windows = read_windows(checkpoint, &request.calibration)?;
    let writer = CheckpointWriter::create(
        request.output,
        tensor_plan(request, &config)?,
        request.max_shard,
    )?;

    let (rows, digests) = write_tensors(request, &config, windows.as_ref(), &writer, progress)?;

    let numbers = cache_plan(source, &request.layers, 1).numbers_per_token();
    let record = Record {
        mlac: env!("CARGO_PKG_VERSION").to_owned(),
        source: digests,
        method: request.method.name().to_owned(),
        recipe: recipe_json(&request.method)?,
        calibration: calibration_record(request, windows.as_ref()),
        refine: request.refine.as_ref().map(|r| r.options),
        gqa_cache_numbers: numbers.0,
        mla_cache_numbers: numbers.1,
        layers: rows,
    };
    write_side_files(checkpoint, source, &config, &record, &writer)?;
    writer.finish()?;
    Ok(record)
}

fn refuse_converted(checkpoint: &Checkpoint) -> Result<(), Error> {
    if checkpoint.config().mla.is_none() {
        return Ok(());
    }
    Err(Refusal::new(
        format!("model {}", checkpoint.path().display()),
        "a GQA checkpoint",
        "one that is converted already",
        "convert the original checkpoint",
    )
    .into())
}

/// The calibration text's windows with the chosen ones.
pub struct Chosen {
    windows: Windows,
    indices: Vec<usize>,
}

impl Chosen {
    /// The chosen windows.
    pub fn slices(&self) -> Vec<&[u32]> {
        self.indices.iter().map(|&i| self.windows.get(i)).collect()
    }
}

/// The windows to calibrate on; none without a text.
pub fn read_windows(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
) -> Result<Option<Chosen>, Error> {
    let Calibration::Text {
        path,
        windows,
        window,
        seed,
        ..
    } = calibration
    else {
        return Ok(None);
    };
    let longest = checkpoint.config().max_position_embeddings;
    if *window > longest {
        return Err(Refusal::new(
            "--calib-window",
            format!("at most the model's {longest} positions"),
            window.to_string(),
            "give shorter windows",
        )
        .into());
    }
    let all = Windows::read(path, &checkpoint.tokenizer()?, *window)?;
    let indices = all.spread(*windows, *seed, path)?;
    Ok(Some(Chosen {
        windows: all,
        indices,
    }))
}

/// Every tensor of the output: new ones in the asked type, others as the source has them.
fn tensor_plan(
    request: &ConvertRequest<'_>,
    config: &ModelConfig,
) -> Result<Vec<TensorInfo>, Error> {
    expected_tensors(config)
        .into_iter()
        .map(|(name, shape)| {
            let dtype = if is_converted(request, config, &name) {
                if name.ends_with("rotary_inv_freq") {
                    Dtype::F32
                } else {
                    request.dtype
                }
            } else {
                request.checkpoint.info(&name)?.dtype
            };
            Ok(TensorInfo::new(name, dtype, shape))
        })
        .collect()
}

/// Whether a tensor belongs to the attention of a converted layer and is made anew there.
fn is_converted(request: &ConvertRequest<'_>, config: &ModelConfig, name: &str) -> bool {
    let Some((layer, tensor)) = name
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.'))
    else {
        return false;
    };
    let (Ok(layer), Some(tensor)) = (layer.parse(), tensor.strip_prefix("self_attn.")) else {
        return false;
    };
    config.mla_layer(layer).is_some_and(|mla| {
        let kept =
            mla.encoder.keeps(tensor) || tensor.starts_with("o_proj.") && !request.refits_output();
        !kept
    })
}

fn convert_layers(
    request: &ConvertRequest<'_>,
    config: &ModelConfig,
    windows: Option<&Chosen>,
    writer: &CheckpointWriter,
    progress: Progress,
) -> Result<Vec<LayerRow>, Error> {
    let Some(last) = request.layers.last().map(|l| l.layer) else {
        return Err(Refusal::new(
            "--layers",
            "at least one layer to convert",
            "none",
            "see `mlac plan`",
        )
        .into());
    };
    let mut rows = Vec::new();
    let mut keep = |converted: ConvertedLayer, plan: &LayerPlan| -> Result<(), Error> {
        write_layer(request, config, plan.layer, &converted, writer)?;
        rows.push(layer_row(plan, converted));
        Ok(())
    };
    let Some(chosen) = windows else {
        let stage = progress.stage("converting layers", request.layers.len() as u64);
        for plan in &request.layers {
            stage.doing(format!("layer {}", plan.layer));
            keep(
                convert_from_weights(request.checkpoint, plan, &request.method)?,
                plan,
            )?;
            stage.step();
        }
        drop(stage);
        return Ok(rows);
    };
    let stage = progress.stage("calibrating and converting", last as u64 + 1);
    stage.doing("embedding");
    let statistics = statistics_options(&request.calibration);
    let options = SessionOptions::default().with_threads(request.threads);
    let mut walk = Walk::start(
        request.checkpoint,
        config,
        &chosen.slices(),
        options,
        statistics,
        request.sequential,
    )?;
    walk.gradients = request.gradients.as_ref();
    walk.refinement = match &request.refine {
        Some(refine) => {
            let foundation = foundation(request, chosen)?;
            Some(Refinement::new(refine, &foundation, progress, &stage))
        }
        None => None,
    };
    for layer in 0..=last {
        stage.doing(format!("layer {layer}"));
        match request.layers.iter().find(|p| p.layer == layer) {
            Some(plan) => keep(walk.convert(plan, &request.method)?, plan)?,
            None => walk.pass(layer)?,
        }
        stage.step();
    }
    drop(walk);
    drop(stage);
    Ok(rows)
}

/// Everything but layers that a refined layer depends on.
fn foundation(request: &ConvertRequest<'_>, chosen: &Chosen) -> Result<String, Error> {
    let checkpoint = request.checkpoint;
    pretty(&serde_json::json!({
        "program": program_digest()?,
        "config": checkpoint.raw_config(),
        "embedding": checkpoint.sha256("model.embed_tokens.weight")?,
        "method": request.method.name(),
        "recipe": recipe_json(&request.method)?,
        "calibration": calibration_record(request, Some(chosen)),
        "query_rows": statistics_options(&request.calibration).sampled_rows,
        "refine": request.refine.as_ref().map(|r| r.options),
    }))
}

/// SHA-256 of the running program: another build may compute otherwise.
pub fn program_digest() -> Result<String, Error> {
    let program = std::env::current_exe().map_err(|e| Error::io("the running program", e))?;
    let bytes = std::fs::read(&program).map_err(|e| Error::io(&program, e))?;
    Ok(hex(&Sha256::digest(bytes)))
}

/// How the statistics of a calibration are gathered.
pub fn statistics_options(calibration: &Calibration) -> StatisticsOptions {
    let sampled_rows = match calibration {
        Calibration::Text { query_rows, .. } => *query_rows,
        Calibration::Weights => 0,
    };
    StatisticsOptions {
        sampled_rows,
        ..StatisticsOptions::default()
    }
}

fn write_layer(
    request: &ConvertRequest<'_>,
    config: &ModelConfig,
    layer: usize,
    converted: &ConvertedLayer,
    writer: &CheckpointWriter,
) -> Result<(), Error> {
    let dtype = request.dtype;
    for (name, shape, data) in converted.tensors.named() {
        let name = tensor_name(layer, name);
        if !is_converted(request, config, &name) {
            continue;
        }
        check_finite(&format!("converted tensor {name}"), &shape, data)?;
        let dtype = if name.ends_with("rotary_inv_freq") {
            Dtype::F32
        } else {
            dtype
        };
        let bytes = bytes_from_f32(dtype, data).ok_or_else(|| {
            Refusal::new(
                "--dtype",
                "f32, f16 or bf16",
                dtype.safetensors_name(),
                "choose one of them",
            )
        })?;
        if dtype == Dtype::F16 {
            refuse_overflow(&name, &shape, &bytes)?;
        }
        writer.write(&name, &bytes)?;
    }
    Ok(())
}

/// Rounding to f16 may overflow; that is a refusal, not an infinity in a file.
fn refuse_overflow(name: &str, shape: &[usize], bytes: &[u8]) -> Result<(), Error> {
    if let Some(rounded) = f32_from_bytes(Dtype::F16, bytes) {
        check_finite(&format!("converted tensor {name} in f16"), shape, &rounded)?;
    }
    Ok(())
}

fn layer_row(plan: &LayerPlan, converted: ConvertedLayer) -> LayerRow {
    let report = converted.report;
    LayerRow {
        layer: plan.layer,
        kv_lora_rank: plan.ranks.kv_lora_rank,
        qk_rope_head_dim: plan.ranks.qk_rope_head_dim,
        output_error: report.error,
        refit_error_before: report.refit_error_before,
        refit_error: report.refit_error_after,
        stream_error: converted.stream_error,
        refined: converted.refined,
        spectrum: report.spectrum,
        beta: report.beta,
        kept_by_frequency: report.kept_by_frequency,
        notes: report.notes,
    }
}

/// Converts the layers while all other tensors are copied beside: the one computes, the other
/// waits for the disk. Returns what was converted and the digests of all the source's tensors.
fn write_tensors(
    request: &ConvertRequest<'_>,
    config: &ModelConfig,
    windows: Option<&Chosen>,
    writer: &CheckpointWriter,
    progress: Progress,
) -> Result<(Vec<LayerRow>, BTreeMap<String, String>), Error> {
    let copied = Copied::default();
    thread::scope(|scope| {
        let copy = scope.spawn(|| copy_rest(request, config, writer, &copied));
        let rows = convert_layers(request, config, windows, writer, progress);
        copied.stop.store(rows.is_err(), Ordering::Relaxed);
        let total = request.checkpoint.tensors().len() as u64;
        let stage = progress.stage("copying other tensors", total);
        while !copy.is_finished() {
            stage.at(copied.tensors.load(Ordering::Relaxed));
            thread::sleep(Duration::from_millis(20));
        }
        drop(stage);
        let digests = copy.join().unwrap_or_else(|panic| resume_unwind(panic));
        Ok((rows?, digests?))
    })
}

/// How far the copy is, and whether it shall end.
#[derive(Default)]
struct Copied {
    tensors: AtomicU64,
    stop: AtomicBool,
}

/// Copies every tensor that is not converted; returns the digests of all the source's tensors.
fn copy_rest(
    request: &ConvertRequest<'_>,
    config: &ModelConfig,
    writer: &CheckpointWriter,
    copied: &Copied,
) -> Result<BTreeMap<String, String>, Error> {
    let wanted: HashSet<String> = expected_tensors(config)
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| !is_converted(request, config, name))
        .collect();
    let digests = copy_tensors(
        request.checkpoint,
        writer,
        |name| wanted.contains(name),
        |_| {
            copied.tensors.fetch_add(1, Ordering::Relaxed);
            !copied.stop.load(Ordering::Relaxed)
        },
    )?;
    Ok(digests)
}

fn write_side_files(
    checkpoint: &Checkpoint,
    source: &ModelConfig,
    config: &ModelConfig,
    record: &Record,
    writer: &CheckpointWriter,
) -> Result<(), Error> {
    let Some(mla) = &config.mla else {
        return Ok(());
    };
    let mut json = mla_config_json(checkpoint.raw_config(), source, mla);
    if let Some(code) = remote_code(source.architecture) {
        json["auto_map"] = code.auto_map;
        // Converted tensors may have another type than the rest; without the key a loader with
        // `dtype="auto"` would go by whichever it meets first.
        if ["dtype", "torch_dtype"]
            .iter()
            .all(|key| json.get(*key).is_none())
        {
            let dtype = checkpoint.info("model.embed_tokens.weight")?.dtype;
            json["dtype"] = torch_name(dtype).into();
        }
        for (name, content) in code.files {
            writer.write_file(name, content.as_bytes())?;
        }
    }
    writer.write_file("config.json", pretty(&json)?.as_bytes())?;
    writer.write_file("mlac.json", pretty(record)?.as_bytes())?;
    let card = Card {
        source: &source_name(checkpoint),
        config,
        record,
        quality: None,
    };
    writer.write_file(CARD, card.markdown().as_bytes())?;
    for (name, bytes) in checkpoint.side_contents()? {
        writer.write_file(&name, &bytes)?;
    }
    Ok(())
}

/// PyTorch's name of a weight's type.
fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}

/// The model card's file name.
pub const CARD: &str = "README.md";

/// Last part of the path the source was opened with.
pub fn source_name(checkpoint: &Checkpoint) -> String {
    let path = checkpoint.path();
    let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    path.file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

fn recipe_json(method: &Method) -> Result<serde_json::Value, Error> {
    let value = match method {
        Method::Recipe(recipe) => serde_json::to_value(recipe),
        Method::TransMla(options) => serde_json::to_value(options),
        Method::Svd => Ok(serde_json::Value::Null),
    };
    value.map_err(|e| Error::json("the recipe", e))
}

fn calibration_record(request: &ConvertRequest<'_>, windows: Option<&Chosen>) -> CalibrationRecord {
    let mut hasher = Sha256::new();
    for window in windows.map(Chosen::slices).unwrap_or_default() {
        for token in window {
            hasher.update(token.to_le_bytes());
        }
    }
    let (text, window, seed) = match &request.calibration {
        Calibration::Weights => ("none".to_owned(), 0, 0),
        Calibration::Text {
            path, window, seed, ..
        } => {
            let name = path
                .file_name()
                .map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            (name, *window, *seed)
        }
    };
    CalibrationRecord {
        text,
        tokens_sha256: hex(&hasher.finalize()),
        windows: windows.map_or(0, |w| w.indices.len()),
        window,
        seed,
        sequential: windows.is_some() && request.sequential,
    }
}

/// Indented JSON with a final newline.
pub fn pretty(value: &impl Serialize) -> Result<String, Error> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::json("output", e))?;
    text.push('\n');
    Ok(text)
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

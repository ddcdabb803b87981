//! `mlac convert`: from arguments to a conversion, which `mlac compile` shares.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use mlac_converter::{AttentionShape, Budget, Recipe, RefineOptions};
use mlac_engines::ort::SessionOptions;
use mlac_model::{Checkpoint, Dtype, Refusal};

use super::Context;
use super::plan::request;
use crate::cli::args::{CalibArgs, ConvertArgs, DtypeArg, MethodArg, RankArgs};
use crate::cli::units::{show_bytes, show_tokens, table};
use crate::error::Error;
use crate::pipeline::allocate::AllocateRequest;
use crate::pipeline::convert::{
    Calibration, ConvertRequest, LayerPlan, Method, Record, convert, read_windows,
    statistics_options,
};
use crate::pipeline::gradients::{Gradients, take};
use crate::pipeline::ranks::cache_plan;
use crate::pipeline::refine::RefineRequest;
use crate::pipeline::refined_layers::remove;
use crate::pipeline::{allocate, kept_gradients, steps};
use crate::report::data::HEADLINE_CONTEXT;
use crate::staging::beside;

/// How the options convert a layer, and what surrounds it.
struct Chosen {
    method: Method,
    /// Whether calibration is sequential.
    sequential: bool,
    /// Whether the recipe wants the gradients of the loss.
    gradient: bool,
    /// Whether a budget is distributed by measured loss.
    allocation: bool,
}

fn method(args: &CalibArgs) -> Result<Chosen, Error> {
    let steps = steps::resolve(&args.steps)?;
    if !args.steps.is_empty() && args.method != MethodArg::Recipe {
        return Err(Refusal::new(
            "--steps",
            "--method recipe, whose steps they are",
            format!("--method {:?}", args.method).to_lowercase(),
            "leave one of the two out",
        )
        .into());
    }
    let plain = |method| Chosen {
        method,
        sequential: false,
        gradient: false,
        allocation: false,
    };
    Ok(match args.method {
        MethodArg::Recipe => Chosen {
            method: Method::Recipe(steps.recipe),
            sequential: steps.sequential,
            gradient: steps.gradient,
            allocation: steps.allocation,
        },
        MethodArg::Transmla => plain(Method::TransMla(mlac_converter::TransMla {
            freqfold: args.freqfold,
        })),
        MethodArg::Svd => plain(Method::Svd),
    })
}

fn calibration(args: &CalibArgs, budget: Budget) -> Result<Calibration, Error> {
    match args.calib.as_deref() {
        Some("none") => Ok(Calibration::Weights),
        Some(path) => Ok(Calibration::Text {
            path: PathBuf::from(path),
            windows: args.calib_windows,
            window: args.calib_window,
            seed: args.calib_seed,
            query_rows: args.query_rows,
        }),
        None if budget == Budget::Exact || args.method == MethodArg::Svd => {
            Ok(Calibration::Weights)
        }
        None => Err(Refusal::new(
            "--calib",
            "a calibration text, or none for statistics from the weights alone",
            "nothing",
            "give --calib FILE; --calib none costs much quality",
        )
        .into()),
    }
}

fn model_dtype(dtype: DtypeArg) -> Dtype {
    match dtype {
        DtypeArg::F32 => Dtype::F32,
        DtypeArg::F16 => Dtype::F16,
        DtypeArg::Bf16 => Dtype::BF16,
    }
}

/// A conversion into `output`, of a command that leaves `finally`.
pub(super) fn convert_request<'a>(
    checkpoint: &'a Checkpoint,
    (output, finally): (&'a Path, &Path),
    ranks: &RankArgs,
    calib: &CalibArgs,
    dtype: DtypeArg,
    max_shard: u64,
    context: Context,
) -> Result<ConvertRequest<'a>, Error> {
    let wanted = request(ranks, checkpoint)?;
    let (even, _) = wanted.plan(checkpoint.config())?;
    let mut chosen = method(calib)?;
    let calibration = calibration(calib, wanted.budget)?;
    let refine = refinement(calib, &calibration, finally)?;
    // At full rank no metric changes anything.
    let gradients = if chosen.gradient && wanted.budget != Budget::Exact {
        gradients(
            checkpoint,
            &calibration,
            calib.gradients.as_deref(),
            &even,
            context,
        )?
    } else {
        None
    };
    if let (Method::Recipe(recipe), Some(_)) = (&mut chosen.method, &gradients) {
        *recipe = recipe.clone().with_gradients();
    }
    let layers = match (&chosen.method, wanted.budget) {
        (Method::Recipe(recipe), Budget::Fraction(fraction))
            if chosen.allocation && fraction < 1.0 =>
        {
            distribute(
                checkpoint,
                &calibration,
                &even,
                fraction,
                (recipe, gradients.as_ref()),
                wanted.align,
                context,
            )?
        }
        _ => even,
    };
    Ok(ConvertRequest {
        checkpoint,
        output,
        layers,
        method: chosen.method,
        sequential: chosen.sequential,
        calibration,
        dtype: model_dtype(dtype),
        max_shard,
        threads: context.threads,
        gradients,
        refine,
    })
}

/// Gradients of the original model's loss, where there is a text to take them on.
fn gradients(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    file: Option<&Path>,
    layers: &[LayerPlan],
    context: Context,
) -> Result<Option<Gradients>, Error> {
    let Calibration::Text { seed, .. } = *calibration else {
        context.progress.note(
            "low rank in the metric of scores and outputs: without a calibration text there are no gradients",
        );
        return Ok(None);
    };
    let Some(chosen) = read_windows(checkpoint, calibration)? else {
        return Ok(None);
    };
    let layers: Vec<usize> = layers.iter().map(|p| p.layer).collect();
    let options = SessionOptions::default().with_threads(context.threads);
    let windows = chosen.slices();
    let kept = match file {
        Some(path) => Some((
            path,
            kept_gradients::key(checkpoint, &windows, &layers, seed)?,
        )),
        None => None,
    };
    if let Some((path, key)) = &kept {
        let width = AttentionShape::of(checkpoint.config()).stacked_width();
        if let Some(found) = kept_gradients::read(path, key, &layers, width)? {
            let note = format!("gradients of the loss read from {}", path.display());
            context.progress.note(&note);
            return Ok(Some(found));
        }
    }
    let found = take(
        checkpoint,
        &windows,
        &layers,
        seed,
        &options,
        context.progress,
    )?;
    if let Some((path, key)) = &kept {
        kept_gradients::write(path, key, &found)?;
    }
    Ok(Some(found))
}

/// Gradient steps, if any were asked for; `output`: the folder that the command leaves.
fn refinement(
    args: &CalibArgs,
    calibration: &Calibration,
    output: &Path,
) -> Result<Option<RefineRequest>, Error> {
    if args.refine == 0 {
        return Ok(None);
    }
    let Calibration::Text { windows, seed, .. } = calibration else {
        return Err(Refusal::new(
            "--refine",
            "a calibration text, on which steps are done",
            "statistics from the weights alone",
            "give --calib FILE, or leave --refine out",
        )
        .into());
    };
    if *windows < 2 {
        return Err(Refusal::new(
            "--refine",
            "at least 2 calibration windows, of which one is not trained on",
            windows.to_string(),
            "raise --calib-windows",
        )
        .into());
    }
    let options = RefineOptions {
        steps: args.refine,
        rows: args.refine_rows,
        rate: args.refine_rate,
        seed: *seed,
    };
    options.check()?;
    Ok(Some(RefineRequest {
        options,
        folder: beside(output, ".refine")?,
    }))
}

/// A budget over the layers by measured loss, told before any conversion starts; without
/// calibration there is nothing to measure on, and every layer gets the same.
fn distribute(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    even: &[LayerPlan],
    fraction: f64,
    (recipe, gradients): (&Recipe, Option<&Gradients>),
    align: usize,
    context: Context,
) -> Result<Vec<LayerPlan>, Error> {
    let Some(chosen) = read_windows(checkpoint, calibration)? else {
        context.progress.note(
            "every layer gets the same ranks: without a calibration text there is no loss to measure",
        );
        return Ok(even.to_vec());
    };
    let whole = checkpoint.config().gqa_cache_width() * even.len();
    let request = AllocateRequest {
        checkpoint,
        windows: &chosen.slices(),
        even,
        budget: (fraction * whole as f64 + 1e-9).floor() as usize,
        recipe,
        gradients,
        align,
        statistics: statistics_options(calibration),
        threads: context.threads,
    };
    let plans = allocate::distribute(&request, context.progress)?;
    let ranks = |p: &LayerPlan| format!("{}+{}", p.ranks.kv_lora_rank, p.ranks.qk_rope_head_dim);
    let list: Vec<String> = plans
        .iter()
        .map(|p| format!("{}: {}", p.layer, ranks(p)))
        .collect();
    context
        .progress
        .note(&format!("ranks by layer  {}", list.join(", ")));
    Ok(plans)
}

pub(super) fn run(args: &ConvertArgs, context: Context) -> Result<bool, Error> {
    crate::staging::refuse_existing(&args.output)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let request = convert_request(
        &checkpoint,
        (&args.output, &args.output),
        &args.ranks,
        &args.calib,
        args.dtype,
        args.max_shard,
        context,
    )?;
    let record = convert(&request, context.progress)?;
    forget_refined(request.refine.as_ref())?;
    context.show(&record, &convert_text(&request, &record))?;
    Ok(true)
}

/// Removes the refined layers of a command that is done.
pub(super) fn forget_refined(refine: Option<&RefineRequest>) -> Result<(), Error> {
    refine.map_or(Ok(()), |refine| remove(&refine.folder))
}

/// Bytes of a cached number in summaries.
const CACHED_BYTES: u64 = 2;

/// The result of a conversion for people.
fn convert_text(request: &ConvertRequest<'_>, record: &Record) -> String {
    let plan = cache_plan(request.checkpoint.config(), &request.layers, CACHED_BYTES);
    let number = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"));
    let rows: Vec<Vec<String>> = record
        .layers
        .iter()
        .map(|l| {
            vec![
                l.layer.to_string(),
                format!("{} + {}", l.kv_lora_rank, l.qk_rope_head_dim),
                format!("{:.2}", l.beta),
                number(l.output_error),
                number(l.refit_error),
                l.refined.as_ref().map_or_else(
                    || "-".to_owned(),
                    |r| format!("{:.4} to {:.4}", r.error_before, r.error_after),
                ),
                number(l.stream_error),
            ]
        })
        .collect();
    let mut text = table(
        &[
            "layer",
            "r + d_r",
            "balance",
            "output error",
            "after refit",
            "refined, held out",
            "stream error",
        ],
        &rows,
    );
    for layer in &record.layers {
        let refined = layer.refined.iter().filter_map(|r| r.note.as_ref());
        for note in layer.notes.iter().chain(refined) {
            let _ = writeln!(text, "layer {}: {note}", layer.layer);
        }
    }
    let _ = writeln!(
        text,
        "{}: {} cached at {} tokens instead of {} ({:.1} %), {CACHED_BYTES} bytes a number",
        request.output.display(),
        show_bytes(plan.mla_bytes(HEADLINE_CONTEXT)),
        show_tokens(HEADLINE_CONTEXT),
        show_bytes(plan.gqa_bytes(HEADLINE_CONTEXT)),
        100.0 * plan.mla_bytes(HEADLINE_CONTEXT) as f64
            / plan.gqa_bytes(HEADLINE_CONTEXT).max(1) as f64
    );
    text
}

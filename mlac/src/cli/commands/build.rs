//! `mlac build`, and what it says of engines that are there.

use std::fmt::Write as _;

use mlac_engines::tensorrt::{Product, Profiles, Target};
use mlac_model::Refusal;

use super::Context;
use crate::cli::args::{BackendArg, BuildArgs, ProfileArgs};
use crate::cli::units::show_bytes;
use crate::error::Error;
use crate::pipeline::build;

pub(super) fn profiles(args: &ProfileArgs) -> Profiles {
    Profiles {
        max_batch: args.max_batch,
        max_context: args.max_context,
        max_prefill: args.max_prefill.min(args.max_context),
    }
}

pub(super) fn targets(args: &ProfileArgs) -> Result<Vec<Target>, Error> {
    args.target
        .iter()
        .map(|t| Ok(t.parse::<Target>()?))
        .collect()
}

pub(super) fn run(args: &BuildArgs, context: Context) -> Result<bool, Error> {
    if args.check {
        return check_engines(args, context);
    }
    let targets = targets(&args.profile)?;
    if targets.is_empty() {
        return Err(Refusal::new(
            "--target",
            "at least one GPU architecture",
            "none",
            "give for example --target sm89,sm120",
        )
        .into());
    }
    let report = build::build(
        &args.onnx,
        &args.output,
        match args.backend {
            BackendArg::TensorrtRtx => Product::Rtx,
            BackendArg::Tensorrt => Product::Enterprise,
        },
        &targets,
        profiles(&args.profile),
        context.threads,
        context.progress,
    )?;
    let mut text = String::new();
    for engine in &report.engines {
        let _ = writeln!(
            text,
            "{}  {}  {}  {:.0} s  {}",
            args.output.join(&engine.file).display(),
            engine.target,
            show_bytes(engine.bytes),
            engine.seconds,
            build::attention_text(engine.attention)
        );
    }
    if let Some(room) = report.manifest.room() {
        text.push_str(&build::room_text(room));
    }
    for warning in &report.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    text.push_str("not run on a GPU\n");
    context.show(&report.manifest, &text)?;
    Ok(true)
}

/// `mlac build --check`: whether the engines are those of the ONNX folder.
fn check_engines(args: &BuildArgs, context: Context) -> Result<bool, Error> {
    let stale = build::stale(&args.output, &args.onnx)?;
    let mut text = String::new();
    for file in &stale {
        let _ = writeln!(text, "stale: {file}");
    }
    if stale.is_empty() {
        let _ = writeln!(
            text,
            "{} was built from {}",
            args.output.display(),
            args.onnx.display()
        );
    }
    context.show(&stale, &text)?;
    Ok(stale.is_empty())
}

//! ONNX folder to TensorRT for RTX engines.

use std::path::Path;

use mlac_engines::tensorrt::{
    Attention, BuildOptions, BuildProgress, BuildReport, Manifest, Profiles, Stale, Target,
    build_engines,
};

use crate::error::Error;
use crate::progress::Progress;

/// Builds engines of every graph in `onnx` for each target.
pub fn build(
    onnx: &Path,
    output: &Path,
    targets: &[Target],
    profiles: Profiles,
    threads: usize,
    progress: Progress,
) -> Result<BuildReport, Error> {
    let options = BuildOptions {
        targets: targets.to_vec(),
        profiles,
        threads,
    };
    let stage = progress.stage("building engines", 0);
    let report = build_engines(onnx, output, &options, &mut |at| match at {
        BuildProgress::Digesting => stage.doing("digests"),
        BuildProgress::Parsing(file) => stage.doing(format!("parsing {file}")),
        BuildProgress::Building {
            graph,
            target,
            index,
            count,
        } => {
            stage.of(*count as u64);
            stage.at(*index as u64);
            stage.doing(format!("{graph} for {target}"));
        }
    })?;
    Ok(report)
}

/// Every file that is no longer what the engines' manifest recorded.
pub fn stale(engines: &Path, onnx: &Path) -> Result<Vec<Stale>, Error> {
    Ok(Manifest::read(engines)?.check(engines, onnx)?)
}

/// An engine's attention for people.
pub fn attention_text(attention: Attention) -> String {
    match (attention.fused, attention.decomposable) {
        (0, 0) => "attention in primitives".to_owned(),
        (fused, 0) => format!("{fused} fused attention layers"),
        (fused, other) => format!("{fused} fused and {other} decomposable attention layers"),
    }
}

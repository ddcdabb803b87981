//! ONNX folder to TensorRT engines.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use mlac_engines::tensorrt::{
    Attention, BuildOptions, BuildProgress, BuildReport, Manifest, Product, Profiles, Room, Stale,
    Target, build_engines,
};

use crate::cli::units::show_bytes;
use crate::error::Error;
use crate::progress::Progress;

/// Builds engines of every graph in `onnx` for each target.
pub fn build(
    onnx: &Path,
    output: &Path,
    product: Product,
    targets: &[Target],
    profiles: Profiles,
    threads: usize,
    progress: Progress,
) -> Result<BuildReport, Error> {
    let options = BuildOptions {
        product,
        targets: targets.to_vec(),
        profiles,
        threads,
        timing_cache: timing_cache(),
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

/// `mlac/tensorrt.timing` in the user's cache folder; none without one.
fn timing_cache() -> Option<PathBuf> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let folder = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?;
    Some(folder.join("mlac").join("tensorrt.timing"))
}

/// Every file that is no longer what the engines' manifest recorded.
pub fn stale(engines: &Path, onnx: &Path) -> Result<Vec<Stale>, Error> {
    Ok(Manifest::read(engines)?.check(engines, onnx)?)
}

/// Memory of the caches for people.
pub fn room_text(room: Room) -> String {
    let mut text = format!(
        "caches in place: {} rows for each of {} sequences, {}\n",
        room.rows,
        room.batch,
        show_bytes(room.bytes)
    );
    if room.windowed_layers > 0 {
        let _ = writeln!(
            text,
            "{} layers with a sliding window keep all rows, {} more than their windows: the plugin has no rings",
            room.windowed_layers,
            show_bytes(room.beyond_windows)
        );
    }
    text
}

/// An engine's attention for people.
pub fn attention_text(attention: Attention) -> String {
    match (attention.fused, attention.decomposable) {
        (0, 0) => "attention in primitives".to_owned(),
        (fused, 0) => format!("{fused} fused attention layers"),
        (fused, other) => format!("{fused} fused and {other} decomposable attention layers"),
    }
}

//! All engines of an ONNX folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mlac_model::Refusal;

use super::builder::{Attention, Builder, Engine, InputShapes};
use super::enterprise::{self, Plugins};
use super::library::{Product, TensorRt};
use super::manifest::{self, EngineRecord, Manifest, ProfileRecord};
use super::profile::{Profile, Profiles};
use super::target::Target;
use crate::error::{EngineError, Result};
use crate::ort::cache_layouts;

/// What to build.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Which TensorRT builds.
    pub product: Product,
    /// One engine file of each graph per target. [`Builder::build`] can also put several targets into
    /// one file, in about the time and size of one. Enterprise TensorRT: one, the GPU of this machine.
    pub targets: Vec<Target>,
    /// What the engines are to take.
    pub profiles: Profiles,
    /// Threads that TensorRT may use; 0 means one per core.
    pub threads: usize,
    /// Where enterprise TensorRT keeps what it measured, for later builds.
    pub timing_cache: Option<PathBuf>,
}

/// Where a build is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BuildProgress {
    /// Digests of the ONNX folder's files are being taken.
    Digesting,
    /// A graph is being parsed.
    Parsing(String),
    /// The engine `index` of `count` is being built.
    Building {
        /// The graph.
        graph: String,
        /// The target.
        target: Target,
        /// From 0.
        index: usize,
        /// Engines in all.
        count: usize,
    },
}

/// One engine that was built.
#[derive(Debug, Clone)]
pub struct EngineReport {
    /// Its file in the engine folder.
    pub file: String,
    /// Its target.
    pub target: Target,
    /// Its size.
    pub bytes: u64,
    /// Seconds that TensorRT took.
    pub seconds: f64,
    /// Its attention layers.
    pub attention: Attention,
}

/// What a build came to.
#[derive(Debug, Clone)]
pub struct BuildReport {
    /// What was written as `manifest.json`.
    pub manifest: Manifest,
    /// Per engine.
    pub engines: Vec<EngineReport>,
    /// What TensorRT warned about.
    pub warnings: Vec<String>,
    /// The process's greatest resident memory so far, bytes; includes what ran before the build.
    pub peak_memory: Option<u64>,
}

/// A graph of the folder, and what it is run for.
struct Graph {
    file: String,
    stem: &'static str,
    profiles: Vec<(&'static str, Profile)>,
}

/// Builds an engine of each graph in `onnx` for each target, and writes them with their manifest
/// to `out`, which must not exist. With only `decoder.onnx`, its engine has both profiles, prompts
/// first; with `prefill.onnx` as well, each graph has its own.
pub fn build_engines(
    onnx: &Path,
    out: &Path,
    options: &BuildOptions,
    progress: &mut dyn FnMut(&BuildProgress),
) -> Result<BuildReport> {
    if options.targets.is_empty() {
        return Err(Refusal::new(
            "targets",
            "at least one",
            "none",
            "name one, for example sm89",
        )
        .into());
    }
    match options.product {
        Product::Rtx => {
            for target in &options.targets {
                target.check()?;
            }
        }
        Product::Enterprise => enterprise::check_targets(&options.targets)?,
    }
    options.profiles.check()?;
    if out.exists() {
        return Err(Refusal::new(
            out.display().to_string(),
            "a folder that does not exist yet",
            "it exists",
            "choose another name, or remove it",
        )
        .into());
    }
    let graphs = graphs(onnx, options)?;
    let library = TensorRt::load(options.product)?;
    let mut plugins = match options.product {
        Product::Rtx => None,
        Product::Enterprise => Some(Plugins::open(
            &library,
            onnx,
            options.targets[0],
            options.timing_cache.as_deref(),
        )?),
    };
    progress(&BuildProgress::Digesting);
    let sources = manifest::sources(onnx)?;

    let staging = staging(out)?;
    let mut report = BuildReport {
        manifest: Manifest {
            format: Manifest::FORMAT,
            tool: format!("mlac {}", env!("CARGO_PKG_VERSION")),
            runtime: library.runtime(),
            plugin: None,
            verified_on_gpu: false,
            targets: options.targets.iter().map(ToString::to_string).collect(),
            cache: Vec::new(),
            sources,
            engines: Vec::new(),
        },
        engines: Vec::new(),
        warnings: Vec::new(),
        peak_memory: None,
    };
    if let Some(plugins) = &plugins {
        report.manifest.plugin = Some(plugins.library.copy_to(staging.path())?);
    }
    let count = graphs.len() * options.targets.len();
    for graph in &graphs {
        build_graph(
            &library,
            plugins.as_mut(),
            onnx,
            staging.path(),
            graph,
            options,
            count,
            &mut report,
            progress,
        )?;
    }
    if let (Some(plugins), Some(path)) = (&plugins, &options.timing_cache) {
        plugins.keep_timing(path)?;
    }
    if options.product == Product::Enterprise {
        copy_side_files(onnx, staging.path(), &report.manifest)?;
    }
    report.manifest.write(staging.path())?;
    let finished = staging.keep();
    fs::rename(&finished, out)
        .map_err(EngineError::io(out, "move the finished folder into place"))?;
    report.peak_memory = peak_memory();
    Ok(report)
}

fn build_graph(
    library: &TensorRt,
    mut plugins: Option<&mut Plugins>,
    onnx: &Path,
    staging: &Path,
    graph: &Graph,
    options: &BuildOptions,
    count: usize,
    report: &mut BuildReport,
    progress: &mut dyn FnMut(&BuildProgress),
) -> Result<()> {
    progress(&BuildProgress::Parsing(graph.file.clone()));
    let path = onnx.join(&graph.file);
    let mut builder = match plugins.as_deref_mut() {
        Some(plugins) => plugins.parse(library, &path)?,
        None => Builder::parse(library, &path)?,
    };
    let inputs = builder.inputs();
    let layouts = cache_layouts(
        inputs
            .iter()
            .map(|input| (input.name.as_str(), input.dims.as_slice())),
    );
    if report.manifest.cache.is_empty() {
        report.manifest.cache = layouts;
    }
    let attention = builder.attention();
    let subject = path.display().to_string();
    let mut profiles = Vec::new();
    for (name, profile) in &graph.profiles {
        profiles.push(ProfileRecord {
            name: (*name).into(),
            inputs: profile.shapes(&subject, &inputs)?,
        });
    }
    let shapes: Vec<_> = profiles
        .iter()
        .map(|profile| profile.inputs.clone())
        .collect();
    let threads = if options.threads == 0 {
        std::thread::available_parallelism().map_or(1, usize::from)
    } else {
        options.threads
    };
    for target in &options.targets {
        progress(&BuildProgress::Building {
            graph: graph.file.clone(),
            target: *target,
            index: report.engines.len(),
            count,
        });
        let started = Instant::now();
        let engine = build_engine(
            &mut builder,
            plugins.as_deref_mut(),
            *target,
            &shapes,
            threads,
        )?;
        let file = format!("{}.{target}.engine", graph.stem);
        let place = staging.join(&file);
        fs::write(&place, engine.bytes()).map_err(EngineError::io(&place, "write the engine"))?;
        let bytes = engine.bytes().len() as u64;
        report.manifest.engines.push(EngineRecord {
            file: file.clone(),
            graph: graph.file.clone(),
            targets: vec![target.to_string()],
            bytes,
            sha256: manifest::sha256(engine.bytes()),
            profiles: profiles.clone(),
            attention,
        });
        let seconds = started.elapsed().as_secs_f64();
        report.engines.push(EngineReport {
            file,
            target: *target,
            bytes,
            seconds,
            attention,
        });
    }
    report.warnings.extend(builder.warnings());
    Ok(())
}

fn build_engine(
    builder: &mut Builder,
    plugins: Option<&mut Plugins>,
    target: Target,
    shapes: &[Vec<InputShapes>],
    threads: usize,
) -> Result<Engine> {
    match plugins {
        Some(plugins) => builder.build_here(shapes, threads, &mut plugins.timing),
        None => builder.build(&[target], shapes, threads),
    }
}

fn graphs(onnx: &Path, options: &BuildOptions) -> Result<Vec<Graph>> {
    let decoder = "decoder.onnx".to_owned();
    let prefill = "prefill.onnx".to_owned();
    if !onnx.join(&decoder).is_file() {
        return Err(Refusal::new(
            onnx.display().to_string(),
            "a folder with decoder.onnx",
            "none in it",
            "export the model with `mlac export`",
        )
        .into());
    }
    let [_, piece] = mlac_kernels::layer::QUERY_TOKENS;
    let prompts = match options.product {
        Product::Rtx => options.profiles.prefill(),
        Product::Enterprise => options.profiles.pieces(piece as usize)?,
    };
    let both = [("prefill", prompts), ("decode", options.profiles.decode())];
    Ok(if onnx.join(&prefill).is_file() {
        vec![
            Graph {
                file: prefill,
                stem: "prefill",
                profiles: vec![both[0]],
            },
            Graph {
                file: decoder,
                stem: "decode",
                profiles: vec![both[1]],
            },
        ]
    } else {
        vec![Graph {
            file: decoder,
            stem: "decoder",
            profiles: both.to_vec(),
        }]
    })
}

/// Configuration and tokenizer, so that the folder is all that a run needs.
fn copy_side_files(onnx: &Path, staging: &Path, manifest: &Manifest) -> Result<()> {
    for source in &manifest.sources {
        if manifest::is_side_file(&source.file) {
            let from = onnx.join(&source.file);
            fs::copy(&from, staging.join(&source.file))
                .map_err(EngineError::io(&from, "copy beside the engines"))?;
        }
    }
    Ok(())
}

/// A folder beside `out`, removed again when the build does not finish.
fn staging(out: &Path) -> Result<tempfile::TempDir> {
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(EngineError::io(parent, "create the folder"))?;
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .suffix(".partial")
        .tempdir_in(parent)
        .map_err(EngineError::io(
            parent,
            "create a folder for the unfinished engines",
        ))
}

/// `VmHWM` of this process.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}

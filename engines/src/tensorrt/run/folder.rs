//! An engine folder: checked against its manifest, the GPU and TensorRT before anything of it runs.

use std::fs;
use std::path::Path;
use std::rc::Rc;

use mlac_kernels::launch::Device;
use mlac_model::Refusal;

use super::engine::Engine;
use crate::error::{EngineError, Result};
use crate::tensorrt::library::{Product, TensorRt};
use crate::tensorrt::manifest::{self, EngineRecord, Manifest};

/// Whether `mlac build` wrote the folder.
pub fn is_engine_folder(folder: &Path) -> bool {
    folder.join(manifest::NAME).is_file()
}

/// Engines of a folder with what they need, in the manifest's order.
pub(super) struct Opened {
    pub(super) manifest: Manifest,
    pub(super) device: Device,
    pub(super) engines: Vec<(EngineRecord, Rc<Engine>)>,
}

/// Checks the folder and opens its engines for this machine's first GPU.
///
/// # Errors
/// Engines of TensorRT for RTX, which mlac does not run; files that are not the manifest's; no driver or another GPU; no
/// TensorRT or another version; a plugin of another major version.
pub(super) fn open(folder: &Path) -> Result<Opened> {
    let manifest = Manifest::read(folder)?;
    let product = Product::Enterprise.title();
    if !manifest.is_of(Product::Enterprise) {
        return Err(Refusal::new(
            folder.display().to_string(),
            format!("engines of {product} 11, which mlac runs"),
            format!("engines of {}, which mlac only builds", manifest.runtime),
            "build with `mlac build --backend tensorrt`, or run the ONNX folder",
        )
        .into());
    }
    check_side_files(folder, &manifest)?;
    let device = Device::open(0)?;
    let records = for_device(folder, &manifest, &device)?;
    let library = TensorRt::load(Product::Enterprise)?;
    manifest.check_runtime(&library.runtime())?;
    if let Some(plugin) = &manifest.plugin {
        library.load_plugin(&plugin.open(folder, library.number())?)?;
    }
    let mut engines = Vec::new();
    for record in records {
        let path = folder.join(&record.file);
        let bytes = fs::read(&path).map_err(EngineError::io(&path, "read the engine"))?;
        let subject = path.display().to_string();
        let found = manifest::sha256(&bytes);
        if found != record.sha256 {
            return Err(changed(subject, &record.sha256, &found));
        }
        let engine = Engine::open(&library, &subject, &bytes)?;
        check_profiles(&engine, &record)?;
        engines.push((record, Rc::new(engine)));
    }
    Ok(Opened {
        manifest,
        device,
        engines,
    })
}

fn changed(subject: String, recorded: &str, found: &str) -> EngineError {
    Refusal::new(
        subject,
        format!("sha256 {recorded}, as the manifest has it"),
        format!("sha256 {found}"),
        "build the engines again with `mlac build`",
    )
    .into()
}

/// Configuration and tokenizer, which the build copied from the ONNX folder.
fn check_side_files(folder: &Path, manifest: &Manifest) -> Result<()> {
    for source in &manifest.sources {
        if !manifest::is_side_file(&source.file) {
            continue;
        }
        let path = folder.join(&source.file);
        let (_, found) = manifest::sha256_file(&path)?;
        if found != source.sha256 {
            return Err(changed(path.display().to_string(), &source.sha256, &found));
        }
    }
    Ok(())
}

/// The engines that run on the GPU.
fn for_device(folder: &Path, manifest: &Manifest, device: &Device) -> Result<Vec<EngineRecord>> {
    let (major, minor) = device.capability();
    let target = format!("sm{major}{minor}");
    let engines = manifest.engines.iter();
    let found: Vec<EngineRecord> = engines
        .filter(|engine| engine.targets.contains(&target))
        .cloned()
        .collect();
    if found.is_empty() {
        return Err(Refusal::new(
            folder.display().to_string(),
            format!("engines for {target}, which is the GPU here ({})", device.name()),
            format!("engines for {}", manifest.targets.join(", ")),
            format!("build for it with `mlac build --backend tensorrt --target {target}`, or run on the other GPU"),
        )
        .into());
    }
    Ok(found)
}

/// The engine must have the profiles that the manifest says.
fn check_profiles(engine: &Engine, record: &EngineRecord) -> Result<()> {
    let refuse = |expected: String, found: String| {
        Err(Refusal::new(
            engine.subject(),
            expected,
            found,
            "build the engines again with `mlac build`: engine and manifest are of two builds",
        )
        .into())
    };
    let (expected, found) = (record.profiles.len(), engine.profiles()?);
    if expected != found {
        return refuse(format!("{expected} profiles"), found.to_string());
    }
    for (number, profile) in record.profiles.iter().enumerate() {
        for shapes in &profile.inputs {
            let found = engine.shapes(&shapes.name, number)?;
            if found != *shapes {
                let show = |s: &crate::tensorrt::InputShapes| {
                    format!("{} of {:?} to {:?}", s.name, s.min, s.max)
                };
                return refuse(show(shapes), show(&found));
            }
        }
    }
    Ok(())
}

//! What a build with enterprise TensorRT does besides: plugin library, kernels in the nodes, timing cache.

use std::fs;
use std::path::Path;

use mlac_model::{ModelConfig, Refusal};

use super::attach;
use super::builder::Builder;
use super::latent::{self, LatentKernels};
use super::library::TensorRt;
use super::plugin::PluginLibrary;
use super::target::Target;
use crate::error::{EngineError, Result};
use crate::find::{self, Library};

/// One target, which there are kernels for.
pub(super) fn check_targets(targets: &[Target]) -> Result<()> {
    if let [target] = targets {
        latent::arch(*target)?;
        return Ok(());
    }
    let names: Vec<String> = targets.iter().map(ToString::to_string).collect();
    Err(Refusal::new(
        "targets",
        "one: enterprise TensorRT builds for the GPU it runs on",
        names.join(", "),
        "build for each GPU on a machine that has it",
    )
    .into())
}

/// What a build with enterprise TensorRT has besides the library.
pub(super) struct Plugins {
    pub(super) library: PluginLibrary,
    kernels: LatentKernels,
    config: ModelConfig,
    pub(super) timing: Vec<u8>,
}

impl Plugins {
    /// Registers the plugin library and finds what compiles kernels.
    pub(super) fn open(
        tensorrt: &TensorRt,
        onnx: &Path,
        target: Target,
        timing_cache: Option<&Path>,
    ) -> Result<Self> {
        let library = PluginLibrary::open(&find::library(Library::TensorRtPlugin)?.require()?)?;
        tensorrt.load_plugin(&library)?;
        let timing = match timing_cache {
            Some(path) if path.is_file() => {
                fs::read(path).map_err(EngineError::io(path, "read the timing cache"))?
            }
            _ => Vec::new(),
        };
        Ok(Self {
            library,
            kernels: LatentKernels::open(target)?,
            config: latent::read_config(onnx)?,
            timing,
        })
    }

    /// A graph whose plugin nodes have their kernels.
    pub(super) fn parse(&mut self, tensorrt: &TensorRt, path: &Path) -> Result<Builder> {
        let model = fs::read(path).map_err(EngineError::io(path, "read the ONNX file"))?;
        let (kernels, config) = (&mut self.kernels, &self.config);
        let (model, layers) =
            attach::attach(path, &model, &mut |layer| kernels.of_layer(config, layer))?;
        let converted: Vec<usize> = config
            .mla
            .iter()
            .flat_map(|mla| mla.layers.keys().copied())
            .collect();
        if layers != converted {
            return Err(Refusal::new(
                path.display().to_string(),
                format!("a node of mlac::LatentAttention for each of the layers {converted:?}"),
                format!("nodes for {layers:?}"),
                "export the model with `mlac export --form tensorrt`",
            )
            .into());
        }
        Builder::parse_bytes(tensorrt, path, &model)
    }

    /// Writes beside the place, then renames.
    pub(super) fn keep_timing(&self, path: &Path) -> Result<()> {
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        fs::create_dir_all(folder).map_err(EngineError::io(folder, "create the folder"))?;
        let file = tempfile::NamedTempFile::new_in(folder)
            .map_err(EngineError::io(path, "create a temporary file for"))?;
        fs::write(file.path(), &self.timing)
            .map_err(EngineError::io(path, "write the timing cache"))?;
        file.persist(path)
            .map_err(|error| EngineError::io(path, "rename into place")(error.error))?;
        Ok(())
    }
}

//! Kernels of `mlac::LatentAttention` for the layers of a model, on the GPU that engines are built for.

use std::path::Path;
use std::sync::Arc;

use mlac_kernels::Arch;
use mlac_kernels::launch::{Decoder, Device};
use mlac_kernels::layer::LayerKernels;
use mlac_model::{ModelConfig, Refusal};

use super::target::Target;
use crate::error::{EngineError, Result};

/// Compiles and keeps what the layers need.
pub(super) struct LatentKernels {
    device: Device,
    layers: LayerKernels,
}

impl LatentKernels {
    /// Finds compiler and GPU.
    ///
    /// # Errors
    /// Found / needed / fix; a GPU that is not the target.
    pub(super) fn open(target: Target) -> Result<Self> {
        let arch = arch(target)?;
        let layers = LayerKernels::open(arch)?;
        let device = Device::open(0)?;
        if device.capability() != arch.capability() {
            let (major, minor) = device.capability();
            return Err(Refusal::new(
                format!("target {target}"),
                "the GPU of this machine: enterprise TensorRT builds for the GPU it runs on",
                format!("{} (sm{major}{minor})", device.name()),
                format!("build with --target sm{major}{minor}, or on that GPU"),
            )
            .into());
        }
        Ok(Self { device, layers })
    }

    /// Recipes and cubins of a layer.
    ///
    /// # Errors
    /// When no kernel computes the layer; the compiler's and the driver's words.
    pub(super) fn of_layer(&mut self, config: &ModelConfig, layer: usize) -> Result<Arc<[u8]>> {
        let Self { device, layers } = self;
        // As many parts as CTAs run at a time on this GPU.
        let bytes = layers.of_layer(config, layer, |desc, choice, cubin| {
            Ok(Decoder::load(device, desc, choice, cubin)?.parts())
        })?;
        Ok(bytes)
    }
}

/// The architecture that kernels are compiled for.
///
/// # Errors
/// Lists those that there are kernels for.
pub(super) fn arch(target: Target) -> Result<Arch> {
    let number = target.number();
    let found = Arch::ALL.into_iter().find(|arch| {
        let (major, minor) = arch.capability();
        major * 10 + minor == number
    });
    found.ok_or_else(|| {
        let names: Vec<String> = Arch::ALL
            .iter()
            .map(|arch| {
                let (major, minor) = arch.capability();
                format!("sm{major}{minor}")
            })
            .collect();
        Refusal::new(
            format!("target {target}"),
            format!("one of {}, which mlac has kernels for", names.join(", ")),
            "another architecture",
            "choose one of those",
        )
        .into()
    })
}

/// The configuration in an ONNX folder.
pub(super) fn read_config(folder: &Path) -> Result<ModelConfig> {
    let path = folder.join("config.json");
    let bytes = std::fs::read(&path).map_err(EngineError::io(&path, "read the configuration"))?;
    let name = path.display().to_string();
    let raw = serde_json::from_slice(&bytes).map_err(|error| {
        Refusal::new(
            name.clone(),
            "a configuration in JSON",
            error.to_string(),
            "export the model again",
        )
    })?;
    ModelConfig::from_json(&raw, &name).map_err(Into::into)
}

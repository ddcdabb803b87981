//! Kernels of `mlac::LatentAttention` for the layers of a model, on the GPU that engines are built for.

use std::collections::BTreeMap;
use std::path::Path;

use mlac_kernels::launch::{Decoder, Device, Recipe};
use mlac_kernels::{
    Arch, AttentionConfig, AttentionDesc, Cache, Compiler, CompilerName, Dtype, Toolchain, bundle,
};
use mlac_model::{ModelConfig, Refusal};

use super::target::Target;
use crate::error::{EngineError, Result};

/// Query tokens that an engine has kernels for: one step, and a piece of a prompt.
pub(super) const QUERY_TOKENS: [u32; 2] = [1, mlac_kernels::desc::MAX_QUERY_TOKENS];

/// Compiles and keeps what the layers need.
pub(super) struct LatentKernels {
    device: Device,
    compiler: Compiler,
    cache: Cache,
    arch: Arch,
    made: BTreeMap<String, Vec<u8>>,
}

impl LatentKernels {
    /// Finds compiler and GPU.
    ///
    /// # Errors
    /// Found / needed / fix; a GPU that is not the target.
    pub(super) fn open(target: Target) -> Result<Self> {
        let arch = arch(target)?;
        let toolchain = Toolchain::find()?;
        let compiler = Compiler::load(&toolchain, CompilerName::Nvrtc)?;
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
        Ok(Self {
            device,
            compiler,
            cache: Cache::of_user()?,
            arch,
            made: BTreeMap::new(),
        })
    }

    /// Recipes and cubins of a layer.
    ///
    /// # Errors
    /// When no kernel computes the layer; the compiler's and the driver's words.
    pub(super) fn of_layer(&mut self, config: &ModelConfig, layer: usize) -> Result<Vec<u8>> {
        let desc = describe(config, layer, self.arch)?;
        if let Some(bytes) = self.made.get(&desc.slug()) {
            return Ok(bytes.clone());
        }
        let mut kernels = Vec::new();
        for query_tokens in QUERY_TOKENS {
            let desc = AttentionDesc {
                query_tokens,
                ..desc
            };
            let config = AttentionConfig::choose(&desc)?;
            let cubin = self.cache.get(&desc, &self.compiler)?;
            // As many parts as CTAs run at a time on this GPU.
            let parts = Decoder::load(&self.device, &desc, &config, &cubin.bytes)?.parts();
            kernels.push((Recipe::of(&desc, &config, parts)?, cubin.bytes));
        }
        let bytes = bundle::bundle(&kernels)?;
        self.made.insert(desc.slug(), bytes.clone());
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

/// The request of one layer, for one query token.
fn describe(config: &ModelConfig, layer: usize, arch: Arch) -> Result<AttentionDesc> {
    let Some(mla) = config.mla.as_ref().and_then(|mla| mla.layers.get(&layer)) else {
        return Err(Refusal::new(
            format!("layer {layer}"),
            "a converted layer, as the graph has it",
            "none in config.json",
            "export the model again: graph and configuration are of two models",
        )
        .into());
    };
    let desc = AttentionDesc {
        sinks: config.sinks,
        window: config
            .sliding_window
            .get(layer)
            .copied()
            .flatten()
            .map(|window| window as u32),
        dtype: Dtype::F16,
        ..AttentionDesc::latent(
            config.num_attention_heads as u32,
            mla.kv_lora_rank as u32,
            mla.qk_rope_head_dim as u32,
            arch,
        )
    };
    desc.check()?;
    Ok(desc)
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

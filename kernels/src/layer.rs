//! The kernels that the node of a converted layer brings: which they are, compiled and bundled.

use std::collections::BTreeMap;
use std::sync::Arc;

use mlac_model::{ModelConfig, Refusal};

use crate::bundle::bundle;
use crate::desc::MAX_QUERY_TOKENS;
use crate::error::Result;
use crate::launch::{Recipe, most_parts};
use crate::{
    Arch, AttentionConfig, AttentionDesc, Cache, Compiler, CompilerName, Dtype, Toolchain,
};

/// Query tokens that a node has kernels for: one step, and a piece of a prompt.
pub const QUERY_TOKENS: [u32; 2] = [1, MAX_QUERY_TOKENS];

/// Compiles and keeps what the layers of a model need.
pub struct LayerKernels {
    compiler: Compiler,
    cache: Cache,
    arch: Arch,
    made: BTreeMap<String, Arc<[u8]>>,
}

impl LayerKernels {
    /// Finds the compiler and the user's cache of cubins.
    ///
    /// # Errors
    /// Found / needed / fix.
    pub fn open(arch: Arch) -> Result<Self> {
        Ok(Self {
            compiler: Compiler::load(&Toolchain::find()?, CompilerName::Nvrtc)?,
            cache: Cache::of_user()?,
            arch,
            made: BTreeMap::new(),
        })
    }

    /// Recipes and cubins of a layer; `parts` says among how many CTAs a kernel's long caches are divided.
    ///
    /// # Errors
    /// When no kernel computes the layer; the compiler's words, and those of `parts`.
    pub fn of_layer(
        &mut self,
        config: &ModelConfig,
        layer: usize,
        mut parts: impl FnMut(&AttentionDesc, &AttentionConfig, &[u8]) -> Result<u32>,
    ) -> Result<Arc<[u8]>> {
        let desc = describe(config, layer, self.arch)?;
        if let Some(bytes) = self.made.get(&desc.slug()) {
            return Ok(Arc::clone(bytes));
        }
        let mut kernels = Vec::new();
        for query_tokens in QUERY_TOKENS {
            let desc = AttentionDesc {
                query_tokens,
                ..desc
            };
            let config = AttentionConfig::choose(&desc)?;
            let cubin = self.cache.get(&desc, &self.compiler)?;
            let parts = parts(&desc, &config, &cubin.bytes)?;
            kernels.push((Recipe::of(&desc, &config, parts)?, cubin.bytes));
        }
        let bytes: Arc<[u8]> = bundle(&kernels)?.into();
        self.made.insert(desc.slug(), Arc::clone(&bytes));
        Ok(bytes)
    }
}

/// CTAs among which long caches are divided where no GPU can be asked: those that fit at a time, by shared memory, on the largest
/// GPU of the architecture. More or fewer give the same results but for rounding, and cost time only.
pub fn parts_without_a_gpu(desc: &AttentionDesc, config: &AttentionConfig) -> u32 {
    let arch = desc.arch;
    // A CTA takes 1 KiB beside what it asks for.
    let resident = (arch.shared_memory() + 1024) / (config.shared_bytes + 1024);
    most_parts(arch.multiprocessors() * resident.max(1))
}

/// The request of one layer for one query token, in f16.
///
/// # Errors
/// A layer that is not converted, or that no kernel computes.
pub fn describe(
    config: &ModelConfig,
    layer: usize,
    arch: Arch,
) -> std::result::Result<AttentionDesc, Refusal> {
    let Some(mla) = config.mla_layer(layer) else {
        return Err(Refusal::new(
            format!("layer {layer}"),
            "a converted layer, as the graph has it",
            "none in config.json",
            "export the model again: graph and configuration are of two models",
        ));
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
    desc.check().map_err(|refusal| Refusal {
        subject: format!("layer {layer}: {}", refusal.subject),
        ..refusal
    })?;
    Ok(desc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_every_multiprocessor_of_the_largest_has_work() {
        for arch in Arch::ALL {
            for (rank, rope) in [(64, 16), (192, 64), (512, 64)] {
                let desc = AttentionDesc::latent(64, rank, rope, arch);
                let config = AttentionConfig::choose(&desc).unwrap();
                let parts = parts_without_a_gpu(&desc, &config);
                assert!(parts >= arch.multiprocessors(), "{desc}: {parts}");
                Recipe::of(&desc, &config, parts).unwrap();
            }
        }
    }
}

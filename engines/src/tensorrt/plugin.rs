//! The library of the plugin `mlac::LatentAttention`: which TensorRT it is for, before TensorRT loads it.

use std::path::{Path, PathBuf};

use mlac_model::Refusal;
use serde::{Deserialize, Serialize};

use super::manifest;
use crate::error::{EngineError, Result};
use crate::probe;

/// A plugin library, looked at but not registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginLibrary {
    path: PathBuf,
    tensorrt: u32,
}

/// The plugin library that engines were built with, as their manifest has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginRecord {
    /// Name in the engine folder.
    pub file: String,
    /// The TensorRT it was compiled for, for example "11.4.0". It serves this major version only.
    pub tensorrt: String,
    /// Hexadecimal.
    pub sha256: String,
}

impl PluginLibrary {
    /// Loads the library and asks for its version.
    ///
    /// # Errors
    /// When it is no library, or none of this plugin.
    pub fn open(path: &Path) -> Result<Self> {
        let tensorrt = probe::plugin(path).map_err(|found| {
            Refusal::new(
                format!("TensorRT plugin ({})", path.display()),
                "libmlac_trt.so, compiled from kernels/plugin",
                found,
                "run `cargo xtask setup` in mlac's checkout",
            )
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            tensorrt,
        })
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// sha256 of the file, hexadecimal.
    pub(super) fn digest(&self) -> Result<String> {
        let bytes =
            std::fs::read(&self.path).map_err(EngineError::io(&self.path, "read the plugin"))?;
        Ok(manifest::sha256(&bytes))
    }

    /// Refuses the library when TensorRT's major version (`version` is major * 10000 + minor * 100 + patch) is another one than it was
    /// compiled for: the tables of virtual functions differ.
    ///
    /// # Errors
    /// Names both versions.
    pub fn check(&self, version: u32) -> Result<()> {
        if version / 10_000 == self.tensorrt / 10_000 {
            return Ok(());
        }
        Err(Refusal::new(
            format!("TensorRT plugin ({})", self.path.display()),
            format!(
                "a library for TensorRT {}, which is {} here",
                version / 10_000,
                probe::shown(version)
            ),
            format!(
                "one for TensorRT {} (compiled with {})",
                self.tensorrt / 10_000,
                probe::shown(self.tensorrt)
            ),
            "compile kernels/plugin against the headers of that TensorRT, or install the other TensorRT",
        )
        .into())
    }

    /// Copies the library into an engine folder.
    pub(super) fn copy_to(&self, folder: &Path) -> Result<PluginRecord> {
        let file = "libmlac_trt.so".to_owned();
        let bytes =
            std::fs::read(&self.path).map_err(EngineError::io(&self.path, "read the plugin"))?;
        let place = folder.join(&file);
        std::fs::write(&place, &bytes).map_err(EngineError::io(&place, "write the plugin"))?;
        Ok(PluginRecord {
            file,
            tensorrt: probe::shown(self.tensorrt),
            sha256: manifest::sha256(&bytes),
        })
    }
}

impl PluginRecord {
    /// The library in its engine folder, checked against the record and TensorRT's version.
    ///
    /// # Errors
    /// When the file is gone or another one, or was compiled for another major version.
    pub fn open(&self, engines: &Path, version: u32) -> Result<PluginLibrary> {
        let path = engines.join(&self.file);
        let bytes = std::fs::read(&path).map_err(EngineError::io(&path, "read the plugin"))?;
        let found = manifest::sha256(&bytes);
        if found != self.sha256 {
            return Err(Refusal::new(
                format!("TensorRT plugin ({})", path.display()),
                format!("sha256 {}, as the manifest has it", self.sha256),
                format!("sha256 {found}"),
                "build the engines again with `mlac build`",
            )
            .into());
        }
        let library = PluginLibrary::open(&path)?;
        library.check(version)?;
        Ok(library)
    }
}

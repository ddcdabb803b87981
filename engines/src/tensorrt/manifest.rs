//! What an engine folder was made from, and whether that still holds.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use mlac_model::Refusal;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::builder::{Attention, InputShapes};
use super::library::Product;
use super::plugin::PluginRecord;
use crate::error::{EngineError, Result};
use crate::ort::CacheLayout;

pub(super) const NAME: &str = "manifest.json";
const FORMAT: u32 = 1;

/// A file of the ONNX folder that the engines were built from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Name in the ONNX folder.
    pub file: String,
    /// Size.
    pub bytes: u64,
    /// Hexadecimal.
    pub sha256: String,
}

/// The shapes of one profile of an engine, in the order in which the engine numbers them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileRecord {
    /// "prefill" or "decode".
    pub name: String,
    /// Every input's shapes.
    pub inputs: Vec<InputShapes>,
}

/// One serialized engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineRecord {
    /// Name in the engine folder.
    pub file: String,
    /// The ONNX file that it was built from.
    pub graph: String,
    /// The architectures it runs on, for example "sm89".
    pub targets: Vec<String>,
    /// Size.
    pub bytes: u64,
    /// Hexadecimal.
    pub sha256: String,
    /// What it can be run with.
    pub profiles: Vec<ProfileRecord>,
    /// Its attention layers.
    pub attention: Attention,
}

/// `manifest.json` of an engine folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this file's form.
    pub format: u32,
    /// Version of mlac.
    pub tool: String,
    /// For example "TensorRT for RTX 1.7.1". Engines run with this version only.
    pub runtime: String,
    /// The plugin library that the engines need; none for TensorRT for RTX.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugin: Option<PluginRecord>,
    /// Whether the engines were run and verified. Building proves nothing about their output.
    pub verified_on_gpu: bool,
    /// Architectures, for example "sm89".
    pub targets: Vec<String>,
    /// Cache of every layer, in layer order.
    pub cache: Vec<CacheLayout>,
    /// The ONNX folder's files.
    pub sources: Vec<SourceRecord>,
    /// The engines.
    pub engines: Vec<EngineRecord>,
}

/// A file that is no longer what the manifest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stale {
    /// The file.
    pub path: PathBuf,
    /// The sha256 that the manifest recorded.
    pub recorded: String,
    /// The sha256 that the file has now; `None` when it is gone.
    pub found: Option<String>,
    /// What to do.
    pub fix: &'static str,
}

impl std::fmt::Display for Stale {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let found = self
            .found
            .as_ref()
            .map_or_else(|| "no such file".into(), |found| format!("sha256 {found}"));
        write!(
            f,
            "{}: expected sha256 {}, found {found}; fix: {}",
            self.path.display(),
            self.recorded,
            self.fix
        )
    }
}

impl Manifest {
    pub(super) const FORMAT: u32 = FORMAT;

    /// Reads an engine folder's manifest.
    pub fn read(engines: &Path) -> Result<Self> {
        let path = engines.join(NAME);
        let bytes = fs::read(&path).map_err(EngineError::io(&path, "read the manifest"))?;
        let manifest: Self = serde_json::from_slice(&bytes).map_err(|error| {
            Refusal::new(
                path.display().to_string(),
                "a manifest that `mlac build` wrote",
                error.to_string(),
                "build the engines again with `mlac build`",
            )
        })?;
        if manifest.format != FORMAT {
            return Err(Refusal::new(
                format!("{}: format", path.display()),
                FORMAT.to_string(),
                manifest.format.to_string(),
                "build the engines again with this mlac",
            )
            .into());
        }
        // Names from a file must stay inside the two folders.
        let names = manifest
            .sources
            .iter()
            .map(|source| &source.file)
            .chain(manifest.engines.iter().map(|engine| &engine.file))
            .chain(manifest.plugin.iter().map(|plugin| &plugin.file));
        for name in names {
            let path_of_name = Path::new(name);
            if path_of_name.components().count() != 1
                || path_of_name.file_name() != Some(name.as_ref())
            {
                return Err(Refusal::new(
                    path.display().to_string(),
                    "plain file names",
                    name.clone(),
                    "build the engines again with `mlac build`",
                )
                .into());
            }
        }
        Ok(manifest)
    }

    /// Whether the engines are of that product.
    pub fn is_of(&self, product: Product) -> bool {
        // The version follows the name, and one name begins with the other.
        let version = self.runtime.strip_prefix(product.title());
        version.is_some_and(|v| v.trim_start().starts_with(|c: char| c.is_ascii_digit()))
    }

    /// Refuses a runtime of another name or version than the one that the engines were built with.
    ///
    /// # Errors
    /// Names both.
    pub fn check_runtime(&self, runtime: &str) -> Result<()> {
        if self.runtime == runtime {
            return Ok(());
        }
        Err(Refusal::new(
            "engines",
            self.runtime.clone(),
            runtime,
            "install the TensorRT that the engines were built with, or build them again with `mlac build`",
        )
        .into())
    }

    /// Every file that is not what it was when the engines were built, sources first. Empty: the
    /// engines are those of this ONNX folder.
    pub fn check(&self, engines: &Path, onnx: &Path) -> Result<Vec<Stale>> {
        let sources = self.sources.iter().map(|source| {
            (
                onnx.join(&source.file),
                &source.sha256,
                "run `mlac build` again: the engines are of the older file",
            )
        });
        let built = self.engines.iter().map(|engine| {
            (
                engines.join(&engine.file),
                &engine.sha256,
                "run `mlac build` again: the engine is damaged or was replaced",
            )
        });
        let plugin = self.plugin.iter().map(|plugin| {
            (
                engines.join(&plugin.file),
                &plugin.sha256,
                "run `mlac build` again: the plugin is damaged or was replaced",
            )
        });
        let mut stale = Vec::new();
        for (path, recorded, fix) in sources.chain(built).chain(plugin) {
            let found = if path.is_file() {
                Some(sha256_file(&path)?.1)
            } else {
                None
            };
            if found.as_ref() != Some(recorded) {
                stale.push(Stale {
                    path,
                    recorded: recorded.clone(),
                    found,
                    fix,
                });
            }
        }
        Ok(stale)
    }

    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(NAME);
        let mut bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| EngineError::io(&path, "write the manifest")(error.into()))?;
        bytes.push(b'\n');
        fs::write(&path, bytes).map_err(EngineError::io(&path, "write the manifest"))
    }
}

/// Whether a file of the ONNX folder is copied beside engines that mlac runs: configuration and tokenizer, not graphs and weights.
pub(super) fn is_side_file(name: &str) -> bool {
    let extension = Path::new(name).extension();
    !extension.is_some_and(|e| e == "onnx" || e == "data")
}

/// Every regular file of an ONNX folder, in name order.
pub(super) fn sources(onnx: &Path) -> Result<Vec<SourceRecord>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(onnx).map_err(EngineError::io(onnx, "list the ONNX folder"))? {
        let entry = entry.map_err(EngineError::io(onnx, "list the ONNX folder"))?;
        if entry.path().is_file() {
            let name = entry.file_name().into_string().map_err(|name| {
                Refusal::new(
                    onnx.join(name).display().to_string(),
                    "a file name in UTF-8",
                    "other bytes",
                    "remove the file from the ONNX folder",
                )
            })?;
            names.push(name);
        }
    }
    names.sort();
    names
        .into_iter()
        .map(|file| {
            let (bytes, sha256) = sha256_file(&onnx.join(&file))?;
            Ok(SourceRecord {
                file,
                bytes,
                sha256,
            })
        })
        .collect()
}

/// Size and digest of a file, read in pieces.
pub(super) fn sha256_file(path: &Path) -> Result<(u64, String)> {
    let mut file = File::open(path).map_err(EngineError::io(path, "open"))?;
    let mut digest = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let length = file
            .read(&mut piece)
            .map_err(EngineError::io(path, "read"))?;
        if length == 0 {
            return Ok((bytes, hexadecimal(&digest.finalize())));
        }
        digest.update(&piece[..length]);
        bytes += length as u64;
    }
}

/// Digest of bytes.
pub(super) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_and_tokenizer_go_with_the_engines_and_nothing_else() {
        for (name, expected) in [
            ("config.json", true),
            ("tokenizer.json", true),
            ("tokenizer.model", true),
            ("LICENSE", true),
            ("decoder.onnx", false),
            ("decoder.onnx.data", false),
        ] {
            assert_eq!(is_side_file(name), expected, "{name}");
        }
    }

    #[test]
    fn a_runtime_names_its_product() {
        let of = |runtime: &str, product| {
            let manifest = Manifest {
                format: FORMAT,
                tool: String::new(),
                runtime: runtime.to_owned(),
                plugin: None,
                verified_on_gpu: false,
                targets: vec![],
                cache: vec![],
                sources: vec![],
                engines: vec![],
            };
            manifest.is_of(product)
        };
        for (runtime, rtx, enterprise) in [
            ("TensorRT for RTX 1.7.1", true, false),
            ("TensorRT 11.4.0", false, true),
            ("TensorRT", false, false),
            ("ONNX Runtime 1.31.1", false, false),
        ] {
            assert_eq!(of(runtime, Product::Rtx), rtx, "{runtime}");
            assert_eq!(of(runtime, Product::Enterprise), enterprise, "{runtime}");
        }
    }
}

//! Cubins on disk, under a key of everything that decides their bytes.
//!
//! An entry is `<slug>-<key>.cubin` and `<slug>-<key>.json`. Both are written to temporary files and renamed, the JSON last; it
//! holds the cubin's digest, so a damaged or half-written entry is seen when it is opened, and built again.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use mlac_model::Refusal;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::compiler::{Compiler, options};
use crate::config::AttentionConfig;
use crate::desc::AttentionDesc;
use crate::error::{KernelError, Result};
use crate::source::{HEADERS, Source};

/// SHA-256 in hexadecimal.
pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// The key of a compilation: source, headers, flags (the architecture is one) and compiler.
pub fn key(source: &Source, desc: &AttentionDesc, compiler: &str) -> String {
    let mut hasher = Sha256::new();
    // Each part with its length before it: no two lists of parts make the same bytes.
    let mut part = |text: &str| {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    part("mlac cubin 1");
    part(&source.text);
    for (name, text) in HEADERS {
        part(name);
        part(text);
    }
    for flag in options(desc.arch) {
        part(&flag);
    }
    part(compiler);
    hasher.finalize()[..12]
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// What is known of a cached cubin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The request.
    pub desc: AttentionDesc,
    /// The choice.
    pub config: AttentionConfig,
    /// The compiler's [`identity`](Compiler::identity).
    pub compiler: String,
    /// SHA-256 of the cubin.
    pub sha256: String,
    /// Bytes of the cubin.
    pub bytes: u64,
    /// What the compiler said.
    pub log: String,
}

impl Entry {
    /// Name and version of the compiler.
    pub fn compiler_version(&self) -> &str {
        self.compiler
            .split_once(',')
            .map_or(self.compiler.as_str(), |(version, _)| version)
    }
}

/// A cubin, built or found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cubin {
    /// What is known of it.
    pub entry: Entry,
    /// Its file.
    pub path: PathBuf,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Whether it was compiled just now.
    pub built: bool,
}

/// A folder of cubins.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The user's: `MLAC_KERNEL_CACHE`, else `mlac/kernels` in `XDG_CACHE_HOME` or `~/.cache`.
    ///
    /// # Errors
    /// When none of these variables is set.
    pub fn of_user() -> Result<Self> {
        let variable = |name: &str| {
            env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        if let Some(folder) = variable("MLAC_KERNEL_CACHE") {
            return Ok(Self::at(folder));
        }
        let base = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
        match base {
            Some(base) => Ok(Self::at(base.join("mlac").join("kernels"))),
            None => Err(Refusal::new(
                "kernel cache",
                "a folder in MLAC_KERNEL_CACHE, XDG_CACHE_HOME or HOME",
                "none of them is set",
                "set MLAC_KERNEL_CACHE to a folder",
            )
            .into()),
        }
    }

    /// The one in this folder.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The cubin of a request: from the cache when its entry is whole, else compiled.
    ///
    /// # Errors
    /// When nothing computes the request, it does not compile, or the folder cannot be written.
    pub fn get(&self, desc: &AttentionDesc, compiler: &Compiler) -> Result<Cubin> {
        self.get_with(desc, AttentionConfig::choose(desc)?, compiler)
    }

    /// As [`get`](Self::get) with another choice than [`AttentionConfig::choose`] makes.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn get_with(
        &self,
        desc: &AttentionDesc,
        config: AttentionConfig,
        compiler: &Compiler,
    ) -> Result<Cubin> {
        let source = Source::of(desc, &config);
        let name = format!(
            "{}-{}",
            desc.slug(),
            key(&source, desc, compiler.identity())
        );
        if let Some(found) = self.open(&name)
            && found.entry.desc == *desc
            && found.entry.config == config
        {
            return Ok(found);
        }
        let compiled = compiler.compile(&desc.slug(), &source, desc.arch)?;
        let entry = Entry {
            desc: *desc,
            config,
            compiler: compiler.identity().to_owned(),
            sha256: digest(&compiled.cubin),
            bytes: compiled.cubin.len() as u64,
            log: compiled.log,
        };
        fs::create_dir_all(&self.folder)
            .map_err(KernelError::io(&self.folder, "create the folder"))?;
        let path = self.folder.join(format!("{name}.cubin"));
        write(&path, &compiled.cubin)?;
        let json = self.folder.join(format!("{name}.json"));
        let text = serde_json::to_vec_pretty(&entry)
            .map_err(|error| KernelError::io(&json, "write")(error.into()))?;
        write(&json, &text)?;
        Ok(Cubin {
            entry,
            path,
            bytes: compiled.cubin,
            built: true,
        })
    }

    /// An entry that is whole; anything else is as good as none.
    fn open(&self, name: &str) -> Option<Cubin> {
        let entry: Entry =
            serde_json::from_slice(&fs::read(self.folder.join(format!("{name}.json"))).ok()?)
                .ok()?;
        let path = self.folder.join(format!("{name}.cubin"));
        let bytes = fs::read(&path).ok()?;
        (digest(&bytes) == entry.sha256).then_some(Cubin {
            entry,
            path,
            bytes,
            built: false,
        })
    }

    /// Every entry, by name; a damaged one as an error with the way out.
    ///
    /// # Errors
    /// When the folder cannot be listed; that there is none is an empty list.
    pub fn list(&self) -> Result<Vec<std::result::Result<Cubin, Refusal>>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(KernelError::io(&self.folder, "list the folder")(error)),
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                name.strip_suffix(".json").map(str::to_owned)
            })
            .collect();
        names.sort_unstable();
        Ok(names
            .iter()
            .map(|name| {
                self.open(name).ok_or_else(|| {
                    Refusal::new(
                        self.folder
                            .join(format!("{name}.cubin"))
                            .display()
                            .to_string(),
                        "the cubin whose digest is in its JSON file",
                        "a damaged or missing one",
                        "build it again with `mlac kernels build`, or remove both files",
                    )
                })
            })
            .collect())
    }
}

/// Writes beside the place, then renames.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)
        .map_err(KernelError::io(path, "create a temporary file for"))?;
    file.write_all(bytes)
        .map_err(KernelError::io(path, "write"))?;
    file.as_file()
        .sync_all()
        .map_err(KernelError::io(path, "write to the disk"))?;
    file.persist(path)
        .map_err(|error| KernelError::io(path, "rename into place")(error.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Arch;
    use crate::desc::Dtype;

    #[test]
    fn a_key_changes_with_everything_that_decides_the_bytes() {
        let keys = |desc: AttentionDesc, compiler: &str| {
            let config = AttentionConfig::choose(&desc).unwrap();
            key(&Source::of(&desc, &config), &desc, compiler)
        };
        let desc = AttentionDesc::latent(64, 192, 64, Arch::Sm90a);
        let base = keys(desc, "13.0");
        assert_eq!(base, keys(desc, "13.0"));
        let mut seen = vec![base];
        for (other, compiler) in [
            (desc, "13.1"),
            (
                AttentionDesc {
                    sinks: true,
                    ..desc
                },
                "13.0",
            ),
            (
                AttentionDesc {
                    dtype: Dtype::F16,
                    ..desc
                },
                "13.0",
            ),
            (
                AttentionDesc {
                    window: Some(128),
                    ..desc
                },
                "13.0",
            ),
            (
                AttentionDesc {
                    arch: Arch::Sm80,
                    ..desc
                },
                "13.0",
            ),
            (
                AttentionDesc {
                    query_tokens: 2,
                    ..desc
                },
                "13.0",
            ),
        ] {
            let next = keys(other, compiler);
            assert!(!seen.contains(&next), "{other}");
            seen.push(next);
        }
    }
}

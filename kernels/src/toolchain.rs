//! Finding CUDA's compilers and tools.
//!
//! Order: `MLAC_CUDA` (which must then be right), `MLAC_RUNTIME_DIR`, `runtime/` beside the program, `target/runtime` above the
//! program and above the current folder. A folder is usable when NVRTC and the tools are in it, in `lib/` and `bin/`; nvcc, which
//! may be asked for, is looked for in the same folder only.

use std::env;
use std::path::{Path, PathBuf};

use mlac_model::{Refusal, runtime};

const NEEDED: &str = "lib/libnvrtc.so.13, lib/libnvrtc-builtins.so.13.0, bin/cuobjdump and bin/nvdisasm of CUDA 13.0";
const FIX: &str = "run `cargo xtask setup` in mlac's checkout, or set MLAC_CUDA to a folder with these files \
                   (`pip install --target D nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm` makes D/nvidia/cu13)";
const NVCC_NEEDED: &str = "bin/nvcc, nvvm/bin/cicc, bin/ptxas and include/ of CUDA 13.0";
const NVCC_FIX: &str = "run `cargo xtask setup` in mlac's checkout, or install nvidia-cuda-nvcc==13.0.88, nvidia-nvvm==13.0.88, \
                        nvidia-cuda-crt==13.0.88 and nvidia-cuda-runtime==13.0.96 into the same folder";

/// A folder with all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toolchain {
    folder: PathBuf,
}

impl Toolchain {
    /// The files of a toolchain, below its folder.
    pub(crate) const FILES: [&str; 4] = [
        "lib/libnvrtc.so.13",
        "lib/libnvrtc-builtins.so.13.0",
        "bin/cuobjdump",
        "bin/nvdisasm",
    ];

    /// What nvcc needs besides, below the same folder; each package of it has a file here.
    pub(crate) const NVCC: [&str; 6] = [
        "bin/nvcc",
        "bin/nvcc.profile",
        "bin/ptxas",
        "nvvm/bin/cicc",
        "include/crt/host_config.h",
        "include/cuda_runtime.h",
    ];

    /// The first usable folder.
    ///
    /// # Errors
    /// Found / needed / fix.
    pub fn find() -> Result<Self, Refusal> {
        let chosen = env::var_os("MLAC_CUDA").filter(|value| !value.is_empty());
        Self::among(chosen.map(PathBuf::from).as_deref(), &places())
    }

    /// As [`find`](Self::find), from the variable's value and the places to look at without it.
    pub fn among(chosen: Option<&Path>, places: &[PathBuf]) -> Result<Self, Refusal> {
        if let Some(folder) = chosen {
            let missing = missing(folder, &Self::FILES);
            if missing.is_empty() {
                return Ok(Self {
                    folder: folder.to_path_buf(),
                });
            }
            return Err(Refusal::new(
                "variable MLAC_CUDA",
                format!("a folder with {NEEDED}"),
                format!("{} without {}", folder.display(), missing.join(", ")),
                "correct or unset MLAC_CUDA",
            ));
        }
        if let Some(folder) = places
            .iter()
            .find(|folder| missing(folder, &Self::FILES).is_empty())
        {
            return Ok(Self {
                folder: folder.clone(),
            });
        }
        let looked: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
        Err(Refusal::new(
            "CUDA compiler",
            NEEDED,
            format!("none in {} places ({})", looked.len(), looked.join(", ")),
            FIX,
        ))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn nvrtc(&self) -> PathBuf {
        self.folder.join(Self::FILES[0])
    }

    pub(crate) fn builtins(&self) -> PathBuf {
        self.folder.join(Self::FILES[1])
    }

    pub(crate) fn cuobjdump(&self) -> PathBuf {
        self.folder.join(Self::FILES[2])
    }

    pub(crate) fn nvdisasm(&self) -> PathBuf {
        self.folder.join(Self::FILES[3])
    }

    /// nvcc, when all of it is there.
    pub(crate) fn nvcc(&self) -> Result<PathBuf, Refusal> {
        let missing = missing(&self.folder, &Self::NVCC);
        if missing.is_empty() {
            return Ok(self.folder.join(Self::NVCC[0]));
        }
        Err(Refusal::new(
            "nvcc",
            format!("a folder with {NVCC_NEEDED}"),
            format!("{} without {}", self.folder.display(), missing.join(", ")),
            NVCC_FIX,
        ))
    }

    pub(crate) fn ptxas(&self) -> PathBuf {
        self.folder.join(Self::NVCC[2])
    }

    pub(crate) fn cicc(&self) -> PathBuf {
        self.folder.join(Self::NVCC[3])
    }
}

fn missing(folder: &Path, files: &[&'static str]) -> Vec<&'static str> {
    files
        .iter()
        .copied()
        .filter(|file| !folder.join(file).is_file())
        .collect()
}

fn places() -> Vec<PathBuf> {
    let chosen = env::var_os("MLAC_RUNTIME_DIR").filter(|value| !value.is_empty());
    runtime::places(
        "cuda",
        chosen.as_deref().map(Path::new),
        env::current_exe().ok().as_deref(),
        env::current_dir().ok().as_deref(),
    )
    .into_iter()
    .map(|(place, _)| place)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_whole_toolchain_is_found_and_a_partial_one_named() {
        let root = tempfile::tempdir().unwrap();
        let (half, whole) = (root.path().join("half"), root.path().join("whole"));
        for (folder, files) in [
            (&half, &Toolchain::FILES[..2]),
            (&whole, &Toolchain::FILES[..]),
        ] {
            for file in files {
                let path = folder.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "").unwrap();
            }
        }
        let found = Toolchain::among(None, &[half.clone(), whole.clone()]).unwrap();
        assert_eq!(found.folder(), whole);
        let error = Toolchain::among(Some(&half), &[whole])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("variable MLAC_CUDA") && error.contains("without bin/cuobjdump"),
            "{error}"
        );
        let error = Toolchain::among(None, &[half]).unwrap_err().to_string();
        assert!(
            error.contains("CUDA compiler: expected lib/libnvrtc.so.13")
                && error.contains("none in 1 places")
                && error.contains("fix: run `cargo xtask setup`"),
            "{error}"
        );
    }
}

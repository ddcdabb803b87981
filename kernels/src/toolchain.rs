//! Finding CUDA's compiler and its tools.
//!
//! Order: `MLAC_CUDA` (which must then be right), `MLAC_RUNTIME_DIR`, `runtime/` beside the program, `target/runtime` above the
//! program and above the current folder. A folder is usable when all four files are in it, in `lib/` and `bin/`.

use std::env;
use std::path::{Path, PathBuf};

use mlac_model::{Refusal, runtime};

/// The files of a toolchain, below its folder.
const FILES: [&str; 4] = [
    "lib/libnvrtc.so.13",
    "lib/libnvrtc-builtins.so.13.0",
    "bin/cuobjdump",
    "bin/nvdisasm",
];
const NEEDED: &str = "lib/libnvrtc.so.13, lib/libnvrtc-builtins.so.13.0, bin/cuobjdump and bin/nvdisasm of CUDA 13.0";
const FIX: &str = "run `cargo xtask setup` in mlac's checkout, or set MLAC_CUDA to a folder with these files \
                   (`pip install --target D nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm` makes D/nvidia/cu13)";

/// A folder with all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toolchain {
    folder: PathBuf,
}

impl Toolchain {
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
            let missing = missing(folder);
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
        if let Some(folder) = places.iter().find(|folder| missing(folder).is_empty()) {
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
        self.folder.join(FILES[0])
    }

    pub(crate) fn builtins(&self) -> PathBuf {
        self.folder.join(FILES[1])
    }

    pub(crate) fn cuobjdump(&self) -> PathBuf {
        self.folder.join(FILES[2])
    }

    pub(crate) fn nvdisasm(&self) -> PathBuf {
        self.folder.join(FILES[3])
    }
}

fn missing(folder: &Path) -> Vec<&'static str> {
    FILES
        .into_iter()
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
        for (folder, files) in [(&half, &FILES[..2]), (&whole, &FILES[..])] {
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

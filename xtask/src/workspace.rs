//! Where things are in this checkout.

use std::path::{Path, PathBuf};

/// The checkout's folders.
pub(crate) struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// The checkout that this program was built from.
    pub(crate) fn here() -> Self {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        Self {
            root: here.parent().unwrap_or(here).to_path_buf(),
        }
    }

    /// A checkout at `root`.
    #[cfg(test)]
    pub(crate) fn at(root: &Path) -> Self {
        Self {
            root: root.to_path_buf(),
        }
    }

    /// The folder of the top `Cargo.toml`.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// `target/runtime`: everything that set-up installs.
    pub(crate) fn runtime(&self) -> PathBuf {
        self.root.join("target").join("runtime")
    }

    /// `xtask/pins`: requirement files with one sha256 per accepted wheel.
    pub(crate) fn pins(&self) -> PathBuf {
        self.root.join("xtask").join("pins")
    }
}

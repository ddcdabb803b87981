//! The stamp of an installed component: what it was made from and what must still be there.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::TaskError;

const NAME: &str = "setup.json";

/// Written last into a component's folder.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// sha256 of the recipe, hexadecimal.
    recipe: String,
    /// Files that must be there, with their size in bytes.
    files: Vec<(PathBuf, u64)>,
}

/// sha256 in hexadecimal.
pub(crate) fn digest(bytes: &[u8]) -> String {
    use std::fmt::Write;
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

impl Stamp {
    /// The stamp of `files` (relative to `folder`) as they are now.
    pub(crate) fn of(recipe: String, folder: &Path, files: &[PathBuf]) -> Result<Self, TaskError> {
        let mut sized = Vec::new();
        for file in files {
            let path = folder.join(file);
            let size = fs::metadata(&path)
                .map_err(TaskError::io(&path, "find the file that was just made"))?
                .len();
            sized.push((file.clone(), size));
        }
        Ok(Self {
            recipe,
            files: sized,
        })
    }

    /// The stamp in a folder, when there is a readable one.
    pub(crate) fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(folder.join(NAME)).ok()?).ok()
    }

    /// Whether the folder was made from this recipe and its files still have their sizes.
    pub(crate) fn holds(&self, recipe: &str, folder: &Path) -> bool {
        self.recipe == recipe
            && self.files.iter().all(|(file, size)| {
                fs::metadata(folder.join(file)).is_ok_and(|found| found.len() == *size)
            })
    }

    pub(crate) fn write(&self, folder: &Path) -> Result<(), TaskError> {
        let path = folder.join(NAME);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| TaskError::io(&path, "write")(error.into()))?;
        fs::write(&path, text).map_err(TaskError::io(&path, "write"))
    }
}

//! The error type of this crate.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::Refusal;

/// What can go wrong with a configuration, a checkpoint or a tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An input is not what it has to be.
    #[error(transparent)]
    Refusal(#[from] Refusal),
    /// The operating system refused a file operation.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file that should be JSON is not.
    #[error("{}: expected the JSON this file has to hold, found {source}; fix: get the file again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why the text stops being what was expected.
        source: serde_json::Error,
    },
}

impl Error {
    /// A refusal from its four parts.
    pub fn refusal(
        subject: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::Refusal(Refusal::new(subject, expected, found, fix))
    }

    /// A failed file operation; a missing file and a full disk become refusals that say what to do.
    pub fn io(path: impl AsRef<Path>, source: io::Error) -> Self {
        let path = path.as_ref();
        match source.kind() {
            io::ErrorKind::NotFound => Self::refusal(
                path.display().to_string(),
                "an existing file or folder",
                "nothing at this path",
                "check the path",
            ),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::refusal(
                path.display().to_string(),
                "room to write",
                source.to_string(),
                "free space on this disk or choose another output folder",
            ),
            _ => Self::Io {
                path: path.to_owned(),
                source,
            },
        }
    }

    /// The refusal inside, if the error is one.
    pub fn as_refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refusal(refusal) => Some(refusal),
            Self::Io { .. } | Self::Json { .. } => None,
        }
    }
}

//! What can go wrong in a task, with what was found, what is needed and what to do.

use std::io;
use std::path::{Path, PathBuf};

/// A task that did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TaskError {
    /// Something that must be there is not, or is not usable.
    #[error("{what}\n  found:  {found}\n  needed: {needed}\n  fix:    {fix}")]
    Missing {
        what: String,
        found: String,
        needed: String,
        fix: String,
    },
    /// A file could not be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        path: PathBuf,
        action: &'static str,
        source: io::Error,
    },
    /// A program that a task runs said no.
    #[error("`{program}` failed ({status})")]
    Failed { program: String, status: String },
    /// The command line was wrong.
    #[error("{0}; `cargo xtask help` lists the commands")]
    Usage(String),
}

impl TaskError {
    pub(crate) fn missing(
        what: impl Into<String>,
        found: impl Into<String>,
        needed: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::Missing {
            what: what.into(),
            found: found.into(),
            needed: needed.into(),
            fix: fix.into(),
        }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    /// Wraps an input or output error with the path that it was about.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Io {
            path,
            action,
            source,
        }
    }

    /// 1: a check said no; 2: the task could not run.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Failed { .. } => 1,
            Self::Missing { .. } | Self::Io { .. } | Self::Usage(_) => 2,
        }
    }
}

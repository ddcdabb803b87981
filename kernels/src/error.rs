//! What can go wrong with kernels.

use std::io;
use std::path::{Path, PathBuf};

use mlac_model::Refusal;

use crate::compiler::CompilerName;

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, KernelError>;

/// An error, with the kernel, file or component that it is about.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A request, or a missing component, named with what was expected, found, and the way out.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A file could not be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The compiler said no.
    #[error("kernel {kernel}: {compiler} could not {action} ({code}):\n{log}")]
    Compile {
        /// The request.
        kernel: String,
        /// The compiler.
        compiler: CompilerName,
        /// What was asked of it.
        action: &'static str,
        /// Its error's name, or how it ended.
        code: String,
        /// Its log.
        log: String,
    },
    /// A tool of the toolkit said no, or answered what cannot be read.
    #[error("{tool}: {message}")]
    Tool {
        /// The program.
        tool: String,
        /// Its answer.
        message: String,
    },
    /// The CUDA driver said no.
    #[error("CUDA driver: cannot {action}: {message}")]
    Driver {
        /// What was asked of it.
        action: String,
        /// Its answer.
        message: String,
    },
}

impl KernelError {
    /// Wraps an input or output error with its path.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Io {
            path,
            action,
            source,
        }
    }
}

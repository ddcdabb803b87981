//! What can go wrong in a command, and the exit code it maps to.

use std::path::Path;

use mlac_model::Refusal;

/// Why a command did not finish.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An input, option or file was refused.
    #[error(transparent)]
    Refusal(#[from] Refusal),
    /// From the checkpoint readers and writers.
    #[error(transparent)]
    Model(#[from] mlac_model::Error),
    /// From the conversion's mathematics.
    #[error(transparent)]
    Converter(#[from] mlac_converter::Error),
    /// From the graph builders and the ONNX writer.
    #[error(transparent)]
    Graph(#[from] mlac_graph::Error),
    /// From a runtime.
    #[error(transparent)]
    Engine(#[from] mlac_engines::EngineError),
    /// From the kernels: their compiler, their cache.
    #[error(transparent)]
    Kernel(#[from] mlac_kernels::KernelError),
    /// Turning something into JSON or back failed.
    #[error("{subject}: {source}")]
    Json {
        /// What was written or read.
        subject: String,
        /// What serde said.
        source: serde_json::Error,
    },
}

impl Error {
    /// A JSON error with what was written or read.
    pub fn json(subject: impl Into<String>, source: serde_json::Error) -> Self {
        Self::Json {
            subject: subject.into(),
            source,
        }
    }

    /// An I/O error with the path it happened at; a missing file or a full disk is a refusal.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Model(mlac_model::Error::io(path.as_ref(), source))
    }
}

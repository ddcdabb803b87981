//! What can go wrong with a runtime.

use std::io;
use std::path::{Path, PathBuf};

use mlac_model::Refusal;

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, EngineError>;

/// An error of a runtime, with the file or component that it is about.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// An input, or a missing component, named with what was expected, found, and the way out.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Our own kernels: their compiler, or the driver.
    #[error(transparent)]
    Kernel(#[from] mlac_kernels::KernelError),
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
    /// ONNX Runtime said no.
    #[error("{subject}: ONNX Runtime could not {action}: {message}")]
    OnnxRuntime {
        /// The model or library that it was about.
        subject: String,
        /// What was asked of it.
        action: &'static str,
        /// Its own words.
        message: String,
    },
    /// TensorRT said no.
    #[error("{subject}: TensorRT could not {action}:{}", lines(messages))]
    TensorRt {
        /// The ONNX file or library that it was about.
        subject: String,
        /// What was asked of it.
        action: &'static str,
        /// All of its parser's errors and its logged errors, in order.
        messages: Vec<String>,
    },
}

impl EngineError {
    /// Wraps an input or output error with its path.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Io {
            path,
            action,
            source,
        }
    }

    /// Wraps an error of `ort`.
    pub(crate) fn ort<E: std::fmt::Display>(
        subject: &str,
        action: &'static str,
    ) -> impl FnOnce(E) -> Self + use<E> {
        let subject = subject.to_owned();
        move |error| Self::OnnxRuntime {
            subject,
            action,
            message: error.to_string(),
        }
    }
}

fn lines(messages: &[String]) -> String {
    if messages.is_empty() {
        return " it logged nothing".into();
    }
    messages.iter().fold(String::new(), |mut text, message| {
        text.push_str("\n  ");
        text.push_str(message);
        text
    })
}

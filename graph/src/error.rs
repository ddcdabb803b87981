//! What can go wrong in this crate.

use std::path::PathBuf;

use mlac_model::Refusal;

/// An error of the graph crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A node was given inputs that its operator does not take.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A finished graph breaks an invariant of [`crate::validate`].
    #[error(transparent)]
    Invalid(#[from] crate::validate::Violation),
    /// A configuration, an option or a tensor that cannot be turned into a graph.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A file could not be written.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The source of the weights failed.
    #[error("cannot read tensor {name}")]
    Source {
        /// The tensor's name in the checkpoint.
        name: String,
        /// The source's reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A node that cannot exist: its inputs do not fit its operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("node {node}: expected {expected}, found {found}")]
pub struct NodeError {
    /// The node's name and operator.
    pub node: String,
    /// What the operator takes.
    pub expected: String,
    /// What it was given.
    pub found: String,
}

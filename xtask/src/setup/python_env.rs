//! A Python package folder for the tests: ONNX Runtime's own front end and `onnx.checker`.
//!
//! Used as `PYTHONPATH=target/runtime/python`; the interpreter is the user's.

use std::path::{Path, PathBuf};

use super::{Component, Context, pinned, pip};
use crate::error::TaskError;
use crate::workspace::Workspace;

const LIST: &str = "python.txt";
const FOLDER: &str = "python";

pub(super) const COMPONENT: Component = Component {
    title: "Python packages for the tests (onnxruntime, onnx, numpy)",
    folder: FOLDER,
    recipe,
    produce,
};

/// The folder to put on `PYTHONPATH`.
pub(crate) fn python_path(workspace: &Workspace) -> PathBuf {
    workspace.runtime().join(FOLDER)
}

fn recipe(context: &Context<'_>) -> Result<Vec<u8>, TaskError> {
    pinned(context, LIST)
}

fn produce(context: &Context<'_>, staging: &Path) -> Result<Vec<PathBuf>, TaskError> {
    pip::install(context, LIST, staging)?;
    Ok([
        "onnxruntime",
        "onnx",
        "numpy",
        "ml_dtypes",
        "flatbuffers",
        "packaging",
    ]
    .iter()
    .map(|package| Path::new(package).join("__init__.py"))
    .chain([
        PathBuf::from("google/protobuf/__init__.py"),
        PathBuf::from("typing_extensions.py"),
    ])
    .collect())
}

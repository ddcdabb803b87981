//! TensorRT for RTX: `target/runtime/tensorrt_rtx/libtensorrt_rtx.so.1` and its ONNX parser.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Component, Context, pinned, pip, remove, take};
use crate::error::TaskError;

const LIST: &str = "tensorrt_rtx.txt";
const LIBRARIES: [&str; 2] = ["libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"];

pub(super) const COMPONENT: Component = Component {
    title: "TensorRT for RTX 1.7.1 libraries",
    folder: "tensorrt_rtx",
    recipe: |context| pinned(context, LIST),
    produce,
};

fn produce(context: &Context<'_>, staging: &Path) -> Result<Vec<PathBuf>, TaskError> {
    let wheel = staging.join("wheel");
    pip::install(context, LIST, &wheel)?;
    for library in LIBRARIES {
        take(
            &wheel.join("tensorrt_rtx_libs").join(library),
            &staging.join(library),
        )?;
    }
    // NVIDIA's licence travels with the libraries that it covers.
    let licence = wheel.join("tensorrt_rtx_cu13_libs-1.7.1.116.dist-info/licenses/LICENSE.txt");
    if licence.is_file() {
        fs::rename(&licence, staging.join("LICENSE.txt"))
            .map_err(TaskError::io(&licence, "move"))?;
    }
    remove(&wheel)?;
    Ok(LIBRARIES.iter().map(PathBuf::from).collect())
}

//! CUDA's compiler and its disassembler: `target/runtime/cuda/{lib,bin}`.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Component, Context, pinned, pip, remove, take};
use crate::error::TaskError;

const LIST: &str = "cuda.txt";

/// Folder and name, in the wheels' `nvidia/cu13` and in ours.
const FILES: [&str; 4] = [
    "lib/libnvrtc.so.13",
    "lib/libnvrtc-builtins.so.13.0",
    "bin/cuobjdump",
    "bin/nvdisasm",
];

pub(super) const COMPONENT: Component = Component {
    title: "CUDA 13.0 compiler (NVRTC 13.0.88, cuobjdump, nvdisasm)",
    folder: "cuda",
    recipe: |context| pinned(context, LIST),
    produce,
};

fn produce(context: &Context<'_>, staging: &Path) -> Result<Vec<PathBuf>, TaskError> {
    let wheel = staging.join("wheel");
    pip::install(context, LIST, &wheel)?;
    for file in FILES {
        take(
            &wheel.join("nvidia").join("cu13").join(file),
            &staging.join(file),
        )?;
    }
    // NVIDIA's licence travels with the libraries that it covers.
    let licence = wheel.join("nvidia_cuda_nvrtc-13.0.88.dist-info/licenses/License.txt");
    if licence.is_file() {
        fs::rename(&licence, staging.join("LICENSE.txt"))
            .map_err(TaskError::io(&licence, "move"))?;
    }
    remove(&wheel)?;
    Ok(FILES.iter().map(PathBuf::from).collect())
}

//! CUDA's compilers and disassembler: `target/runtime/cuda/{lib,bin,nvvm,include}`.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Component, Context, pinned, pip, remove, take};
use crate::error::TaskError;

const LIST: &str = "cuda.txt";

/// Folder and name, in the wheels' `nvidia/cu13` and in ours.
const FILES: [&str; 8] = [
    "lib/libnvrtc.so.13",
    "lib/libnvrtc-builtins.so.13.0",
    "bin/cuobjdump",
    "bin/nvdisasm",
    "bin/nvcc",
    "bin/nvcc.profile",
    "bin/ptxas",
    "nvvm/bin/cicc",
];

/// What nvcc includes, a folder, and the files of it that two packages bring.
const HEADERS: &str = "include";
const INCLUDED: [&str; 2] = ["include/cuda_runtime.h", "include/crt/host_config.h"];

pub(super) const COMPONENT: Component = Component {
    title: "CUDA 13.0 compilers (NVRTC 13.0.88, nvcc 13.0.88, cuobjdump, nvdisasm)",
    folder: "cuda",
    recipe,
    produce,
};

/// Which files are taken belongs to it: a list may hold packages of which other files were taken.
fn recipe(context: &Context<'_>) -> Result<Vec<u8>, TaskError> {
    let mut bytes = pinned(context, LIST)?;
    bytes.extend(FILES.join("\n").into_bytes());
    Ok(bytes)
}

fn produce(context: &Context<'_>, staging: &Path) -> Result<Vec<PathBuf>, TaskError> {
    let wheel = staging.join("wheel");
    pip::install(context, LIST, &wheel)?;
    for file in FILES.into_iter().chain([HEADERS]) {
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
    Ok(FILES.iter().chain(&INCLUDED).map(PathBuf::from).collect())
}

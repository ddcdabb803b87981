//! Our C++ shim over TensorRT's interface: `target/runtime/tensorrt_shim/libmlac_trt_shim.so`.
//!
//! TensorRT's objects are C++ classes with virtual functions; the shim turns the handful that mlac
//! uses into plain C functions. It links nothing: `mlac-engines` hands it the loaded libraries'
//! entry points. Compiling it takes well under a second.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Component, Context, headers};
use crate::error::TaskError;
use crate::process::{quiet, tail};

const LIBRARY: &str = "libmlac_trt_shim.so";
const FLAGS: [&str; 6] = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wall",
];

pub(super) const COMPONENT: Component = Component {
    title: "TensorRT shim",
    folder: "tensorrt_shim",
    recipe,
    produce,
};

fn source(context: &Context<'_>) -> PathBuf {
    context
        .workspace
        .root()
        .join("engines")
        .join("shim")
        .join("shim.cpp")
}

fn recipe(context: &Context<'_>) -> Result<Vec<u8>, TaskError> {
    let path = source(context);
    let mut bytes = fs::read(&path).map_err(TaskError::io(&path, "read the shim's source"))?;
    bytes.extend_from_slice(FLAGS.join(" ").as_bytes());
    let headers = context
        .workspace
        .runtime()
        .join("tensorrt_headers")
        .join("setup.json");
    bytes.extend_from_slice(&fs::read(&headers).unwrap_or_default());
    Ok(bytes)
}

fn produce(context: &Context<'_>, staging: &Path) -> Result<Vec<PathBuf>, TaskError> {
    let compiler = headers::compiler()?;
    let include = context.workspace.runtime().join("tensorrt_headers");
    let answer = quiet(
        Command::new(&compiler)
            .args(FLAGS)
            .arg("-isystem")
            .arg(include.join("rtx"))
            .arg("-isystem")
            .arg(include.join("cuda"))
            .arg(source(context))
            .arg("-o")
            .arg(staging.join(LIBRARY)),
    );
    match answer {
        Some(answer) if answer.ok => Ok(vec![LIBRARY.into()]),
        answer => Err(TaskError::missing(
            "the TensorRT shim does not compile",
            answer.map_or_else(
                || "the compiler did not start".into(),
                |answer| tail(&answer.text, 12),
            ),
            "a C++17 compiler",
            "set CXX to g++ 9 or later",
        )),
    }
}

//! Our C++ against TensorRT's headers: the shims over its interface, one for each product, and the plugin library.
//!
//! TensorRT's objects are C++ classes with virtual functions; a shim turns the handful that mlac
//! uses into plain C functions. None of the libraries links TensorRT or CUDA: `mlac-engines` hands the shims the
//! loaded libraries' entry points, and the plugin library is loaded by TensorRT itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Component, Context, headers};
use crate::error::TaskError;
use crate::process::{quiet, tail};

const SHIM: &str = "libmlac_trt_shim.so";
const PLUGIN: &str = "libmlac_trt.so";
const FLAGS: [&str; 7] = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wall",
    // A name that only a library could bring is an error now, not when it is loaded.
    "-Wl,-z,defs",
];

pub(super) const RTX: Component = Component {
    title: "TensorRT shim",
    folder: "tensorrt_shim",
    recipe: |context| recipe(&shim(context, &["shim.h", "shim.cpp"]), context),
    produce: |context, staging| {
        let sources = shim(context, &["shim.cpp"]);
        compile(context, staging, "rtx", &sources, SHIM)
    },
};

pub(super) const ENTERPRISE: Component = Component {
    title: "TensorRT shim for enterprise TensorRT",
    folder: "tensorrt_enterprise_shim",
    recipe: |context| recipe(&shim(context, &["shim.h", "shim.cpp", "run.cpp"]), context),
    produce: |context, staging| {
        let sources = shim(context, &["shim.cpp", "run.cpp"]);
        compile(context, staging, "enterprise", &sources, SHIM)
    },
};

pub(super) const PLUGINS: Component = Component {
    title: "TensorRT plugin",
    folder: "tensorrt_plugin",
    recipe: |context| recipe(&plugin(context)?, context),
    produce: |context, staging| {
        let sources: Vec<PathBuf> = plugin(context)?
            .into_iter()
            .filter(|path| path.extension().is_some_and(|e| e == "cpp"))
            .collect();
        compile(context, staging, "enterprise", &sources, PLUGIN)
    },
};

/// Files of the shim's source.
fn shim(context: &Context<'_>, files: &[&str]) -> Vec<PathBuf> {
    let folder = context.workspace.root().join("engines/shim");
    files.iter().map(|file| folder.join(file)).collect()
}

/// Every file of the plugin's source, in name order.
fn plugin(context: &Context<'_>) -> Result<Vec<PathBuf>, TaskError> {
    let folder = context.workspace.root().join("kernels/plugin");
    let mut files = Vec::new();
    for entry in fs::read_dir(&folder).map_err(TaskError::io(&folder, "list the folder"))? {
        files.push(
            entry
                .map_err(TaskError::io(&folder, "list the folder"))?
                .path(),
        );
    }
    files.sort();
    Ok(files)
}

fn recipe(sources: &[PathBuf], context: &Context<'_>) -> Result<Vec<u8>, TaskError> {
    let mut bytes = FLAGS.join(" ").into_bytes();
    for path in sources {
        bytes.extend(fs::read(path).map_err(TaskError::io(path, "read the source"))?);
    }
    let headers = context
        .workspace
        .runtime()
        .join("tensorrt_headers")
        .join("setup.json");
    bytes.extend_from_slice(&fs::read(&headers).unwrap_or_default());
    Ok(bytes)
}

fn compile(
    context: &Context<'_>,
    staging: &Path,
    set: &str,
    sources: &[PathBuf],
    library: &str,
) -> Result<Vec<PathBuf>, TaskError> {
    let compiler = headers::compiler()?;
    let include = context.workspace.runtime().join("tensorrt_headers");
    let answer = quiet(
        Command::new(&compiler)
            .args(FLAGS)
            .arg("-isystem")
            .arg(include.join(set))
            .arg("-isystem")
            .arg(include.join("cuda"))
            .args(sources)
            .arg("-o")
            .arg(staging.join(library))
            .arg("-ldl"),
    );
    match answer {
        Some(answer) if answer.ok => Ok(vec![library.into()]),
        answer => Err(TaskError::missing(
            format!("{library} does not compile"),
            answer.map_or_else(
                || "the compiler did not start".into(),
                |answer| tail(&answer.text, 12),
            ),
            "a C++17 compiler",
            "set CXX to g++ 9 or later",
        )),
    }
}

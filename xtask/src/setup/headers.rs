//! TensorRT's Apache-2.0 headers: `target/runtime/tensorrt_headers/`.
//!
//! They come out of the `trtx-sys` crate, which cargo fetches by the checksum in
//! `xtask/headers/Cargo.lock`. Nothing of that crate is compiled.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Component, Context};
use crate::error::TaskError;
use crate::process::{quiet, tail};

/// The header set of the pinned TensorRT for RTX, and the enterprise one for plugins.
const SETS: [(&str, &str); 2] = [
    ("TRT-RTX-1.7", "rtx"),
    ("TRT-Enterprise-11.4", "enterprise"),
];

pub(super) const COMPONENT: Component = Component {
    title: "TensorRT headers",
    folder: "tensorrt_headers",
    recipe,
    produce,
};

fn manifest(context: &Context<'_>) -> PathBuf {
    context
        .workspace
        .root()
        .join("xtask")
        .join("headers")
        .join("Cargo.toml")
}

fn recipe(context: &Context<'_>) -> Result<Vec<u8>, TaskError> {
    let lock = manifest(context).with_file_name("Cargo.lock");
    let text = fs::read_to_string(&lock).map_err(TaskError::io(&lock, "read the pinned list"))?;
    let entry = text
        .split("[[package]]")
        .find(|entry| entry.contains("name = \"trtx-sys\""));
    Ok(format!("2 {}", entry.unwrap_or_default()).into_bytes())
}

fn produce(context: &Context<'_>, staging: &Path) -> Result<Vec<PathBuf>, TaskError> {
    let crate_folder = crate_folder(context)?;
    let source = crate_folder.join("TensorRT-Headers");
    let mut files = Vec::new();
    for (set, short) in SETS {
        copy_tree(&source.join(set), &staging.join(short))?;
        files.push(Path::new(short).join("NvInfer.h"));
        files.push(Path::new(short).join("NvOnnxParser.h"));
    }
    let cuda = Path::new("cuda").join("cuda_runtime_api.h");
    copy(&source.join("cuda_runtime_api.h"), &staging.join(&cuda))?;
    files.push(cuda);
    Ok(files)
}

/// Where cargo unpacked the crate.
fn crate_folder(context: &Context<'_>) -> Result<PathBuf, TaskError> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
        ])
        .arg("--manifest-path")
        .arg(manifest(context));
    if context.offline {
        command.arg("--offline");
    }
    let failed = |found: String| {
        TaskError::missing(
            "cannot fetch the TensorRT headers",
            found,
            "the crate trtx-sys 0.9.1 at the checksum of xtask/headers/Cargo.lock",
            "run `cargo xtask setup` once with network access to the crate registry",
        )
    };
    let answer = command
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !answer.status.success() {
        return Err(failed(tail(&String::from_utf8_lossy(&answer.stderr), 6)));
    }
    let metadata: serde_json::Value =
        serde_json::from_slice(&answer.stdout).map_err(|error| failed(error.to_string()))?;
    metadata["packages"]
        .as_array()
        .and_then(|packages| {
            packages
                .iter()
                .find(|package| package["name"] == "trtx-sys")
        })
        .and_then(|package| package["manifest_path"].as_str())
        .and_then(|path| Path::new(path).parent())
        .map(Path::to_path_buf)
        .ok_or_else(|| failed("no package trtx-sys in cargo's answer".into()))
}

fn copy_tree(from: &Path, to: &Path) -> Result<(), TaskError> {
    for entry in fs::read_dir(from).map_err(TaskError::io(from, "list the folder"))? {
        let path = entry
            .map_err(TaskError::io(from, "list the folder"))?
            .path();
        let Some(name) = path.file_name() else {
            continue;
        };
        if path.is_dir() {
            copy_tree(&path, &to.join(name))?;
        } else {
            copy(&path, &to.join(name))?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<(), TaskError> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(TaskError::io(parent, "create the folder"))?;
    }
    fs::copy(from, to).map_err(TaskError::io(from, "copy"))?;
    Ok(())
}

/// The C++ compiler, or what to do without one.
pub(super) fn compiler() -> Result<PathBuf, TaskError> {
    let chosen = std::env::var_os("CXX")
        .filter(|value| !value.is_empty())
        .unwrap_or_else(|| "g++".into());
    let path = PathBuf::from(chosen);
    match quiet(Command::new(&path).arg("--version")) {
        Some(answer) if answer.ok => Ok(path),
        other => Err(TaskError::missing(
            "no C++ compiler",
            other.map_or_else(
                || format!("no `{}`", path.display()),
                |answer| tail(&answer.text, 2),
            ),
            "g++ 9 or later, to compile the TensorRT shim",
            "install g++ (Debian: apt-get install g++), or set CXX to a C++17 compiler",
        )),
    }
}

//! `cargo xtask gpu-check`: a folder that checks and times the kernels on a machine with nothing but an NVIDIA driver.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cargo;
use crate::error::TaskError;
use crate::process::{line, on_terminal};
use crate::setup;
use crate::workspace::Workspace;

const OUT: &str = "target/gpu-check";
const PROGRAM: &str = "mlac-gpu-check";
/// What a pack may take: it is copied to the machine with the GPU.
const LIMIT: u64 = 60 << 20;

pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    setup::ensure(workspace, false)?;
    let (folder, archs) = arguments(workspace, args)?;
    step(cargo(workspace).args([
        "build",
        "--quiet",
        "--release",
        "-p",
        "mlac-kernels",
        "--bin",
        PROGRAM,
    ]))?;
    let built = target(workspace).join("release").join(PROGRAM);
    if folder.is_dir() {
        fs::remove_dir_all(&folder).map_err(TaskError::io(&folder, "remove the previous pack"))?;
    }
    let mut pack = Command::new(&built);
    pack.current_dir(workspace.root())
        .arg("--pack")
        .arg(&folder);
    if let Some(archs) = archs {
        pack.arg("--arch").arg(archs);
    }
    step(&mut pack)?;
    step(Command::new(folder.join(PROGRAM)).arg("--self-test"))?;
    let bytes = size(&folder)?;
    println!(
        "\ngpu-check: {:.1} MiB in {}; copy it to the GPU machine and run ./{PROGRAM} there",
        bytes as f64 / f64::from(1 << 20),
        folder.display()
    );
    if bytes > LIMIT {
        return Err(TaskError::missing(
            "the pack is too large",
            format!("{bytes} bytes"),
            format!("at most {LIMIT}"),
            "pack fewer architectures with --arch",
        ));
    }
    Ok(())
}

/// `--output FOLDER` and `--arch LIST`.
fn arguments(
    workspace: &Workspace,
    args: &[String],
) -> Result<(PathBuf, Option<String>), TaskError> {
    let (mut folder, mut archs) = (workspace.root().join(OUT), None);
    let mut words = args.iter();
    while let Some(word) = words.next() {
        match (word.as_str(), words.next()) {
            ("--output", Some(value)) => folder = PathBuf::from(value),
            ("--arch", Some(value)) => archs = Some(value.clone()),
            _ => {
                return Err(TaskError::usage(format!(
                    "gpu-check takes --output FOLDER and --arch LIST, got `{word}`"
                )));
            }
        }
    }
    Ok((folder, archs))
}

/// Where cargo puts what it builds.
fn target(workspace: &Workspace) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .filter(|value| !value.is_empty())
        .map_or_else(|| workspace.root().join("target"), PathBuf::from)
}

fn step(command: &mut Command) -> Result<(), TaskError> {
    println!("\n$ {}", line(command));
    on_terminal(command)
}

/// Bytes of the files of a folder.
fn size(folder: &Path) -> Result<u64, TaskError> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).map_err(TaskError::io(folder, "list the folder"))? {
        let path = entry
            .map_err(TaskError::io(folder, "list the folder"))?
            .path();
        bytes += fs::metadata(&path)
            .map_err(TaskError::io(&path, "look at"))?
            .len();
    }
    Ok(bytes)
}

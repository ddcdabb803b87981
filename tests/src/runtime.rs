//! What `cargo xtask setup` installs under `target/runtime`, as the tests use it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Outcome;

const FIX: &str = "run `cargo xtask setup`";

/// The checkout.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// `target/runtime`.
fn installed() -> PathBuf {
    root().join("target").join("runtime")
}

/// SmolLM2-135M-Instruct's GGUF file.
pub fn smollm2() -> Outcome<PathBuf> {
    let models = installed().join("models");
    let mut found: Vec<PathBuf> = std::fs::read_dir(&models)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "gguf")
        })
        .collect();
    found.sort();
    found.into_iter().next().ok_or_else(|| {
        format!(
            "SmolLM2: found no .gguf file in {}, needed SmolLM2-135M-Instruct.Q4_1.gguf; fix: {FIX}",
            models.display()
        )
    })
}

/// Python with the packages of set-up (onnx, onnxruntime, numpy) and nothing else, ready to run a
/// script of `tests/`.
pub fn python(script: &str) -> Outcome<Command> {
    let packages = installed().join("python");
    for package in ["numpy", "onnx", "onnxruntime"] {
        if !packages.join(package).is_dir() {
            return Err(format!(
                "Python package {package}: found nothing at {}, needed the packages of the tests; fix: {FIX}",
                packages.join(package).display()
            ));
        }
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    if !script.is_file() {
        return Err(format!(
            "{}: found no such file; fix: restore it",
            script.display()
        ));
    }
    let mut command = Command::new(interpreter());
    command
        .arg("-s")
        .arg(script)
        .env("PYTHONPATH", packages)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PYTHONNOUSERSITE", "1");
    Ok(command)
}

/// The interpreter that set-up used: `MLAC_PYTHON`, else `python3.11`, else `python3`.
fn interpreter() -> OsString {
    let chosen = std::env::var_os("MLAC_PYTHON").filter(|value| !value.is_empty());
    chosen.unwrap_or_else(|| {
        let starts = Command::new("python3.11")
            .arg("--version")
            .output()
            .is_ok_and(|answer| answer.status.success());
        if starts { "python3.11" } else { "python3" }.into()
    })
}

/// Runs a command and gives its output; anything but exit code 0 is an error with all it said.
pub fn output(command: &mut Command) -> Outcome<String> {
    let shown = format!("{command:?}");
    let found = command.output().map_err(|error| {
        format!("{shown}: could not start: {error}; needed Python 3.11; fix: install it, or set MLAC_PYTHON")
    })?;
    let out = String::from_utf8_lossy(&found.stdout).into_owned();
    if found.status.success() {
        return Ok(out);
    }
    let shown: String = shown.chars().take(400).collect();
    Err(format!(
        "{shown}: {}\n{out}{}",
        found.status,
        String::from_utf8_lossy(&found.stderr)
    ))
}

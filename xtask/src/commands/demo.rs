//! `cargo xtask demo`: SmolLM2-135M from GGUF to a verified MLA engine and a sentence.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use super::cargo;
use crate::error::TaskError;
use crate::process::{line, on_terminal};
use crate::setup;
use crate::workspace::Workspace;

const OUT: &str = "target/demo";
const PROMPT: &str = "The capital of France is";

pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    let started = Instant::now();
    setup::ensure(workspace, false)?;
    remove_previous(&workspace.root().join(OUT))?;

    let mut compile = mlac(workspace);
    compile
        .args([
            "compile",
            "target/runtime/models/SmolLM2-135M-Instruct.Q4_1.gguf",
            "-o",
            OUT,
        ])
        .args(["--budget", "0.5"])
        .args(["--form", "ort"])
        .args(["--calib", "target/runtime/text/calibration.txt"])
        .args(["--eval", "target/runtime/text/evaluation.txt"])
        .args(["--target", "sm89,sm120"])
        .args(args);
    step(&mut compile)?;

    let mut generate = mlac(workspace);
    generate.args(["generate", OUT, "--prompt", PROMPT, "--max-tokens", "32"]);
    step(&mut generate)?;

    println!(
        "\ndemo: {:.0} s in all; the report is {OUT}/report.html",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The demo owns its output folder; an earlier run's is removed.
fn remove_previous(folder: &Path) -> Result<(), TaskError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(TaskError::io(folder, "remove the previous demo")(error))
        }
        _ => Ok(()),
    }
}

fn mlac(workspace: &Workspace) -> Command {
    let mut command = cargo(workspace);
    command.args(["run", "--quiet", "--release", "-p", "mlac", "--"]);
    command
}

fn step(command: &mut Command) -> Result<(), TaskError> {
    println!("\n$ {}", line(command));
    on_terminal(command)
}

//! `cargo xtask oracle`: regenerates the reference fixtures with their original programs and
//! compares them with the committed ones; then converts the GPT-OSS fixtures with `mlac` and loads
//! the folders in transformers with the code that lies in them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cargo;
use crate::error::TaskError;
use crate::process::on_terminal;
use crate::setup;
use crate::workspace::Workspace;

const SCRIPT: &str = "tests/oracle/oracle.py";
/// Where converted fixtures are written.
const CONVERTED: &str = "target/oracle/converted";
/// Sizes of the cache at which fixtures are converted.
const SIZES: [[&str; 2]; 2] = [["--kv-lora-rank", "max"], ["--budget", "0.4"]];

pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    setup::ensure(workspace, false)?;
    let script = workspace.root().join(SCRIPT);
    if !script.is_file() {
        return Err(TaskError::missing(
            "no oracle script",
            format!("no file {SCRIPT}"),
            "the script that writes the reference fixtures",
            "check the file out again (`git status` lists what is missing)",
        ));
    }
    on_terminal(python(workspace)?.arg(&script).args(args))?;
    if args.is_empty() {
        let pairs = convert_fixtures(workspace)?;
        on_terminal(python(workspace)?.arg(&script).arg("remote").args(pairs))?;
    }
    Ok(())
}

fn python(workspace: &Workspace) -> Result<Command, TaskError> {
    let mut command = Command::new(setup::interpreter()?);
    command
        .current_dir(workspace.root())
        .env("PYTHONPATH", setup::python_path(workspace));
    Ok(command)
}

/// Converts every GPT-OSS fixture in every size, sliding layers too and full ones only; the folders,
/// each followed by the fixture's texts.
fn convert_fixtures(workspace: &Workspace) -> Result<Vec<PathBuf>, TaskError> {
    let out = workspace.root().join(CONVERTED);
    if out.exists() {
        fs::remove_dir_all(&out).map_err(TaskError::io(&out, "remove earlier conversions"))?;
    }
    fs::create_dir_all(&out).map_err(TaskError::io(&out, "create the folder"))?;
    let mut pairs = Vec::new();
    for fixture in gpt_oss_fixtures(workspace)? {
        for layers in ["all", "full"] {
            for size in SIZES {
                let name = fixture.file_name().unwrap_or_default().to_string_lossy();
                let folder = out.join(format!("{name}-{layers}-{}", size[1]));
                on_terminal(
                    cargo(workspace)
                        .args(["run", "--quiet", "-p", "mlac", "--", "convert"])
                        .arg(&fixture)
                        .arg("-o")
                        .arg(&folder)
                        .args(["--layers", layers, "--calib", "none"])
                        .args(size),
                )?;
                pairs.extend([folder, fixture.join("io.safetensors")]);
            }
        }
    }
    Ok(pairs)
}

fn gpt_oss_fixtures(workspace: &Workspace) -> Result<Vec<PathBuf>, TaskError> {
    let folder: &Path = &workspace.root().join("tests/fixtures");
    let read = TaskError::io(folder, "list the fixtures");
    let entries: std::io::Result<Vec<PathBuf>> =
        fs::read_dir(folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut found = entries.map_err(read)?;
    found.retain(|path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("gpt_oss"))
    });
    found.sort();
    Ok(found)
}

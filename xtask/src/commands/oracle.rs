//! `cargo xtask oracle`: regenerates the reference fixtures with their original programs and
//! compares them with the committed ones.

use std::process::Command;

use crate::error::TaskError;
use crate::process::on_terminal;
use crate::setup;
use crate::workspace::Workspace;

const SCRIPT: &str = "tests/oracle/oracle.py";

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
    on_terminal(
        Command::new(setup::interpreter()?)
            .current_dir(workspace.root())
            .env("PYTHONPATH", setup::python_path(workspace))
            .arg(script)
            .args(args),
    )
}

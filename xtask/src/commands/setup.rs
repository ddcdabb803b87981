//! `cargo xtask setup [--offline]`.

use std::time::Instant;

use crate::error::TaskError;
use crate::setup;
use crate::workspace::Workspace;

pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    let offline = match args {
        [] => false,
        [flag] if flag == "--offline" => true,
        other => {
            return Err(TaskError::usage(format!(
                "setup takes --offline only, got `{}`",
                other.join(" ")
            )));
        }
    };
    let started = Instant::now();
    setup::ensure(workspace, offline)?;
    println!(
        "setup: everything is in {} ({:.2} s)",
        workspace.runtime().display(),
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

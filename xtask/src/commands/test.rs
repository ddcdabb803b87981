//! `cargo xtask test`: everything that must hold before a change goes in.

use std::time::Instant;

use super::cargo;
use crate::error::TaskError;
use crate::process::{line, on_terminal};
use crate::setup;
use crate::workspace::Workspace;

/// The stages in order: the cheapest first. Title, cargo arguments, extra rustdoc flags.
const STAGES: [(&str, &[&str], Option<&str>); 4] = [
    ("formatting", &["fmt", "--all", "--check"], None),
    (
        "lints",
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ],
        None,
    ),
    (
        "documentation",
        &["doc", "--workspace", "--no-deps", "--quiet"],
        Some("-D warnings"),
    ),
    // Last, so that the runners' own totals close the output.
    ("tests", &["test", "--workspace", "--no-fail-fast"], None),
];

pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    if !args.is_empty() {
        return Err(TaskError::usage(format!(
            "test takes no arguments, got `{}` (for one test: cargo test -p <package> <name>)",
            args.join(" ")
        )));
    }
    setup::ensure(workspace, false)?;
    for (title, arguments, rustdoc_flags) in STAGES {
        let mut command = cargo(workspace);
        command.args(arguments);
        if let Some(flags) = rustdoc_flags {
            command.env("RUSTDOCFLAGS", flags);
        }
        eprintln!("\n==> {title}: {}", line(&command));
        let started = Instant::now();
        let result = on_terminal(&mut command);
        eprintln!("==> {title}: {:.1} s", started.elapsed().as_secs_f64());
        result?;
    }
    Ok(())
}

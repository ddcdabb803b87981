//! Running other programs: quietly, with their whole output in the error, or on the terminal.

use std::process::{Command, Stdio};

use crate::error::TaskError;

/// What a quiet program wrote.
pub(crate) struct Quiet {
    pub(crate) ok: bool,
    pub(crate) text: String,
}

/// Runs a program to its end and keeps what it wrote (standard output, then standard error).
/// `None` when there is no such program.
pub(crate) fn quiet(command: &mut Command) -> Option<Quiet> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Some(Quiet {
        ok: output.status.success(),
        text,
    })
}

/// Runs a program on this terminal; its failure is an error that shows the command line.
pub(crate) fn on_terminal(command: &mut Command) -> Result<(), TaskError> {
    let shown = line(command);
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(TaskError::Failed {
            program: shown,
            status: status.to_string(),
        }),
        Err(error) => Err(TaskError::missing(
            format!("cannot start `{shown}`"),
            error.to_string(),
            "the program on PATH",
            "install it, or put its folder on PATH",
        )),
    }
}

/// The command line as a person would type it.
pub(crate) fn line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|part| part.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The last lines of a program's output, indented, for an error message.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    all[all.len().saturating_sub(lines)..].join("\n          ")
}

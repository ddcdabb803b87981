//! `cargo xtask make-gpt-oss`: a synthetic checkpoint of the size of GPT-OSS.

use crate::error::TaskError;
use crate::workspace::Workspace;

/// Writes the checkpoint.
#[cfg(any(feature = "synthetic", test))]
pub(crate) fn run(_: &Workspace, args: &[String]) -> Result<(), TaskError> {
    crate::gpt_oss::run(args)
}

/// Builds this program once more, optimised and with the product's writer, and lets that one work
/// in the same folder.
#[cfg(not(any(feature = "synthetic", test)))]
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    crate::process::on_terminal(
        std::process::Command::new(cargo)
            .args(["run", "--quiet", "--release", "--package", "xtask"])
            .args(["--features", "synthetic", "--manifest-path"])
            .arg(workspace.root().join("Cargo.toml"))
            .args(["--", "make-gpt-oss"])
            .args(args),
    )
}

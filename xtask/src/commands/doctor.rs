//! `cargo xtask doctor`: the product's own `mlac doctor`, from this checkout.

use super::cargo;
use crate::error::TaskError;
use crate::process::on_terminal;
use crate::workspace::Workspace;

pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    on_terminal(
        cargo(workspace)
            .args(["run", "--quiet", "-p", "mlac", "--", "doctor"])
            .args(args),
    )
}

//! One file per command.

pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod gpu_check;
pub(crate) mod make_gpt_oss;
pub(crate) mod oracle;
pub(crate) mod setup;
pub(crate) mod test;

use std::process::Command;

use crate::workspace::Workspace;

/// `cargo` in the checkout.
fn cargo(workspace: &Workspace) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace.root());
    command
}

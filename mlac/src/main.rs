//! The `mlac` command. Exit codes: 0 done, 1 a check said no, 2 could not run.

use std::process::ExitCode;

use clap::Parser;
use mlac::cli::{args::Cli, commands};

#[expect(clippy::print_stderr, reason = "errors go to standard error")]
fn main() -> ExitCode {
    mlac_engines::allocator::keep_large_blocks();
    let cli = Cli::parse();
    match commands::run(cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            ExitCode::from(2)
        }
    }
}

/// The error and what caused it, in one line; a cause that the message repeats is left out.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

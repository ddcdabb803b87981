//! Everything that runs around the product: set-up, tests, demo.
//!
//! `cargo xtask setup | test | demo | oracle | doctor | gpu-check | make-gpt-oss`. Each command first installs,
//! pinned and checksummed, what it needs into `target/runtime`; when that is done already it costs
//! milliseconds and no network.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line tool"
)]
#![allow(
    clippy::doc_markdown,
    reason = "product names in prose: TensorRT, SmolLM2"
)]

mod commands;
mod error;
#[cfg(any(feature = "synthetic", test))]
mod gpt_oss;
mod process;
mod setup;
mod workspace;

use std::process::ExitCode;

use error::TaskError;
use workspace::Workspace;

const HELP: &str = "\
Usage: cargo xtask <command> [arguments]

Commands:
  setup [--offline]  install the pinned runtimes, model and text into target/runtime
  test               set-up, then formatting, lints, tests and documentation
  demo [args]        set-up, then compile SmolLM2-135M to MLA end to end and generate a sentence
  oracle [args]      set-up, then regenerate the reference fixtures and compare them
  doctor [args]      what was found, what is needed, how to get it
  gpu-check          set-up, then pack the kernels into a folder that checks and times them on a GPU machine:
                     [--output FOLDER] [--arch sm_90a,sm_80]
  make-gpt-oss       a synthetic checkpoint in the exact form of GPT-OSS, to convert without a download:
                     --size 20b|120b --output FOLDER [--layers N] [--seed S]

Arguments after `demo`, `oracle` and `doctor` go to the program that they run.
Example: cargo xtask demo";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    let workspace = Workspace::here();
    let done = match command.as_str() {
        "setup" => commands::setup::run(&workspace, &rest),
        "test" => commands::test::run(&workspace, &rest),
        "demo" => commands::demo::run(&workspace, &rest),
        "oracle" => commands::oracle::run(&workspace, &rest),
        "doctor" => commands::doctor::run(&workspace, &rest),
        "gpu-check" => commands::gpu_check::run(&workspace, &rest),
        "make-gpt-oss" => commands::make_gpt_oss::run(&workspace, &rest),
        "" | "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(())
        }
        other => Err(TaskError::usage(format!("no command `{other}`"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nxtask: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

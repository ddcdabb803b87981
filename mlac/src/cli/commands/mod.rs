//! Every command: arguments resolved, the pipeline's step run, the result printed. One file each.

mod bench;
mod build;
mod compile;
mod convert;
mod doctor;
mod eval;
mod export;
mod generate;
mod kernels;
mod plan;
mod verify;

use std::io::{self, Write};

use mlac_model::Refusal;
use serde::Serialize;

use crate::cli::args::{Cli, Command};
use crate::error::Error;
use crate::pipeline::convert::pretty;
use crate::progress::Progress;

/// What every command shares.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    json: bool,
    threads: usize,
    progress: Progress,
}

/// Runs a command; `false` when a check said no.
pub fn run(cli: Cli) -> Result<bool, Error> {
    let threads = cli
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    if threads == 0 {
        return Err(
            Refusal::new("--threads", "at least 1", "0", "leave it out for all cores").into(),
        );
    }
    // A pool that exists already (tests) keeps its size.
    let _ = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global();
    let context = Context {
        json: cli.json,
        threads,
        progress: Progress::detect(),
    };
    match cli.command {
        Command::Doctor => doctor::run(context),
        Command::Plan(args) => plan::run(&args, context),
        Command::Convert(args) => convert::run(&args, context),
        Command::Export(args) => export::run(&args, context),
        Command::Build(args) => build::run(&args, context),
        Command::Verify(args) => verify::run(&args, context),
        Command::Eval(args) => eval::run(&args, context),
        Command::Generate(args) => generate::run(&args, context),
        Command::Bench(args) => bench::run(&args, context),
        Command::Kernels(command) => kernels::run(&command, context),
        Command::Compile(args) => compile::run(&args, context),
    }
}

impl Context {
    /// Prints the result: JSON when asked, else text. A reader that closes the pipe has seen what it wanted.
    fn show(self, value: &impl Serialize, text: &str) -> Result<(), Error> {
        let text = if self.json {
            pretty(value)?
        } else {
            format!("{}\n", text.trim_end())
        };
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Error::io("standard output", error))
            }
            _ => Ok(()),
        }
    }
}

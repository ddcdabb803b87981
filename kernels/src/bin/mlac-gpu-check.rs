//! The program of the folder that `cargo xtask gpu-check` packs. Exit codes: 0 done, 1 a check said no, 2 could not run.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line tool"
)]

use std::path::PathBuf;
use std::process::ExitCode;

use mlac_kernels::gpu_check::{Options, pack, run, self_test};
use mlac_kernels::{Arch, KernelError};
use mlac_model::Refusal;

const HELP: &str = "\
Checks mlac's attention kernels on this machine's GPU: parity with an f64 reference, then speed.
It needs nothing but an NVIDIA driver for CUDA 13.0 or later.

Usage: mlac-gpu-check [--device N] [--seed S] [--repeats N] [--json FILE] [--peers FOLDER] [--parity-only]
       mlac-gpu-check --self-test
       mlac-gpu-check --pack FOLDER [--arch sm_90a,sm_80]

  --device N     the GPU (0)
  --seed S       repeat a run's inputs (default: fresh ones)
  --repeats N    times each shape is timed (30)
  --json FILE    where the results go (gpu-check.json beside the program); the picture beside it, .svg
  --peers FOLDER run FlashMLA and FlashAttention-3 too: FOLDER is what fetch_peers.py made where there is a
                 network; needs a Python with PyTorch 2.11 (python3, or MLAC_PYTHON)
  --parity-only  one short comparison of each kernel, nothing else, nothing written
  --self-test    check the folder on the CPU: digests, ELF headers, emulator parity
  --pack FOLDER  compile the kernels and fill a folder (needs `cargo xtask setup`)
  --arch LIST    architectures to pack (sm_90a)

Example: ./mlac-gpu-check --json results.json";

struct Arguments {
    pack: Option<PathBuf>,
    archs: Vec<Arch>,
    self_test: bool,
    json: Option<PathBuf>,
    options: Options,
}

fn number<T: std::str::FromStr>(word: &str, text: &str) -> Result<T, Refusal> {
    text.parse()
        .map_err(|_| Refusal::new(word, "a number", text, "see --help"))
}

fn parse() -> Result<Option<Arguments>, Refusal> {
    let mut arguments = Arguments {
        pack: None,
        archs: vec![Arch::Sm90a],
        self_test: false,
        json: None,
        options: Options {
            device: 0,
            seed: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |t| t.as_nanos() as u64),
            repeats: 30,
            parity_only: false,
            peers: None,
        },
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .ok_or_else(|| Refusal::new(&word, "a value after it", "nothing", "see --help"))
        };
        match word.as_str() {
            "--help" | "-h" => return Ok(None),
            "--self-test" => arguments.self_test = true,
            "--parity-only" => arguments.options.parity_only = true,
            "--pack" => arguments.pack = Some(value()?.into()),
            "--peers" => arguments.options.peers = Some(value()?.into()),
            "--json" => arguments.json = Some(value()?.into()),
            "--device" => arguments.options.device = number(&word, &value()?)?,
            "--seed" => arguments.options.seed = number(&word, &value()?)?,
            "--repeats" => arguments.options.repeats = number(&word, &value()?)?,
            "--arch" => {
                arguments.archs = value()?
                    .split(',')
                    .map(str::parse)
                    .collect::<Result<_, _>>()?;
            }
            _ => {
                return Err(Refusal::new(
                    "command line",
                    "an option of --help",
                    word,
                    "see --help",
                ));
            }
        }
    }
    Ok(Some(arguments))
}

fn main() -> ExitCode {
    match go() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn go() -> Result<bool, KernelError> {
    let Some(arguments) = parse()? else {
        println!("{HELP}");
        return Ok(true);
    };
    if let Some(folder) = &arguments.pack {
        let packed = pack(folder, &arguments.archs)?;
        println!(
            "{} kernels by {} in {}",
            packed.kernels.len(),
            packed.compiler,
            folder.display()
        );
        return Ok(true);
    }
    let program = std::env::current_exe().map_err(|source| KernelError::Io {
        path: "mlac-gpu-check".into(),
        action: "find the program",
        source,
    })?;
    let folder = program.parent().unwrap_or(&program);
    if arguments.self_test {
        println!("{}", self_test(folder)?);
        return Ok(true);
    }
    let results = run(folder, &arguments.options, |line| println!("{line}"))?;
    if arguments.options.parity_only {
        return Ok(results.passed());
    }
    println!("\n{}", results.table());
    let path = arguments
        .json
        .unwrap_or_else(|| folder.join("gpu-check.json"));
    let failed = |source| KernelError::Io {
        path: path.clone(),
        action: "write",
        source,
    };
    let text = serde_json::to_vec_pretty(&results).map_err(|error| failed(error.into()))?;
    std::fs::write(&path, text).map_err(failed)?;
    let picture = path.with_extension("svg");
    std::fs::write(&picture, results.svg()).map_err(|source| KernelError::Io {
        path: picture.clone(),
        action: "write",
        source,
    })?;
    println!("{}\n{}", path.display(), picture.display());
    if !results.passed() {
        println!("FAILED: a kernel differs from the reference, or its runs differ from each other");
    }
    Ok(results.passed())
}

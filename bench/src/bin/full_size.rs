//! Conversion and export at full size: memory, speed against `cp` of the same bytes, and what a
//! killed run leaves. Writes a section of `bench/RESULTS.md`.
//!
//! `cargo run --release -p mlac-bench --bin full_size -- SOURCE WORK`: SOURCE is a GPT-OSS checkpoint
//! (`cargo xtask make-gpt-oss` writes one), WORK a folder on the same disk with twice its size free.
//! Needs GNU time; `mlac` must lie built beside this program.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line tool"
)]

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mlac_bench::results::{results_file, table, write_section};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const GIB: f64 = (1_u64 << 30) as f64;
/// What `mlac convert` gets besides its folders.
const CONVERT: [&str; 4] = ["--budget", "0.5", "--calib", "none"];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [source, work] = args.as_slice() else {
        eprintln!("Usage: full_size SOURCE WORK");
        return ExitCode::from(2);
    };
    match run(Path::new(source), Path::new(work)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("full_size: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One command against `cp` of what it reads or writes.
struct Row {
    what: &'static str,
    bytes: u64,
    seconds: f64,
    copy_bytes: u64,
    copy_seconds: f64,
    peak: u64,
}

impl Row {
    fn speed(&self) -> f64 {
        self.bytes as f64 / GIB / self.seconds
    }

    fn copy_speed(&self) -> f64 {
        self.copy_bytes as f64 / GIB / self.copy_seconds
    }
}

fn run(source: &Path, work: &Path) -> Outcome {
    let name = source
        .file_name()
        .map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let at = |suffix: &str| work.join(format!("{name}-{suffix}"));
    let (mla, onnx, copy) = (at("mla"), at("onnx"), at("copy"));
    for folder in [&mla, &onnx, &copy] {
        remove(folder)?;
    }

    let mlac = built_mlac()?;
    let convert = |to: &Path| {
        let mut command = Command::new(&mlac);
        command.arg("convert").arg(source).arg("-o").arg(to);
        command.args(CONVERT);
        command
    };
    let export = |to: &Path| {
        let mut command = Command::new(&mlac);
        command.arg("export").arg(&mla).arg("-o").arg(to);
        command
    };
    let copy_seconds = copied(source, &copy)?;
    let converted = measured("convert", &convert(&mla), &mla, (source, copy_seconds))?;
    let copy_seconds = copied(&mla, &copy)?;
    let exported = measured("export", &export(&onnx), &onnx, (&mla, copy_seconds))?;

    let again = at("again");
    let mut kept = Vec::new();
    for (what, first, command, seconds) in [
        ("convert", &mla, convert(&again), converted.seconds),
        ("export", &onnx, export(&again), exported.seconds),
    ] {
        remove(&again)?;
        kept.push(killed_and_repeated(what, command, &again, first, seconds)?);
        remove(&again)?;
    }

    let rows = [&converted, &exported].map(|row| {
        vec![
            row.what.to_owned(),
            format!("{:.2} GB", row.bytes as f64 / 1e9),
            format!("{:.1} s", row.seconds),
            format!("{:.2} GiB/s", row.speed()),
            format!("{:.2} GiB/s", row.copy_speed()),
            format!("{:.0} %", 100.0 * row.speed() / row.copy_speed()),
            format!("{:.2} GiB", row.peak as f64 / GIB),
        ]
    });
    let head = [
        "command",
        "written",
        "time with sync",
        "speed",
        "cp with sync",
        "of cp",
        "peak memory",
    ];
    let body = format!(
        "Source {name}, {:.2} GB. `mlac convert` with `{}`, then `mlac export`. Speeds count the bytes written, both \
         sides end with `sync`; `cp` copied what the command reads, just before it, with the page cache dropped where \
         the system lets us. Peak memory is the maximum resident set size of GNU time.\n\n{}\n{}\n",
        size(source)? as f64 / 1e9,
        CONVERT.join(" "),
        table(&head, &rows),
        kept.join("\n")
    );
    println!("{body}");
    let command = "cargo run --release -p mlac-bench --bin full_size -- SOURCE WORK";
    write_section(
        &results_file(),
        &format!("Full size: {name}"),
        command,
        &body,
    )?;
    Ok(())
}

/// The `mlac` that lies built beside this program.
fn built_mlac() -> Outcome<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name("mlac");
    if beside.is_file() {
        return Ok(beside);
    }
    Err(format!(
        "{}: expected mlac built beside this program, found none; fix: cargo build --release -p mlac",
        beside.display()
    )
    .into())
}

/// Copies a folder and waits for the disk; the copy is removed again.
fn copied(source: &Path, copy: &Path) -> Outcome<f64> {
    settle()?;
    let started = Instant::now();
    succeed(Command::new("cp").arg("-r").arg(source).arg(copy))?;
    succeed(&mut Command::new("sync"))?;
    let seconds = started.elapsed().as_secs_f64();
    println!("cp {}: {seconds:.1} s", source.display());
    remove(copy)?;
    Ok(seconds)
}

/// Runs a command under GNU time and waits for the disk.
fn measured(
    what: &'static str,
    command: &Command,
    output: &Path,
    (read, copy_seconds): (&Path, f64),
) -> Outcome<Row> {
    settle()?;
    let started = Instant::now();
    let out = Command::new("time")
        .arg("-v")
        .arg(command.get_program())
        .args(command.get_args())
        .output()
        .map_err(|e| format!("GNU time cannot be started ({e}): install the package time"))?;
    succeed(&mut Command::new("sync"))?;
    let seconds = started.elapsed().as_secs_f64();
    let text = String::from_utf8_lossy(&out.stderr);
    if !out.status.success() {
        return Err(format!("{command:?} failed:\n{text}").into());
    }
    let peak = text
        .lines()
        .find_map(|line| {
            line.trim()
                .strip_prefix("Maximum resident set size (kbytes): ")
        })
        .and_then(|kib| kib.parse::<u64>().ok())
        .ok_or("GNU time did not print the maximum resident set size")?
        * 1024;
    let row = Row {
        what,
        bytes: size(output)?,
        seconds,
        copy_bytes: size(read)?,
        copy_seconds,
        peak,
    };
    println!(
        "{what}: {seconds:.1} s, {:.0} % of cp, peak {:.2} GiB",
        100.0 * row.speed() / row.copy_speed(),
        peak as f64 / GIB
    );
    Ok(row)
}

/// Starts a command, kills it halfway, runs it again and compares what it wrote with `first`.
fn killed_and_repeated(
    what: &str,
    mut command: Command,
    output: &Path,
    first: &Path,
    seconds: f64,
) -> Outcome<String> {
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    thread::sleep(Duration::from_secs_f64(seconds / 2.0));
    let running = child.try_wait()?.is_none();
    child.kill()?;
    child.wait()?;
    if !running {
        return Err(format!("{what} ended before half of its time").into());
    }
    if output.exists() {
        return Err(format!("the killed {what} left {}", output.display()).into());
    }
    succeed(&mut command)?;
    let (expected, found) = (files(first)?, files(output)?);
    if expected.keys().ne(found.keys()) {
        return Err(format!("the repeated {what} wrote other files").into());
    }
    for (name, path) in &expected {
        if !same(path, &found[name])? {
            return Err(format!("{name} differs after a killed {what}").into());
        }
    }
    Ok(format!(
        "`{what}` killed after {:.0} s left nothing under its name; run again, all {} files are byte for byte those of \
         the undisturbed run.",
        seconds / 2.0,
        expected.len()
    ))
}

fn files(folder: &Path) -> Outcome<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        found.insert(
            entry.file_name().to_string_lossy().into_owned(),
            entry.path(),
        );
    }
    Ok(found)
}

fn same(a: &Path, b: &Path) -> Outcome<bool> {
    let (mut a, mut b) = (fs::File::open(a)?, fs::File::open(b)?);
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    let (mut x, mut y) = (vec![0; 8 << 20], vec![0; 8 << 20]);
    loop {
        let n = a.read(&mut x)?;
        if n == 0 {
            return Ok(true);
        }
        b.read_exact(&mut y[..n])?;
        if x[..n] != y[..n] {
            return Ok(false);
        }
    }
}

fn size(folder: &Path) -> Outcome<u64> {
    files(folder)?
        .values()
        .map(|path| Ok(fs::metadata(path)?.len()))
        .sum()
}

/// Everything on the disk and, where we may, nothing of it in memory.
fn settle() -> Outcome {
    succeed(&mut Command::new("sync"))?;
    if let Err(error) = fs::write("/proc/sys/vm/drop_caches", "3") {
        eprintln!("the page cache stays as it is: {error}");
    }
    Ok(())
}

fn remove(folder: &Path) -> Outcome {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn succeed(command: &mut Command) -> Outcome {
    let status = command.status()?;
    if status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {status}").into())
}

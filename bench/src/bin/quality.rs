//! Perplexity at equal cache, for several methods, sizes, seeds and window lengths, and without each
//! step of the recipe. Writes a section of `bench/RESULTS.md` and, with more than one size, `docs/quality.svg`.
//!
//! `cargo run --release -p mlac-bench --bin quality -- --model MODEL --calib TEXT --eval TEXT --work DIR`;
//! without arguments it says which options there are. `mlac` must lie built beside this program. WORK
//! keeps one small file of each run, so that an interrupted program goes on where it was.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line tool"
)]

use std::error::Error;
use std::fs::{self, File};
use std::path::Path;
use std::process::ExitCode;

use mlac::pipeline::steps::STEPS;
use mlac_bench::quality::harness::{Entry, Harness};
use mlac_bench::quality::jobs::{Job, jobs};
use mlac_bench::quality::mlac::Mlac;
use mlac_bench::quality::request::{Request, USAGE};
use mlac_bench::quality::section::Results;
use mlac_bench::results::{results_file, write_section};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.is_empty() || args.iter().any(|a| a == "--help" || a == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let request = match Request::parse(&args) {
        Ok(request) => request,
        Err(refusal) => {
            eprintln!("quality: {refusal}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&request) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quality: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(request: &Request) -> Outcome {
    fs::create_dir_all(&request.work)?;
    // Held until the end; a killed program lets go of it.
    let lock = File::create(request.work.join("lock"))?;
    if lock.try_lock().is_err() {
        return Err(format!("{}: another run is going on there", request.work.display()).into());
    }
    let mlac = Mlac::beside(&request.work)?;
    let measures_memory = mlac.measures_memory();
    let harness = Harness::open(request, mlac)?;
    let names = STEPS.map(|(name, _)| name);
    let jobs = jobs(request, &names);

    let mut entries: Vec<Entry> = Vec::new();
    for (i, job) in jobs.iter().enumerate() {
        let place = format!("[{}/{}] {}", i + 1, jobs.len(), job.label());
        let kept = harness
            .kept(job)
            .filter(|e| !(request.retry && e.failure().is_some()));
        let entry = match kept {
            Some(entry) => {
                println!("{place}: {} (kept)", outcome(&entry));
                entry
            }
            None if request.no_runs => {
                println!("{place}: not run");
                continue;
            }
            None => {
                println!("{place} ...");
                let entry = harness.run(job)?;
                println!("{place}: {}", outcome(&entry));
                entry
            }
        };
        if is_reference(job, request) && entry.failure().is_some() {
            let failure = entry.failure().unwrap_or_default();
            return Err(format!("nothing to compare with: {failure}").into());
        }
        entries.push(entry);
    }

    let results = Results::new(request, &harness, &entries, &STEPS, measures_memory);
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let (file, chart, link) = match &request.output {
        None => (
            results_file(),
            repository.join("docs/quality.svg"),
            "../docs/quality.svg",
        ),
        Some(folder) => {
            fs::create_dir_all(folder)?;
            (
                folder.join("RESULTS.md"),
                folder.join("quality.svg"),
                "quality.svg",
            )
        }
    };
    let svg = results.chart();
    if let Some(svg) = &svg {
        fs::write(&chart, svg)?;
        println!("{}", chart.display());
    }
    write_section(
        &file,
        &results.title(),
        &request.command,
        &results.body(svg.is_some().then_some(link)),
    )?;
    println!("{}", file.display());
    Ok(())
}

/// Whether a job is what the main table compares with.
fn is_reference(job: &Job, request: &Request) -> bool {
    job.conversion.is_none() && job.windows[0].length == request.eval_window
}

/// What came out of a job, in a few words.
fn outcome(entry: &Entry) -> String {
    let mut seconds = entry.convert.as_ref().map_or(0.0, |s| s.seconds);
    seconds += entry.measured.iter().map(|m| m.step.seconds).sum::<f64>();
    let perplexities: Vec<String> = entry
        .measured
        .iter()
        .filter_map(|m| Some(format!("{:.4}", m.perplexity?)))
        .collect();
    let mut words = vec![format!("{seconds:.0} s")];
    if !perplexities.is_empty() {
        words.push(format!("perplexity {}", perplexities.join(", ")));
    }
    words.extend(entry.failure().map(|f| format!("failed: {f}")));
    words.join(", ")
}

//! Synthetic GPT-OSS checkpoints of full size: everything as published except the numbers.
//!
//! Compiled only with the feature `synthetic` (and in tests), so that the other tasks need no
//! library of the product.

mod layout;
mod numbers;
#[cfg(test)]
mod tests;
mod tokenizer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mlac_model::{CheckpointWriter, Error, TensorInfo};
use serde_json::Value;

use crate::error::TaskError;
use layout::Sizes;
use numbers::{Bell, Source};

/// Bytes made and written at once.
const CHUNK: usize = 1 << 20;

/// Room left free on the disk, for the file system and for others.
const SPARE: u64 = 256 << 20;

/// What the command line asked for.
#[derive(Debug)]
struct Request {
    sizes: Sizes,
    /// Layers of the published model.
    all_layers: usize,
    output: PathBuf,
    seed: u64,
}

/// Runs `make-gpt-oss` in this process.
pub(crate) fn run(args: &[String]) -> Result<(), TaskError> {
    let request = parse(args)?;
    let Request { sizes, output, .. } = &request;
    let shards = sizes.shards().map_err(refused)?;
    let bytes = bytes_of(&shards).map_err(refused)?;
    if sizes.layers < request.all_layers {
        println!(
            "only the first {} of {} layers",
            sizes.layers, request.all_layers
        );
    }
    println!(
        "{}: {:.2} GB in {} files, seed {}",
        output.display(),
        bytes as f64 / 1e9,
        shards.len(),
        request.seed
    );
    refuse_full_disk(output, bytes)?;
    let started = Instant::now();
    make(sizes, shards, request.seed, output, &mut |done| {
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "{:>3} %  {:.2} GB  {:.0} MB/s",
            done * 100 / bytes.max(1),
            done as f64 / 1e9,
            done as f64 / 1e6 / seconds
        );
    })
    .map_err(refused)?;
    println!("complete after {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn parse(args: &[String]) -> Result<Request, TaskError> {
    let (mut size, mut output, mut layers, mut seed) = (None, None, None, 0);
    let mut args = args.iter();
    while let Some(option) = args.next() {
        let value = args
            .next()
            .ok_or_else(|| TaskError::usage(format!("{option} without a value")))?;
        let wrong =
            |expected: &str| TaskError::usage(format!("{option} takes {expected}, got `{value}`"));
        match option.as_str() {
            "--size" => {
                size = Some(match value.as_str() {
                    "20b" => Sizes::SMALL,
                    "120b" => Sizes::LARGE,
                    _ => return Err(wrong("20b or 120b")),
                });
            }
            "--output" => output = Some(PathBuf::from(value)),
            "--layers" => {
                layers = Some(value.parse().map_err(|_| wrong("a number of layers"))?);
            }
            "--seed" => seed = value.parse().map_err(|_| wrong("a whole number"))?,
            _ => {
                return Err(TaskError::usage(format!(
                    "make-gpt-oss has no option `{option}`"
                )));
            }
        }
    }
    let (Some(mut sizes), Some(output)) = (size, output) else {
        return Err(TaskError::usage(
            "make-gpt-oss needs --size 20b|120b and --output FOLDER",
        ));
    };
    let all_layers = sizes.layers;
    sizes.layers = layers.unwrap_or(all_layers);
    if !(1..=all_layers).contains(&sizes.layers) {
        return Err(TaskError::usage(format!(
            "--layers takes 1 to {all_layers}, got `{}`",
            sizes.layers
        )));
    }
    Ok(Request {
        sizes,
        all_layers,
        output,
        seed,
    })
}

fn bytes_of(shards: &[(String, Vec<TensorInfo>)]) -> Result<u64, Error> {
    shards
        .iter()
        .flat_map(|(_, tensors)| tensors)
        .map(|info| info.byte_len().map(|bytes| bytes as u64))
        .sum()
}

fn refuse_full_disk(output: &Path, bytes: u64) -> Result<(), TaskError> {
    let existing = output
        .ancestors()
        .find(|folder| folder.is_dir())
        .unwrap_or(Path::new("."));
    let disk = rustix::fs::statvfs(existing)
        .map_err(|error| TaskError::io(existing, "ask for free space")(error.into()))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free >= bytes.saturating_add(SPARE) {
        return Ok(());
    }
    Err(TaskError::missing(
        format!("{}: not enough room", output.display()),
        format!("{:.2} GB free", free as f64 / 1e9),
        format!("{:.2} GB", (bytes + SPARE) as f64 / 1e9),
        "free space, choose another disk, or make fewer layers (--layers)",
    ))
}

fn refused(error: Error) -> TaskError {
    match error {
        Error::Refusal(refusal) => TaskError::missing(
            refusal.subject,
            refusal.found,
            refusal.expected,
            refusal.fix,
        ),
        other => TaskError::missing(
            "writing the checkpoint",
            other.to_string(),
            "files that can be written",
            "check the output folder",
        ),
    }
}

/// Writes a checkpoint; `progress` hears now and then how many bytes are there.
fn make(
    sizes: &Sizes,
    shards: Vec<(String, Vec<TensorInfo>)>,
    seed: u64,
    output: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let tensors: Vec<TensorInfo> = shards.iter().flat_map(|(_, t)| t).cloned().collect();
    let writer = CheckpointWriter::create_shards(output, shards)?;
    write_texts(sizes, &writer)?;
    let bell = Bell::new();
    let (next, done, running) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicUsize::new(0));
    let failure = Mutex::new(None);
    let work = || {
        let mut chunk = vec![0; CHUNK];
        while let Some(info) = tensors.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = write_tensor(&writer, info, seed, &bell, &mut chunk, &done) {
                next.store(tensors.len(), Ordering::Relaxed);
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        }
        running.fetch_sub(1, Ordering::Release);
    };
    let threads = thread::available_parallelism().map_or(2, usize::from);
    running.store(threads, Ordering::Relaxed);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
        let mut told = Instant::now();
        while running.load(Ordering::Acquire) > 0 {
            thread::sleep(Duration::from_millis(20));
            if told.elapsed() >= Duration::from_secs(2) {
                told = Instant::now();
                progress(done.load(Ordering::Relaxed));
            }
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => writer.finish(),
    }
}

fn write_tensor(
    writer: &CheckpointWriter,
    info: &TensorInfo,
    seed: u64,
    bell: &Bell,
    chunk: &mut [u8],
    done: &AtomicU64,
) -> Result<(), Error> {
    let source = Source::new(seed, info, bell);
    let length = info.byte_len()?;
    writer.write_stream(&info.name, |sink| {
        for offset in (0..length).step_by(CHUNK) {
            let chunk = &mut chunk[..CHUNK.min(length - offset)];
            source.fill(offset, chunk);
            sink.put(chunk)?;
            done.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    })
}

fn write_texts(sizes: &Sizes, writer: &CheckpointWriter) -> Result<(), Error> {
    let json =
        |name: &str, value: &Value| writer.write_file(name, format!("{value:#}\n").as_bytes());
    json("config.json", &sizes.config_json())?;
    json("generation_config.json", &sizes.generation_json())?;
    json(
        "tokenizer.json",
        &tokenizer::tokenizer_json(sizes.first_special),
    )?;
    json("tokenizer_config.json", &tokenizer::config_json())?;
    writer.write_file("chat_template.jinja", tokenizer::CHAT_TEMPLATE.as_bytes())
}

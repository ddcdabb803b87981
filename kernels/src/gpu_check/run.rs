//! Parity and speed on a GPU.

use std::path::{Path, PathBuf};

use mlac_model::Refusal;

use super::bench::{Most, Shape, compare_with_gqa, copy_bandwidth, figures, splits, time};
use super::matmul::product;
use super::pack::{PROGRAM, Pack, Packed};
use super::parity::{append, parity};
use super::peers;
use super::results::Results;
use super::sanitize::{find, sanitize};
use crate::error::Result;
use crate::launch::{Decoder, Device};
use crate::problem::Problem;

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The GPU.
    pub device: u32,
    /// Seed of the inputs; a fresh one every run unless it is to be repeated.
    pub seed: u64,
    /// Times each kernel is timed.
    pub repeats: usize,
    /// Whether to stop after one short comparison of each kernel, as under compute-sanitizer.
    pub parity_only: bool,
    /// Folder with other people's kernels, as `peers/fetch_peers.py` makes it; none: they are not run.
    pub peers: Option<PathBuf>,
}

const LENGTHS: [&[u32]; 3] = [&[0, 1, 63, 64, 65, 777], &[4096, 130, 65, 2000], &[16_500]];
/// Rows that are appended at a time: one, those of a decode step, those of a prompt.
const APPENDED: [usize; 3] = [1, 70, 1000];
const SHAPES: [(u32, u32); 5] = [
    (1, 32_768),
    (1, 131_072),
    (32, 4096),
    (32, 32_768),
    (128, 4096),
];

/// Checks and times every kernel of the folder that is for this GPU.
///
/// # Errors
/// Without a driver or a GPU, or when no kernel is for it.
pub fn run(folder: &Path, options: &Options, mut tell: impl FnMut(&str)) -> Result<Results> {
    let pack = Pack::open(folder)?;
    let device = Device::open(options.device)?;
    let (major, minor) = device.capability();
    let mine: Vec<&Packed> = pack
        .kernels
        .iter()
        .filter(|p| p.desc.arch.capability() == device.capability())
        .collect();
    if mine.is_empty() {
        return Err(Refusal::new(
            folder.display().to_string(),
            format!(
                "kernels for {} (compute capability {major}.{minor})",
                device.name()
            ),
            "none",
            "pack with `cargo xtask gpu-check --arch` of this GPU",
        )
        .into());
    }
    let stream = device.stream()?;
    let mut results = Results {
        device: device.name().to_owned(),
        multiprocessors: device.multiprocessors(),
        seed: options.seed,
        copy_gigabytes_per_second: if options.parity_only {
            0.0
        } else {
            copy_bandwidth(&device, &stream, options.repeats)?
        },
        matmul: product(&device, &stream, folder, &pack, options)?,
        parity: Vec::new(),
        append: Vec::new(),
        sanitized: Vec::new(),
        bench: Vec::new(),
        splits: Vec::new(),
        peers: Vec::new(),
        skipped: Vec::new(),
    };
    tell(&format!(
        "{}, {} multiprocessors, copy {:.0} GB/s, seed {}",
        results.device, results.multiprocessors, results.copy_gigabytes_per_second, results.seed
    ));
    match &results.matmul {
        Some(product) => tell(&product.line()),
        None => results
            .skipped
            .push("a dense product: none is packed for this GPU".to_owned()),
    }
    let lengths = &LENGTHS[..if options.parity_only {
        1
    } else {
        LENGTHS.len()
    }];
    for packed in &mine {
        let decoder = Decoder::load(
            &device,
            &packed.desc,
            &packed.config,
            &pack.cubin(folder, packed)?,
        )?;
        for (i, lengths) in lengths.iter().enumerate() {
            let problem = Problem::random(packed.desc, lengths, options.seed + i as u64);
            let parity = parity(&device, &stream, packed, &decoder, &problem)?;
            tell(&format!(
                "{:<44} {:>30}  max abs {:.2e}  norm {:.1e}  lse {:.1e}  {}",
                parity.kernel,
                format!("{lengths:?}"),
                parity.max_abs,
                parity.relative,
                parity.lse,
                verdict(parity.complaint.as_deref(), parity.same_bits)
            ));
            results.parity.push(parity);
        }
        for tokens in APPENDED {
            let seed = options.seed ^ tokens as u64;
            let Some(rows) = append(&device, &stream, packed.desc, &decoder, tokens, seed)? else {
                continue;
            };
            tell(&format!(
                "{:<44} {:>30}  {}",
                rows.kernel,
                format!("append {tokens}"),
                verdict(rows.complaint.as_deref(), rows.same_bits)
            ));
            results.append.push(rows);
        }
    }
    if options.parity_only {
        return Ok(results);
    }
    match find() {
        Some(sanitizer) => {
            let program = folder.join(PROGRAM);
            let (device, seed) = (options.device.to_string(), options.seed.to_string());
            let arguments = ["--parity-only", "--device", &device, "--seed", &seed];
            let arguments = arguments.map(str::to_owned);
            results.sanitized = sanitize(&sanitizer, &program, &arguments, &mut tell)?;
        }
        None => results
            .skipped
            .push("compute-sanitizer: not on this machine".to_owned()),
    }
    let most = Most {
        gigabytes_per_second: results.copy_gigabytes_per_second,
        teraflops: results.matmul.as_ref().and_then(|m| m.teraflops),
    };
    for packed in &mine {
        let decoder = Decoder::load(
            &device,
            &packed.desc,
            &packed.config,
            &pack.cubin(folder, packed)?,
        )?;
        for (batch, context) in SHAPES {
            let shape = Shape { batch, context };
            match time(
                &device,
                &stream,
                &packed.desc,
                &packed.config,
                &decoder,
                shape,
                options,
            )? {
                Some(microseconds) => {
                    let bench = figures(&packed.desc, shape, microseconds, most);
                    results.bench.push(bench);
                }
                None => results.skipped.push(format!(
                    "{} at {batch} x {context}: the caches take more than half of the GPU's memory",
                    packed.desc.slug()
                )),
            }
        }
    }
    results.splits = splits(&device, &stream, folder, &pack, options)?;
    match &options.peers {
        Some(extensions) => {
            // They want the memory that this process holds.
            drop(stream);
            drop(device);
            results.peers = peers::run(folder, extensions, options, &SHAPES, &mut tell)?;
        }
        None => results
            .skipped
            .push("FlashMLA, FlashAttention-3, PyTorch: give --peers FOLDER".to_owned()),
    }
    compare_with_gqa(&mine, &results.peers, &mut results.bench);
    Ok(results)
}

/// The last column of a comparison.
fn verdict(complaint: Option<&str>, same_bits: bool) -> String {
    match (complaint, same_bits) {
        (Some(complaint), _) => format!("FAILED: {complaint}"),
        (None, false) => "FAILED: runs differ".to_owned(),
        (None, true) => "ok".to_owned(),
    }
}

//! Parity and speed on a GPU.

use std::fmt::Write as _;
use std::path::Path;

use mlac_model::Refusal;
use serde::Serialize;

use super::pack::{Pack, Packed};
use crate::desc::{Attention, AttentionDesc};
use crate::error::Result;
use crate::launch::{Buffer, Call, Decoder, Device, Region, Stream, Workspace};
use crate::problem::{Answer, Difference, Problem, Random, bits, compare, from_bits};

/// What to run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The GPU.
    pub device: u32,
    /// Seed of the inputs; a fresh one every run unless it is to be repeated.
    pub seed: u64,
    /// Times each kernel is timed.
    pub repeats: usize,
}

/// Comparison of one kernel on one problem.
#[derive(Debug, Clone, Serialize)]
pub struct Parity {
    /// The request.
    pub kernel: String,
    /// Lengths of the requests in the batch.
    pub lengths: Vec<u32>,
    /// Largest absolute difference from the f64 reference.
    pub max_abs: f32,
    /// Norm of the difference over the norm of the reference.
    pub relative: f64,
    /// Largest relative difference of log-sum-exps.
    pub lse: f32,
    /// Whether three runs had the same bits.
    pub same_bits: bool,
    /// What is beyond tolerance.
    pub complaint: Option<String>,
}

/// Time of one kernel on one shape.
#[derive(Debug, Clone, Serialize)]
pub struct Bench {
    /// The request.
    pub kernel: String,
    /// Requests.
    pub batch: u32,
    /// Cached tokens of each.
    pub context: u32,
    /// Median of the repeats.
    pub microseconds: f64,
    /// Cache, queries and outputs, once each.
    pub gigabytes_per_second: f64,
    /// Multiplications and additions of scores and outputs.
    pub teraflops: f64,
    /// Of the copy's bandwidth.
    pub copy_fraction: f64,
    /// Time of our GQA kernel with as many query tokens, over this one's.
    pub over_gqa: Option<f64>,
}

/// Everything that was seen.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
    /// The GPU.
    pub device: String,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Seed of the inputs.
    pub seed: u64,
    /// Bandwidth of a copy, reading and writing counted.
    pub copy_gigabytes_per_second: f64,
    /// Comparisons.
    pub parity: Vec<Parity>,
    /// Times.
    pub bench: Vec<Bench>,
    /// What was not timed, and why.
    pub skipped: Vec<String>,
}

const LENGTHS: [&[u32]; 3] = [&[0, 1, 63, 64, 65, 777], &[4096, 130, 65, 2000], &[16_500]];
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
        copy_gigabytes_per_second: copy_bandwidth(&device, &stream, options.repeats)?,
        parity: Vec::new(),
        bench: Vec::new(),
        skipped: Vec::new(),
    };
    tell(&format!(
        "{}, {} multiprocessors, copy {:.0} GB/s, seed {}",
        results.device, results.multiprocessors, results.copy_gigabytes_per_second, results.seed
    ));
    for packed in &mine {
        let decoder = Decoder::load(
            &device,
            &packed.desc,
            &packed.config,
            &pack.cubin(folder, packed)?,
        )?;
        for (i, lengths) in LENGTHS.iter().enumerate() {
            let problem = Problem::random(packed.desc, lengths, options.seed + i as u64);
            let parity = parity(&device, &stream, packed, &decoder, &problem)?;
            tell(&format!(
                "{:<44} {:>30}  max abs {:.2e}  norm {:.1e}  lse {:.1e}  {}",
                parity.kernel,
                format!("{lengths:?}"),
                parity.max_abs,
                parity.relative,
                parity.lse,
                match (&parity.complaint, parity.same_bits) {
                    (Some(complaint), _) => format!("FAILED: {complaint}"),
                    (None, false) => "FAILED: runs differ".to_owned(),
                    (None, true) => "ok".to_owned(),
                }
            ));
            results.parity.push(parity);
        }
    }
    for packed in &mine {
        let decoder = Decoder::load(
            &device,
            &packed.desc,
            &packed.config,
            &pack.cubin(folder, packed)?,
        )?;
        for (batch, context) in SHAPES {
            match bench(
                &device, &stream, packed, &decoder, batch, context, options, &results,
            )? {
                Some(bench) => results.bench.push(bench),
                None => results.skipped.push(format!(
                    "{} at {batch} x {context}: the caches take more than half of the GPU's memory",
                    packed.desc.slug()
                )),
            }
        }
    }
    compare_with_gqa(&mine, &mut results.bench);
    Ok(results)
}

struct Placed {
    call: Call,
    out: Buffer,
    lse: Buffer,
    workspace: Buffer,
    _inputs: Vec<Buffer>,
}

/// Puts a problem on the GPU.
fn place(device: &Device, packed: &Packed, decoder: &Decoder, problem: &Problem) -> Result<Placed> {
    let desc = &problem.desc;
    let halves =
        |numbers: &[f32]| -> Vec<u16> { numbers.iter().map(|&x| bits(desc.dtype, x)).collect() };
    let batch = problem.lengths.len() as u32;
    let rows = u64::from(batch * desc.query_tokens * desc.query_heads);
    let out = device.buffer(rows * u64::from(desc.out_row()) * 2)?;
    let lse = device.buffer(rows * 4)?;
    let workspace =
        device.buffer(Workspace::of(desc, &packed.config, batch, decoder.parts()).bytes())?;
    let q = device.upload(&halves(&problem.q))?;
    let cache = device.upload(&halves(&problem.cache))?;
    let values = device.upload(&halves(&problem.values))?;
    let sinks = device.upload(&problem.sinks)?;
    let lengths = device.upload(&problem.lengths)?;
    let pages = device.upload(&problem.pages)?;
    let tree = device.upload(&problem.tree)?;
    let call = Call {
        q: q.region(),
        cache: cache.region(),
        values: values.region(),
        out: out.region(),
        lse: lse.region(),
        sinks: sinks.region(),
        lengths: lengths.region(),
        pages: pages.region(),
        tree: tree.region(),
        workspace: workspace.region(),
        batch,
        page_stride: problem.page_stride,
        scale: problem.scale,
    };
    Ok(Placed {
        call,
        out,
        lse,
        workspace,
        _inputs: vec![q, cache, values, sinks, lengths, pages, tree],
    })
}

fn parity(
    device: &Device,
    stream: &Stream,
    packed: &Packed,
    decoder: &Decoder,
    problem: &Problem,
) -> Result<Parity> {
    let placed = place(device, packed, decoder, problem)?;
    let mut runs: Vec<(Vec<u16>, Vec<u32>)> = Vec::new();
    for _ in 0..3 {
        // All ones is NaN in every type: what a kernel does not write cannot pass.
        for buffer in [&placed.out, &placed.lse, &placed.workspace] {
            buffer.fill(0xff, stream)?;
        }
        decoder.launch(&placed.call, stream)?;
        stream.wait()?;
        runs.push((placed.out.download()?, placed.lse.download()?));
    }
    let answer = Answer {
        out: runs[0]
            .0
            .iter()
            .map(|&b| from_bits(problem.desc.dtype, b))
            .collect(),
        lse: runs[0].1.iter().map(|&b| f32::from_bits(b)).collect(),
    };
    let difference: Difference = compare(&answer, &problem.reference());
    Ok(Parity {
        kernel: problem.desc.slug(),
        lengths: problem.lengths.clone(),
        max_abs: difference.max_abs,
        relative: difference.relative,
        lse: difference.lse,
        same_bits: runs.windows(2).all(|pair| pair[0] == pair[1]),
        complaint: difference.complaint(problem),
    })
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

fn copy_bandwidth(device: &Device, stream: &Stream, repeats: usize) -> Result<f64> {
    let bytes = (device.l2_bytes() * 16)
        .max(1 << 30)
        .min(device.memory_bytes() / 8);
    let (from, to) = (device.buffer(bytes)?, device.buffer(bytes)?);
    from.fill(1, stream)?;
    let (start, end) = (device.event()?, device.event()?);
    let mut times = Vec::new();
    for _ in 0..repeats.max(3) {
        start.record(stream)?;
        to.copy_from(&from, bytes, stream)?;
        end.record(stream)?;
        stream.wait()?;
        times.push(end.microseconds_since(&start)?);
    }
    Ok(2.0 * bytes as f64 / median(times) / 1e3)
}

#[expect(
    clippy::too_many_arguments,
    reason = "one shape of one kernel on one device"
)]
fn bench(
    device: &Device,
    stream: &Stream,
    packed: &Packed,
    decoder: &Decoder,
    batch: u32,
    context: u32,
    options: &Options,
    results: &Results,
) -> Result<Option<Bench>> {
    let desc = &packed.desc;
    let pages = context.div_ceil(desc.page);
    let page_bytes = u64::from(desc.page) * desc.cache_bytes_per_token();
    let cache_bytes = u64::from(batch * pages) * page_bytes;
    // Caches in turn, together at least four times the L2 cache: none is found there.
    let copies = (4 * device.l2_bytes()).div_ceil(cache_bytes).clamp(1, 64);
    if copies * cache_bytes > device.memory_bytes() / 2 {
        return Ok(None);
    }
    let mut random = Random::new(options.seed ^ 0x5eed);
    let pattern: Vec<u16> = (0..1 << 23)
        .map(|_| bits(desc.dtype, random.eighth()))
        .collect();
    let pattern = device.upload(&pattern)?;
    let grouped = matches!(desc.attention, Attention::Grouped { .. });
    let half = if grouped {
        cache_bytes / 2
    } else {
        cache_bytes
    };
    let mut caches = Vec::new();
    for _ in 0..copies {
        let keys = device.buffer(half)?;
        keys.repeat(&pattern, stream)?;
        let values = device.buffer(if grouped { half } else { 0 })?;
        values.repeat(&pattern, stream)?;
        caches.push((keys, values));
    }
    // The rest of the call is a small problem's; its pages and lengths are replaced.
    let small = Problem::random(*desc, &vec![1; batch as usize], options.seed);
    let mut table: Vec<i32> = (0..(batch * pages) as i32).collect();
    for i in (1..table.len()).rev() {
        table.swap(i, random.below(i as u64 + 1) as usize);
    }
    let placed = place(device, packed, decoder, &small)?;
    let lengths = device.upload(&vec![context; batch as usize])?;
    let table = device.upload(&table)?;
    let mut call = Call {
        lengths: lengths.region(),
        pages: table.region(),
        page_stride: pages,
        ..placed.call
    };
    let (start, end) = (device.event()?, device.event()?);
    let mut times = Vec::new();
    for i in 0..options.repeats + 5 {
        let (keys, values) = &caches[i % caches.len()];
        call.cache = keys.region();
        call.values = if grouped {
            values.region()
        } else {
            Region::default()
        };
        start.record(stream)?;
        decoder.launch(&call, stream)?;
        end.record(stream)?;
        stream.wait()?;
        if i >= 5 {
            times.push(end.microseconds_since(&start)?);
        }
    }
    let microseconds = median(times);
    let seen = u64::from(desc.window.unwrap_or(context).min(context)) * u64::from(batch);
    let rows = u64::from(batch * desc.query_tokens * desc.query_heads);
    let bytes =
        seen * desc.cache_bytes_per_token() + rows * u64::from(desc.row() + desc.out_row()) * 2;
    let gigabytes_per_second = bytes as f64 / microseconds / 1e3;
    Ok(Some(Bench {
        kernel: desc.slug(),
        batch,
        context,
        microseconds,
        gigabytes_per_second,
        teraflops: (seen * desc.operations_per_token()) as f64 / microseconds / 1e6,
        copy_fraction: gigabytes_per_second / results.copy_gigabytes_per_second,
        over_gqa: None,
    }))
}

/// Fills in how much faster each latent kernel is than grouped queries on the same shape.
fn compare_with_gqa(packed: &[&Packed], benches: &mut [Bench]) {
    let of = |slug: &str| {
        packed
            .iter()
            .find(|p| p.desc.slug() == slug)
            .map(|p| p.desc)
    };
    let grouped: Vec<(AttentionDesc, u32, u32, f64)> = benches
        .iter()
        .filter_map(|b| {
            let desc = of(&b.kernel)?;
            matches!(desc.attention, Attention::Grouped { .. }).then_some((
                desc,
                b.batch,
                b.context,
                b.microseconds,
            ))
        })
        .collect();
    for bench in benches.iter_mut() {
        let Some(desc) = of(&bench.kernel) else {
            continue;
        };
        if matches!(desc.attention, Attention::Grouped { .. }) {
            continue;
        }
        bench.over_gqa = grouped
            .iter()
            .find(|(g, batch, context, _)| {
                g.query_tokens == desc.query_tokens
                    && g.query_heads == desc.query_heads
                    && g.window == desc.window
                    && (*batch, *context) == (bench.batch, bench.context)
            })
            .map(|(.., microseconds)| microseconds / bench.microseconds);
    }
}

impl Results {
    /// Whether every comparison passed.
    pub fn passed(&self) -> bool {
        !self.parity.is_empty()
            && self
                .parity
                .iter()
                .all(|p| p.complaint.is_none() && p.same_bits)
    }

    /// The times for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<44} {:>5} {:>7} {:>10} {:>7} {:>8} {:>6} {:>6}\n",
            "kernel", "batch", "context", "us", "GB/s", "TFLOP/s", "copy", "x GQA"
        );
        for b in &self.bench {
            let _ = writeln!(
                text,
                "{:<44} {:>5} {:>7} {:>10.1} {:>7.0} {:>8.1} {:>5.0}% {:>6}",
                b.kernel,
                b.batch,
                b.context,
                b.microseconds,
                b.gigabytes_per_second,
                b.teraflops,
                b.copy_fraction * 100.0,
                b.over_gqa.map_or_else(String::new, |x| format!("{x:.2}"))
            );
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "not timed: {skipped}");
        }
        text
    }
}

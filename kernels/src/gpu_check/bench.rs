//! Times on a GPU.

use std::path::Path;

use crate::config::AttentionConfig;
use crate::desc::{Attention, AttentionDesc, CacheDtype};
use crate::error::Result;
use crate::launch::{Call, Decoder, Device, Region, Stream};
use crate::problem::{Problem, Random, bits};

use super::pack::{Pack, Packed};
use super::parity::place;
use super::peers::Peer;
use super::results::{Bench, Split};
use super::run::Options;

/// Batches and contexts on which the smallest piece of a divided cache matters.
const SPLIT_SHAPES: [(u32, u32); 4] = [(1, 4096), (1, 32_768), (8, 8192), (32, 4096)];

pub(super) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

pub(super) fn copy_bandwidth(device: &Device, stream: &Stream, repeats: usize) -> Result<f64> {
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

/// One shape of one kernel, on caches in turn that are larger than the L2 cache together.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) batch: u32,
    pub(super) context: u32,
}

/// Median of the repeats in microseconds; none when the caches take more than half of the GPU's memory.
pub(super) fn time(
    device: &Device,
    stream: &Stream,
    desc: &AttentionDesc,
    config: &AttentionConfig,
    decoder: &Decoder,
    shape: Shape,
    options: &Options,
) -> Result<Option<f64>> {
    let Shape { batch, context } = shape;
    let pages = context.div_ceil(desc.page);
    let page_bytes = u64::from(desc.page) * desc.cache_bytes_per_token();
    let cache_bytes = u64::from(batch * pages) * page_bytes;
    // Caches in turn, together at least four times the L2 cache: none is found there.
    let copies = (4 * device.l2_bytes()).div_ceil(cache_bytes).clamp(1, 64);
    if copies * cache_bytes > device.memory_bytes() / 2 {
        return Ok(None);
    }
    let mut random = Random::new(options.seed ^ 0x5eed);
    let pattern = device.upload(&pattern(desc, &mut random))?;
    let grouped = matches!(desc.attention, Attention::Grouped { .. });
    let half = u64::from(batch * pages) * desc.page_bytes();
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
    let placed = place(device, config, decoder, &small)?;
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
    Ok(Some(median(times)))
}

/// Bytes that fill a cache again and again: numbers of the type, or whole pages of an FP8 cache.
fn pattern(desc: &AttentionDesc, random: &mut Random) -> Vec<u8> {
    if desc.cache == CacheDtype::E4m3 {
        let full = AttentionDesc {
            query_heads: 1,
            query_tokens: 1,
            ..*desc
        };
        let problem = Problem::random(full, &[desc.page * 64], random.bits());
        let bytes = problem.cache_bytes();
        // One page of them is nobody's, and holds no numbers.
        let page = desc.page_bytes() as usize;
        return problem
            .pages
            .iter()
            .flat_map(|&at| bytes[at as usize * page..(at as usize + 1) * page].to_vec())
            .collect();
    }
    (0..1 << 23)
        .flat_map(|_| bits(desc.dtype, random.eighth()).to_le_bytes())
        .collect()
}

/// What the GPU can do, measured in the same run.
#[derive(Clone, Copy)]
pub(super) struct Most {
    /// Of a copy.
    pub(super) gigabytes_per_second: f64,
    /// Of a dense product, where there is one.
    pub(super) teraflops: Option<f64>,
}

/// GB/s and TFLOP/s of a time: what was moved and computed.
pub(super) fn rates(desc: &AttentionDesc, shape: Shape, microseconds: f64) -> (f64, f64) {
    let Shape { batch, context } = shape;
    let seen = u64::from(desc.window.unwrap_or(context).min(context)) * u64::from(batch);
    let rows = u64::from(batch * desc.query_tokens * desc.query_heads);
    let bytes =
        seen * desc.cache_bytes_per_token() + rows * u64::from(desc.row() + desc.out_row()) * 2;
    let operations = seen * desc.operations_per_token();
    (
        bytes as f64 / microseconds / 1e3,
        operations as f64 / microseconds / 1e6,
    )
}

/// The figures of a time, as they are and beside what the GPU can do.
pub(super) fn figures(desc: &AttentionDesc, shape: Shape, microseconds: f64, most: Most) -> Bench {
    let (gigabytes_per_second, teraflops) = rates(desc, shape, microseconds);
    Bench {
        kernel: desc.slug(),
        batch: shape.batch,
        context: shape.context,
        microseconds,
        gigabytes_per_second,
        teraflops,
        copy_fraction: gigabytes_per_second / most.gigabytes_per_second,
        matmul_fraction: most.teraflops.map(|most| teraflops / most),
        over_gqa: None,
        over_best_gqa: None,
    }
}

/// Times the variants of a kernel that differ in the smallest piece of a divided cache.
pub(super) fn splits(
    device: &Device,
    stream: &Stream,
    folder: &Path,
    pack: &Pack,
    options: &Options,
) -> Result<Vec<Split>> {
    let mut found = Vec::new();
    for packed in pack
        .splits
        .iter()
        .filter(|p| p.desc.arch.capability() == device.capability())
    {
        let decoder = Decoder::load(
            device,
            &packed.desc,
            &packed.config,
            &pack.cubin(folder, packed)?,
        )?;
        for (batch, context) in SPLIT_SHAPES {
            let shape = Shape { batch, context };
            let time = time(
                device,
                stream,
                &packed.desc,
                &packed.config,
                &decoder,
                shape,
                options,
            )?;
            if let Some(microseconds) = time {
                found.push(Split {
                    kernel: packed.desc.slug(),
                    batch,
                    context,
                    tokens: packed.config.min_split * packed.config.tile,
                    microseconds,
                });
            }
        }
    }
    Ok(found)
}

/// Fills in how much faster each latent kernel is than grouped queries on the same shape: than ours, and than the fastest of the run.
pub(super) fn compare_with_gqa(packed: &[&Packed], peers: &[Peer], benches: &mut [Bench]) {
    let of = |slug: &str| {
        packed
            .iter()
            .find(|p| p.desc.slug() == slug)
            .map(|p| p.desc)
    };
    let is_grouped = |desc: &AttentionDesc| matches!(desc.attention, Attention::Grouped { .. });
    let ours: Vec<(AttentionDesc, u32, u32, f64)> = benches
        .iter()
        .filter_map(|b| Some((of(&b.kernel)?, b.batch, b.context, b.microseconds)))
        .filter(|(desc, ..)| is_grouped(desc))
        .collect();
    let theirs = peers
        .iter()
        .filter_map(|p| Some((p.desc, p.batch, p.context, p.microseconds?)))
        .filter(|(desc, ..)| is_grouped(desc));
    let all: Vec<_> = ours.iter().copied().chain(theirs).collect();
    for bench in benches.iter_mut() {
        let Some(desc) = of(&bench.kernel).filter(|desc| !is_grouped(desc)) else {
            continue;
        };
        // Sinks are left out of it: a peer without them has less to do, if anything.
        let fastest = |times: &[(AttentionDesc, u32, u32, f64)]| {
            times
                .iter()
                .filter(|(g, batch, context, _)| {
                    g.query_tokens == desc.query_tokens
                        && g.query_heads == desc.query_heads
                        && g.window == desc.window
                        && (*batch, *context) == (bench.batch, bench.context)
                })
                .map(|(.., microseconds)| microseconds / bench.microseconds)
                .min_by(f64::total_cmp)
        };
        bench.over_gqa = fastest(&ours);
        bench.over_best_gqa = fastest(&all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arch, Report};

    #[test]
    fn the_fastest_grouped_queries_of_the_run_are_found() {
        let latent = AttentionDesc::latent(64, 256, 64, Arch::Sm90a);
        let grouped = AttentionDesc::grouped(64, 8, 64, Arch::Sm90a);
        let pack = |desc: AttentionDesc| Packed {
            file: String::new(),
            sha256: String::new(),
            config: AttentionConfig::choose(&desc).unwrap(),
            desc,
            report: Report {
                functions: Vec::new(),
                instructions: crate::inspect::Instructions::default(),
            },
        };
        let (latent, grouped) = (pack(latent), pack(grouped));
        let shape = Shape {
            batch: 1,
            context: 4096,
        };
        let most = Most {
            gigabytes_per_second: 1.0,
            teraflops: None,
        };
        let mut benches = [
            figures(&latent.desc, shape, 10.0, most),
            figures(&grouped.desc, shape, 40.0, most),
        ];
        let peer = |desc: AttentionDesc, context, microseconds| Peer {
            name: String::new(),
            desc,
            batch: 1,
            context,
            microseconds,
            gigabytes_per_second: 1.0,
            teraflops: 1.0,
            complaint: None,
        };
        let windowed = AttentionDesc {
            window: Some(128),
            ..grouped.desc
        };
        let peers = [
            peer(grouped.desc, 4096, Some(30.0)),
            // Another context, another window, a latent, one that failed: none of them counts.
            peer(grouped.desc, 64, Some(1.0)),
            peer(windowed, 4096, Some(1.0)),
            peer(latent.desc, 4096, Some(1.0)),
            peer(grouped.desc, 4096, None),
        ];
        compare_with_gqa(&[&latent, &grouped], &peers, &mut benches);
        assert_eq!(benches[0].over_gqa, Some(4.0));
        assert_eq!(benches[0].over_best_gqa, Some(3.0));
        assert_eq!(benches[1].over_best_gqa, None);
    }
}

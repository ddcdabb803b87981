//! Answers of kernels on a GPU, beside the f64 reference.

use crate::append::{AppendProblem, POISON};
use crate::config::AttentionConfig;
use crate::desc::AttentionDesc;
use crate::error::Result;
use crate::launch::{Append, Buffer, Call, Decoder, Device, Stream, Workspace};
use crate::problem::{Answer, Difference, Problem, bits, compare, from_bits};

use super::pack::Packed;
use super::results::{AppendParity, Parity};

pub(super) struct Placed {
    pub(super) call: Call,
    out: Buffer,
    lse: Buffer,
    workspace: Buffer,
    _inputs: Vec<Buffer>,
}

/// Puts a problem on the GPU.
pub(super) fn place(
    device: &Device,
    config: &AttentionConfig,
    decoder: &Decoder,
    problem: &Problem,
) -> Result<Placed> {
    let desc = &problem.desc;
    let halves =
        |numbers: &[f32]| -> Vec<u16> { numbers.iter().map(|&x| bits(desc.dtype, x)).collect() };
    let batch = problem.lengths.len() as u32;
    let rows = u64::from(batch * desc.query_tokens * desc.query_heads);
    let out = device.buffer(rows * u64::from(desc.out_row()) * 2)?;
    let lse = device.buffer(rows * 4)?;
    let workspace = device.buffer(Workspace::of(desc, config, batch, decoder.parts()).bytes())?;
    let q = device.upload(&halves(&problem.q))?;
    let cache = device.upload(&problem.cache_bytes())?;
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

pub(super) fn parity(
    device: &Device,
    stream: &Stream,
    packed: &Packed,
    decoder: &Decoder,
    problem: &Problem,
) -> Result<Parity> {
    let placed = place(device, &packed.config, decoder, problem)?;
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

/// Appends rows three times to poisoned caches; none for grouped queries.
pub(super) fn append(
    device: &Device,
    stream: &Stream,
    desc: AttentionDesc,
    decoder: &Decoder,
    tokens: usize,
    seed: u64,
) -> Result<Option<AppendParity>> {
    let Some(problem) = AppendProblem::random(desc, tokens, seed) else {
        return Ok(None);
    };
    let halves =
        |numbers: &[f32]| -> Vec<u16> { numbers.iter().map(|&x| bits(desc.dtype, x)).collect() };
    let latent = device.upload(&halves(&problem.latent))?;
    let key = device.upload(&halves(&problem.key))?;
    let cosines = device.upload(&problem.cosines)?;
    let sines = device.upload(&problem.sines)?;
    let positions = device.upload(&problem.positions)?;
    let slots = device.upload(&problem.slots)?;
    let cache = device.buffer(problem.cache_bytes())?;
    let rows = Append {
        latent: latent.region(),
        key: key.region(),
        cosines: cosines.region(),
        sines: sines.region(),
        positions: positions.region(),
        slots: slots.region(),
        cache: cache.region(),
        tokens: tokens as u32,
        table_rows: problem.table_rows,
    };
    let mut runs: Vec<Vec<u8>> = Vec::new();
    for _ in 0..3 {
        cache.fill(POISON, stream)?;
        decoder.append(&rows, stream)?;
        stream.wait()?;
        runs.push(cache.download()?);
    }
    Ok(Some(AppendParity {
        kernel: desc.slug(),
        tokens,
        same_bits: runs.windows(2).all(|pair| pair[0] == pair[1]),
        complaint: problem.complaint(&runs[0]),
    }))
}

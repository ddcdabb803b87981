//! The dense product on a GPU: its bits, and the rate beside which the attention kernels are put.

use std::path::Path;

use crate::error::Result;
use crate::launch::{Device, Multiplier, Stream};
use crate::matmul::{Operand, entry};
use crate::problem::Random;

use super::bench::median;
use super::pack::Pack;
use super::results::Product;
use super::run::Options;

/// Rows, columns and depth that are timed, and those that are only compared.
const TIMED: [u32; 3] = [8192; 3];
const COMPARED: [u32; 3] = [384, 512, 320];
/// Entries that are compared with the f64 sum, besides the corners.
const ENTRIES: usize = 4096;

/// Multiplies, compares and, unless only parity is wanted, times; none when no product is packed for this GPU.
pub(super) fn product(
    device: &Device,
    stream: &Stream,
    folder: &Path,
    pack: &Pack,
    options: &Options,
) -> Result<Option<Product>> {
    let Some(packed) = pack
        .products
        .iter()
        .find(|p| p.arch.capability() == device.capability())
    else {
        return Ok(None);
    };
    let cubin = Pack::bytes(folder, &packed.file, &packed.sha256)?;
    let multiplier = Multiplier::load(device, packed.arch, &cubin)?;
    let size = if options.parity_only { COMPARED } else { TIMED };
    let [rows, columns, depth] = size.map(u64::from);
    let (a, b) = (
        Operand::random(options.seed),
        Operand::random(!options.seed),
    );
    let place = |operand: &Operand, rows: u64| {
        let matrix = device.buffer(rows * depth * 2)?;
        matrix.repeat(&device.upload(operand.pattern())?, stream)?;
        // The pattern goes when this returns.
        stream.wait()?;
        Ok::<_, crate::KernelError>(matrix)
    };
    let (left, right) = (place(&a, rows)?, place(&b, columns)?);
    let out = device.buffer(rows * columns * 2)?;
    // All ones is NaN: what the kernel does not write cannot pass.
    out.fill(0xff, stream)?;
    let regions = [left.region(), right.region(), out.region()];
    multiplier.launch(regions, size, stream)?;
    stream.wait()?;
    let answer: Vec<u16> = out.download()?;
    let mut random = Random::new(options.seed);
    let corners = [
        (0, 0),
        (0, columns - 1),
        (rows - 1, 0),
        (rows - 1, columns - 1),
    ];
    let sample = (0..ENTRIES).map(|_| (random.below(rows), random.below(columns)));
    let complaint = corners.into_iter().chain(sample).find_map(|(row, column)| {
        let expected = entry(&a, &b, row, column, size[2]);
        let found = answer[(row * columns + column) as usize];
        (found != expected).then(|| {
            format!("row {row}, column {column}: bits {found:#06x}, the f64 sum rounds to {expected:#06x}")
        })
    });
    // A wrong product's time is no figure to compare with.
    let microseconds = if options.parity_only || complaint.is_some() {
        None
    } else {
        let (start, end) = (device.event()?, device.event()?);
        let mut times = Vec::new();
        for i in 0..options.repeats + 5 {
            start.record(stream)?;
            multiplier.launch(regions, size, stream)?;
            end.record(stream)?;
            stream.wait()?;
            if i >= 5 {
                times.push(end.microseconds_since(&start)?);
            }
        }
        Some(median(times))
    };
    Ok(Some(Product {
        kernel: format!("mlac_matmul, {}", multiplier.choice().instruction()),
        rows: size[0],
        columns: size[1],
        depth: size[2],
        microseconds,
        teraflops: microseconds.map(|us| (2 * rows * columns * depth) as f64 / us / 1e6),
        complaint,
    }))
}

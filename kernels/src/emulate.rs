//! The kernels' arithmetic in plain Rust: the same tiles, the same streams, the same rounding, the same order of merges.
//!
//! Scores are f32; every stream of tiles keeps a running maximum and denominator; weights are rounded to the factors' type before
//! they meet the values; over an FP8 cache the maximum is of score plus the logarithm of the token's scale, which is a factor of its weight; streams, then pieces, are merged in a fixed order; the sink joins once. What the GPU does differently:
//! the order of sums within one multiplication, and `ex2.approx`.

use std::f32::consts::{LN_2, LOG2_E};

use crate::config::AttentionConfig;
use crate::desc::{Attention, AttentionDesc};
use crate::plan::{Piece, Plan};
use crate::problem::{Answer, Cached, Problem, round};

/// Warps of `mlac_combine`, which add pieces in turns.
const COMBINE_WARPS: usize = 8;

/// One row's running softmax.
struct Stream {
    peak: f32,
    sum: f32,
    out: Vec<f32>,
}

/// The base-2 exponent that is subtracted; a maximum of minus infinity stands for "nothing yet".
fn anchor(peak: f32) -> f32 {
    if peak == f32::NEG_INFINITY { 0.0 } else { peak }
}

/// A row of a unit.
#[derive(Clone, Copy)]
struct Row {
    request: usize,
    token: usize,
    head: usize,
    /// Number in the unit.
    index: usize,
}

/// The rows of a unit of all requests.
fn rows(desc: &AttentionDesc, config: &AttentionConfig, unit: u32) -> Vec<Row> {
    let units = config.units(desc);
    let request = (unit / units) as usize;
    let unit = unit % units;
    let mut rows = Vec::new();
    match desc.attention {
        Attention::Latent { .. } => {
            let head_tiles = desc.query_heads.div_ceil(config.head_tile);
            for group in 0..config.group {
                let row_tile = unit * config.group + group;
                for row in 0..config.head_tile {
                    let head = row_tile % head_tiles * config.head_tile + row;
                    if row_tile < desc.query_tokens * head_tiles && head < desc.query_heads {
                        rows.push(Row {
                            request,
                            token: (row_tile / head_tiles) as usize,
                            head: head as usize,
                            index: (group * config.head_tile + row) as usize,
                        });
                    }
                }
            }
        }
        Attention::Grouped { kv_heads, .. } => {
            let heads = desc.query_heads / kv_heads;
            for index in 0..heads * desc.query_tokens {
                rows.push(Row {
                    request,
                    token: (index / heads) as usize,
                    head: (unit * heads + index % heads) as usize,
                    index: index as usize,
                });
            }
        }
    }
    rows
}

/// One row over one piece: normalised output (without the sink when `sink` is none) and base-2 log-sum-exp.
fn run_piece(
    problem: &Problem,
    config: &AttentionConfig,
    piece: &Piece,
    row: Row,
    sink: Option<f32>,
) -> (Vec<f32>, f32) {
    let desc = &problem.desc;
    let scale = problem.scale * LOG2_E;
    let width = desc.row() as usize;
    let at = (row.request * desc.query_tokens as usize + row.token) * desc.query_heads as usize
        + row.head;
    let q = &problem.q[at * width..(at + 1) * width];
    let mut streams: Vec<Stream> = Vec::new();
    for first in 0..config.streams {
        let mut stream = Stream {
            peak: f32::NEG_INFINITY,
            sum: 0.0,
            out: vec![0.0; desc.out_row() as usize],
        };
        for tile in (piece.tiles.begin + first..piece.tiles.end).step_by(config.streams as usize) {
            let start = tile * config.tile;
            let seen: Vec<(f32, Cached)> = (start..start + config.tile)
                .filter(|&position| problem.sees(row.request, row.token, position))
                .map(|position| {
                    let cached = problem.cached(row.request, row.head, position);
                    let score: f32 = q.iter().zip(cached.key).map(|(a, b)| a * b).sum();
                    (score * (cached.scale * scale), cached)
                })
                .collect();
            let top = seen
                .iter()
                .map(|(s, cached)| s + cached.scale.log2())
                .fold(stream.peak, f32::max);
            let base = anchor(top);
            let rescale = (stream.peak - base).exp2();
            stream.peak = top;
            for o in &mut stream.out {
                *o *= rescale;
            }
            let mut added = 0.0;
            for (score, cached) in seen {
                let w = (score - base).exp2();
                added += w;
                let w = round(desc.factor(), w * cached.scale);
                for (o, &v) in stream.out.iter_mut().zip(cached.value) {
                    *o += w * v;
                }
            }
            stream.sum = stream.sum * rescale + added;
        }
        streams.push(stream);
    }
    let top = streams
        .iter()
        .map(|s| s.peak)
        .fold(f32::NEG_INFINITY, f32::max);
    let base = anchor(top);
    let mut sum = 0.0;
    let mut out = vec![0.0; desc.out_row() as usize];
    for stream in &streams {
        let w = (stream.peak - base).exp2();
        sum += stream.sum * w;
        for (o, x) in out.iter_mut().zip(&stream.out) {
            *o += x * w;
        }
    }
    if sum == 0.0 {
        return (vec![0.0; out.len()], f32::NEG_INFINITY);
    }
    let denominator = sum + sink.map_or(0.0, |sink| (sink * LOG2_E - base).exp2());
    let inverse = 1.0 / denominator;
    for o in &mut out {
        *o *= inverse;
    }
    (out, base + sum.log2())
}

/// Pieces of one row, added as `mlac_combine` adds them.
fn combine(pieces: &[(Vec<f32>, f32)], sink: Option<f32>) -> (Vec<f32>, f32) {
    let top = pieces
        .iter()
        .map(|(_, lse)| *lse)
        .fold(f32::NEG_INFINITY, f32::max);
    let base = anchor(top);
    let weights: Vec<f32> = pieces.iter().map(|(_, lse)| (lse - base).exp2()).collect();
    let sum: f32 = weights.iter().sum();
    let width = pieces.first().map_or(0, |(out, _)| out.len());
    if sum == 0.0 {
        return (vec![0.0; width], f32::NEG_INFINITY);
    }
    let inverse = 1.0 / (sum + sink.map_or(0.0, |sink| (sink * LOG2_E - base).exp2()));
    let mut total = vec![0.0; width];
    for warp in 0..COMBINE_WARPS {
        let mut partial = vec![0.0; width];
        for (weight, (out, _)) in weights.iter().zip(pieces).skip(warp).step_by(COMBINE_WARPS) {
            for (p, x) in partial.iter_mut().zip(out) {
                *p += weight * inverse * x;
            }
        }
        for (t, p) in total.iter_mut().zip(&partial) {
            *t += p;
        }
    }
    (total, base + sum.log2())
}

/// What the kernels of `config` answer with `parts` CTAs.
pub fn emulate(problem: &Problem, config: &AttentionConfig, parts: u32) -> Answer {
    let desc = &problem.desc;
    let plan = Plan::of(desc, config, &problem.lengths, parts);
    let out_row = desc.out_row() as usize;
    let (tokens, heads) = (desc.query_tokens as usize, desc.query_heads as usize);
    let count = problem.lengths.len() * tokens * heads;
    // What nobody writes stays NaN, and fails every comparison.
    let mut answer = Answer {
        out: vec![f32::NAN; count * out_row],
        lse: vec![f32::NAN; count],
    };
    let unit_rows = config.unit_rows(desc) as usize;
    let mut parts_out: Vec<Option<(Vec<f32>, f32)>> = vec![None; 2 * parts as usize * unit_rows];
    let mut put = |row: Row, out: &[f32], lse2: f32| {
        let at = (row.request * tokens + row.token) * heads + row.head;
        for (place, &x) in answer.out[at * out_row..(at + 1) * out_row]
            .iter_mut()
            .zip(out)
        {
            *place = round(desc.dtype, x);
        }
        answer.lse[at] = lse2 * LN_2;
    };
    for piece in plan.pieces() {
        for row in rows(desc, config, piece.unit) {
            let sink = problem.sinks.get(row.head).copied();
            if let Some(slot) = piece.slot {
                parts_out[slot as usize * unit_rows + row.index] =
                    Some(run_piece(problem, config, &piece, row, None));
            } else {
                let (out, lse) = run_piece(problem, config, &piece, row, sink);
                put(row, &out, lse);
            }
        }
    }
    if config.planned {
        for unit in 0..config.units(desc) * problem.lengths.len() as u32 {
            let slots = plan.slots(unit);
            if slots.is_empty() {
                continue;
            }
            for row in rows(desc, config, unit) {
                // A slot that nobody filled would be memory that nobody wrote.
                let pieces: Vec<(Vec<f32>, f32)> = slots
                    .iter()
                    .map(|&slot| {
                        parts_out[slot as usize * unit_rows + row.index]
                            .clone()
                            .unwrap_or((vec![f32::NAN; out_row], f32::NAN))
                    })
                    .collect();
                let (out, lse) = combine(&pieces, problem.sinks.get(row.head).copied());
                put(row, &out, lse);
            }
        }
    }
    answer
}

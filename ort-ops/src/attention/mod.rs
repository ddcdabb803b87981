//! The operator on the CPU: a step is cut into tiles of query rows and stretches of positions, which run side
//! by side; then stretches of one tile are merged, and the new rows are stored.

mod sequence;
mod step;
mod tile;

use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};

pub use step::{Inputs, Layout, Shape, Step};

use self::sequence::{Sequence, Span, slot};
use self::tile::{Partial, Tile};
use crate::element::Element;
use crate::pool::Pool;
use crate::products::{Isa, Queries, TILE};

/// Fewest positions worth a task of their own.
const SHORTEST_STRETCH: usize = 192;

/// Query rows that share a task's products: consecutive rows of `[query_tokens, heads]` of one sequence.
struct Share<'o, T> {
    b: usize,
    rows: Range<usize>,
    /// New token of every row.
    tokens: Vec<usize>,
    span: Span,
    queries: OnceLock<Queries>,
    /// Stretches of `span.some`, and their results.
    stretches: Vec<(Range<usize>, OnceLock<Partial>)>,
    out: Mutex<Out<'o, T>>,
}

/// Where a tile's results go.
struct Out<'o, T> {
    sums: &'o mut [T],
    lse: Option<&'o mut [f32]>,
}

/// Computes `sums [batch, query_tokens, heads, r]` and `lse [batch, query_tokens, heads]` of a step over `cache`, which does
/// not hold the new rows yet.
///
/// # Panics
/// When an output has not the length that the shape says.
pub fn attend<T: Element>(
    step: &Step<'_, T>,
    cache: &[T],
    sums: &mut [T],
    lse: Option<&mut [f32]>,
    isa: Isa,
    pool: &dyn Pool,
) {
    let shape = &step.shape;
    assert_eq!(sums.len(), shape.sums_numbers(), "length of sums");
    assert_eq!(cache.len(), shape.cache_numbers(), "length of the cache");
    if let Some(lse) = &lse {
        assert_eq!(lse.len(), shape.rows(), "length of lse");
    }
    let tiles = divide(step, cache, sums, lse, pool.threads());
    let tasks: Vec<(usize, usize)> = tiles
        .iter()
        .enumerate()
        .flat_map(|(i, tile)| (0..tile.stretches.len()).map(move |j| (i, j)))
        .collect();
    pool.run(tasks.len(), &|task| {
        let (i, j) = tasks[task];
        let tile = &tiles[i];
        let partial = run(step, cache, tile, j, isa);
        if tile.stretches.len() == 1 {
            finish(step, tile, &[&partial]);
        } else {
            let _ = tile.stretches[j].1.set(partial);
        }
    });
    for tile in tiles.iter().filter(|tile| tile.stretches.len() > 1) {
        let partials: Vec<&Partial> = tile.stretches.iter().filter_map(|s| s.1.get()).collect();
        finish(step, tile, &partials);
    }
}

/// Copies a cache, side by side.
pub fn copy<T: Element>(from: &[T], to: &mut [T], pool: &dyn Pool) {
    const PIECE: usize = 1 << 16;
    let pieces: Vec<_> = to
        .chunks_mut(PIECE)
        .zip(from.chunks(PIECE))
        .map(Mutex::new)
        .collect();
    pool.run(pieces.len(), &|i| {
        let mut piece = pieces[i].lock().unwrap_or_else(PoisonError::into_inner);
        let (to, from) = &mut *piece;
        to.copy_from_slice(from);
    });
}

/// Stores the new rows in `cache_out`, which holds the rest of the cache already.
///
/// # Panics
/// When `cache_out` has not the length that the shape says.
pub fn append<T: Element>(step: &Step<'_, T>, cache_out: &mut [T]) {
    let shape = &step.shape;
    assert_eq!(
        cache_out.len(),
        shape.cache_numbers(),
        "length of the cache"
    );
    let width = shape.width;
    for b in 0..shape.batch {
        for token in 0..shape.query_tokens {
            let slot = slot(step, b, step.past(b) + token);
            let row = (b * shape.query_tokens + token) * width;
            cache_out[slot * width..(slot + 1) * width]
                .copy_from_slice(&step.inputs.new_rows[row..row + width]);
        }
    }
}

fn divide<'o, T: Element>(
    step: &Step<'_, T>,
    cache: &[T],
    sums: &'o mut [T],
    lse: Option<&'o mut [f32]>,
    threads: usize,
) -> Vec<Share<'o, T>> {
    let shape = &step.shape;
    let rows = shape.query_tokens * shape.heads;
    // Tiles of the same size, whole vectors where there are several.
    let size = match rows.div_ceil(TILE) {
        1 => rows,
        _ => TILE,
    };
    let tiles = shape.batch * rows.div_ceil(size.max(1));
    let pieces = (2 * threads).div_ceil(tiles.max(1));
    let mut lse_rest = lse;
    let mut sums_rest = sums;
    let mut found = Vec::with_capacity(tiles);
    for b in 0..shape.batch {
        let sequence = Sequence::new(step, cache, b);
        for start in (0..rows).step_by(size) {
            let rows = start..(start + size).min(rows);
            let (sums, rest) = sums_rest.split_at_mut(rows.len() * shape.kv_lora_rank);
            sums_rest = rest;
            let lse = lse_rest.take().map(|lse| {
                let (mine, rest) = lse.split_at_mut(rows.len());
                lse_rest = Some(rest);
                mine
            });
            let tokens: Vec<usize> = rows.clone().map(|row| row / shape.heads).collect();
            let span = sequence.span(&(tokens[0]..tokens[tokens.len() - 1] + 1));
            found.push(Share {
                b,
                rows,
                tokens,
                stretches: stretches(&span.some, pieces),
                span,
                queries: OnceLock::new(),
                out: Mutex::new(Out { sums, lse }),
            });
        }
    }
    found
}

/// `positions` in at most `pieces` stretches of nearly one length.
fn stretches(positions: &Range<usize>, pieces: usize) -> Vec<(Range<usize>, OnceLock<Partial>)> {
    let pieces = pieces.min(positions.len() / SHORTEST_STRETCH).max(1);
    (0..pieces)
        .map(|i| {
            let at = |i: usize| positions.start + positions.len() * i / pieces;
            (at(i)..at(i + 1), OnceLock::new())
        })
        .collect()
}

fn run<T: Element>(
    step: &Step<'_, T>,
    cache: &[T],
    tile: &Share<'_, T>,
    stretch: usize,
    isa: Isa,
) -> Partial {
    let shape = &step.shape;
    let queries = tile.queries.get_or_init(|| {
        let first = tile.b * shape.query_tokens * shape.heads;
        let numbers =
            (first + tile.rows.start) * shape.width..(first + tile.rows.end) * shape.width;
        let mut rows = vec![0.0; numbers.len()];
        T::widen(&step.inputs.query[numbers], &mut rows);
        Queries::new(rows, shape.width)
    });
    let tile_of = Tile {
        sequence: Sequence::new(step, cache, tile.b),
        queries,
        tokens: &tile.tokens,
        span: &tile.span,
        rank: shape.kv_lora_rank,
        scale: shape.scale,
        products: isa.products(),
    };
    tile_of.run(tile.stretches[stretch].0.clone())
}

/// Merges the stretches of a tile, divides, and writes.
fn finish<T: Element>(step: &Step<'_, T>, tile: &Share<'_, T>, partials: &[&Partial]) {
    let rank = step.shape.kv_lora_rank;
    let mut out = tile.out.lock().unwrap_or_else(PoisonError::into_inner);
    let mut sums = vec![0.0_f32; rank];
    for lane in 0..tile.tokens.len() {
        let top = partials
            .iter()
            .map(|p| p.running.top[lane])
            .fold(f32::NEG_INFINITY, f32::max);
        let base = top.max(f32::MIN);
        let mut sum = 0.0;
        sums.fill(0.0);
        for partial in partials {
            let factor = (partial.running.top[lane] - base).exp2();
            sum += partial.running.sum[lane] * factor;
            let from = &partial.sums[lane * partial.stride..][..rank];
            for (sum, x) in sums.iter_mut().zip(from) {
                *sum += x * factor;
            }
        }
        // Without a visible score there is nothing to divide, whatever the sink.
        let seen = sum != 0.0;
        let head = (tile.rows.start + lane) % step.shape.heads;
        let sink = step
            .inputs
            .sinks
            .map_or(0.0, |s| (s[head] * LOG2_E - base).exp2());
        let inverse = if seen { 1.0 / (sum + sink) } else { 0.0 };
        for x in &mut sums {
            *x *= inverse;
        }
        T::narrow(&sums, &mut out.sums[lane * rank..(lane + 1) * rank]);
        if let Some(lse) = &mut out.lse {
            lse[lane] = if seen {
                (top + sum.log2()) * LN_2
            } else {
                f32::NEG_INFINITY
            };
        }
    }
}

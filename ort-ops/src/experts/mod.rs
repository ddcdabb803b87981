//! `mlac::Mxfp4Experts` on the CPU: the choices are sorted by expert, gate and up of all chosen experts are computed, then
//! down; in each of the two passes a task takes some rows of a matrix for all the tokens that chose the expert.

mod product;
mod step;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

pub use step::{Inputs, Projection, Shape, Step};

use self::product::{Operand, ROW_STEP, RowProducts, place};
use crate::pool::{Pool, take_turns};
use crate::products::Isa;

/// Choices that are computed together at most; their activations are in memory.
const CHOICES: usize = 2048;
/// Rows of a task of the second pass.
const DOWN_ROWS: usize = 128;

/// The tokens that chose one expert.
struct Group {
    expert: usize,
    /// Their choices, as indices into `[tokens, K]`.
    choices: Vec<usize>,
}

/// A piece of memory that one task writes.
type Piece<'a> = Mutex<&'a mut [f32]>;

/// Computes `out [tokens, D]`.
///
/// # Panics
/// When `out` has not the length that the shape says.
pub fn compute(step: &Step<'_>, out: &mut [f32], isa: Isa, pool: &dyn Pool) {
    let Shape {
        tokens,
        experts_per_token,
        hidden_size,
        ..
    } = step.shape;
    assert_eq!(out.len(), tokens * hidden_size, "length of the output");
    let some = (CHOICES / experts_per_token.max(1)).max(1);
    for (i, out) in out.chunks_mut(some * hidden_size).enumerate() {
        let first = i * some;
        let tokens = first..first + out.len() / hidden_size;
        some_tokens(step, &tokens, out, RowProducts::of(isa), pool);
    }
}

fn some_tokens(
    step: &Step<'_>,
    tokens: &Range<usize>,
    out: &mut [f32],
    products: RowProducts,
    pool: &dyn Pool,
) {
    let groups = groups(step, tokens);
    let activations = gate_up(step, &groups, products, pool);
    let Shape {
        experts_per_token,
        hidden_size,
        ..
    } = step.shape;
    // Every task has its rows of all tokens side by side.
    let count = tokens.len();
    let mut by_task = vec![0.0; out.len()];
    let pieces: Vec<Piece<'_>> = by_task
        .chunks_mut(count * DOWN_ROWS)
        .map(Mutex::new)
        .collect();
    take_turns(pool, pieces.len(), &|task| {
        let mut sums = pieces[task].lock().unwrap_or_else(PoisonError::into_inner);
        let rows = task * DOWN_ROWS..((task + 1) * DOWN_ROWS).min(hidden_size);
        let mut products_of = Vec::new();
        for (group, operand) in groups.iter().zip(&activations) {
            let (matrix, bias) = step.down(group.expert);
            products_of.clear();
            products_of.resize(group.choices.len() * rows.len(), 0.0);
            products.rows(&matrix, rows.clone(), operand, &mut products_of);
            for (from, &choice) in products_of.chunks(rows.len()).zip(&group.choices) {
                let token = choice / experts_per_token - tokens.start;
                let weight = step.inputs.weights[choice];
                let to = &mut sums[token * rows.len()..(token + 1) * rows.len()];
                for ((to, x), bias) in to.iter_mut().zip(from).zip(&bias[rows.clone()]) {
                    *to += weight * (x + bias);
                }
            }
        }
    });
    drop(pieces);
    for (task, sums) in by_task.chunks(count * DOWN_ROWS).enumerate() {
        let rows = sums.len() / count;
        for (out, sums) in out.chunks_mut(hidden_size).zip(sums.chunks(rows)) {
            out[task * DOWN_ROWS..][..rows].copy_from_slice(sums);
        }
    }
}

/// The choices of some tokens by expert, in the experts' order.
fn groups(step: &Step<'_>, tokens: &Range<usize>) -> Vec<Group> {
    let chosen = step.shape.experts_per_token;
    let mut order: Vec<usize> = (tokens.start * chosen..tokens.end * chosen).collect();
    let expert = |choice: usize| step.inputs.experts[choice] as usize;
    order.sort_by_key(|&choice| expert(choice));
    order
        .chunk_by(|&a, &b| expert(a) == expert(b))
        .map(|choices| Group {
            expert: expert(choices[0]),
            choices: choices.to_vec(),
        })
        .collect()
}

/// What goes into the experts' second matrices, by group.
fn gate_up(
    step: &Step<'_>,
    groups: &[Group],
    products: RowProducts,
    pool: &dyn Pool,
) -> Vec<Operand> {
    let Shape {
        experts_per_token,
        hidden_size,
        intermediate_size: inner,
        ..
    } = step.shape;
    let hidden: Vec<Operand> = groups
        .iter()
        .map(|group| {
            let token = |&choice: &usize| {
                let token = choice / experts_per_token;
                &step.inputs.hidden[token * hidden_size..(token + 1) * hidden_size]
            };
            Operand::of(group.choices.iter().map(token), hidden_size, products.lanes)
        })
        .collect();
    let mut activations: Vec<Operand> = groups
        .iter()
        .map(|group| Operand::zeros(group.choices.len(), inner, products.lanes))
        .collect();
    // A task makes one chunk of activations of one expert's tokens.
    let chunk = activations.first().map_or(1, Operand::chunk);
    let tasks: Vec<(usize, usize, Piece<'_>)> = activations
        .iter_mut()
        .enumerate()
        .flat_map(|(group, operand)| {
            let size = operand.tokens * chunk;
            let chunks = operand.numbers.chunks_mut(size).enumerate();
            chunks.map(move |(c, piece)| (group, c * chunk, Mutex::new(piece)))
        })
        .collect();
    take_turns(pool, tasks.len(), &|task| {
        let (group, first, piece) = &tasks[task];
        let mut piece = piece.lock().unwrap_or_else(PoisonError::into_inner);
        let (matrix, bias) = step.gate_up(groups[*group].expert);
        let rows = 2 * first..2 * (first + chunk).min(inner);
        let mut both = vec![0.0; hidden[*group].tokens * rows.len()];
        products.rows(&matrix, rows.clone(), &hidden[*group], &mut both);
        let bias = &bias[rows.clone()];
        for (piece, both) in piece.chunks_mut(chunk).zip(both.chunks(rows.len())) {
            let pairs = both.chunks_exact(2).zip(bias.chunks_exact(2));
            for (at, (x, bias)) in pairs.enumerate() {
                piece[place(at, products.lanes)] =
                    gated(&step.shape, x[0] + bias[0], x[1] + bias[1]);
            }
        }
    });
    drop(tasks);
    activations
}

/// The clamped `SwiGLU` of GPT-OSS. Comparisons, and not `min` and `max`, let NaN through.
fn gated(shape: &Shape, gate: f32, up: f32) -> f32 {
    let limit = shape.swiglu_limit;
    let gate = if gate > limit { limit } else { gate };
    let up = up.clamp(-limit, limit);
    let sigmoid = 1.0 / (1.0 + (-shape.swiglu_alpha * gate).exp());
    (up + 1.0) * (gate * sigmoid)
}

const _: () = assert!(DOWN_ROWS.is_multiple_of(ROW_STEP), "whole steps of rows");

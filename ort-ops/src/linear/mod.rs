//! `mlac::Linear16` on the CPU. Few tokens: rows are read as they lie and widened in registers, once for up to six tokens. Many:
//! a panel of rows is widened and transposed once for many tokens, piece by piece, in the nearest cache.

mod panels;
mod rows;
mod step;
mod width;

use std::marker::PhantomData;
use std::ops::Range;

pub use step::{Inputs, Shape, Step, Weight};

use self::width::Products;
use crate::pool::{Pool, take_turns};
use crate::products::Isa;

/// Tokens up to which rows are read as they lie.
const FEW: usize = 12;
/// Bytes of weights that a task of few tokens reads, about.
const TASK_BYTES: usize = 1 << 17;
/// Rows of such a task are multiples of this.
const ROW_STEP: usize = 4;
/// Tokens of a task of many, at most.
const TASK_TOKENS: usize = 192;

/// Where tasks put what they computed, each its own numbers.
#[derive(Clone, Copy)]
struct Out<'a> {
    numbers: *mut f32,
    rows: usize,
    tokens: usize,
    /// Nobody else has the numbers.
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: a pointer to f32; who writes through it promises that no other task writes there (`Out::put`).
unsafe impl Sync for Out<'_> {}

impl Out<'_> {
    /// Writes the numbers of consecutive rows with a token.
    ///
    /// # Safety
    /// The rows and the token exist, and no other thread puts anything there.
    #[inline(always)]
    unsafe fn put(&self, token: usize, row: usize, numbers: &[f32]) {
        debug_assert!(
            token < self.tokens && row + numbers.len() <= self.rows,
            "a place of the output"
        );
        // SAFETY: the caller's promise.
        unsafe {
            let to = self.numbers.add(token * self.rows + row);
            to.copy_from_nonoverlapping(numbers.as_ptr(), numbers.len());
        }
    }
}

/// Computes `out [tokens, out]`.
///
/// # Panics
/// When `out` has not the length that the shape says.
pub fn compute(step: &Step<'_>, out: &mut [f32], isa: Isa, pool: &dyn Pool) {
    let Shape {
        tokens,
        rows,
        columns,
    } = step.shape;
    assert_eq!(out.len(), tokens * rows, "length of the output");
    if out.is_empty() {
        return;
    }
    let out = Out {
        numbers: out.as_mut_ptr(),
        rows,
        tokens,
        borrowed: PhantomData,
    };
    let products = Products::of(isa, &step.inputs.weight);
    if tokens <= FEW {
        let some = (TASK_BYTES / (2 * columns.max(1))).max(1);
        let some = some.next_multiple_of(ROW_STEP);
        take_turns(pool, rows.div_ceil(some), &|task| {
            let rows = part(task, some, rows);
            // SAFETY: tasks have different rows of the matrix; the width is of this CPU (`Isa::available`), the step is checked.
            unsafe { (products.rows)(step, rows, &out) }
        });
        return;
    }
    // Parts of nearly one size.
    let parts = tokens.div_ceil(TASK_TOKENS);
    let some = tokens.div_ceil(parts);
    let panels = rows.div_ceil(products.width);
    take_turns(pool, panels * parts, &|task| {
        let rows = part(task / parts, products.width, rows);
        let tokens = part(task % parts, some, tokens);
        // SAFETY: as above; tasks with the same rows have different tokens.
        unsafe { (products.panel)(step, rows, tokens, &out) }
    });
}

/// Part `index` of `0..all` in parts of `some`.
fn part(index: usize, some: usize, all: usize) -> Range<usize> {
    (index * some).min(all)..((index + 1) * some).min(all)
}

//! One call's shapes and inputs, and their checks.

use half::{bf16, f16};

use crate::refusal::{Refusal, refuse};

/// The operator's shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Tokens of all sequences.
    pub tokens: usize,
    /// Rows of the matrix, `out`.
    pub rows: usize,
    /// Numbers of a row, `in`.
    pub columns: usize,
}

/// A matrix `[out, in]`.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a> {
    /// Upper halves of f32.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
}

impl Weight<'_> {
    fn count(&self) -> usize {
        match self {
            Self::Bf16(numbers) => numbers.len(),
            Self::F16(numbers) => numbers.len(),
        }
    }

    /// Where the numbers are, for who knows their type.
    pub(crate) fn bits(&self) -> *const u16 {
        match self {
            Self::Bf16(numbers) => numbers.as_ptr().cast(),
            Self::F16(numbers) => numbers.as_ptr().cast(),
        }
    }
}

/// The inputs; shapes as in `docs/linear16.md`.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[tokens, in]`.
    pub x: &'a [f32],
    /// `[out, in]`.
    pub weight: Weight<'a>,
    /// `[out]`.
    pub bias: Option<&'a [f32]>,
}

/// A checked call.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    pub(crate) shape: Shape,
    pub(crate) inputs: Inputs<'a>,
}

impl<'a> Step<'a> {
    /// Checks that the inputs are as long as the shapes say.
    ///
    /// # Errors
    /// An input of another length.
    pub fn new(shape: Shape, inputs: Inputs<'a>) -> Result<Self, Refusal> {
        let Shape {
            tokens,
            rows,
            columns,
        } = shape;
        let bias = inputs.bias.map_or(rows, <[f32]>::len);
        let counts = [
            ("x", inputs.x.len(), tokens * columns),
            ("weight", inputs.weight.count(), rows * columns),
            ("bias", bias, rows),
        ];
        for (name, found, expected) in counts {
            if found != expected {
                return Err(refuse(
                    name,
                    format!("{expected} elements"),
                    found.to_string(),
                    "give it the shape that the other inputs imply",
                ));
            }
        }
        Ok(Self { shape, inputs })
    }
}

//! One call's shapes and inputs, and the checks of their values.

use super::product::{BLOCK, BLOCK_BYTES, Matrix, whole_blocks};
use crate::refusal::{Refusal, refuse};

/// The operator's attributes and shapes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Tokens of all sequences.
    pub tokens: usize,
    /// Experts that a token chose, K.
    pub experts_per_token: usize,
    /// Experts that there are, E.
    pub num_experts: usize,
    /// `hidden_size`, D.
    pub hidden_size: usize,
    /// `intermediate_size`, I.
    pub intermediate_size: usize,
    /// Limit of gate and up.
    pub swiglu_limit: f32,
    /// Steepness of the gate's sigmoid.
    pub swiglu_alpha: f32,
}

/// One projection of all experts, `[E, out, in]`.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a> {
    /// `[E, out, in / 32, 16]`.
    pub blocks: &'a [u8],
    /// `[E, out, in / 32]`.
    pub scales: &'a [u8],
    /// `[E, out]`.
    pub bias: &'a [f32],
}

/// The inputs; shapes as in `docs/mxfp4-experts.md`.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[tokens, D]`.
    pub hidden: &'a [f32],
    /// `[tokens, K]`.
    pub experts: &'a [i64],
    /// `[tokens, K]`.
    pub weights: &'a [f32],
    /// `out` is 2 I, gate and up by turns; `in` is D.
    pub gate_up: Projection<'a>,
    /// `out` is D, `in` is I.
    pub down: Projection<'a>,
}

/// A checked call.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    pub(crate) shape: Shape,
    pub(crate) inputs: Inputs<'a>,
}

impl<'a> Step<'a> {
    /// Checks what shapes alone do not say.
    ///
    /// # Errors
    /// The conditions of `docs/mxfp4-experts.md`, section Errors.
    pub fn new(shape: Shape, inputs: Inputs<'a>) -> Result<Self, Refusal> {
        let Shape {
            tokens,
            experts_per_token: chosen,
            num_experts: count,
            hidden_size: hidden,
            intermediate_size: inner,
            ..
        } = shape;
        if chosen == 0 {
            let fix = "choose one expert or more for every token";
            return Err(refuse("experts", "1 choice or more", "none", fix));
        }
        whole_blocks("hidden", hidden)?;
        whole_blocks("down_blocks", inner)?;
        let (gate_up, down) = (&inputs.gate_up, &inputs.down);
        let counts = [
            ("hidden", inputs.hidden.len(), tokens * hidden),
            ("experts", inputs.experts.len(), tokens * chosen),
            ("weights", inputs.weights.len(), tokens * chosen),
            (
                "gate_up_blocks",
                gate_up.blocks.len(),
                count * 2 * inner * hidden / 2,
            ),
            (
                "gate_up_scales",
                gate_up.scales.len(),
                count * 2 * inner * (hidden / BLOCK),
            ),
            ("gate_up_bias", gate_up.bias.len(), count * 2 * inner),
            ("down_blocks", down.blocks.len(), count * hidden * inner / 2),
            (
                "down_scales",
                down.scales.len(),
                count * hidden * (inner / BLOCK),
            ),
            ("down_bias", down.bias.len(), count * hidden),
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
        if shape.swiglu_limit.is_nan() || shape.swiglu_limit <= 0.0 {
            let found = shape.swiglu_limit.to_string();
            let fix = "GPT-OSS has 7; infinity is no limit";
            return Err(refuse("swiglu_limit", "a positive number", found, fix));
        }
        if !shape.swiglu_alpha.is_finite() {
            let found = shape.swiglu_alpha.to_string();
            return Err(refuse(
                "swiglu_alpha",
                "a number",
                found,
                "GPT-OSS has 1.702",
            ));
        }
        let known = |expert: &i64| usize::try_from(*expert).is_ok_and(|expert| expert < count);
        if let Some(at) = inputs.experts.iter().position(|expert| !known(expert)) {
            return Err(refuse(
                "experts",
                format!("0 to {}", count.saturating_sub(1)),
                format!(
                    "{} at token {}, choice {}",
                    inputs.experts[at],
                    at / chosen,
                    at % chosen
                ),
                "choose among the experts that there are",
            ));
        }
        Ok(Self { shape, inputs })
    }

    /// Gate and up of one expert: `[2 I, D]` and `[2 I]`.
    pub(crate) fn gate_up(&self, expert: usize) -> (Matrix<'a>, &'a [f32]) {
        let Shape {
            hidden_size,
            intermediate_size,
            ..
        } = self.shape;
        one(
            &self.inputs.gate_up,
            expert,
            2 * intermediate_size,
            hidden_size,
        )
    }

    /// Down of one expert: `[D, I]` and `[D]`.
    pub(crate) fn down(&self, expert: usize) -> (Matrix<'a>, &'a [f32]) {
        let Shape {
            hidden_size,
            intermediate_size,
            ..
        } = self.shape;
        one(&self.inputs.down, expert, hidden_size, intermediate_size)
    }
}

fn one<'a>(
    of: &Projection<'a>,
    expert: usize,
    rows: usize,
    columns: usize,
) -> (Matrix<'a>, &'a [f32]) {
    let scales = rows * (columns / BLOCK);
    let bytes = scales * BLOCK_BYTES;
    let matrix = Matrix {
        blocks: &of.blocks[expert * bytes..(expert + 1) * bytes],
        scales: &of.scales[expert * scales..(expert + 1) * scales],
        columns,
    };
    (matrix, &of.bias[expert * rows..(expert + 1) * rows])
}

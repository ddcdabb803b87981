//! Rotary position embedding, half-split: component `l` of a head of `d` numbers pairs with
//! `l + d/2`; at position `s` the pair `(a, b)` becomes `(a cos - b sin, b cos + a sin)` with the angle
//! `s * inv_freq[l]`. Angles are computed in f32 whatever the type of the model.

use crate::{
    error::NodeError,
    ir::{DType, Dim, GraphBuilder, InlineTensor, Op, Unary, ValueId},
};

/// Cosines and sines, `[batch, seq, d/2]` each, in the type of the model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Angles {
    pub(super) cos: ValueId,
    pub(super) sin: ValueId,
}

/// Which nodes rotate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RotaryForm {
    /// `RotaryEmbedding`, one node.
    Operator,
    /// Products and sums.
    Primitives,
}

/// A table of frequencies as a constant, f32 `[n]`.
pub(super) fn constant_table(b: &mut GraphBuilder, inv_freq: &[f32]) -> ValueId {
    b.constant(InlineTensor::float(DType::F32, &[inv_freq.len()], inv_freq))
}

/// Positions i64 `[batch, seq]` as f32 `[batch, seq, 1]`.
pub(super) fn positions_f32(
    b: &mut GraphBuilder,
    positions: ValueId,
) -> Result<ValueId, NodeError> {
    b.top_level(|b| {
        let positions = b.cast("rope.positions_f32", positions, DType::F32)?;
        b.unsqueeze("rope.positions", positions, &[2])
    })
}

/// Cosines and sines of `positions [batch, seq, 1]` times `inv_freq [n]`, times `factor`.
pub(super) fn angles(
    b: &mut GraphBuilder,
    name: &str,
    positions: ValueId,
    inv_freq: ValueId,
    factor: f64,
    dtype: DType,
) -> Result<Angles, NodeError> {
    b.scope(name, |b| {
        let angle = b.mul("angle", positions, inv_freq)?;
        let mut part = |name: &str, function| {
            let x = b.unary(name, function, angle)?;
            let x = b.scale(&format!("{name}.scaled"), x, factor)?;
            b.cast(&format!("{name}.cast"), x, dtype)
        };
        Ok(Angles {
            cos: part("cos", Unary::Cos)?,
            sin: part("sin", Unary::Sin)?,
        })
    })
}

/// Rotates every head of `x`, `[batch, seq, heads*d]` or `[batch, heads, seq, d]`.
pub(super) fn rotate(
    b: &mut GraphBuilder,
    name: &str,
    x: ValueId,
    heads: usize,
    angles: Angles,
    form: RotaryForm,
) -> Result<ValueId, NodeError> {
    match form {
        RotaryForm::Operator => b.node(
            name,
            Op::RotaryEmbedding { heads },
            &[x, angles.cos, angles.sin],
        ),
        RotaryForm::Primitives => b.scope(name, |b| primitives(b, x, heads, angles)),
    }
}

fn primitives(
    b: &mut GraphBuilder,
    x: ValueId,
    heads: usize,
    angles: Angles,
) -> Result<ValueId, NodeError> {
    let shape = b.shape(x).to_vec();
    let half = b
        .shape(angles.cos)
        .last()
        .and_then(Dim::as_known)
        .unwrap_or(0);
    // The axis of the heads, which the tables lack.
    let (x, head_axis) = match shape.as_slice() {
        [batch, seq, _] => {
            let by_head = [batch.clone(), seq.clone(), heads.into(), (2 * half).into()];
            (b.reshape("heads", x, &by_head)?, 2)
        }
        _ => (x, 1),
    };
    let cos = b.unsqueeze("cos", angles.cos, &[head_axis])?;
    let sin = b.unsqueeze("sin", angles.sin, &[head_axis])?;
    let parts = b.split("halves", x, 3, &[half, half])?;
    let a_cos = b.mul("a_cos", parts[0], cos)?;
    let b_sin = b.mul("b_sin", parts[1], sin)?;
    let first = b.sub("first", a_cos, b_sin)?;
    let b_cos = b.mul("b_cos", parts[1], cos)?;
    let a_sin = b.mul("a_sin", parts[0], sin)?;
    let second = b.add("second", b_cos, a_sin)?;
    let turned = b.concat("turned", &[first, second], 3)?;
    b.reshape("out", turned, &shape)
}

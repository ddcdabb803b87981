//! RMS norm: `x / sqrt(mean(x^2) + eps) * weight` over the last axis, computed in f32.

use crate::{
    error::NodeError,
    ir::{Dim, GraphBuilder, Op, ValueId},
};

/// Norm of `x [.., n]` by the checkpoint's `{tensor}.weight` `[n]`.
pub(super) fn rms_norm(
    b: &mut GraphBuilder,
    name: &str,
    x: ValueId,
    tensor: &str,
    epsilon: f64,
) -> Result<ValueId, NodeError> {
    let len = b.shape(x).last().and_then(Dim::as_known).unwrap_or(0);
    let dtype = b.ty(x).dtype;
    let weight = b.vector(&format!("{tensor}.weight"), len, dtype);
    b.node(
        name,
        Op::RmsNormalization {
            epsilon: epsilon as f32,
        },
        &[x, weight],
    )
}

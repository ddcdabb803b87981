//! Gated MLP: `down(silu(gate(x)) * up(x))`.

use mlac_model::ModelConfig;

use crate::{
    error::NodeError,
    ir::{GraphBuilder, Unary, ValueId},
};

/// `x [batch, seq, D]` to `[batch, seq, D]`; `prefix` is the layer's, `model.layers.{i}`.
pub(super) fn mlp(
    b: &mut GraphBuilder,
    cfg: &ModelConfig,
    prefix: &str,
    x: ValueId,
) -> Result<ValueId, NodeError> {
    let (hidden, inner, bias) = (cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias);
    b.scope("mlp", |b| {
        let tensor = |part: &str| format!("{prefix}.mlp.{part}_proj");
        let gate = b.linear("gate", x, &tensor("gate"), inner, hidden, bias)?;
        let up = b.linear("up", x, &tensor("up"), inner, hidden, bias)?;
        let sigmoid = b.unary("sigmoid", Unary::Sigmoid, gate)?;
        let silu = b.mul("silu", gate, sigmoid)?;
        let gated = b.mul("gated", silu, up)?;
        b.linear("down", gated, &tensor("down"), hidden, inner, bias)
    })
}

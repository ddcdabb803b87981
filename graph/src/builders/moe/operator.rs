//! `mlac::Mxfp4Experts` as a node (`docs/mxfp4-experts.md`), and in standard operators again.

use mlac_model::{ExpertFormat, MoeConfig};

use super::{Projection, Routed, SUM_DTYPE, Sizes, Tables, chosen};
use crate::{
    error::NodeError,
    ir::{
        DType, Definition, Dim, GraphBuilder, Initializer, Node, Op, Transform, ValueId, WeightRef,
    },
};

/// The chosen experts of `x [tokens, D]`, weighted and summed: f32 `[tokens, D]`.
pub(super) fn node(
    b: &mut GraphBuilder,
    sizes: Sizes,
    x: ValueId,
    routed: Routed,
    gate_up: Projection,
    down: Projection,
) -> Result<ValueId, NodeError> {
    let op = Op::Mxfp4Experts {
        swiglu_limit: sizes.moe.swiglu_limit as f32,
        swiglu_alpha: sizes.moe.swiglu_alpha as f32,
    };
    let inputs = [
        b.cast("tokens_f32", x, SUM_DTYPE)?,
        routed.experts,
        routed.weights,
        gate_up.matrix,
        gate_up.scales,
        b.cast("gate_up_bias", gate_up.bias, SUM_DTYPE)?,
        down.matrix,
        down.scales,
        b.cast("down_bias", down.bias, SUM_DTYPE)?,
    ];
    b.node("experts", op, &inputs)
}

/// What the operator `node` computes from `inputs`, as the standard form has it; `quads` is the table of FP4 numbers, once it is
/// built.
pub(crate) fn standard(
    b: &mut GraphBuilder,
    node: &Node,
    inputs: &[Option<ValueId>],
    quads: &mut Option<ValueId>,
) -> Result<ValueId, NodeError> {
    let refuse = |expected: &str, found: String| NodeError {
        node: format!("{} (Mxfp4Experts)", node.name),
        expected: expected.to_owned(),
        found,
    };
    let &Op::Mxfp4Experts {
        swiglu_limit,
        swiglu_alpha,
    } = &node.op
    else {
        return Err(refuse("Mxfp4Experts", node.op.name().to_owned()));
    };
    let all: Option<Vec<ValueId>> = inputs.iter().copied().collect();
    let Some(Ok(inputs)) = all.map(<[ValueId; 9]>::try_from) else {
        return Err(refuse("nine inputs", inputs.len().to_string()));
    };
    let [x, experts, weights, ..] = inputs;
    let known = |value: ValueId, axis: usize| {
        let dim = b.shape(value).get(axis).and_then(Dim::as_known);
        dim.ok_or_else(|| refuse("known sizes", b.ty(value).to_string()))
    };
    let choice = b.ty(experts).rank() - 1;
    let sizes = Sizes {
        moe: MoeConfig {
            num_experts: known(inputs[6], 0)?,
            experts_per_token: known(experts, choice)?,
            swiglu_limit: f64::from(swiglu_limit),
            swiglu_alpha: f64::from(swiglu_alpha),
            format: ExpertFormat::Mxfp4,
        },
        hidden: known(inputs[6], 1)?,
        inner: known(inputs[3], 1)? / 2,
    };
    let shape = b.shape(x).to_vec();
    let tokens = Dim::product(&shape[..choice]);
    let rows = b.reshape("tokens", x, &[tokens.clone(), sizes.hidden.into()])?;
    let choices = [tokens, sizes.moe.experts_per_token.into()];
    let routed = Routed {
        experts: b.reshape("chosen", experts, &choices)?,
        weights: b.reshape("chosen_weights", weights, &choices)?,
    };
    let tables = Tables::of(b, quads)?;
    let mut projection = |first: usize| {
        let matrix = pairs(b, inputs[first]).ok_or_else(|| {
            let found = b.ty(inputs[first]).to_string();
            refuse("blocks that are a weight of the graph", found)
        })?;
        Ok(Projection {
            matrix,
            scales: inputs[first + 1],
            bias: inputs[first + 2],
        })
    };
    let (gate_up, down) = (projection(3)?, projection(6)?);
    let sum = chosen(b, sizes, tables, &node.name, rows, routed, gate_up, down)?;
    b.reshape("out", sum, &shape)
}

/// The same bytes two by two, as the lookup takes them; `None` when they are not a weight.
fn pairs(b: &mut GraphBuilder, blocks: ValueId) -> Option<ValueId> {
    let Definition::Initializer(Initializer::Weight(weight)) =
        b.graph().value(blocks).definition.clone()
    else {
        return None;
    };
    let [count, out, per_row, bytes] = weight.shape[..] else {
        return None;
    };
    if weight.transform != Transform::Bytes {
        return None;
    }
    Some(b.weight(WeightRef {
        dtype: DType::U16,
        shape: vec![count, out, per_row * bytes / 2],
        ..weight
    }))
}

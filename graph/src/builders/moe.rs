//! Mixture of experts, as GPT-OSS has it: a router picks K of E experts for every token; an expert is a
//! gated MLP with a clamped `SwiGLU`, and its weights may be stored as MXFP4.
//!
//! `logits = W_r x + b_r`; `p = softmax(top_K(logits))`; `y = sum_k p_k expert_k(x)`.
//! `expert(x) = W_d ((up + 1) * gate * sigmoid(alpha * gate)) + b_d` with `gate = min(g, limit)` and
//! `up = clamp(u, -limit, limit)`, where `g` and `u` are the even and the odd rows of `W_gu x + b_gu`.
//!
//! MXFP4: 32 numbers of a row are a block of 16 bytes, two numbers a byte, the low half first, and
//! a byte that scales them by `2^(byte - 127)`. (OCP Microscaling Formats, version 1.0.)
//! The checkpoint's bytes go into the data file as they are; an expert is decoded where it is used.

mod decode;
mod operator;

use mlac_model::{
    ExpertFormat, MoeConfig,
    mxfp4::{BLOCK, BLOCK_BYTES},
};

pub(crate) use operator::standard;

use self::decode::{Tables, decode_by_table, decode_words};
use super::context::{Context, MlaForm, Runtime};
use crate::{
    error::NodeError,
    ir::{
        Binary, Compare, DType, Dim, GraphBuilder, InlineTensor, Op, Transform, Unary, ValueId,
        WeightRef,
    },
};

/// The type in which the outputs of experts are weighted and summed, and the type of routing.
const SUM_DTYPE: DType = DType::F32;

/// Routing of the tokens.
#[derive(Clone, Copy)]
struct Routed {
    /// i64 `[tokens, K]`.
    experts: ValueId,
    /// f32 `[tokens, K]`.
    weights: ValueId,
}

/// One projection of all experts.
#[derive(Clone, Copy)]
struct Projection {
    /// The numbers: MXFP4 blocks, or `[E, in, out]`.
    matrix: ValueId,
    /// Scales of MXFP4; the matrix again when there are none.
    scales: ValueId,
    /// `[E, out]`.
    bias: ValueId,
}

/// What every part needs to know.
#[derive(Clone, Copy)]
struct Sizes {
    moe: MoeConfig,
    /// D.
    hidden: usize,
    /// I.
    inner: usize,
}

/// One row per (token, choice) or per token: `[.., in]` to `[.., out]`.
struct Matrix {
    out: usize,
    input: usize,
}

impl Sizes {
    fn gate_up(self) -> Matrix {
        Matrix {
            out: 2 * self.inner,
            input: self.hidden,
        }
    }

    fn down(self) -> Matrix {
        Matrix {
            out: self.hidden,
            input: self.inner,
        }
    }
}

/// `x [batch, seq, D]` to `[batch, seq, D]`; `prefix` is the layer's, `model.layers.{i}`.
pub(super) fn moe(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    moe: MoeConfig,
    prefix: &str,
    x: ValueId,
) -> Result<ValueId, NodeError> {
    let sizes = Sizes {
        moe,
        hidden: cx.cfg.hidden_size,
        inner: cx.cfg.intermediate_size,
    };
    b.scope("moe", |b| {
        let shape = b.shape(x).to_vec();
        let tokens = Dim::product(&shape[..2]);
        let rows = b.reshape("tokens", x, &[tokens, sizes.hidden.into()])?;
        let routed = route(b, sizes, prefix, rows)?;
        let form = match (cx.runtime, cx.mla_form) {
            (Runtime::OnnxRuntime, _) if moe.format == ExpertFormat::Mxfp4 => Form::Operator,
            (Runtime::Standard | Runtime::OnnxRuntime | Runtime::OnnxRuntimeCuda, _) => {
                Form::Chosen
            }
            (_, MlaForm::Absorbed) => Form::Gathered,
            (_, MlaForm::Expanded) => Form::All,
        };
        let gate_up = projection(b, cx, sizes, form, prefix, "gate_up_proj", &sizes.gate_up());
        let down = projection(b, cx, sizes, form, prefix, "down_proj", &sizes.down());
        let sum = if form == Form::Operator {
            operator::node(b, sizes, rows, routed, gate_up, down)?
        } else {
            let tables = Tables::of(b, &mut cx.fp4_quads)?;
            match form {
                Form::Gathered => gathered(b, sizes, tables, rows, routed, gate_up, down)?,
                Form::All => all(b, sizes, tables, rows, routed, gate_up, down)?,
                _ => chosen(b, sizes, tables, prefix, rows, routed, gate_up, down)?,
            }
        };
        let sum = b.cast("sum_cast", sum, cx.dtype)?;
        b.reshape("out", sum, &shape)
    })
}

/// Which experts are computed for which tokens; all forms give the same.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A loop over the distinct experts that some token chose, each for its tokens: every chosen expert is
    /// decoded once, the others never, and one decoded expert is in memory.
    Chosen,
    /// The K experts of every token side by side, without a loop: for few tokens.
    Gathered,
    /// A loop over all experts, each for all tokens; needs no shape that depends on what was chosen.
    All,
    /// `mlac::Mxfp4Experts`.
    Operator,
}

/// Experts and weights of every row of `x [tokens, D]`.
fn route(
    b: &mut GraphBuilder,
    sizes: Sizes,
    prefix: &str,
    x: ValueId,
) -> Result<Routed, NodeError> {
    let (experts, k) = (sizes.moe.num_experts, sizes.moe.experts_per_token);
    let tensor = format!("{prefix}.mlp.router");
    let logits = b.linear("router", x, &tensor, experts, sizes.hidden, true)?;
    let logits = b.cast("router_f32", logits, SUM_DTYPE)?;
    let k = b.ints(&[k as i64]);
    let top = b.apply("chosen", Op::TopK, &[Some(logits), Some(k)])?;
    Ok(Routed {
        experts: top[1],
        weights: b.softmax("chosen_weights", top[0])?,
    })
}

/// The stored tensors of one projection in the element types that the form reads.
fn projection(
    b: &mut GraphBuilder,
    cx: &Context<'_>,
    sizes: Sizes,
    form: Form,
    prefix: &str,
    part: &str,
    matrix: &Matrix,
) -> Projection {
    let name = format!("{prefix}.mlp.experts.{part}");
    let (count, Matrix { out, input }) = (sizes.moe.num_experts, matrix);
    let (out, blocks) = (*out, input / BLOCK);
    let as_is = |name: String, shape: Vec<usize>| WeightRef {
        name,
        source_shape: shape.clone(),
        transform: Transform::AsIs,
        dtype: cx.dtype,
        shape,
    };
    let bias = b.stored_weight(as_is(format!("{name}_bias"), vec![count, out]));
    if sizes.moe.format == ExpertFormat::Dense {
        let matrix = b.stored_weight(as_is(name, vec![count, *input, out]));
        return Projection {
            matrix,
            scales: matrix,
            bias,
        };
    }
    let bytes = (DType::U8, vec![count, out, blocks]);
    let ((block_type, block_shape), (scale_type, scale_shape)) = match form {
        Form::Operator => ((DType::U8, vec![count, out, blocks, BLOCK_BYTES]), bytes),
        Form::Chosen => ((DType::U16, vec![count, out, blocks * 8]), bytes),
        // TensorRT has no constants of bytes. Both sizes are multiples of 32, so scales fill words.
        Form::Gathered | Form::All => (
            (DType::I32, vec![count, out, blocks * 4]),
            (DType::I32, vec![count, out * blocks / 4]),
        ),
    };
    let matrix = b.weight(WeightRef {
        name: format!("{name}_blocks"),
        source_shape: vec![count, out, blocks, BLOCK / 2],
        transform: Transform::Bytes,
        dtype: block_type,
        shape: block_shape,
    });
    let scales = b.weight(WeightRef {
        name: format!("{name}_scales"),
        source_shape: vec![count, out, blocks],
        transform: Transform::Scales,
        dtype: scale_type,
        shape: scale_shape,
    });
    Projection {
        matrix,
        scales,
        bias,
    }
}

/// [`Form::Chosen`]: f32 `[tokens, D]`. Everything after the router is computed in f32.
fn chosen(
    b: &mut GraphBuilder,
    sizes: Sizes,
    tables: Tables,
    prefix: &str,
    x: ValueId,
    routed: Routed,
    gate_up: Projection,
    down: Projection,
) -> Result<ValueId, NodeError> {
    let size = Dim::symbol(&format!("experts_of.{prefix}"));
    let op = Op::Unique {
        size: size.to_string().into(),
    };
    let distinct = b.node("distinct", op, &[routed.experts])?;
    let trips = b.dim_scalar(&size)?;
    let x = b.cast("tokens_f32", x, SUM_DTYPE)?;
    let nothing = zeros(b, x)?;
    let captured = [
        x,
        distinct,
        routed.experts,
        routed.weights,
        tables.quads,
        tables.scales,
        gate_up.matrix,
        gate_up.scales,
        gate_up.bias,
        down.matrix,
        down.scales,
        down.bias,
    ];
    let [sum] = b.repeat("experts", trips, [nothing], captured, |b, run| {
        let [x, distinct, chosen, weights, quads, scales, ..] = run.captured;
        let (gate_up, down) = projections(&run.captured[6..]);
        let tables = Tables { quads, scales };
        let expert = b.node("expert", Op::Gather { axis: 0 }, &[distinct, run.iteration])?;
        let (rows, x, weight) = tokens_of(b, expert, x, chosen, weights)?;
        let out = mlp(b, sizes, x, |b, part, x| {
            let (size, p) = match part {
                Part::GateUp => (sizes.gate_up(), gate_up),
                Part::Down => (sizes.down(), down),
            };
            let stored = gather(b, "stored", p.matrix, expert)?;
            let matrix = match sizes.moe.format {
                ExpertFormat::Dense => b.cast("matrix", stored, SUM_DTYPE)?,
                ExpertFormat::Mxfp4 => {
                    let scales = gather(b, "stored_scales", p.scales, expert)?;
                    decode_by_table(b, tables, &size, stored, scales)?
                }
            };
            product(b, sizes, x, matrix, p.bias, expert)
        })?;
        let out = b.mul("weighted", out, weight)?;
        Ok([b.node("sum", Op::ScatterAdd, &[run.carried[0], rows, out])?])
    })?;
    Ok(sum)
}

/// The tokens that chose `expert`: their rows i64 `[n, 1]`, their hidden states `[n, D]` and its weights
/// for them `[n, 1]`.
fn tokens_of(
    b: &mut GraphBuilder,
    expert: ValueId,
    x: ValueId,
    chosen: ValueId,
    weights: ValueId,
) -> Result<(ValueId, ValueId, ValueId), NodeError> {
    let hit = b.compare("hit", Compare::Equal, chosen, expert)?;
    let op = Op::NonZero {
        size: "tokens_of_expert".into(),
    };
    let places = b.node("places", op, &[hit])?;
    let places = b.transpose("places_t", places, &[1, 0])?;
    let rows = b.slice("rows", places, 1, 0..1)?;
    let x = b.node("hidden", Op::GatherNd, &[x, rows])?;
    let weights = b.node("weight", Op::GatherNd, &[weights, places])?;
    let weights = b.unsqueeze("weight_column", weights, &[1])?;
    Ok((rows, x, weights))
}

/// [`Form::All`]: f32 `[tokens, D]`.
fn all(
    b: &mut GraphBuilder,
    sizes: Sizes,
    tables: Tables,
    x: ValueId,
    routed: Routed,
    gate_up: Projection,
    down: Projection,
) -> Result<ValueId, NodeError> {
    let nothing = zeros(b, x)?;
    let trips = InlineTensor::i64(&[], &[sizes.moe.num_experts as i64]);
    let trips = b.constant(trips);
    let captured = [
        x,
        routed.experts,
        routed.weights,
        tables.scales,
        gate_up.matrix,
        gate_up.scales,
        gate_up.bias,
        down.matrix,
        down.scales,
        down.bias,
    ];
    let [sum] = b.repeat("experts", trips, [nothing], captured, |b, run| {
        let [x, chosen, weights, scales, ..] = run.captured;
        let (gate_up, down) = projections(&run.captured[4..]);
        let expert = run.iteration;
        let out = mlp(b, sizes, x, |b, part, x| {
            let (size, p) = match part {
                Part::GateUp => (sizes.gate_up(), gate_up),
                Part::Down => (sizes.down(), down),
            };
            let dtype = b.ty(x).dtype;
            let stored = gather(b, "stored", p.matrix, expert)?;
            let matrix = match sizes.moe.format {
                ExpertFormat::Dense => b.cast("matrix", stored, dtype)?,
                ExpertFormat::Mxfp4 => {
                    let words = gather(b, "stored_scales", p.scales, expert)?;
                    decode_words(b, scales, &[], &size, stored, words, dtype)?
                }
            };
            product(b, sizes, x, matrix, p.bias, expert)
        })?;
        let hit = b.compare("hit", Compare::Equal, chosen, expert)?;
        let none = b.constant(InlineTensor::float(SUM_DTYPE, &[], &[0.0]));
        let weight = b.node("weight_if_hit", Op::Where, &[hit, weights, none])?;
        let axis = b.ints(&[1]);
        let weight = b.node("weight", Op::ReduceSum, &[weight, axis])?;
        let out = b.cast("out_f32", out, SUM_DTYPE)?;
        let out = b.mul("weighted", out, weight)?;
        Ok([b.add("sum", run.carried[0], out)?])
    })?;
    Ok(sum)
}

/// [`Form::Gathered`]: f32 `[tokens, 1, D]`.
fn gathered(
    b: &mut GraphBuilder,
    sizes: Sizes,
    tables: Tables,
    x: ValueId,
    routed: Routed,
    gate_up: Projection,
    down: Projection,
) -> Result<ValueId, NodeError> {
    let dtype = b.ty(x).dtype;
    let lead = b.shape(routed.experts).to_vec();
    let x = b.unsqueeze("token_columns", x, &[1, 3])?;
    let out = mlp(b, sizes, x, |b, part, x| {
        let (size, p) = match part {
            Part::GateUp => (sizes.gate_up(), gate_up),
            Part::Down => (sizes.down(), down),
        };
        let stored = gather(b, "stored", p.matrix, routed.experts)?;
        let matrix = match sizes.moe.format {
            ExpertFormat::Dense => {
                let matrix = b.cast("matrix_cast", stored, dtype)?;
                b.transpose("matrix", matrix, &[0, 1, 3, 2])?
            }
            ExpertFormat::Mxfp4 => {
                let words = gather(b, "stored_scales", p.scales, routed.experts)?;
                decode_words(b, tables.scales, &lead, &size, stored, words, dtype)?
            }
        };
        let column = b.matmul("product", matrix, x)?;
        let bias = gather(b, "stored_bias", p.bias, routed.experts)?;
        let bias = b.cast("bias", bias, dtype)?;
        let bias = b.unsqueeze("bias_column", bias, &[3])?;
        b.add("biased", column, bias)
    })?;
    let axes = b.ints(&[3]);
    let out = b.node("outs", Op::Squeeze, &[out, axes])?;
    let out = b.cast("out_f32", out, SUM_DTYPE)?;
    let weights = b.unsqueeze("weight_columns", routed.weights, &[2])?;
    let out = b.mul("weighted", out, weights)?;
    let axis = b.ints(&[1]);
    b.node("sum", Op::ReduceSum, &[out, axis])
}

/// The captured values of both projections, in the order of the captures.
fn projections(captured: &[ValueId]) -> (Projection, Projection) {
    let one = |at: usize| Projection {
        matrix: captured[at],
        scales: captured[at + 1],
        bias: captured[at + 2],
    };
    (one(0), one(3))
}

/// f32 zeros `[tokens, D]`.
fn zeros(b: &mut GraphBuilder, x: ValueId) -> Result<ValueId, NodeError> {
    let zero = b.constant(InlineTensor::float(SUM_DTYPE, &[1, 1], &[0.0]));
    let shape = b.shape(x).to_vec();
    b.expand("nothing", zero, &shape)
}

/// What `table` has for one expert or several.
fn gather(
    b: &mut GraphBuilder,
    name: &str,
    table: ValueId,
    experts: ValueId,
) -> Result<ValueId, NodeError> {
    b.node(name, Op::Gather { axis: 0 }, &[table, experts])
}

/// `x [n, in]` by one expert's matrix, and its bias: `[n, out]`.
fn product(
    b: &mut GraphBuilder,
    sizes: Sizes,
    x: ValueId,
    matrix: ValueId,
    bias: ValueId,
    expert: ValueId,
) -> Result<ValueId, NodeError> {
    let dtype = b.ty(x).dtype;
    let bias = gather(b, "stored_bias", bias, expert)?;
    let bias = b.cast("bias", bias, dtype)?;
    let trans_b = sizes.moe.format == ExpertFormat::Mxfp4;
    b.node("product", Op::Gemm { trans_b }, &[x, matrix, bias])
}

#[derive(Clone, Copy)]
enum Part {
    GateUp,
    Down,
}

/// An expert: two projections around the clamped `SwiGLU`; `x` is `[.., D]`, or a column `[.., D, 1]`.
fn mlp(
    b: &mut GraphBuilder,
    sizes: Sizes,
    x: ValueId,
    mut project: impl FnMut(&mut GraphBuilder, Part, ValueId) -> Result<ValueId, NodeError>,
) -> Result<ValueId, NodeError> {
    let Sizes { moe, inner, .. } = sizes;
    let both = b.scope("gate_up", |b| project(b, Part::GateUp, x))?;
    let gated = b.scope("gated", |b| {
        let dtype = b.ty(both).dtype;
        let scalar =
            |b: &mut GraphBuilder, x: f64| b.constant(InlineTensor::float(dtype, &[], &[x as f32]));
        let shape = b.shape(both).to_vec();
        let column = shape.last().is_some_and(Dim::is_one);
        let axis = shape.len() - if column { 2 } else { 1 };
        let mut split = shape.clone();
        split[axis] = inner.into();
        let result = split.clone();
        split.insert(axis + 1, 2.into());
        let pairs = b.reshape("pairs", both, &split)?;
        let parts = b.split("parts", pairs, axis + 1, &[1, 1])?;
        let gate = b.reshape("gate", parts[0], &result)?;
        let up = b.reshape("up", parts[1], &result)?;
        let (low, high) = (scalar(b, -moe.swiglu_limit), scalar(b, moe.swiglu_limit));
        let gate = b.node("gate_min", Op::Binary(Binary::Min), &[gate, high])?;
        let up = b.node("up_min", Op::Binary(Binary::Min), &[up, high])?;
        let up = b.node("up_max", Op::Binary(Binary::Max), &[up, low])?;
        let slope = b.scale("slope", gate, moe.swiglu_alpha)?;
        let sigmoid = b.unary("sigmoid", Unary::Sigmoid, slope)?;
        let glu = b.mul("glu", gate, sigmoid)?;
        let one = scalar(b, 1.0);
        let up = b.add("up_plus_1", up, one)?;
        b.mul("out", up, glu)
    })?;
    b.scope("down", |b| project(b, Part::Down, gated))
}

#[cfg(test)]
mod tests;

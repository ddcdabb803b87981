//! Lowering of `mlac::LatentAttention` to standard operators, for runtimes without it.
//!
//! The cache keeps its capacity: new rows are chosen into their slots, and every slot is scored. So it computes the same from the same
//! inputs, but reads and writes the whole cache. Rows that are not cached yet are zeroed before they are multiplied, because
//! they may hold anything.

use crate::{
    error::{Error, NodeError},
    ir::{
        Binary, Compare, DType, Definition, Dim, GraphBuilder, Initializer, InlineTensor, Node, Op,
        ValueId,
    },
    validate::ValidGraph,
};

/// Added nowhere: it replaces hidden scores. Far below any score, and finite, so that a token that sees nothing has weights at all.
const HIDDEN: f32 = -3.0e38;

/// `graph` with every `LatentAttention` in standard operators.
///
/// # Errors
/// A node with a sliding window is refused: whether its cache rolls is known only when it runs.
pub fn lower_latent_attention(graph: &ValidGraph) -> Result<ValidGraph, Error> {
    let graph = graph.graph();
    let mut b = GraphBuilder::new(graph.name());
    let mut new: Vec<Option<ValueId>> = vec![None; graph.values().len()];
    for (id, value) in graph.values() {
        new[id.0 as usize] = match &value.definition {
            Definition::Input => Some(b.input(&value.name, value.ty.dtype, value.ty.shape.clone())),
            Definition::Initializer(Initializer::Inline(tensor)) => {
                Some(b.constant(tensor.clone()))
            }
            Definition::Initializer(Initializer::Weight(weight)) => Some(b.weight(weight.clone())),
            Definition::Node { .. } => None,
        };
    }
    for (_, node) in graph.nodes() {
        let inputs: Vec<Option<ValueId>> = node
            .inputs
            .iter()
            .map(|input| input.and_then(|id| new[id.0 as usize]))
            .collect();
        let outputs = match node.op {
            Op::LatentAttention { .. } => b.scope(&node.name, |b| lower(b, node, &inputs))?,
            _ => b.apply(&node.name, node.op.clone(), &inputs)?,
        };
        for (old, output) in node.outputs.iter().zip(outputs) {
            new[old.0 as usize] = Some(output);
        }
    }
    for &output in graph.outputs() {
        if let Some(value) = new[output.0 as usize] {
            b.output(&graph.value(output).name, value);
        }
    }
    b.finish()
}

/// Axes of one node.
struct Axes {
    batch: Dim,
    seq: Dim,
    heads: Dim,
    width: Dim,
    capacity: Dim,
    rank: usize,
}

fn lower(
    b: &mut GraphBuilder,
    node: &Node,
    inputs: &[Option<ValueId>],
) -> Result<Vec<ValueId>, NodeError> {
    let refuse = |expected: &str, found: String| NodeError {
        node: format!("{} (LatentAttention)", node.name),
        expected: expected.to_owned(),
        found,
    };
    let &Op::LatentAttention {
        kv_lora_rank: rank,
        scale,
        sliding_window,
        ..
    } = &node.op
    else {
        return Err(refuse("LatentAttention", node.op.name().to_owned()));
    };
    if let Some(window) = sliding_window {
        let expected = "no sliding window: standard operators do not know whether the cache rolls";
        return Err(refuse(expected, format!("a window of {window}")));
    }
    let given = |i: usize| inputs.get(i).copied().flatten();
    let [Some(query), Some(rows), Some(cache), Some(past)] = [0, 1, 2, 3].map(given) else {
        return Err(refuse(
            "a query, new rows, a cache and lengths",
            "less".to_owned(),
        ));
    };
    let [batch, seq, heads, width] = b.shape(query) else {
        return Err(refuse("a query with 4 axes", b.ty(query).to_string()));
    };
    let axes = Axes {
        batch: batch.clone(),
        seq: seq.clone(),
        heads: heads.clone(),
        width: width.clone(),
        capacity: b.shape(cache)[1].clone(),
        rank,
    };
    let places = Places::of(b, &axes, past)?;
    let kept = store(b, &axes, &places, rows, cache)?;
    let known = known_rows(b, &axes, &places, given(7))?;
    let sums = attend(b, &axes, &places, query, kept, known, given(5), scale)?;
    Ok(vec![sums, kept])
}

/// Where things are, all i64.
struct Places {
    /// `[capacity]`.
    slots: ValueId,
    /// `[batch, 1]`.
    past: ValueId,
    /// `[batch, 1]`: number of the sequence.
    sequence: ValueId,
    /// Scalars.
    zero: ValueId,
    one: ValueId,
    seq: ValueId,
}

impl Places {
    fn of(b: &mut GraphBuilder, axes: &Axes, past: ValueId) -> Result<Self, NodeError> {
        let zero = b.constant(InlineTensor::i64(&[], &[0]));
        let one = b.constant(InlineTensor::i64(&[], &[1]));
        let capacity = b.dim_scalar(&axes.capacity)?;
        let batch = b.dim_scalar(&axes.batch)?;
        let seq = b.dim_scalar(&axes.seq)?;
        let past = b.cast("past_i64", past, DType::I64)?;
        let sequence = b.node("sequence", Op::Range, &[zero, batch, one])?;
        Ok(Self {
            slots: b.node("slots", Op::Range, &[zero, capacity, one])?,
            past: b.unsqueeze("past_column", past, &[1])?,
            sequence: b.unsqueeze("sequence_column", sequence, &[1])?,
            zero,
            one,
            seq,
        })
    }
}

/// The cache with the new rows in their slots, `[batch, capacity, w]`.
fn store(
    b: &mut GraphBuilder,
    axes: &Axes,
    at: &Places,
    rows: ValueId,
    cache: ValueId,
) -> Result<ValueId, NodeError> {
    let token = b.sub("token", at.slots, at.past)?;
    let minus_one = b.constant(InlineTensor::i64(&[], &[-1]));
    let begun = b.compare("begun", Compare::Greater, token, minus_one)?;
    let not_over = b.compare("not_over", Compare::Greater, at.seq, token)?;
    let fresh = b.node("fresh", Op::And, &[begun, not_over])?;
    let last = b.sub("last", at.seq, at.one)?;
    let token = b.node("from_first", Op::Binary(Binary::Max), &[token, at.zero])?;
    let token = b.node("to_last", Op::Binary(Binary::Min), &[token, last])?;
    let first = b.mul("first_row", at.sequence, at.seq)?;
    let row = b.add("row", token, first)?;
    let flat = [&axes.batch * &axes.seq, axes.width.clone()];
    let rows = b.reshape("rows", rows, &flat)?;
    let rows = b.node("rows_by_slot", Op::Gather { axis: 0 }, &[rows, row])?;
    let fresh = b.unsqueeze("fresh_rows", fresh, &[2])?;
    b.node("cache", Op::Where, &[fresh, rows, cache])
}

/// Which slots hold rows that a token may see at all, `[batch, capacity]`.
fn known_rows(
    b: &mut GraphBuilder,
    axes: &Axes,
    at: &Places,
    key_mask: Option<ValueId>,
) -> Result<ValueId, NodeError> {
    let total = b.add("total", at.past, at.seq)?;
    let known = b.compare("known", Compare::Greater, total, at.slots)?;
    let Some(mask) = key_mask else {
        return Ok(known);
    };
    let columns = b.shape(mask)[1].clone();
    let count = b.dim_scalar(&columns)?;
    let last = b.sub("last_column", count, at.one)?;
    let column = b.node("column", Op::Binary(Binary::Min), &[at.slots, last])?;
    let first = b.mul("first_column", at.sequence, count)?;
    let place = b.add("mask_place", column, first)?;
    let mask = b.reshape("mask", mask, &[&axes.batch * &columns])?;
    let mask = b.node("mask_by_slot", Op::Gather { axis: 0 }, &[mask, place])?;
    let shown = b.cast("shown", mask, DType::Bool)?;
    b.node("known_and_shown", Op::And, &[known, shown])
}

/// Sums of latents, `[batch, seq, H, r]`.
fn attend(
    b: &mut GraphBuilder,
    axes: &Axes,
    at: &Places,
    query: ValueId,
    cache: ValueId,
    known: ValueId,
    sinks: Option<ValueId>,
    scale: f32,
) -> Result<ValueId, NodeError> {
    let dtype = b.ty(query).dtype;
    let Axes {
        batch,
        seq,
        heads,
        capacity,
        ..
    } = axes;
    let zero = b.constant(InlineTensor::float(dtype, &[], &[0.0]));
    let rows = b.unsqueeze("known_rows", known, &[2])?;
    let cache = b.node("clean", Op::Where, &[rows, cache, zero])?;

    let query_rows = [batch.clone(), seq * heads, axes.width.clone()];
    let query = b.reshape("query_rows", query, &query_rows)?;
    let query = b.scale("scaled", query, f64::from(scale))?;
    let keys = b.transpose("keys", cache, &[0, 2, 1])?;
    let scores = b.matmul("scores", query, keys)?;
    let scores = b.cast("scores_f32", scores, DType::F32)?;
    let by_head = [batch.clone(), seq.clone(), heads.clone(), capacity.clone()];
    let scores = b.reshape("scores_by_head", scores, &by_head)?;

    let tokens = b.node("tokens", Op::Range, &[at.zero, at.seq, at.one])?;
    let tokens = b.unsqueeze("token_column", tokens, &[1])?;
    let past = b.unsqueeze("past_block", at.past, &[2])?;
    let own = b.add("own", past, tokens)?;
    let causal = b.compare("causal", Compare::LessOrEqual, at.slots, own)?;
    let known = b.unsqueeze("known_slots", known, &[1])?;
    let seen = b.node("seen", Op::And, &[causal, known])?;
    let seen = b.unsqueeze("seen_by_heads", seen, &[2])?;
    let hidden = b.constant(InlineTensor::float(DType::F32, &[], &[HIDDEN]));
    let mut scores = b.node("visible", Op::Where, &[seen, scores, hidden])?;
    if let Some(sinks) = sinks {
        let column = b.unsqueeze("sinks", sinks, &[0, 1, 3])?;
        let shape = [batch.clone(), seq.clone(), heads.clone(), Dim::known(1)];
        let column = b.expand("sink_column", column, &shape)?;
        scores = b.concat("scores_and_sink", &[column, scores], 3)?;
    }
    let mut weights = b.softmax("weights", scores)?;
    if sinks.is_some() {
        weights = if let Some(rows) = capacity.as_known() {
            b.slice("weights_alone", weights, 3, 1..rows + 1)?
        } else {
            let first = b.ints(&[1]);
            b.slice_from("weights_alone", weights, 3, first)?
        };
    }
    let weights = b.cast("weights_cast", weights, dtype)?;
    let weight_rows = [batch.clone(), seq * heads, capacity.clone()];
    let weights = b.reshape("weight_rows", weights, &weight_rows)?;
    let latents = b.slice("latents", cache, 2, 0..axes.rank)?;
    let sums = b.matmul("sums", weights, latents)?;
    let by_head = [batch.clone(), seq.clone(), heads.clone(), axes.rank.into()];
    let sums = b.reshape("sums_by_head", sums, &by_head)?;

    // A token that sees nothing has weights of nothing in particular.
    let seen = b.cast("seen_f32", seen, DType::F32)?;
    let axis = b.ints(&[3]);
    let count = b.node("seen_count", Op::ReduceSum, &[seen, axis])?;
    let none = b.constant(InlineTensor::float(DType::F32, &[], &[0.0]));
    let any = b.compare("any", Compare::Greater, count, none)?;
    b.node("out", Op::Where, &[any, sums, zero])
}

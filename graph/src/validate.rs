//! The invariants of a finished graph.
//!
//! [`GraphBuilder::finish`](crate::ir::GraphBuilder::finish) checks them all; nothing that breaks one can
//! be written:
//!
//! 1. Handles: every handle in a node, an input or an output points into the graph.
//! 2. Single assignment: every value is defined once, where its definition says, and a node's
//!    inputs are defined before the node.
//! 3. Names: of values and of nodes, unique, not empty, printable ASCII without spaces or slashes.
//! 4. Types: the types and shapes of a node's outputs are those that its inputs imply.
//! 5. Outputs: at least one, distinct, computed by nodes.
//! 6. Nothing dead: every input, initializer and node is needed by an output.
//! 7. Symbols: every symbol of a shape occurs in the shape of an input, or one node brings it
//!    in ([`crate::ir::Op::introduces`]; several `Tail`s may bring in one that means the same).
//! 8. Inline constants: as many bytes as type and shape say, and small.
//! 9. Weights: floating point, or bytes as they are; the transform applies to the source shape and leaves as many
//!    elements as the shape has; one checkpoint tensor has one source shape.
//! 10. Caches: every input `past_*` but `past_lengths` has one output `present*` of the same type and rank, equal in
//!     all axes but one, which grows by the new tokens or keeps the last ones, and in all axes when
//!     one of them is a `capacity*`; and the other way round.
//! 11. Bodies of loops: each is a graph with these invariants, but its inputs stand for values outside;
//!     none but the run's number, the condition and carried values may be unused, and it has no weights.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    error::NodeError,
    ir::{
        DType, Definition, Dim, Graph, Initializer, InlineTensor, Node, NodeId, Op, TensorType,
        Transform, Value, ValueId, WeightRef, infer_node,
    },
    passes::dead,
};

/// The largest constant that may sit inside a graph, in bytes.
const LARGEST_INLINE: usize = 1 << 16;

/// What the symbol of an axis begins with that holds as many rows after a step as before.
const CAPACITY: &str = "capacity";

/// The input of lengths that some forms have, which is no cache.
pub(crate) const PAST_LENGTHS: &str = "past_lengths";

/// A graph that holds every invariant; the only form that can be written.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidGraph(Graph);

impl ValidGraph {
    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.0
    }

    /// Names of what the caller gives, in order.
    pub fn input_names(&self) -> Vec<&str> {
        self.0
            .inputs()
            .iter()
            .map(|&i| self.0.value(i).name.as_str())
            .collect()
    }

    /// Names of what the caller gets, in order.
    pub fn output_names(&self) -> Vec<&str> {
        self.0
            .outputs()
            .iter()
            .map(|&o| self.0.value(o).name.as_str())
            .collect()
    }
}

/// An invariant that a graph breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Invariant 1.
    #[error("{subject}: handle {handle} does not belong to the graph")]
    ForeignHandle {
        /// Where the handle stands.
        subject: String,
        /// The handle.
        handle: u32,
    },
    /// Invariant 2.
    #[error("value {value}: {problem}")]
    Assignment {
        /// The value.
        value: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// Invariant 3.
    #[error("name {name:?}: {problem}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// Invariant 4, the inputs.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// Invariant 4, the outputs.
    #[error("node {node}: inputs imply outputs {expected}, the graph says {found}")]
    Types {
        /// The node.
        node: String,
        /// What inference gives.
        expected: String,
        /// What is recorded.
        found: String,
    },
    /// Invariant 5.
    #[error("output {name}: {problem}")]
    Output {
        /// The output.
        name: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// Invariant 6.
    #[error("{kind} {name}: no output needs it")]
    Dead {
        /// Input, initializer or node.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// Invariant 7.
    #[error("value {value} of type {ty}: symbol {symbol} is not an axis of any input")]
    UnboundSymbol {
        /// The value.
        value: String,
        /// Its type.
        ty: String,
        /// The symbol.
        symbol: String,
    },
    /// Invariants 8 and 9.
    #[error("initializer {name}: {problem}")]
    Initializer {
        /// The initializer.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// Invariant 10.
    #[error("cache {name}: {problem}")]
    Cache {
        /// The input or output.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// Invariant 7, symbols that nodes bring in.
    #[error("node {node}: brings in the symbol {symbol}, which has another meaning")]
    Symbol {
        /// The node.
        node: String,
        /// The symbol.
        symbol: String,
    },
    /// Invariant 11.
    #[error("body of {node}: {problem}")]
    Body {
        /// The node.
        node: String,
        /// What is wrong.
        problem: String,
    },
}

/// Checks every invariant and seals the graph.
pub(crate) fn seal(graph: Graph) -> Result<ValidGraph, Violation> {
    handles(&graph)?;
    assignment(&graph)?;
    names(&graph)?;
    types(&graph)?;
    outputs(&graph)?;
    nothing_dead(&graph, &dead::live(&graph))?;
    symbols(&graph)?;
    initializers(&graph)?;
    caches(&graph)?;
    bodies(&graph)?;
    Ok(ValidGraph(graph))
}

/// Checks what the body of a loop with `carried` values must satisfy and gives it back.
pub(crate) fn check_body(graph: Graph, carried: usize) -> Result<Graph, Violation> {
    body(&graph, carried)?;
    Ok(graph)
}

fn bodies(graph: &Graph) -> Result<(), Violation> {
    for node in &graph.nodes {
        if let Op::Loop {
            body: inner,
            carried,
        } = &node.op
        {
            body(inner, *carried).map_err(|violation| Violation::Body {
                node: node.name.clone(),
                problem: violation.to_string(),
            })?;
        }
    }
    Ok(())
}

fn body(graph: &Graph, carried: usize) -> Result<(), Violation> {
    handles(graph)?;
    assignment(graph)?;
    names(graph)?;
    types(graph)?;
    outputs(graph)?;
    nothing_dead(graph, &dead::live_in_body(graph, 2 + carried))?;
    symbols(graph)?;
    initializers(graph)?;
    bodies(graph)?;
    match graph.weights().next() {
        Some(weight) => Err(Violation::Initializer {
            name: weight.name.clone(),
            problem: "a weight inside a body, it must be captured".to_owned(),
        }),
        None => Ok(()),
    }
}

fn handles(graph: &Graph) -> Result<(), Violation> {
    let check = |subject: &str, id: ValueId| {
        if (id.0 as usize) < graph.values.len() {
            Ok(())
        } else {
            Err(Violation::ForeignHandle {
                subject: subject.to_owned(),
                handle: id.0,
            })
        }
    };
    graph
        .inputs
        .iter()
        .try_for_each(|&i| check("graph inputs", i))?;
    graph
        .outputs
        .iter()
        .try_for_each(|&o| check("graph outputs", o))?;
    for node in &graph.nodes {
        let all = node.inputs.iter().flatten().chain(&node.outputs);
        all.copied().try_for_each(|v| check(&node.name, v))?;
    }
    for value in &graph.values {
        if let Definition::Node { node, .. } = value.definition
            && node.0 as usize >= graph.nodes.len()
        {
            return Err(Violation::ForeignHandle {
                subject: value.name.clone(),
                handle: node.0,
            });
        }
    }
    Ok(())
}

fn assignment(graph: &Graph) -> Result<(), Violation> {
    let wrong = |id: ValueId, problem| {
        Err(Violation::Assignment {
            value: graph.value(id).name.clone(),
            problem,
        })
    };
    let mut defined = vec![false; graph.values.len()];
    let mut define = |id: ValueId| std::mem::replace(&mut defined[id.0 as usize], true);
    for &id in &graph.inputs {
        if graph.value(id).definition != Definition::Input {
            return wrong(id, "a graph input that is not defined as one");
        }
        if define(id) {
            return wrong(id, "defined twice");
        }
    }
    for (id, value) in graph.values() {
        if matches!(value.definition, Definition::Initializer(_)) {
            define(id);
        }
    }
    for (node_id, node) in graph.nodes() {
        for &input in node.inputs.iter().flatten() {
            if !defined[input.0 as usize] {
                return wrong(input, "used before it is defined");
            }
        }
        for (at, &output) in node.outputs.iter().enumerate() {
            let own = Definition::Node {
                node: node_id,
                output: at,
            };
            if graph.value(output).definition != own {
                return wrong(output, "output of a node that its definition does not name");
            }
            if std::mem::replace(&mut defined[output.0 as usize], true) {
                return wrong(output, "defined twice");
            }
        }
    }
    match graph.values().find(|(id, _)| !defined[id.0 as usize]) {
        Some((id, _)) => wrong(id, "never defined"),
        None => Ok(()),
    }
}

fn names(graph: &Graph) -> Result<(), Violation> {
    let wrong = |name: &str, problem| {
        Err(Violation::Name {
            name: name.to_owned(),
            problem,
        })
    };
    let check = |all: &mut dyn Iterator<Item = &String>| {
        let mut seen = BTreeSet::new();
        for name in all {
            if name.is_empty() {
                return wrong(name, "empty");
            }
            if !name.chars().all(|c| c.is_ascii_graphic()) {
                return wrong(name, "not printable ASCII without spaces");
            }
            // Slashes separate the names of a body from its loop's in a written file.
            if name.contains('/') {
                return wrong(name, "a slash");
            }
            if !seen.insert(name) {
                return wrong(name, "used twice");
            }
        }
        Ok(())
    };
    check(&mut graph.values.iter().map(|v| &v.name))?;
    check(&mut graph.nodes.iter().map(|n| &n.name))
}

fn types(graph: &Graph) -> Result<(), Violation> {
    for node in &graph.nodes {
        let inferred = infer_node(graph, &node.name, &node.op, &node.inputs)?;
        let found: Vec<&Value> = node.outputs.iter().map(|&o| graph.value(o)).collect();
        let agree = inferred.len() == found.len()
            && inferred
                .iter()
                .zip(&found)
                .all(|(a, b)| a.ty == b.ty && a.content == b.content);
        if !agree {
            let text = |types: Vec<&TensorType>| {
                let all: Vec<String> = types.into_iter().map(ToString::to_string).collect();
                all.join(", ")
            };
            return Err(Violation::Types {
                node: node.name.clone(),
                expected: text(inferred.iter().map(|t| &t.ty).collect()),
                found: text(found.iter().map(|v| &v.ty).collect()),
            });
        }
    }
    Ok(())
}

fn outputs(graph: &Graph) -> Result<(), Violation> {
    let wrong = |name: &str, problem| {
        Err(Violation::Output {
            name: name.to_owned(),
            problem,
        })
    };
    if graph.outputs.is_empty() {
        return wrong(&graph.name, "the graph has none");
    }
    let mut seen = BTreeSet::new();
    for &id in &graph.outputs {
        let value = graph.value(id);
        if !matches!(value.definition, Definition::Node { .. }) {
            return wrong(&value.name, "not computed by a node");
        }
        if !seen.insert(id) {
            return wrong(&value.name, "given twice");
        }
    }
    Ok(())
}

fn nothing_dead(graph: &Graph, live: &dead::Live) -> Result<(), Violation> {
    for (id, value) in graph.values() {
        if !live.values[id.0 as usize] {
            let kind = match value.definition {
                Definition::Input => "input",
                Definition::Initializer(_) => "initializer",
                Definition::Node { .. } => "value",
            };
            return Err(Violation::Dead {
                kind,
                name: value.name.clone(),
            });
        }
    }
    match graph
        .nodes()
        .find(|(id, _): &(NodeId, &Node)| !live.nodes[id.0 as usize])
    {
        Some((_, node)) => Err(Violation::Dead {
            kind: "node",
            name: node.name.clone(),
        }),
        None => Ok(()),
    }
}

fn symbols(graph: &Graph) -> Result<(), Violation> {
    let mut bound: BTreeSet<&str> = graph
        .inputs
        .iter()
        .flat_map(|&i| graph.value(i).ty.shape.iter().flat_map(Dim::symbols))
        .collect();
    let mut tails: BTreeMap<&str, TailMeaning<'_>> = BTreeMap::new();
    for node in &graph.nodes {
        let Some(symbol) = node.op.introduces() else {
            continue;
        };
        let meaning = tail_meaning(graph, node);
        let again = tails
            .get(symbol)
            .is_some_and(|m| Some(m) == meaning.as_ref());
        if !bound.insert(symbol) && !again {
            return Err(Violation::Symbol {
                node: node.name.clone(),
                symbol: symbol.to_owned(),
            });
        }
        if let Some(meaning) = meaning {
            tails.insert(symbol, meaning);
        }
    }
    for value in &graph.values {
        for symbol in value.ty.shape.iter().flat_map(Dim::symbols) {
            if !bound.contains(symbol) {
                return Err(Violation::UnboundSymbol {
                    value: value.name.clone(),
                    ty: value.ty.to_string(),
                    symbol: symbol.to_owned(),
                });
            }
        }
    }
    Ok(())
}

/// What is cut and the start of the cut.
type TailMeaning<'g> = (&'g Dim, &'g [Dim]);

fn tail_meaning<'g>(graph: &'g Graph, node: &Node) -> Option<TailMeaning<'g>> {
    let (Op::Tail { .. }, &[Some(data), Some(start), _, Some(axis)]) =
        (&node.op, node.inputs.as_slice())
    else {
        return None;
    };
    let axis = graph.value(axis).content.as_ref()?.first()?.as_known()?;
    let whole = graph.value(data).ty.shape.get(axis)?;
    Some((whole, graph.value(start).content.as_deref()?))
}

fn initializers(graph: &Graph) -> Result<(), Violation> {
    let mut sources: BTreeMap<&str, &[usize]> = BTreeMap::new();
    for value in &graph.values {
        let Definition::Initializer(initializer) = &value.definition else {
            continue;
        };
        let problem = match initializer {
            Initializer::Inline(tensor) => inline_problem(tensor, &value.ty),
            Initializer::Weight(weight) => weight_problem(weight, &value.ty, &mut sources),
        };
        if let Some(problem) = problem {
            return Err(Violation::Initializer {
                name: value.name.clone(),
                problem,
            });
        }
    }
    Ok(())
}

fn has_type(ty: &TensorType, dtype: DType, shape: &[usize]) -> bool {
    ty.dtype == dtype
        && ty
            .shape
            .iter()
            .map(Dim::as_known)
            .eq(shape.iter().map(|&n| Some(n)))
}

fn inline_problem(tensor: &InlineTensor, ty: &TensorType) -> Option<String> {
    let needed = tensor.shape.iter().product::<usize>() * tensor.dtype.size();
    if tensor.bytes.len() != needed {
        return Some(format!(
            "{ty} takes {needed} bytes, it has {}",
            tensor.bytes.len()
        ));
    }
    if needed > LARGEST_INLINE {
        return Some(format!(
            "{needed} bytes inside the graph, at most {LARGEST_INLINE} may be"
        ));
    }
    (!has_type(ty, tensor.dtype, &tensor.shape))
        .then(|| format!("declared {ty}, holds {}{:?}", tensor.dtype, tensor.shape))
}

fn weight_problem<'g>(
    weight: &'g WeightRef,
    ty: &TensorType,
    sources: &mut BTreeMap<&'g str, &'g [usize]>,
) -> Option<String> {
    let bytes = matches!(weight.transform, Transform::Bytes | Transform::Scales);
    if !(bytes || weight.dtype.is_float() || weight.dtype == DType::BF16) {
        return Some(format!(
            "a weight of type {}, weights are floating point",
            weight.dtype
        ));
    }
    if !has_type(ty, weight.dtype, &weight.shape) {
        return Some(format!(
            "declared {ty}, refers to {}{:?}",
            weight.dtype, weight.shape
        ));
    }
    let elements = match weight.elements() {
        Ok(n) => n,
        Err(problem) => return Some(problem),
    };
    if elements != weight.shape.iter().product::<usize>() {
        return Some(format!(
            "the transform leaves {elements} elements for {:?}",
            weight.shape
        ));
    }
    let first = sources.entry(&weight.name).or_insert(&weight.source_shape);
    (*first != weight.source_shape.as_slice()).then(|| {
        format!(
            "{} read as {first:?} and as {:?}",
            weight.name, weight.source_shape
        )
    })
}

fn caches(graph: &Graph) -> Result<(), Violation> {
    let wrong = |name: &str, problem: String| {
        Err(Violation::Cache {
            name: name.into(),
            problem,
        })
    };
    let mut presents: BTreeMap<String, &Value> = graph
        .outputs
        .iter()
        .map(|&o| graph.value(o))
        .filter(|v| v.name.starts_with("present"))
        .map(|v| (v.name.clone(), v))
        .collect();
    for past in graph.inputs.iter().map(|&i| graph.value(i)) {
        let Some(rest) = past.name.strip_prefix("past_") else {
            continue;
        };
        if past.name == PAST_LENGTHS {
            continue;
        }
        let name = match rest.strip_prefix("key_values.") {
            Some(rest) => format!("present.{rest}"),
            None => format!("present_{rest}"),
        };
        let Some(present) = presents.remove(&name) else {
            return wrong(&past.name, format!("no output {name}"));
        };
        let grown: Vec<(&Dim, &Dim)> = past
            .ty
            .shape
            .iter()
            .zip(&present.ty.shape)
            .filter(|(a, b)| a != b)
            .collect();
        let agree = past.ty.dtype == present.ty.dtype
            && past.ty.rank() == present.ty.rank()
            && grown.len() == usize::from(!has_capacity(past))
            && past.ty.shape.len() > 1;
        if !agree {
            let problem = format!(
                "{} becomes {name} {}, one axis may grow, or none when one is a capacity",
                past.ty, present.ty
            );
            return wrong(&past.name, problem);
        }
    }
    match presents.into_iter().next() {
        Some((name, _)) => wrong(&name, "no past input belongs to it".to_owned()),
        None => Ok(()),
    }
}

/// Whether the cache has a fixed capacity, so that a step gives it back in the same shape.
fn has_capacity(cache: &Value) -> bool {
    let mut symbols = cache.ty.shape.iter().flat_map(Dim::symbols);
    symbols.any(|symbol| symbol.starts_with(CAPACITY))
}

#[cfg(test)]
mod tests;

//! A readable text form: one line per input, weight, node and output.

use std::fmt::{self, Write as _};

use crate::ir::{Attribute, DType, Definition, Graph, Initializer, InlineTensor, Op, ValueId};

/// Constants with more elements than this are shown by their count.
const LONGEST_SHOWN: usize = 8;

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "graph {}", self.name())?;
        lines(self, "", f)
    }
}

/// The lines of a graph or, indented, of a body.
fn lines(graph: &Graph, indent: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for &id in graph.inputs() {
        let value = graph.value(id);
        writeln!(f, "{indent}input  {}: {}", value.name, value.ty)?;
    }
    for weight in graph.values().filter_map(|(_, v)| match &v.definition {
        Definition::Initializer(Initializer::Weight(w)) => Some((v, w)),
        _ => None,
    }) {
        let (value, w) = weight;
        writeln!(
            f,
            "{indent}weight {}: {} = {} {:?} {}",
            value.name, value.ty, w.name, w.source_shape, w.transform
        )?;
    }
    for (_, node) in graph.nodes() {
        let outputs: Vec<String> = node
            .outputs
            .iter()
            .map(|&o| format!("{}: {}", graph.value(o).name, graph.value(o).ty))
            .collect();
        let inputs: Vec<String> = node
            .inputs
            .iter()
            .map(|i| i.map_or_else(|| "-".to_owned(), |i| operand(graph, i)))
            .collect();
        let mut attributes = String::new();
        for (name, value) in node.op.attributes() {
            if !matches!(value, Attribute::Graph(_)) {
                write!(attributes, " {name}={value}")?;
            }
        }
        let domain = node.op.domain();
        let dot = if domain.is_empty() { "" } else { "." };
        writeln!(
            f,
            "{indent}{} = {domain}{dot}{}({}){attributes}",
            outputs.join(", "),
            node.op.name(),
            inputs.join(", "),
        )?;
        if let Op::Loop { body, .. } = &node.op {
            lines(body, &format!("{indent}    "), f)?;
        }
    }
    for &id in graph.outputs() {
        let value = graph.value(id);
        writeln!(f, "{indent}output {}: {}", value.name, value.ty)?;
    }
    Ok(())
}

/// A value where it is used: its name, or its elements when it is a small constant.
fn operand(graph: &Graph, id: ValueId) -> String {
    let value = graph.value(id);
    match &value.definition {
        Definition::Initializer(Initializer::Inline(t)) => constant(t),
        _ => value.name.clone(),
    }
}

fn constant(tensor: &InlineTensor) -> String {
    let count: usize = tensor.shape.iter().product();
    if count > LONGEST_SHOWN {
        return format!("<{}{:?}>", tensor.dtype, tensor.shape);
    }
    let mut elements = vec![];
    for chunk in tensor.bytes.chunks(tensor.dtype.size()) {
        elements.push(match *chunk {
            [a, b] if tensor.dtype == DType::F16 => half::f16::from_le_bytes([a, b]).to_string(),
            [a, b, c, d] if tensor.dtype.is_float() => f32::from_le_bytes([a, b, c, d]).to_string(),
            [a, b, c, d] => i32::from_le_bytes([a, b, c, d]).to_string(),
            [a, b, c, d, e, g, h, i] => i64::from_le_bytes([a, b, c, d, e, g, h, i]).to_string(),
            _ => format!("{chunk:?}"),
        });
    }
    let kind = tensor.dtype;
    match tensor.shape.as_slice() {
        [] => format!("{kind} {}", elements.join(", ")),
        _ => format!("{kind} [{}]", elements.join(", ")),
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(n) => write!(f, "{n}"),
            Self::Float(x) => write!(f, "{x}"),
            Self::Ints(all) => write!(f, "{all:?}"),
            Self::DType(d) => write!(f, "{d}"),
            Self::Text(word) => f.write_str(word),
            Self::Bytes(bytes) => write!(f, "<{} bytes>", bytes.len()),
            Self::Graph(graph) => f.write_str(graph.name()),
        }
    }
}

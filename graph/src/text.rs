//! A readable text form: one line per input, weight, node and output.

use std::fmt::{self, Write as _};

use crate::ir::{Attribute, Definition, Graph, Initializer, InlineTensor, ValueId};

/// Constants with more elements than this are shown by their count.
const LONGEST_SHOWN: usize = 8;

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "graph {}", self.name())?;
        for &id in self.inputs() {
            writeln!(f, "input  {}: {}", self.value(id).name, self.value(id).ty)?;
        }
        for weight in self.values().filter_map(|(_, v)| match &v.definition {
            Definition::Initializer(Initializer::Weight(w)) => Some((v, w)),
            _ => None,
        }) {
            let (value, w) = weight;
            writeln!(
                f,
                "weight {}: {} = {} {:?} {}",
                value.name, value.ty, w.name, w.source_shape, w.transform
            )?;
        }
        for (_, node) in self.nodes() {
            let outputs: Vec<String> = node
                .outputs
                .iter()
                .map(|&o| format!("{}: {}", self.value(o).name, self.value(o).ty))
                .collect();
            let inputs: Vec<String> = node
                .inputs
                .iter()
                .map(|i| i.map_or_else(|| "-".to_owned(), |i| operand(self, i)))
                .collect();
            let mut attributes = String::new();
            for (name, value) in node.op.attributes() {
                write!(attributes, " {name}={value}")?;
            }
            let domain = node.op.domain();
            let dot = if domain.is_empty() { "" } else { "." };
            writeln!(
                f,
                "{} = {domain}{dot}{}({}){attributes}",
                outputs.join(", "),
                node.op.name(),
                inputs.join(", "),
            )?;
        }
        for &id in self.outputs() {
            writeln!(f, "output {}: {}", self.value(id).name, self.value(id).ty)?;
        }
        Ok(())
    }
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
            [a, b] => half::f16::from_le_bytes([a, b]).to_string(),
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
        }
    }
}

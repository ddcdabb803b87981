//! The typed graph: values and nodes behind handles, symbolic shapes, weights by reference.
//!
//! A graph is made by [`GraphBuilder`], the only type that may change one, and can be written only
//! as a [`crate::ValidGraph`].

mod builder;
mod dim;
mod dtype;
pub(crate) mod infer;
mod op;
mod sugar;
mod weight;

use std::fmt;

pub(crate) use builder::infer_node;
pub use builder::{GraphBuilder, Run};
pub use dim::Dim;
pub use dtype::DType;
pub use op::{Attribute, Binary, Compare, MICROSOFT_DOMAIN, MLAC_DOMAIN, Op, Unary};
pub use weight::{Initializer, InlineTensor, Transform, WeightRef};

/// ONNX opset of every graph.
pub const OPSET: i64 = 23;

/// Handle of a value of one graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ValueId(pub(crate) u32);

/// Handle of a node of one graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(crate) u32);

/// Element type and shape.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Axis sizes; empty for a scalar.
    pub shape: Vec<Dim>,
}

impl TensorType {
    /// A type from its parts.
    pub fn new(dtype: DType, shape: Vec<Dim>) -> Self {
        Self { dtype, shape }
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.shape.iter().map(ToString::to_string).collect();
        write!(f, "{}[{}]", self.dtype, dims.join(", "))
    }
}

/// A tensor that flows through the graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// Unique name, used in the written file.
    pub name: String,
    /// Element type and shape.
    pub ty: TensorType,
    /// The elements of an i64 tensor with at most one axis, when they follow from shapes.
    pub content: Option<Vec<Dim>>,
    /// Where the value comes from.
    pub definition: Definition,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Definition {
    /// The caller gives it.
    Input,
    /// It is stored with the graph.
    Initializer(Initializer),
    /// A node computes it.
    Node {
        /// The node.
        node: NodeId,
        /// Which of the node's outputs.
        output: usize,
    },
}

/// One application of an operator.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Unique name.
    pub name: String,
    /// The operator.
    pub op: Op,
    /// Inputs in the operator's order; `None` for an optional one that is left out.
    pub inputs: Vec<Option<ValueId>>,
    /// Outputs in the operator's order.
    pub outputs: Vec<ValueId>,
}

/// A graph under construction or finished; read-only outside [`GraphBuilder`].
#[derive(Debug, Clone, PartialEq)]
pub struct Graph {
    pub(crate) name: String,
    pub(crate) values: Vec<Value>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) inputs: Vec<ValueId>,
    pub(crate) outputs: Vec<ValueId>,
}

impl Graph {
    /// The graph's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All values with their handles, in order of creation.
    pub fn values(&self) -> impl ExactSizeIterator<Item = (ValueId, &Value)> {
        self.values
            .iter()
            .enumerate()
            .map(|(i, v)| (ValueId(i as u32), v))
    }

    /// All nodes with their handles, in an order in which they can run.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = (NodeId, &Node)> {
        self.nodes
            .iter()
            .enumerate()
            .map(|(i, n)| (NodeId(i as u32), n))
    }

    /// The value behind a handle of this graph.
    ///
    /// # Panics
    /// When the handle belongs to another graph.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }

    /// The node behind a handle of this graph.
    ///
    /// # Panics
    /// When the handle belongs to another graph.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// What the caller gives, in order.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// What the caller gets, in order.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    /// The type of the input called `name`.
    pub fn input_type(&self, name: &str) -> Option<&TensorType> {
        self.inputs
            .iter()
            .map(|&i| self.value(i))
            .find(|v| v.name == name)
            .map(|v| &v.ty)
    }

    /// The type of the output called `name`.
    pub fn output_type(&self, name: &str) -> Option<&TensorType> {
        self.outputs
            .iter()
            .map(|&i| self.value(i))
            .find(|v| v.name == name)
            .map(|v| &v.ty)
    }

    /// The checkpoint tensors the graph reads, in order of creation.
    pub fn weights(&self) -> impl Iterator<Item = &WeightRef> {
        self.values.iter().filter_map(|v| match &v.definition {
            Definition::Initializer(Initializer::Weight(w)) => Some(w),
            _ => None,
        })
    }
}

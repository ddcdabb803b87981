//! The only type that changes a graph.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    DType, Definition, Dim, Graph, Initializer, InlineTensor, Node, NodeId, Op, TensorType,
    Transform, Value, ValueId, WeightRef,
    infer::{self, Given},
};
use crate::{
    error::{Error, NodeError},
    passes::dead::{self, Live},
    validate::{self, ValidGraph},
};

/// Constants with more elements than this are not followed by shape inference.
const LONGEST_FOLLOWED: usize = 16;

/// Builds a graph node by node; every node is checked when it is added.
#[derive(Debug)]
pub struct GraphBuilder {
    graph: Graph,
    scopes: Vec<String>,
    names: BTreeSet<String>,
    constants: BTreeMap<(DType, Vec<usize>, Vec<u8>), ValueId>,
    weights: BTreeMap<WeightRef, ValueId>,
    cast_weights: BTreeMap<(ValueId, DType), ValueId>,
    /// Types of tensors that keep the one they are stored in, by name.
    stored: BTreeMap<String, DType>,
    /// Whether linear layers multiply by tensors of 16 bits as they are.
    linear16: bool,
    /// Values that hold one dimension each, i64 `[1]`.
    pub(super) dims: BTreeMap<Dim, ValueId>,
    /// Values that hold one dimension each, i64 scalar.
    pub(super) scalars: BTreeMap<Dim, ValueId>,
    /// Values that hold a whole shape, i64 `[rank]`.
    pub(super) shapes: BTreeMap<Vec<Dim>, ValueId>,
}

/// What one run of a loop's body has.
#[derive(Debug, Clone, Copy)]
pub struct Run<const N: usize, const M: usize> {
    /// Number of the run from 0, i64 scalar.
    pub iteration: ValueId,
    /// What the run before gave.
    pub carried: [ValueId; N],
    /// Values of the graph outside, the same in every run.
    pub captured: [ValueId; M],
}

impl GraphBuilder {
    /// An empty graph.
    pub fn new(name: &str) -> Self {
        Self {
            graph: Graph {
                name: name.to_owned(),
                values: vec![],
                nodes: vec![],
                inputs: vec![],
                outputs: vec![],
            },
            scopes: vec![],
            names: BTreeSet::new(),
            constants: BTreeMap::new(),
            weights: BTreeMap::new(),
            stored: BTreeMap::new(),
            linear16: false,
            cast_weights: BTreeMap::new(),
            dims: BTreeMap::new(),
            scalars: BTreeMap::new(),
            shapes: BTreeMap::new(),
        }
    }

    /// The graph so far.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The type of a value.
    pub fn ty(&self, value: ValueId) -> &TensorType {
        &self.graph.value(value).ty
    }

    /// The shape of a value.
    pub fn shape(&self, value: ValueId) -> &[Dim] {
        &self.ty(value).shape
    }

    /// Runs `build` with `name` prepended to the names of the nodes it adds.
    pub fn scope<T>(&mut self, name: &str, build: impl FnOnce(&mut Self) -> T) -> T {
        self.scopes.push(name.to_owned());
        let result = build(self);
        self.scopes.pop();
        result
    }

    /// Runs `build` outside every scope.
    pub(crate) fn top_level<T>(&mut self, build: impl FnOnce(&mut Self) -> T) -> T {
        let scopes = std::mem::take(&mut self.scopes);
        let result = build(self);
        self.scopes = scopes;
        result
    }

    /// `wanted`, or `wanted_2` and so on when it is taken.
    fn unique(&mut self, wanted: &str) -> String {
        let mut name = wanted.to_owned();
        let mut count = 1;
        while !self.names.insert(name.clone()) {
            count += 1;
            name = format!("{wanted}_{count}");
        }
        name
    }

    fn push(&mut self, value: Value) -> ValueId {
        let id = ValueId(self.graph.values.len() as u32);
        self.graph.values.push(value);
        id
    }

    /// Declares what the caller gives.
    pub fn input(&mut self, name: &str, dtype: DType, shape: Vec<Dim>) -> ValueId {
        let name = self.unique(name);
        let id = self.push(Value {
            name,
            ty: TensorType::new(dtype, shape),
            content: None,
            definition: Definition::Input,
        });
        self.graph.inputs.push(id);
        id
    }

    /// A small constant; equal constants share one value.
    pub fn constant(&mut self, tensor: InlineTensor) -> ValueId {
        let key = (tensor.dtype, tensor.shape.clone(), tensor.bytes.clone());
        if let Some(&id) = self.constants.get(&key) {
            return id;
        }
        let short = tensor.shape.len() <= 1 && tensor.bytes.len() <= 8 * LONGEST_FOLLOWED;
        let content = tensor
            .as_i64()
            .filter(|_| short)
            .map(|values| values.into_iter().map(Dim::constant).collect());
        let name = self.unique(&format!("const.{}", self.constants.len()));
        let id = self.push(Value {
            name,
            ty: TensorType::new(
                tensor.dtype,
                tensor.shape.iter().map(|&n| n.into()).collect(),
            ),
            content,
            definition: Definition::Initializer(Initializer::Inline(tensor)),
        });
        self.constants.insert(key, id);
        id
    }

    /// A tensor of the checkpoint; equal references share one value.
    pub fn weight(&mut self, weight: WeightRef) -> ValueId {
        if let Some(&id) = self.weights.get(&weight) {
            return id;
        }
        let suffix = match weight.transform {
            Transform::AsIs | Transform::Bytes | Transform::Scales => "",
            Transform::Transpose2D => ".t",
            Transform::KvBKey { .. } => ".key",
            Transform::KvBValue { .. } => ".value_t",
            Transform::HeadTranspose { .. } => ".head_t",
        };
        let name = self.unique(&format!("{}{suffix}", weight.name));
        let id = self.push(Value {
            name,
            ty: TensorType::new(
                weight.dtype,
                weight.shape.iter().map(|&n| n.into()).collect(),
            ),
            content: None,
            definition: Definition::Initializer(Initializer::Weight(weight.clone())),
        });
        self.weights.insert(weight, id);
        id
    }

    /// From now on [`GraphBuilder::stored_weight`] gives these tensors in these types.
    pub fn keep_stored(&mut self, types: BTreeMap<String, DType>) {
        self.stored = types;
    }

    /// From now on linear layers in f32 multiply by tensors that keep 16 bits as they are, with [`Op::Linear16`].
    pub fn multiply_stored(&mut self) {
        self.linear16 = true;
    }

    /// Whether a linear layer on numbers of `dtype` is [`Op::Linear16`] for this tensor.
    pub(crate) fn multiplies_stored(&self, tensor: &str, dtype: DType) -> bool {
        let stored = self.stored.get(tensor);
        self.linear16 && dtype == DType::F32 && matches!(stored, Some(DType::BF16 | DType::F16))
    }

    /// A tensor of the checkpoint in the type that it keeps, the one of `weight` when it keeps none; the
    /// caller casts what it reads of it.
    pub fn stored_weight(&mut self, weight: WeightRef) -> ValueId {
        let dtype = self.stored.get(&weight.name).copied();
        self.weight(WeightRef {
            dtype: dtype.unwrap_or(weight.dtype),
            ..weight
        })
    }

    /// [`GraphBuilder::stored_weight`] as a whole in the type of `weight`.
    pub fn cast_weight(&mut self, weight: WeightRef) -> Result<ValueId, NodeError> {
        let (dtype, name) = (weight.dtype, weight.name.clone());
        let value = self.stored_weight(weight);
        if let Some(&cast) = self.cast_weights.get(&(value, dtype)) {
            return Ok(cast);
        }
        let cast = self.top_level(|b| b.cast(&format!("{name}.{dtype}"), value, dtype))?;
        self.cast_weights.insert((value, dtype), cast);
        Ok(cast)
    }

    /// Adds a node and gives all its outputs.
    pub fn apply(
        &mut self,
        name: &str,
        op: Op,
        inputs: &[Option<ValueId>],
    ) -> Result<Vec<ValueId>, NodeError> {
        let path = if self.scopes.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.scopes.join("."))
        };
        let inferred = infer_node(&self.graph, &path, &op, inputs)?;
        let name = self.unique(&path);
        let node = NodeId(self.graph.nodes.len() as u32);
        let mut outputs = Vec::with_capacity(inferred.len());
        let single = inferred.len() == 1;
        for (output, result) in inferred.into_iter().enumerate() {
            let name = if single {
                name.clone()
            } else {
                self.unique(&format!("{name}.{output}"))
            };
            let definition = Definition::Node { node, output };
            outputs.push(self.push(Value {
                name,
                ty: result.ty,
                content: result.content,
                definition,
            }));
        }
        let inputs = inputs.to_vec();
        self.graph.nodes.push(Node {
            name,
            op,
            inputs,
            outputs: outputs.clone(),
        });
        Ok(outputs)
    }

    /// Adds a node with one output.
    pub fn node(&mut self, name: &str, op: Op, inputs: &[ValueId]) -> Result<ValueId, NodeError> {
        let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
        Ok(self.apply(name, op, &inputs)?[0])
    }

    /// Declares a computed value to be what the caller gets under `name`.
    pub fn output(&mut self, name: &str, value: ValueId) {
        let name = self.unique(name);
        self.graph.values[value.0 as usize].name = name;
        self.graph.outputs.push(value);
    }

    /// Runs a body `trips` times (i64 scalar), which gets its number, what the last run carried to it
    /// (at first `carried`) and the captured values, and gives what it carries on; captured values that
    /// it does not need are let go. Gives what the last run carried on.
    pub fn repeat<const N: usize, const M: usize>(
        &mut self,
        name: &str,
        trips: ValueId,
        carried: [ValueId; N],
        captured: [ValueId; M],
        build: impl FnOnce(&mut Self, Run<N, M>) -> Result<[ValueId; N], NodeError>,
    ) -> Result<[ValueId; N], NodeError> {
        let mut body = Self::new(name);
        let iteration = body.input("iteration", DType::I64, vec![]);
        body.input("condition", DType::Bool, vec![]);
        let mut inside = |id: ValueId, followed: bool| {
            let value = self.graph.value(id);
            let inner = body.input(&value.name, value.ty.dtype, value.ty.shape.clone());
            if followed {
                let followed = &mut body.graph.values[inner.0 as usize].content;
                followed.clone_from(&value.content);
            }
            inner
        };
        let run = Run {
            iteration,
            carried: carried.map(|id| inside(id, false)),
            captured: captured.map(|id| inside(id, true)),
        };
        let results = build(&mut body, run)?;
        // Not the condition of the run before: TensorRT has none when the loop is given none.
        let go_on = body.constant(InlineTensor::bool(true));
        let go_on = body.node("go_on", Op::Identity, &[go_on])?;
        body.graph.outputs.push(go_on);
        body.graph.outputs.extend(results);
        let fixed = 2 + N;
        let live = dead::live_in_body(&body.graph, fixed);
        let needed: Vec<bool> = body.graph.inputs[fixed..]
            .iter()
            .map(|i| live.values[i.0 as usize])
            .collect();
        body.retain(&live);
        let body = validate::check_body(body.graph, N).map_err(|violation| NodeError {
            node: format!("{name} (Loop)"),
            expected: "a valid body".to_owned(),
            found: violation.to_string(),
        })?;
        let inputs: Vec<Option<ValueId>> = [Some(trips), None]
            .into_iter()
            .chain(carried.map(Some))
            .chain(
                captured
                    .into_iter()
                    .zip(needed)
                    .filter_map(|(c, n)| n.then_some(Some(c))),
            )
            .collect();
        let op = Op::Loop {
            body: Arc::new(body),
            carried: N,
        };
        let outputs = self.apply(name, op, &inputs)?;
        <[ValueId; N]>::try_from(outputs).map_err(|outputs| NodeError {
            node: format!("{name} (Loop)"),
            expected: format!("{N} carried values"),
            found: outputs.len().to_string(),
        })
    }

    /// Removes what no output needs, inputs included, checks every invariant of
    /// [`crate::validate`] and seals the graph.
    pub fn finish(mut self) -> Result<ValidGraph, Error> {
        let live = dead::live(&self.graph);
        self.retain(&live);
        Ok(validate::seal(self.graph)?)
    }

    /// Keeps the live nodes and values and renumbers the handles.
    fn retain(&mut self, live: &Live) {
        let graph = &mut self.graph;
        let number = |keep: &[bool]| -> Vec<Option<u32>> {
            let mut next = 0;
            let mut count = |&k: &bool| {
                k.then(|| {
                    next += 1;
                    next - 1
                })
            };
            keep.iter().map(&mut count).collect()
        };
        let (values, nodes) = (number(&live.values), number(&live.nodes));
        let moved = |id: ValueId| values[id.0 as usize].map(ValueId);
        let mut keep = live.nodes.iter();
        graph.nodes.retain(|_| keep.next().copied().unwrap_or(true));
        for node in &mut graph.nodes {
            node.inputs.iter_mut().for_each(|i| *i = i.and_then(moved));
            node.outputs = node.outputs.iter().filter_map(|&o| moved(o)).collect();
        }
        let mut keep = live.values.iter();
        graph
            .values
            .retain(|_| keep.next().copied().unwrap_or(true));
        for value in &mut graph.values {
            if let Definition::Node { node, .. } = &mut value.definition
                && let Some(new) = nodes[node.0 as usize]
            {
                *node = NodeId(new);
            }
        }
        graph.inputs = graph.inputs.iter().filter_map(|&i| moved(i)).collect();
        graph.outputs = graph.outputs.iter().filter_map(|&o| moved(o)).collect();
    }
}

/// Output types of a node, with the node's name in the error.
pub(crate) fn infer_node(
    graph: &Graph,
    name: &str,
    op: &Op,
    inputs: &[Option<ValueId>],
) -> Result<Vec<infer::Inferred>, NodeError> {
    let given = |id: &Option<ValueId>| {
        id.map(|id| {
            let value = graph.value(id);
            Given {
                ty: &value.ty,
                content: value.content.as_deref(),
            }
        })
    };
    let given: Vec<_> = inputs.iter().map(given).collect();
    infer::infer(op, &given).map_err(|m| NodeError {
        node: format!("{name} ({})", op.name()),
        expected: m.expected,
        found: m.found,
    })
}

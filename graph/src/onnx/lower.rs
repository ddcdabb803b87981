//! From a valid graph to ONNX's model message.

use std::collections::BTreeSet;

use super::{
    IR_VERSION,
    proto::{
        AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
        TensorShapeProto, TypeProto, ValueInfoProto,
        attribute_proto::AttributeType,
        tensor_proto,
        tensor_shape_proto::{Dimension, dimension},
        type_proto,
    },
};
use crate::{
    ir::{
        Attribute, DType, Definition, Graph, Initializer, Node, OPSET, Op, Value, ValueId,
        WeightRef,
    },
    validate::ValidGraph,
};

/// Puts the elements of a weight into its tensor or says where they are.
type Store<'a, E> = dyn FnMut(&WeightRef, &mut TensorProto) -> Result<(), E> + 'a;

/// The message of a graph; `store` puts the elements of a weight into its tensor or says where they are.
pub(super) fn model<E>(
    graph: &ValidGraph,
    mut store: impl FnMut(&WeightRef, &mut TensorProto) -> Result<(), E>,
) -> Result<ModelProto, E> {
    let graph = graph.graph();
    let domains: BTreeSet<&str> = graph.nodes().map(|(_, n)| n.op.domain()).collect();
    let opset = |domain: &str| OperatorSetIdProto {
        domain: Some(domain.to_owned()),
        version: Some(if domain.is_empty() { OPSET } else { 1 }),
    };
    let others = domains.into_iter().filter(|d| !d.is_empty());
    let names: Vec<String> = graph.values().map(|(_, v)| v.name.clone()).collect();
    Ok(ModelProto {
        ir_version: Some(IR_VERSION),
        opset_import: std::iter::once("").chain(others).map(opset).collect(),
        producer_name: Some("mlac".to_owned()),
        producer_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        graph: Some(message(
            graph,
            graph.inputs().len(),
            &names,
            "",
            &mut store,
        )?),
        ..ModelProto::default()
    })
}

/// The message of a graph whose values are called `names`, by handle, and whose nodes' names start with
/// `prefix`; of its inputs it declares the first `inputs`, the others are values outside.
fn message<E>(
    graph: &Graph,
    inputs: usize,
    names: &[String],
    prefix: &str,
    store: &mut Store<'_, E>,
) -> Result<GraphProto, E> {
    let name = |id: ValueId| names[id.0 as usize].clone();
    let mut initializers = vec![];
    for (id, value) in graph.values() {
        let Definition::Initializer(initializer) = &value.definition else {
            continue;
        };
        let shape = match initializer {
            Initializer::Inline(tensor) => &tensor.shape,
            Initializer::Weight(weight) => &weight.shape,
        };
        let mut tensor = TensorProto {
            name: Some(name(id)),
            data_type: Some(data_type(value.ty.dtype)),
            dims: shape.iter().map(|&n| n as i64).collect(),
            ..TensorProto::default()
        };
        match initializer {
            Initializer::Inline(inline) => tensor.raw_data = Some(inline.bytes.clone()),
            Initializer::Weight(weight) => store(weight, &mut tensor)?,
        }
        initializers.push(tensor);
    }
    let mut nodes = vec![];
    for (_, n) in graph.nodes() {
        let mut proto = node(n, prefix, &name);
        if let Op::Loop { body, carried } = &n.op {
            let body = loop_body(n, body, *carried, prefix, &name, store)?;
            // The body sees what it captures by name.
            proto.input.truncate(2 + carried);
            proto.attribute = vec![AttributeProto {
                name: Some("body".to_owned()),
                r#type: Some(AttributeType::Graph as i32),
                g: Some(body),
                ..AttributeProto::default()
            }];
        }
        nodes.push(proto);
    }
    let info = |ids: &[ValueId]| {
        let one = |&id: &ValueId| value_info(name(id), graph.value(id));
        ids.iter().map(one).collect()
    };
    Ok(GraphProto {
        name: Some(format!("{prefix}{}", graph.name())),
        node: nodes,
        initializer: initializers,
        input: info(&graph.inputs()[..inputs]),
        output: info(graph.outputs()),
        ..GraphProto::default()
    })
}

/// The body of the loop `node`: what it captures has the names outside, its own values start with the loop's.
fn loop_body<E>(
    node: &Node,
    body: &Graph,
    carried: usize,
    prefix: &str,
    outside: &dyn Fn(ValueId) -> String,
    store: &mut Store<'_, E>,
) -> Result<GraphProto, E> {
    let prefix = format!("{prefix}{}/", node.name);
    let own = |v: &Value| format!("{prefix}{}", v.name);
    let mut names: Vec<String> = body.values().map(|(_, v)| own(v)).collect();
    let declared = 2 + carried;
    let captured = body.inputs().iter().zip(&node.inputs).skip(declared);
    for (inner, outer) in captured {
        if let &Some(outer) = outer {
            names[inner.0 as usize] = outside(outer);
        }
    }
    message(body, declared, &names, &prefix, store)
}

fn node(node: &Node, prefix: &str, name: &dyn Fn(ValueId) -> String) -> NodeProto {
    let domain = node.op.domain();
    // A plugin has no empty inputs: an attribute says which there are.
    let packed = matches!(
        node.op,
        Op::LatentAttention {
            plugin: Some(_),
            ..
        }
    );
    let inputs = node.inputs.iter().filter(|i| !packed || i.is_some());
    NodeProto {
        name: Some(format!("{prefix}{}", node.name)),
        op_type: Some(node.op.name().to_owned()),
        domain: (!domain.is_empty()).then(|| domain.to_owned()),
        input: inputs.map(|i| i.map_or_else(String::new, name)).collect(),
        output: node.outputs.iter().map(|&o| name(o)).collect(),
        attribute: node
            .op
            .attributes()
            .into_iter()
            .filter_map(|(n, a)| attribute(n, a))
            .collect(),
        ..NodeProto::default()
    }
}

/// `None` for a body, which needs the names around it.
fn attribute(name: &str, value: Attribute) -> Option<AttributeProto> {
    let mut proto = AttributeProto {
        name: Some(name.to_owned()),
        ..AttributeProto::default()
    };
    let kind = match value {
        Attribute::Int(i) => {
            proto.i = Some(i);
            AttributeType::Int
        }
        Attribute::DType(dtype) => {
            proto.i = Some(i64::from(data_type(dtype)));
            AttributeType::Int
        }
        Attribute::Float(f) => {
            proto.f = Some(f);
            AttributeType::Float
        }
        Attribute::Ints(ints) => {
            proto.ints = ints;
            AttributeType::Ints
        }
        Attribute::Text(word) => {
            proto.s = Some(word.as_bytes().to_vec());
            AttributeType::String
        }
        Attribute::Bytes(bytes) => {
            proto.s = Some(bytes.to_vec());
            AttributeType::String
        }
        Attribute::Graph(_) => return None,
    };
    proto.r#type = Some(kind as i32);
    Some(proto)
}

fn value_info(name: String, value: &Value) -> ValueInfoProto {
    let dim = |d: &crate::ir::Dim| Dimension {
        denotation: None,
        value: Some(match d.as_constant() {
            Some(n) => dimension::Value::DimValue(n),
            None => dimension::Value::DimParam(d.to_string()),
        }),
    };
    let tensor = type_proto::Tensor {
        elem_type: Some(data_type(value.ty.dtype)),
        shape: Some(TensorShapeProto {
            dim: value.ty.shape.iter().map(dim).collect(),
        }),
    };
    ValueInfoProto {
        name: Some(name),
        r#type: Some(TypeProto {
            denotation: None,
            value: Some(type_proto::Value::TensorType(tensor)),
        }),
        ..ValueInfoProto::default()
    }
}

fn data_type(dtype: DType) -> i32 {
    let kind = match dtype {
        DType::F32 => tensor_proto::DataType::Float,
        DType::F16 => tensor_proto::DataType::Float16,
        DType::I64 => tensor_proto::DataType::Int64,
        DType::I32 => tensor_proto::DataType::Int32,
        DType::Bool => tensor_proto::DataType::Bool,
        DType::BF16 => tensor_proto::DataType::Bfloat16,
        DType::U8 => tensor_proto::DataType::Uint8,
        DType::U16 => tensor_proto::DataType::Uint16,
    };
    kind as i32
}

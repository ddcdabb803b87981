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
    ir::{Attribute, DType, Definition, Initializer, Node, OPSET, Value, ValueId, WeightRef},
    validate::ValidGraph,
};

/// The message of a graph; `store` puts the elements of a weight into its tensor or says where they are.
pub(super) fn model<E>(
    graph: &ValidGraph,
    mut store: impl FnMut(&WeightRef, &mut TensorProto) -> Result<(), E>,
) -> Result<ModelProto, E> {
    let graph = graph.graph();
    let name = |id: ValueId| graph.value(id).name.clone();
    let mut initializers = vec![];
    for (_, value) in graph.values() {
        let Definition::Initializer(initializer) = &value.definition else {
            continue;
        };
        let shape = match initializer {
            Initializer::Inline(tensor) => &tensor.shape,
            Initializer::Weight(weight) => &weight.shape,
        };
        let mut tensor = TensorProto {
            name: Some(value.name.clone()),
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
    let nodes = graph.nodes().map(|(_, n)| node(n, &name)).collect();
    let info = |ids: &[ValueId]| ids.iter().map(|&id| value_info(graph.value(id))).collect();
    let domains: BTreeSet<&str> = graph.nodes().map(|(_, n)| n.op.domain()).collect();
    let opset = |domain: &str| OperatorSetIdProto {
        domain: Some(domain.to_owned()),
        version: Some(if domain.is_empty() { OPSET } else { 1 }),
    };
    let others = domains.into_iter().filter(|d| !d.is_empty());
    Ok(ModelProto {
        ir_version: Some(IR_VERSION),
        opset_import: std::iter::once("").chain(others).map(opset).collect(),
        producer_name: Some("mlac".to_owned()),
        producer_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        graph: Some(GraphProto {
            name: Some(graph.name().to_owned()),
            node: nodes,
            initializer: initializers,
            input: info(graph.inputs()),
            output: info(graph.outputs()),
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    })
}

fn node(node: &Node, name: &dyn Fn(ValueId) -> String) -> NodeProto {
    let domain = node.op.domain();
    NodeProto {
        name: Some(node.name.clone()),
        op_type: Some(node.op.name().to_owned()),
        domain: (!domain.is_empty()).then(|| domain.to_owned()),
        input: node
            .inputs
            .iter()
            .map(|i| i.map_or_else(String::new, name))
            .collect(),
        output: node.outputs.iter().map(|&o| name(o)).collect(),
        attribute: node
            .op
            .attributes()
            .into_iter()
            .map(|(n, a)| attribute(n, a))
            .collect(),
        ..NodeProto::default()
    }
}

fn attribute(name: &str, value: Attribute) -> AttributeProto {
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
    };
    proto.r#type = Some(kind as i32);
    proto
}

fn value_info(value: &Value) -> ValueInfoProto {
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
        name: Some(value.name.clone()),
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
    };
    kind as i32
}

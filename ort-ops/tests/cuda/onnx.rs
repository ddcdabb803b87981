//! An ONNX file with one node of the operator, written byte by byte: the exporter's graphs have no kernels in them.

/// A field of protobuf: a number, or bytes.
pub(crate) fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn number(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

/// An attribute of a node.
pub(crate) enum Attribute {
    Float(f32),
    Int(i64),
    Bytes(Vec<u8>),
}

fn attribute(name: &str, value: &Attribute) -> Vec<u8> {
    let mut out = Vec::new();
    bytes(&mut out, 1, name.as_bytes());
    let kind = match value {
        Attribute::Float(x) => {
            varint(&mut out, 2 << 3 | 5);
            out.extend(x.to_le_bytes());
            1
        }
        Attribute::Int(x) => {
            number(&mut out, 3, *x as u64);
            2
        }
        Attribute::Bytes(x) => {
            bytes(&mut out, 4, x);
            3
        }
    };
    number(&mut out, 20, kind);
    out
}

/// `ValueInfoProto` of a tensor with so many axes of any size.
fn port(name: &str, element: u64, axes: usize) -> Vec<u8> {
    let (mut shape, mut tensor, mut kind, mut out) = (vec![], vec![], vec![], vec![]);
    for axis in 0..axes {
        let mut dim = Vec::new();
        bytes(&mut dim, 2, format!("{name}_{axis}").as_bytes());
        bytes(&mut shape, 1, &dim);
    }
    number(&mut tensor, 1, element);
    bytes(&mut tensor, 2, &shape);
    bytes(&mut kind, 1, &tensor);
    bytes(&mut out, 1, name.as_bytes());
    bytes(&mut out, 2, &kind);
    out
}

/// A model of one node. Ports are name, ONNX element type and axes; those without a name are left out.
pub(crate) fn model(
    inputs: &[(&str, u64, usize)],
    outputs: &[(&str, u64, usize)],
    attributes: &[(&str, Attribute)],
) -> Vec<u8> {
    let (mut node, mut graph, mut model) = (vec![], vec![], vec![]);
    for (name, ..) in inputs {
        bytes(&mut node, 1, name.as_bytes());
    }
    for (name, ..) in outputs {
        bytes(&mut node, 2, name.as_bytes());
    }
    bytes(&mut node, 4, b"LatentAttention");
    for (name, value) in attributes {
        bytes(&mut node, 5, &attribute(name, value));
    }
    bytes(&mut node, 7, b"mlac");
    bytes(&mut graph, 1, &node);
    bytes(&mut graph, 2, b"step");
    for (field, ports) in [(11, inputs), (12, outputs)] {
        for (name, element, axes) in ports.iter().filter(|(name, ..)| !name.is_empty()) {
            bytes(&mut graph, field, &port(name, *element, *axes));
        }
    }
    number(&mut model, 1, 10);
    bytes(&mut model, 7, &graph);
    for (domain, version) in [("", 21), ("mlac", 1)] {
        let mut opset = Vec::new();
        bytes(&mut opset, 1, domain.as_bytes());
        number(&mut opset, 2, version);
        bytes(&mut model, 8, &opset);
    }
    model
}

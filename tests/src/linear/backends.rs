//! What must give the specification's answer, in Rust: the kernel alone, the operator and its lowering in ONNX Runtime.

use mlac_engines::ort::{Element, HostTensor, OrtSession, SessionOptions, Value};
use mlac_graph::ValidGraph;
use mlac_graph::ir::{DType, GraphBuilder, Op, Transform, WeightRef};
use mlac_graph::onnx::{MemoryWeights, to_bytes};
use mlac_graph::passes::lower_linear16;
use mlac_model::Dtype;
use mlac_ort::Isa;
use mlac_ort::linear::{Inputs, Shape, Step, compute};

use super::problem::{Kind, Problem};
use crate::latent::backends::Threads;
use crate::{Outcome, text};

/// The kernel of the library, without ONNX Runtime.
pub fn kernel(problem: &Problem, isa: Isa, threads: usize) -> Outcome<Vec<f32>> {
    let shape = Shape {
        tokens: problem.tokens(),
        rows: problem.spec.output,
        columns: problem.spec.input,
    };
    let inputs = Inputs {
        x: &problem.x,
        weight: problem.weight.weight(),
        bias: problem.bias.as_deref(),
    };
    let step = Step::new(shape, inputs).map_err(text)?;
    // Whatever is there is overwritten.
    let mut out = vec![f32::NAN; problem.tokens() * problem.spec.output];
    compute(&step, &mut out, isa, &Threads(threads));
    Ok(out)
}

/// The operator as a graph of one node, its weight and bias as weights.
pub fn graph(problem: &Problem) -> Outcome<ValidGraph> {
    let spec = &problem.spec;
    let mut b = GraphBuilder::new("linear16");
    let of = |name: &str, dtype, shape: &[usize]| WeightRef {
        name: name.to_owned(),
        source_shape: shape.to_vec(),
        transform: Transform::AsIs,
        dtype,
        shape: shape.to_vec(),
    };
    let kind = match spec.kind {
        Kind::Bf16 => DType::BF16,
        Kind::F16 => DType::F16,
    };
    let shape = problem.with(spec.input).iter().map(|&n| n.into()).collect();
    let mut inputs = vec![
        b.input("x", DType::F32, shape),
        b.weight(of("weight", kind, &[spec.output, spec.input])),
    ];
    if problem.bias.is_some() {
        inputs.push(b.weight(of("bias", DType::F32, &[spec.output])));
    }
    let out = b.node("product", Op::Linear16, &inputs).map_err(text)?;
    b.output("out", out);
    b.finish().map_err(text)
}

/// The weights of [`graph`].
fn source(problem: &Problem) -> Outcome<MemoryWeights> {
    let spec = &problem.spec;
    let mut source = MemoryWeights::new();
    let kind = match spec.kind {
        Kind::Bf16 => Dtype::BF16,
        Kind::F16 => Dtype::F16,
    };
    let (shape, bytes) = ([spec.output, spec.input], problem.weight.bytes());
    let held = source.insert_stored("weight", &shape, kind, bytes);
    held.map_err(text)?;
    if let Some(bias) = &problem.bias {
        let held = source.insert("bias", &[spec.output], bias.clone());
        held.map_err(text)?;
    }
    Ok(source)
}

/// The operator in a session of mlac's.
pub fn operator(problem: &Problem) -> Outcome<Vec<f32>> {
    session(problem, &graph(problem)?)
}

/// Standard operators in its place.
pub fn lowered(problem: &Problem) -> Outcome<Vec<f32>> {
    session(problem, &lower_linear16(&graph(problem)?).map_err(text)?)
}

/// The operator with `x [2, x_in]` and an f16 `weight [4, weight_in]`, whose sizes the session sees when it runs.
pub fn sizes(x_in: usize, weight_in: usize) -> Outcome<Vec<f32>> {
    let mut b = GraphBuilder::new("sizes");
    let x = b.input("x", DType::F32, vec!["n".into(), "in".into()]);
    let weight = b.input("weight", DType::F16, vec!["out".into(), "in".into()]);
    let out = b.node("product", Op::Linear16, &[x, weight]);
    b.output("out", out.map_err(text)?);
    let graph = b.finish().map_err(text)?;
    let bytes = to_bytes(&graph, &MemoryWeights::new()).map_err(text)?;
    let options = SessionOptions::default();
    let mut session = OrtSession::from_bytes("sizes", &bytes, &options).map_err(text)?;
    let value = |element, shape| Value::new(HostTensor::zeros(element, shape)).map_err(text);
    let x = value(Element::F32, [2, x_in])?;
    let weight = value(Element::F16, [4, weight_in])?;
    let out = session.run(&[("x", &x), ("weight", &weight)]);
    Ok(out.map_err(text)?[0].to_host().to_f32().into_owned())
}

fn session(problem: &Problem, graph: &ValidGraph) -> Outcome<Vec<f32>> {
    let bytes = to_bytes(graph, &source(problem)?).map_err(text)?;
    let options = SessionOptions::default();
    let mut session = OrtSession::from_bytes("linear", &bytes, &options).map_err(text)?;
    let x = HostTensor::f32(problem.with(problem.spec.input), problem.x.clone());
    let x = Value::new(x).map_err(text)?;
    let out = session.run(&[("x", &x)]).map_err(text)?;
    Ok(out[0].to_host().to_f32().into_owned())
}

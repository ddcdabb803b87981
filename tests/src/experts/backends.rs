//! What must give the specification's answer, in Rust: the kernel alone, the operator and its lowering in ONNX Runtime.

use mlac_engines::ort::{HostTensor, OrtSession, SessionOptions, Value};
use mlac_graph::ValidGraph;
use mlac_graph::ir::{DType, GraphBuilder, Op, Transform, ValueId, WeightRef};
use mlac_graph::onnx::{MemoryWeights, to_bytes};
use mlac_graph::passes::lower_mxfp4_experts;
use mlac_model::Dtype;
use mlac_ort::Isa;
use mlac_ort::experts::{self, Inputs, Shape, Step, compute};

use super::problem::{Problem, Projection};
use crate::latent::backends::Threads;
use crate::{Outcome, text};

/// The kernel of the library, without ONNX Runtime.
pub fn kernel(problem: &Problem, isa: Isa, threads: usize) -> Outcome<Vec<f32>> {
    let spec = &problem.spec;
    let shape = Shape {
        tokens: problem.tokens(),
        experts_per_token: spec.chosen,
        num_experts: spec.experts,
        hidden_size: spec.hidden,
        intermediate_size: spec.inner,
        swiglu_limit: spec.limit,
        swiglu_alpha: problem.alpha,
    };
    let inputs = Inputs {
        hidden: &problem.hidden,
        experts: &problem.experts,
        weights: &problem.weights,
        gate_up: stored(&problem.gate_up),
        down: stored(&problem.down),
    };
    let step = Step::new(shape, inputs).map_err(text)?;
    // Whatever is there is overwritten.
    let mut out = vec![f32::NAN; problem.hidden.len()];
    compute(&step, &mut out, isa, &Threads(threads));
    Ok(out)
}

fn stored(of: &Projection) -> experts::Projection<'_> {
    experts::Projection {
        blocks: &of.blocks,
        scales: &of.scales,
        bias: &of.bias,
    }
}

/// The operator as a graph of one node, its blocks, scales and biases as weights.
pub fn graph(problem: &Problem) -> Outcome<ValidGraph> {
    let spec = &problem.spec;
    let mut b = GraphBuilder::new("mxfp4_experts");
    let known = |shape: &[usize]| shape.iter().map(|&n| n.into()).collect();
    let choices = problem.with(spec.chosen);
    let mut inputs = vec![
        b.input("hidden", DType::F32, known(&problem.with(spec.hidden))),
        b.input("experts", DType::I64, known(&choices)),
        b.input("weights", DType::F32, known(&choices)),
    ];
    for (name, projection) in parts(problem) {
        inputs.extend(weights(&mut b, name, spec.experts, projection));
    }
    let op = Op::Mxfp4Experts {
        swiglu_limit: spec.limit,
        swiglu_alpha: problem.alpha,
    };
    let out = b.node("experts_of_tokens", op, &inputs).map_err(text)?;
    b.output("out", out);
    b.finish().map_err(text)
}

/// Both projections by name.
pub fn parts(problem: &Problem) -> [(&'static str, &Projection); 2] {
    [("gate_up", &problem.gate_up), ("down", &problem.down)]
}

fn weights(b: &mut GraphBuilder, name: &str, count: usize, of: &Projection) -> [ValueId; 3] {
    let [out, input] = of.shape;
    let blocks = input / 32;
    let one = |part: &str, shape: Vec<usize>, transform, dtype| WeightRef {
        name: format!("{name}_{part}"),
        source_shape: shape.clone(),
        transform,
        dtype,
        shape,
    };
    let bytes = Transform::Bytes;
    [
        b.weight(one(
            "blocks",
            vec![count, out, blocks, 16],
            bytes,
            DType::U8,
        )),
        b.weight(one("scales", vec![count, out, blocks], bytes, DType::U8)),
        b.weight(one("bias", vec![count, out], Transform::AsIs, DType::F32)),
    ]
}

/// The weights of [`graph`].
pub fn source(problem: &Problem) -> Outcome<MemoryWeights> {
    let count = problem.spec.experts;
    let mut source = MemoryWeights::new();
    for (name, of) in parts(problem) {
        let [out, input] = of.shape;
        let mut bytes = |part: &str, shape: &[usize], bytes: &[u8]| {
            let name = format!("{name}_{part}");
            let held = source.insert_stored(name, shape, Dtype::U8, bytes.to_vec());
            held.map_err(text)
        };
        bytes("blocks", &[count, out, input / 32, 16], &of.blocks)?;
        bytes("scales", &[count, out, input / 32], &of.scales)?;
        let bias = format!("{name}_bias");
        let held = source.insert(bias, &[count, out], of.bias.clone());
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
    session(
        problem,
        &lower_mxfp4_experts(&graph(problem)?).map_err(text)?,
    )
}

fn session(problem: &Problem, graph: &ValidGraph) -> Outcome<Vec<f32>> {
    let bytes = to_bytes(graph, &source(problem)?).map_err(text)?;
    let options = SessionOptions::default();
    let mut session = OrtSession::from_bytes("experts", &bytes, &options).map_err(text)?;
    let spec = &problem.spec;
    let choices = problem.with(spec.chosen);
    let value = |tensor: HostTensor| Value::new(tensor).map_err(text);
    let hidden = problem.with(spec.hidden);
    let hidden = value(HostTensor::f32(hidden, problem.hidden.clone()))?;
    let experts = value(HostTensor::i64(choices.clone(), problem.experts.clone()))?;
    let weights = value(HostTensor::f32(choices, problem.weights.clone()))?;
    let inputs = [
        ("hidden", &hidden),
        ("experts", &experts),
        ("weights", &weights),
    ];
    let out = session.run(&inputs).map_err(text)?;
    Ok(out[0].to_host().to_f32().into_owned())
}

//! What each operator takes and gives, and a twin that it must refuse.

use crate::{
    error::NodeError,
    ir::{Binary, Compare, DType, Dim, GraphBuilder, InlineTensor, Op, TensorType, Unary, ValueId},
};

/// Dimensions from text: numbers, names, `a+b`.
fn dims(text: &str) -> Vec<Dim> {
    let one = |d: &str| match d.parse::<usize>() {
        Ok(n) => Dim::known(n),
        Err(_) => d
            .split('+')
            .map(Dim::symbol)
            .reduce(|a, b| &a + &b)
            .unwrap(),
    };
    text.split_whitespace().map(one).collect()
}

/// An input from text: `f32 batch seq 4`, or constants `i64 [1 -1]` (a list) and `i64 1` (a scalar).
fn operand(b: &mut GraphBuilder, i: usize, text: &str) -> Option<ValueId> {
    if text == "-" {
        return None;
    }
    if let Some(list) = text.strip_prefix("const [") {
        let values: Vec<i64> = list
            .trim_end_matches(']')
            .split_whitespace()
            .map(|v| v.parse().unwrap())
            .collect();
        return Some(b.ints(&values));
    }
    if let Some(scalar) = text.strip_prefix("const ") {
        return Some(b.constant(InlineTensor::i64(&[], &[scalar.parse().unwrap()])));
    }
    let (dtype, shape) = text.split_once(' ').unwrap_or((text, ""));
    let all = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::I64,
        DType::I32,
        DType::Bool,
    ];
    let dtype = all.into_iter().find(|d| d.to_string() == dtype).unwrap();
    Some(b.input(&format!("in{i}"), dtype, dims(shape)))
}

fn apply(op: &Op, inputs: &str) -> Result<String, NodeError> {
    let mut b = GraphBuilder::new("case");
    let inputs: Vec<_> = inputs
        .split(',')
        .enumerate()
        .map(|(i, t)| operand(&mut b, i, t.trim()))
        .collect();
    let outputs = b.apply("node", op.clone(), &inputs)?;
    let types: Vec<&TensorType> = outputs.iter().map(|&o| b.ty(o)).collect();
    Ok(types
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" "))
}

#[test]
fn operators_give_the_types_of_onnx() {
    let gqa = Op::GroupQueryAttention {
        heads: 6,
        kv_heads: 2,
        scale: 1.0,
    };
    let tail = Op::Tail {
        size: "kept".into(),
    };
    let unique = Op::Unique { size: "u".into() };
    let non_zero = Op::NonZero { size: "n".into() };
    let cases = [
        (Op::Binary(Binary::Add), "f32 b s 4, f32 4", "f32[b, s, 4]"),
        (Op::Binary(Binary::Mul), "i64 s 1, i64 t", "i64[s, t]"),
        (
            Op::Compare(Compare::Greater),
            "i64 t, i64 s 1",
            "bool[s, t]",
        ),
        (Op::And, "bool 1 s t, bool b 1 t", "bool[b, s, t]"),
        (Op::Unary(Unary::Cos), "f16 b s", "f16[b, s]"),
        (Op::Cast { to: DType::F32 }, "i64 b s", "f32[b, s]"),
        (Op::Where, "bool b s t, f32, f32", "f32[b, s, t]"),
        (Op::MatMul, "f32 b h s n, f32 h n r", "f32[b, h, s, r]"),
        (
            Op::Gemm { trans_b: true },
            "f32 s 4, f32 9 4, f32 9",
            "f32[s, 9]",
        ),
        (Op::Gemm { trans_b: false }, "f32 s 4, f32 4 9", "f32[s, 9]"),
        (Op::Reshape, "f32 b s 12, const [0 -1 3]", "f32[b, 4*s, 3]"),
        (Op::Reshape, "f32 b p+s 4, const [-1 4]", "f32[b*p+b*s, 4]"),
        (
            Op::Transpose {
                perm: vec![1, 0, 2],
            },
            "f32 a b c",
            "f32[b, a, c]",
        ),
        (
            Op::Concat { axis: 1 },
            "f32 b p 4, f32 b s 4",
            "f32[b, p+s, 4]",
        ),
        (
            Op::Slice,
            "f32 b 8, const [2], const [5], const [1]",
            "f32[b, 3]",
        ),
        (
            Op::Split { axis: 1 },
            "f32 b 8, const [5 3]",
            "f32[b, 5] f32[b, 3]",
        ),
        (Op::Unsqueeze, "f32 b s, const [0 3]", "f32[1, b, s, 1]"),
        (Op::Squeeze, "f32 1 b 1, const [0 2]", "f32[b]"),
        (Op::Expand, "f32 b 1 4, const [1 7 1]", "f32[b, 7, 4]"),
        (Op::Shape { start: 1, end: 3 }, "f32 b s 4", "i64[2]"),
        (Op::Gather { axis: 0 }, "f32 97 4, i64 b s", "f32[b, s, 4]"),
        (Op::Range, "const 2, const 9, const 1", "i64[7]"),
        (Op::Softmax { axis: 1 }, "f32 b t", "f32[b, t]"),
        (
            Op::RmsNormalization { epsilon: 1e-5 },
            "f16 b s 4, f16 4",
            "f16[b, s, 4]",
        ),
        (
            Op::RotaryEmbedding { heads: 3 },
            "f32 b s 12, f32 b s 2, f32 b s 2",
            "f32[b, s, 12]",
        ),
        (
            Op::RotaryEmbedding { heads: 3 },
            "f32 b 3 s 4, f32 b s 2, f32 b s 2",
            "f32[b, 3, s, 4]",
        ),
        (
            Op::Attention { scale: 1.0 },
            "f32 b 6 s 4, f32 b 2 t 4, f32 b 2 t 5, f32 b 1 s t",
            "f32[b, 6, s, 5]",
        ),
        (
            gqa.clone(),
            "f32 b s 24, f32 b s 8, f32 b s 8, f32 b 2 p 4, f32 b 2 p 4, i32 b, i32",
            "f32[b, s, 24] f32[b, 2, p+s, 4] f32[b, 2, p+s, 4]",
        ),
        (
            gqa,
            "f32 b s 24, f32 b s 8, f32 b s 8, f32 b 2 p 4, f32 b 2 p 4, i32 b, i32, -, -, -, -, f32 6",
            "f32[b, s, 24] f32[b, 2, p+s, 4] f32[b, 2, p+s, 4]",
        ),
        (Op::Compare(Compare::Equal), "i64 t k, i64", "bool[t, k]"),
        (Op::Binary(Binary::Mod), "i32 n 1, i32 8", "i32[n, 8]"),
        (Op::Binary(Binary::Max), "f32 n, f32", "f32[n]"),
        (
            Op::Slice,
            "f32 b t, const [1], const [9223372036854775807], const [1]",
            "f32[b, -1+t]",
        ),
        (
            tail.clone(),
            "f32 b t 4, const [-3], const [9223372036854775807], const [1]",
            "f32[b, kept, 4]",
        ),
        (Op::GatherNd, "f32 t k 4, i64 n 2", "f32[n, 4]"),
        (Op::ScatterAdd, "f32 t 4, i64 n 1, f32 n 4", "f32[t, 4]"),
        (Op::TopK, "f32 t 5, const [2]", "f32[t, 2] i64[t, 2]"),
        (unique.clone(), "i64 t k", "i64[u]"),
        (non_zero, "bool t k", "i64[2, n]"),
        (Op::ReduceSum, "f32 t k 4, const [1]", "f32[t, 1, 4]"),
        (Op::Identity, "bool", "bool[]"),
        (Op::Cast { to: DType::F32 }, "bf16 4", "f32[4]"),
    ];
    let wrong: Vec<String> = cases
        .into_iter()
        .filter_map(|(op, inputs, expected)| {
            let found = apply(&op, inputs).map_err(|e| e.to_string());
            (found.as_deref() != Ok(expected))
                .then(|| format!("{}({inputs}): {found:?}", op.name()))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn operators_refuse_what_they_do_not_take() {
    let gqa = Op::GroupQueryAttention {
        heads: 6,
        kv_heads: 2,
        scale: 1.0,
    };
    let rotary = Op::RotaryEmbedding { heads: 3 };
    let attention = Op::Attention { scale: 1.0 };
    let tail = Op::Tail {
        size: "kept".into(),
    };
    let unique = Op::Unique { size: "u".into() };
    let cases = [
        (
            Op::Binary(Binary::Add),
            "f32 4, f16 4",
            "inputs of one type",
        ),
        (Op::Binary(Binary::Add), "f32 4, f32 5", "broadcasts"),
        (Op::Binary(Binary::Add), "f32 s, f32 t", "broadcasts"),
        (Op::Binary(Binary::Add), "bool 4, bool 4", "numbers"),
        (Op::Binary(Binary::Add), "f32 4", "2 inputs"),
        (Op::Binary(Binary::Add), "f32 4, -", "an input 1"),
        (
            Op::Compare(Compare::Greater),
            "i64 4, i32 4",
            "inputs of one type",
        ),
        (Op::And, "i64 4, i64 4", "bool tensors"),
        (Op::Unary(Unary::Sin), "i64 4", "a float tensor"),
        (Op::Where, "i64 4, f32 4, f32 4", "a bool condition"),
        (Op::MatMul, "f32 2 3, f32 4 5", "equal inner axes"),
        (Op::MatMul, "f32 3, f32 3 4", "at least 2 axes"),
        (Op::MatMul, "f32 b 2 3, f32 c 3 4", "broadcasts"),
        (
            Op::Gemm { trans_b: true },
            "f32 s 4, f32 4 9",
            "equal inner axes",
        ),
        (
            Op::Gemm { trans_b: false },
            "f32 s 4, f32 4 9, f32 8",
            "broadcasts",
        ),
        (Op::Reshape, "f32 b 5, const [0 2 3]", "the elements of"),
        (Op::Reshape, "f32 b 5, const [-1 4]", "the elements of"),
        (Op::Reshape, "f32 b 5, const [-1 -1]", "at most one -1"),
        (Op::Reshape, "f32 b 5, i64 2", "follow from constants"),
        (
            Op::Transpose { perm: vec![0, 0] },
            "f32 b 5",
            "a permutation of 2 axes",
        ),
        (
            Op::Concat { axis: 0 },
            "f32 b 5, f32 b 6",
            "in all axes but 0",
        ),
        (Op::Concat { axis: 2 }, "f32 b 5, f32 b 5", "an axis 2"),
        (
            Op::Slice,
            "f32 b 8, const [2], const [9], const [1]",
            "a range of axis 1",
        ),
        (
            Op::Slice,
            "f32 b 8, const [5], const [5], const [1]",
            "a range of axis 1",
        ),
        (
            Op::Slice,
            "f32 b 8, const [5 6], const [7], const [1]",
            "1 starts and ends",
        ),
        (
            Op::Split { axis: 1 },
            "f32 b 8, const [5 4]",
            "sizes that sum to 8",
        ),
        (Op::Unsqueeze, "f32 b, const [3]", "axes below 2"),
        (Op::Unsqueeze, "f32 b, const [0 0]", "distinct axes"),
        (Op::Squeeze, "f32 b 1, const [0]", "size 1 in axis 0"),
        (Op::Expand, "f32 b 3, const [1 7]", "broadcasts"),
        (Op::Shape { start: 1, end: 1 }, "f32 b 3", "axes 1..1"),
        (Op::Gather { axis: 0 }, "f32 9 4, f32 b", "integer indices"),
        (Op::Range, "const 0, const 9, const 2", "a step of 1"),
        (
            Op::Range,
            "const [0], const 9, const 1",
            "a scalar as input 0",
        ),
        (Op::Softmax { axis: 2 }, "f32 b t", "an axis 2"),
        (
            Op::RmsNormalization { epsilon: 1e-5 },
            "f32 b 4, f32 5",
            "a scale of shape [4]",
        ),
        (
            rotary.clone(),
            "f32 b s 12, f32 b s 3, f32 b s 2",
            "cosines of shape [b, s, 2]",
        ),
        (
            rotary.clone(),
            "f32 b s 13, f32 b s 2, f32 b s 2",
            "[batch, seq, 3*d]",
        ),
        (
            rotary,
            "f32 b 4 s 4, f32 b s 2, f32 b s 2",
            "[batch, 3, seq, d]",
        ),
        (
            attention.clone(),
            "f32 b 6 s 4, f32 b 4 t 4, f32 b 4 t 5, f32 s t",
            "KV heads divide",
        ),
        (
            attention.clone(),
            "f32 b 6 s 4, f32 b 2 t 5, f32 b 2 t 5, f32 s t",
            "keys of shape",
        ),
        (
            attention,
            "f32 b 6 s 4, f32 b 2 t 4, f32 b 2 t 4, f32 t s",
            "broadcasts",
        ),
        (
            gqa.clone(),
            "f32 b s 24, f32 b s 8, f32 b s 8, f32 b 2 p 4, f32 b 3 p 4, i32 b, i32",
            "past values of shape [b, 2, p, 4]",
        ),
        (
            gqa.clone(),
            "f32 b s 24, f32 b s 8, f32 b s 8, f32 b 2 p 4, f32 b 2 p 4, i64 b, i32",
            "i32 [b] as input 5",
        ),
        (
            gqa,
            "f32 b s 24, f32 b s 8, f32 b s 8, f32 b 2 p 4, f32 b 2 p 4, i32 b, i32, -, -, -, -, f32 2",
            "sinks of shape [6]",
        ),
        (Op::Binary(Binary::Mod), "f32 4, f32 4", "integers"),
        (Op::Binary(Binary::Add), "bf16 4, bf16 4", "numbers"),
        (Op::MatMul, "bf16 2 3, bf16 3 4", "a float tensor"),
        (
            tail.clone(),
            "f32 b t, const [3], const [9223372036854775807], const [1]",
            "a negative start",
        ),
        (
            tail,
            "f32 b t, const [-3], const [9], const [1]",
            "a negative start",
        ),
        (Op::GatherNd, "f32 t 4, i64 n 3", "q from 1 to 2"),
        (Op::GatherNd, "f32 t 4, i32 n 1", "i64 [n, q]"),
        (
            Op::ScatterAdd,
            "f32 t 4, i64 n 1, f32 n 5",
            "updates of shape [n, 4]",
        ),
        (Op::TopK, "f32 t 5, const [6]", "1 to 5"),
        (unique, "f32 t", "integers"),
        (Op::ReduceSum, "f32 t 4, const [2]", "axes below 2"),
    ];
    let wrong: Vec<String> = cases
        .into_iter()
        .filter_map(|(op, inputs, expected)| {
            let call = format!("{}({inputs})", op.name());
            match apply(&op, inputs) {
                Ok(ty) => Some(format!("{call} gave {ty}")),
                Err(e) if e.expected.contains(expected) => None,
                Err(e) => Some(format!("{call}: {e}")),
            }
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_error_names_the_node_and_both_sides() {
    let mut b = GraphBuilder::new("message");
    let x = b.input("x", DType::F32, dims("b s 4"));
    let y = b.input("y", DType::F32, dims("5 6"));
    let error = b.scope("layers.0", |b| b.matmul("q", x, y)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "node layers.0.q (MatMul): expected equal inner axes, found f32[b, s, 4] and f32[5, 6]"
    );
}

#[test]
fn shapes_are_followed_through_integers() {
    let mut b = GraphBuilder::new("content");
    let x = b.input("x", DType::F32, dims("b s 4"));
    let shape = b
        .node("shape", Op::Shape { start: 0, end: 2 }, &[x])
        .unwrap();
    let two = b.ints(&[2]);
    let double = b.mul("double", shape, two).unwrap();
    let tail = b.ints(&[-1]);
    let all = b.concat("all", &[double, tail], 0).unwrap();
    assert_eq!(
        b.graph().value(all).content.as_deref(),
        Some(
            &[
                &Dim::known(2) * &"b".into(),
                &Dim::known(2) * &"s".into(),
                Dim::constant(-1)
            ][..]
        )
    );
}

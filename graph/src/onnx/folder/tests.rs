use std::{collections::BTreeSet, fs, io};

use prost::Message as _;

use super::*;
use crate::{
    ir::{Dim, GraphBuilder},
    onnx::{
        MemoryWeights, Overlay,
        proto::{ModelProto, TensorProto},
        to_bytes,
    },
};

/// `x W^T` with `W` `[out, 3]`, and, when `embed`, a lookup in the same `W`.
fn graph(name: &str, out: usize, embed: bool, dtype: DType) -> ValidGraph {
    let mut b = GraphBuilder::new(name);
    let x = b.input("x", dtype, vec!["n".into(), 3.into()]);
    let y = b.linear("y", x, "w", out, 3, true).unwrap();
    b.output("out", y);
    if embed {
        let table = WeightRef {
            name: "w.weight".to_owned(),
            source_shape: vec![out, 3],
            transform: Transform::AsIs,
            dtype,
            shape: vec![out, 3],
        };
        let table = b.weight(table);
        let sum = b.add("sum", table, table).unwrap();
        b.output("sum_out", sum);
    }
    b.finish().unwrap()
}

fn weights(out: usize) -> MemoryWeights {
    let numbers = |n: usize| (0..n).map(|k| k as f32 / 8.0).collect();
    let mut weights = MemoryWeights::new();
    weights
        .insert("w.weight", &[out, 3], numbers(out * 3))
        .unwrap();
    weights.insert("w.bias", &[out], numbers(out)).unwrap();
    weights
}

fn model(bytes: &[u8]) -> Vec<TensorProto> {
    ModelProto::decode(bytes)
        .unwrap()
        .graph
        .unwrap()
        .initializer
}

/// The bytes of an initializer, inside the message or beside it.
fn content(tensor: &TensorProto, data: &[u8]) -> (u64, Vec<u8>) {
    let find = |key: &str| {
        let all = &tensor.external_data;
        all.iter()
            .find(|e| e.key.as_deref() == Some(key))
            .and_then(|e| e.value.clone())
    };
    let offset: usize = find("offset").unwrap().parse().unwrap();
    let length: usize = find("length").unwrap().parse().unwrap();
    (offset as u64, data[offset..offset + length].to_vec())
}

#[test]
fn graphs_share_one_data_file() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (
        graph("a", 1500, true, DType::F32),
        graph("b", 1500, false, DType::F32),
    );
    let source = weights(1500);
    let mut seen = vec![];
    let mut progress = |p: Progress<'_>| seen.push((p.tensor.to_owned(), p.done, p.total));
    let graphs = [("a.onnx", &a), ("b.onnx", &b)];
    let report = write_folder(folder.path(), &graphs, "w.data", &source, &mut progress).unwrap();

    assert_eq!(report.tensors, 3);
    let data = fs::read(folder.path().join("w.data")).unwrap();
    assert_eq!(data.len() as u64, report.data_bytes);
    assert_eq!(seen.len(), 3);
    assert_eq!(
        seen[2],
        ("w.weight".to_owned(), report.data_bytes, report.data_bytes)
    );

    let (inside, outside) = (to_bytes(&a, &source).unwrap(), folder.path().join("a.onnx"));
    let outside = fs::read(outside).unwrap();
    let mut offsets = BTreeSet::new();
    for (inside, outside) in model(&inside).iter().zip(&model(&outside)) {
        assert_eq!(inside.name, outside.name);
        let (offset, bytes) = content(outside, &data);
        assert_eq!(offset % if bytes.len() >= 4096 { 4096 } else { 64 }, 0);
        assert_eq!(inside.raw_data.as_deref(), Some(&bytes[..]));
        offsets.insert(offset);
    }
    assert_eq!(offsets.len(), 3);
    for tensor in model(&fs::read(folder.path().join("b.onnx")).unwrap()) {
        assert!(offsets.contains(&content(&tensor, &data).0));
    }
}

#[test]
fn equal_inputs_give_equal_bytes() {
    let bytes = || {
        let folder = tempfile::tempdir().unwrap();
        let graph = graph("a", 7, true, DType::F16);
        let graphs = [("a.onnx", &graph)];
        write_folder(folder.path(), &graphs, "w.data", &weights(7), &mut |_| {}).unwrap();
        ["a.onnx", "w.data"].map(|f| fs::read(folder.path().join(f)).unwrap())
    };
    assert_eq!(bytes(), bytes());
}

#[test]
fn offsets_beyond_4_gib_are_exact() {
    let mut b = GraphBuilder::new("large");
    let mut x = b.input("x", DType::F32, vec!["n".into(), 40_000.into()]);
    for i in 0..3 {
        x = b
            .linear(&format!("y{i}"), x, &format!("w{i}"), 40_000, 40_000, false)
            .unwrap();
    }
    b.output("out", x);
    assert_eq!(b.shape(x)[1], Dim::known(40_000));
    let graph = b.finish().unwrap();
    let plan = Plan::new(&[("large.onnx", &graph)]);
    // 40000^2 * 4 bytes, a multiple of the page.
    let offsets: Vec<u64> = plan.order.iter().map(|o| o.1).collect();
    assert_eq!(offsets, [0, 6_400_000_000, 12_800_000_000]);
    let refused = to_bytes(&graph, &MemoryWeights::new())
        .unwrap_err()
        .to_string();
    assert!(refused.contains("19200000000 bytes"), "{refused}");
}

#[test]
fn file_names_are_plain_and_distinct() {
    let folder = tempfile::tempdir().unwrap();
    let graph = graph("a", 2, false, DType::F32);
    for (name, data) in [
        ("../a.onnx", "w"),
        ("a.onnx", "a.onnx"),
        ("", "w"),
        ("a/b.onnx", "w"),
    ] {
        let graphs = [(name, &graph)];
        let written = write_folder(folder.path(), &graphs, data, &weights(2), &mut |_| {});
        assert!(matches!(written, Err(Error::Refused(_))), "{name} {data}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn failures_name_the_tensor_or_the_file() {
    let graph = graph("a", 2, false, DType::F16);
    let graphs = [("a.onnx", &graph)];
    let write = |folder: &Path, source: &dyn WeightSource| {
        write_folder(folder, &graphs, "w.data", source, &mut |_| {}).unwrap_err()
    };
    let folder = tempfile::tempdir().unwrap();
    let missing = write(folder.path(), &MemoryWeights::new());
    assert_eq!(missing.to_string(), "cannot read tensor w.weight");
    let cause = std::error::Error::source(&missing).unwrap().to_string();
    assert!(
        cause.contains("tensor w.weight: expected a tensor of shape [2, 3]"),
        "{cause}"
    );

    let mut large = MemoryWeights::new();
    large.insert("w.bias", &[2], vec![1.0, 1e6]).unwrap();
    let source = weights(2);
    let refused = write(folder.path(), &Overlay::new(&large, &source)).to_string();
    assert!(
        refused.starts_with("tensor w.bias: expected numbers that f16 holds"),
        "{refused}"
    );

    let nowhere = write(&folder.path().join("nowhere"), &source);
    assert!(
        nowhere
            .to_string()
            .ends_with("nowhere/w.data: cannot create"),
        "{nowhere}"
    );
    let Error::Io { source, .. } = nowhere else {
        panic!("{nowhere}")
    };
    assert_eq!(source.kind(), io::ErrorKind::NotFound);
}

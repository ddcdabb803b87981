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

/// A graph that reads `name` `[rows, cols]` in the given ways.
fn reader(weights: Vec<WeightRef>) -> ValidGraph {
    let mut b = GraphBuilder::new("reader");
    for (i, weight) in weights.into_iter().enumerate() {
        let value = b.weight(weight);
        let same = b
            .node(&format!("same{i}"), crate::ir::Op::Identity, &[value])
            .unwrap();
        b.output(&format!("out{i}"), same);
    }
    b.finish().unwrap()
}

fn stored(
    name: &str,
    source: [usize; 2],
    transform: Transform,
    dtype: DType,
    shape: &[usize],
) -> WeightRef {
    WeightRef {
        name: name.to_owned(),
        source_shape: source.to_vec(),
        transform,
        dtype,
        shape: shape.to_vec(),
    }
}

#[test]
fn bytes_and_halves_reach_the_file_as_they_are_stored() {
    use mlac_model::Dtype;
    let (rows, cols) = (600, 70);
    let bits: Vec<u16> = (0..rows * cols).map(|k| (k % 0x7f80) as u16).collect();
    let halves: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
    let bytes: Vec<u8> = (0..rows * cols).map(|k| (k % 255) as u8).collect();
    let mut source = MemoryWeights::new();
    source
        .insert_stored("h", &[rows, cols], Dtype::BF16, halves.clone())
        .unwrap();
    source
        .insert_stored("b", &[rows, cols], Dtype::U8, bytes.clone())
        .unwrap();
    let graph = reader(vec![
        stored(
            "h",
            [rows, cols],
            Transform::AsIs,
            DType::BF16,
            &[rows, cols],
        ),
        stored(
            "h",
            [rows, cols],
            Transform::Transpose2D,
            DType::BF16,
            &[cols, rows],
        ),
        stored(
            "h",
            [rows, cols],
            Transform::AsIs,
            DType::F32,
            &[rows, cols],
        ),
        stored(
            "b",
            [rows, cols],
            Transform::Bytes,
            DType::I32,
            &[rows * cols / 4],
        ),
        stored(
            "b",
            [rows, cols],
            Transform::Scales,
            DType::U8,
            &[rows, cols],
        ),
    ]);
    let folder = tempfile::tempdir().unwrap();
    let graphs = [("r.onnx", &graph)];
    write_folder(folder.path(), &graphs, "w.data", &source, &mut |_| {}).unwrap();
    let data = fs::read(folder.path().join("w.data")).unwrap();
    let file = fs::read(folder.path().join("r.onnx")).unwrap();
    let found: Vec<Vec<u8>> = model(&file).iter().map(|t| content(t, &data).1).collect();
    assert_eq!(found[0], halves);
    let turned: Vec<u8> = (0..cols)
        .flat_map(|c| (0..rows).map(move |r| r * cols + c))
        .flat_map(|k| bits[k].to_le_bytes())
        .collect();
    assert_eq!(found[1], turned);
    let wide: Vec<u8> = bits
        .iter()
        .flat_map(|&b| (u32::from(b) << 16).to_le_bytes())
        .collect();
    assert_eq!(found[2], wide);
    assert_eq!((&found[3], &found[4]), (&bytes, &bytes));
    for (inside, outside) in model(&to_bytes(&graph, &source).unwrap())
        .iter()
        .zip(&found)
    {
        assert_eq!(inside.raw_data.as_ref(), Some(outside));
    }
}

/// bf16 to f16 and f32 in order, more than is read at once.
#[test]
fn stored_numbers_change_their_type_in_pieces() {
    use half::{bf16, f16};
    use mlac_model::Dtype;
    let (rows, cols) = (1030, 4100);
    let number = |k: usize| bf16::from_f32((k % 251) as f32 / 8.0);
    let bytes = (0..rows * cols).flat_map(|k| number(k).to_le_bytes());
    let mut source = MemoryWeights::new();
    let shape = [rows, cols];
    source
        .insert_stored("w", &shape, Dtype::BF16, bytes.collect())
        .unwrap();
    let as_is = |dtype| reader(vec![stored("w", shape, Transform::AsIs, dtype, &shape)]);
    let bytes = |dtype| {
        let tensors = model(&to_bytes(&as_is(dtype), &source).unwrap());
        tensors[0].raw_data.clone().unwrap()
    };
    let halves = (0..rows * cols).flat_map(|k| f16::from_f32(number(k).to_f32()).to_le_bytes());
    assert!(bytes(DType::F16).into_iter().eq(halves));
    let floats = (0..rows * cols).flat_map(|k| number(k).to_f32().to_le_bytes());
    assert!(bytes(DType::F32).into_iter().eq(floats));
    let large = bf16::from_f32(1e6).to_le_bytes().repeat(2);
    source
        .insert_stored("w", &[1, 2], Dtype::BF16, large)
        .unwrap();
    let weight = stored("w", [1, 2], Transform::AsIs, DType::F16, &[1, 2]);
    let found = to_bytes(&reader(vec![weight]), &source).unwrap_err();
    assert!(
        found.to_string().contains("numbers that f16 holds"),
        "{found}"
    );
}

#[test]
fn stored_numbers_that_are_none_are_refused() {
    use mlac_model::Dtype;
    let refused = |weight: WeightRef, dtype: Dtype, bytes: &[u8]| {
        let mut source = MemoryWeights::new();
        let shape = weight.source_shape.clone();
        source
            .insert_stored("w", &shape, dtype, bytes.to_vec())
            .unwrap();
        to_bytes(&reader(vec![weight]), &source)
            .unwrap_err()
            .to_string()
    };
    let shape = [1, 2];
    let infinity = [0, 0, 0x80, 0x7f];
    for transform in [Transform::AsIs, Transform::Transpose2D] {
        let out = if transform == Transform::AsIs {
            [1, 2]
        } else {
            [2, 1]
        };
        let weight = stored("w", shape, transform, DType::BF16, &out);
        let found = refused(weight, Dtype::BF16, &infinity);
        assert!(
            found.starts_with("tensor w: expected finite numbers"),
            "{found}"
        );
    }
    let scales = stored("w", shape, Transform::Scales, DType::U8, &shape);
    let found = refused(scales.clone(), Dtype::U8, &[3, 255]);
    assert!(
        found.starts_with("tensor w: expected scales that are not NaN, found the byte 255"),
        "{found}"
    );
    let found = refused(scales, Dtype::BF16, &infinity);
    assert!(
        found.starts_with("tensor w: expected dtype U8, found dtype BF16"),
        "{found}"
    );
    let plain = stored("w", shape, Transform::Bytes, DType::U8, &shape);
    let mut source = MemoryWeights::new();
    source
        .insert_stored("w", &shape, Dtype::U8, vec![3, 255])
        .unwrap();
    assert!(to_bytes(&reader(vec![plain.clone()]), &source).is_ok());
    source.insert("w", &shape, vec![1.0, 2.0]).unwrap();
    let found = to_bytes(&reader(vec![plain]), &source)
        .unwrap_err()
        .to_string();
    assert!(
        found.starts_with("tensor w: expected a source that has it as it is stored"),
        "{found}"
    );
}

#[test]
fn a_full_disk_is_told_with_the_files_name() {
    let full = Path::new("/dev/full");
    if !full.exists() {
        return;
    }
    let graph = graph("a", 1500, false, DType::F32);
    let plan = Plan::new(&[("a.onnx", &graph)]);
    let found = write_data(full, &plan, &weights(1500), &mut |_| {}).unwrap_err();
    assert_eq!(found.to_string(), "/dev/full: cannot write");
}

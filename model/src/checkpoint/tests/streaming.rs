//! Reading and writing in pieces, and copies.

use std::{fs, path::Path, sync::Mutex};

use sha2::{Digest, Sha256};

use super::{listing, parse, refusal, tensor_bytes, tiny_checkpoint, tiny_config, tiny_tensors};
use crate::{
    Checkpoint, CheckpointWriter, Dtype, Error, TensorInfo,
    checkpoint::{copy_tensors, safetensors::read_layout},
};

const NAME: &str = "model.layers.0.mlp.up_proj.weight";

#[test]
fn pieces_join_to_the_tensor() {
    let (_around, folder) = tiny_checkpoint(&tiny_config("llama"), Dtype::BF16, u64::MAX);
    let checkpoint = Checkpoint::open(folder).unwrap();
    let whole = checkpoint.bytes(NAME).unwrap();
    assert_eq!(whole.len(), 24 * 16 * 2);
    for size in [0, 1, 7, 512, whole.len(), 2 * whole.len()] {
        let mut joined = Vec::new();
        let mut lengths = Vec::new();
        checkpoint
            .for_each_chunk(NAME, size, |chunk| {
                lengths.push(chunk.len());
                joined.extend_from_slice(chunk);
                Ok::<_, Error>(())
            })
            .unwrap();
        assert!(joined == *whole, "{size}");
        let (last, others) = lengths.split_last().unwrap();
        assert!(*last <= size.max(1) && others.iter().all(|&length| length == size.max(1)));
    }
    checkpoint.release(NAME).unwrap();
    assert!(checkpoint.bytes(NAME).unwrap() == tensor_bytes(checkpoint.info(NAME).unwrap()));
}

#[test]
fn a_part_is_read_by_position() {
    let (_around, folder) = tiny_checkpoint(&tiny_config("llama"), Dtype::F32, u64::MAX);
    let checkpoint = Checkpoint::open(folder).unwrap();
    let whole = checkpoint.bytes(NAME).unwrap();
    let reader = checkpoint.reader(NAME).unwrap();
    assert_eq!((reader.len(), reader.is_empty()), (whole.len(), false));
    let mut part = [0; 100];
    reader.read_at(33, &mut part).unwrap();
    assert_eq!(part, whole[33..133]);
    reader.read_at(whole.len(), &mut []).unwrap();
    for (offset, length) in [(whole.len() - 99, 100), (usize::MAX, 1)] {
        let message = refusal(reader.read_at(offset, &mut part[..length]));
        assert!(message.contains("up_proj.weight: expected a part of its"));
    }
    refusal(checkpoint.reader("no_such"));
    refusal(checkpoint.release("no_such"));
}

#[test]
fn a_failing_reader_of_pieces_stops() {
    let (_around, folder) = tiny_checkpoint(&tiny_config("llama"), Dtype::F32, u64::MAX);
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut pieces = 0;
    let stopped = checkpoint.for_each_chunk(NAME, 10, |_| {
        pieces += 1;
        Err(Error::refusal("s", "e", "f", "x"))
    });
    assert_eq!(refusal(stopped), "s: expected e, found f; fix: x");
    assert_eq!(pieces, 1);
}

#[test]
fn rows_are_those_of_the_whole() {
    let (_around, folder) = tiny_checkpoint(&tiny_config("llama"), Dtype::F16, u64::MAX);
    let checkpoint = Checkpoint::open(folder).unwrap();
    let whole = checkpoint.f32(NAME, &[24, 16]).unwrap();
    for rows in [0..24, 3..7, 23..24, 5..5] {
        let part = checkpoint.f32_rows(NAME, &[24, 16], rows.clone()).unwrap();
        assert_eq!(part, whole[rows.start * 16..rows.end * 16]);
    }
    let message = refusal(checkpoint.f32_rows(NAME, &[24, 16], 20..25));
    assert!(
        message.contains("rows among its 24, found rows 20 to 25"),
        "{message}"
    );
    #[expect(clippy::reversed_empty_ranges, reason = "what is refused")]
    let backwards = 3..2;
    refusal(checkpoint.f32_rows(NAME, &[24, 16], backwards));
}

/// A tensor larger than the pieces in which it is read.
#[test]
fn large_tensors_are_read_piece_by_piece() {
    let mut raw = tiny_config("llama");
    raw["vocab_size"] = 80_001.into();
    for dtype in [Dtype::F32, Dtype::BF16] {
        let (_around, folder) = tiny_checkpoint(&raw, dtype, u64::MAX);
        let checkpoint = Checkpoint::open(folder).unwrap();
        let name = "lm_head.weight";
        let bytes = tensor_bytes(checkpoint.info(name).unwrap());
        assert!(bytes.len() > 2 << 20);
        let numbers = crate::tensor::f32_from_bytes(dtype, &bytes).unwrap();
        assert!(checkpoint.f32(name, &[80_001, 16]).unwrap() == numbers);
        let rows = checkpoint
            .f32_rows(name, &[80_001, 16], 70_000..80_001)
            .unwrap();
        assert!(rows == numbers[70_000 * 16..]);
        assert_eq!(
            checkpoint.sha256(name).unwrap(),
            format!("{:x}", Sha256::digest(&bytes))
        );
    }
}

#[test]
fn a_bad_number_in_later_rows_is_named_where_it_is() {
    let (_around, folder) = tiny_checkpoint(&tiny_config("llama"), Dtype::F32, u64::MAX);
    poison(&folder, NAME, (5 * 16 + 2) * 4, &f32::NAN.to_le_bytes());
    let checkpoint = Checkpoint::open(&folder).unwrap();
    assert!(checkpoint.f32_rows(NAME, &[24, 16], 6..24).is_ok());
    let message = refusal(checkpoint.f32_rows(NAME, &[24, 16], 4..7));
    assert!(message.contains("found NaN at [5, 2]"), "{message}");
}

/// Overwrites bytes of a tensor in the one shard of a checkpoint.
fn poison(folder: &Path, name: &str, offset: usize, bytes: &[u8]) {
    let file = folder.join("model.safetensors");
    let mut content = fs::read(&file).unwrap();
    let layout = read_layout(&content, &file).unwrap();
    let (_, range) = layout.iter().find(|(info, _)| info.name == name).unwrap();
    let start = range.start + offset;
    content[start..start + bytes.len()].copy_from_slice(bytes);
    fs::write(file, content).unwrap();
}

#[test]
fn pieces_are_written_in_order_and_whole() {
    let around = tempfile::tempdir().unwrap();
    let folder = around.path().join("out");
    let tensors = vec![
        TensorInfo::new("a", Dtype::U8, [3]),
        TensorInfo::new("b", Dtype::U8, [5]),
    ];
    let writer = CheckpointWriter::create(&folder, tensors, u64::MAX).unwrap();
    let put = |name: &str, pieces: &[&[u8]]| {
        writer.write_stream(name, |sink| {
            pieces.iter().try_for_each(|piece| sink.put(piece))
        })
    };
    for pieces in [&[&[1_u8, 2, 3, 4][..], &[5, 6]][..], &[&[1, 2, 3, 4]], &[]] {
        let message = refusal(put("b", pieces));
        assert!(
            message.contains("tensor b: expected 5 bytes, found"),
            "{message}"
        );
    }
    put("b", &[&[1, 2], &[], &[3, 4, 5]]).unwrap();
    assert!(refusal(put("b", &[&[1; 5]])).contains("a second write"));
    put("a", &[&[7], &[8], &[9]]).unwrap();
    writer.finish().unwrap();
    let file = fs::read(folder.join("model.safetensors")).unwrap();
    assert_eq!(file[file.len() - 8..], [7, 8, 9, 1, 2, 3, 4, 5]);
}

#[test]
fn a_dictated_layout_is_kept() {
    let around = tempfile::tempdir().unwrap();
    let folder = around.path().join("out");
    let shard = |at: usize, names: &[&str]| {
        let tensors = names
            .iter()
            .map(|&name| TensorInfo::new(name, Dtype::U8, [1]))
            .collect();
        (format!("model-{at:05}-of-00001.safetensors"), tensors)
    };
    let shards = vec![shard(0, &["b", "a"]), shard(1, &["c"])];
    let writer = CheckpointWriter::create_shards(&folder, shards).unwrap();
    for name in ["a", "b", "c"] {
        writer.write(name, name.as_bytes()).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(
        listing(&folder),
        [
            "model-00000-of-00001.safetensors",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
        ]
    );
    let first = fs::read(folder.join("model-00000-of-00001.safetensors")).unwrap();
    assert!(first.ends_with(b"ba"));
    let outside = vec![("../m.safetensors".to_owned(), Vec::new())];
    refusal(CheckpointWriter::create_shards(
        &around.path().join("x"),
        outside,
    ));
    assert_eq!(listing(around.path()), ["out"]);
}

#[test]
fn a_copy_has_the_same_bytes_and_digests() {
    let raw = tiny_config("qwen3");
    let (around, folder) = tiny_checkpoint(&raw, Dtype::BF16, 2000);
    let source = Checkpoint::open(&folder).unwrap();
    let copy = around.path().join("copy");
    let tensors = tiny_tensors(&parse(&raw), Dtype::BF16);
    let writer = CheckpointWriter::create(&copy, tensors.clone(), 2000).unwrap();
    let left_out = "model.norm.weight";
    let seen = Mutex::new(Vec::new());
    let digests = copy_tensors(
        &source,
        &writer,
        |name| name != left_out,
        |info| {
            seen.lock().unwrap().push(info.name.clone());
            true
        },
    )
    .unwrap();
    assert_eq!(seen.into_inner().unwrap().len(), tensors.len());
    assert_eq!(digests.len(), tensors.len());
    for (name, digest) in &digests {
        assert_eq!(*digest, source.sha256(name).unwrap());
    }
    // What was not wanted is still to be written.
    writer
        .write(left_out, &source.bytes(left_out).unwrap())
        .unwrap();
    writer
        .write_file("config.json", raw.to_string().as_bytes())
        .unwrap();
    writer.finish().unwrap();
    for name in listing(&folder) {
        assert!(fs::read(folder.join(&name)).unwrap() == fs::read(copy.join(&name)).unwrap());
    }
}

#[test]
fn a_copy_refuses_numbers_that_are_none() {
    let raw = tiny_config("llama");
    for (dtype, bad, text) in [
        (Dtype::F32, &f32::INFINITY.to_le_bytes()[..], "inf"),
        (Dtype::F16, &[0, 0xfc], "-inf"),
        (Dtype::BF16, &[0xc1, 0x7f], "NaN"),
    ] {
        let (around, folder) = tiny_checkpoint(&raw, dtype, u64::MAX);
        poison(&folder, NAME, (3 * 16 + 15) * dtype.size(), bad);
        let source = Checkpoint::open(&folder).unwrap();
        let tensors = tiny_tensors(&parse(&raw), dtype);
        let copy = around.path().join("copy");
        let writer = CheckpointWriter::create(&copy, tensors, u64::MAX).unwrap();
        let message = refusal(copy_tensors(&source, &writer, |_| true, |_| true));
        let expected = format!("tensor {NAME}: expected finite numbers, found {text} at [3, 15]");
        assert!(message.contains(&expected), "{message}");
        drop(writer);
        assert_eq!(listing(around.path()), ["model"]);
    }
}

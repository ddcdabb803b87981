//! The decoder on a toy graph whose logits are whole numbers, against a plain reference.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::doc_markdown,
    reason = "tests"
)]

use std::path::{Path, PathBuf};

use mlac_engines::ort::{CacheKind, Decoder, HostTensor, OrtSession, SessionOptions, Value};
use mlac_engines::{Decode, Logits};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn options() -> SessionOptions {
    SessionOptions::default().with_threads(1)
}

/// The toy's logits (see `tests/data/make.py`), `[tokens][vocab]`.
fn reference(ids: &[i64]) -> Vec<Vec<f32>> {
    let embed = |id: i64, column: i64| ((id * 4 + column) % 5 - 2) as f32;
    let weight = |row: i64, column: i64| ((row * 7 + column) % 4 - 1) as f32;
    let mut seen = [0.0; 3];
    ids.iter()
        .enumerate()
        .map(|(position, id)| {
            for (column, sum) in seen.iter_mut().enumerate() {
                *sum += embed(*id, column as i64);
            }
            (0..7)
                .map(|token| {
                    let score: f32 = (0..3)
                        .map(|row| seen[row as usize] * weight(row, token))
                        .sum();
                    score + position as f32
                })
                .collect()
        })
        .collect()
}

fn rows(logits: &Logits, batch: usize) -> Vec<Vec<f32>> {
    (0..logits.shape()[1])
        .map(|position| logits.row(batch, position).into_owned())
        .collect()
}

#[test]
fn steps_equal_a_prompt_and_the_reference() {
    let ids = [3, 1, 4, 1, 5, 6, 2, 0];
    let expected = reference(&ids);
    let mut decoder = Decoder::open_file(&data("toy/decoder.onnx"), &options()).unwrap();
    for split in [0, 1, 3, ids.len()] {
        decoder.reset();
        let mut got = Vec::new();
        if split > 0 {
            got.extend(rows(&decoder.prefill(&ids[..split]).unwrap(), 0));
        }
        for id in &ids[split..] {
            got.push(decoder.step(*id).unwrap().last(0).into_owned());
        }
        assert_eq!(got, expected, "prompt of {split}");
        assert_eq!(decoder.past(), ids.len());
    }
}

#[test]
fn a_prompt_uses_the_prompt_graph_and_steps_do_not() {
    let mut decoder = Decoder::open(&data("toy"), &options()).unwrap();
    let ids = [2, 5, 6];
    let expected = reference(&ids);
    let prompt = decoder.prefill(&ids[..2]).unwrap();
    let marked: Vec<Vec<f32>> = expected[..2]
        .iter()
        .map(|row| row.iter().map(|x| x + 1000.0).collect())
        .collect();
    assert_eq!(rows(&prompt, 0), marked);
    decoder.close_prefill();
    assert_eq!(decoder.step(ids[2]).unwrap().last(0).as_ref(), expected[2]);
}

#[test]
fn sequences_side_by_side_equal_each_alone() {
    let sequences: [[i64; 4]; 3] = [[1, 2, 3, 4], [6, 0, 6, 0], [5, 5, 5, 1]];
    let mut decoder = Decoder::open_file(&data("toy/decoder.onnx"), &options()).unwrap();
    let prompts: Vec<&[i64]> = sequences.iter().map(|sequence| &sequence[..3]).collect();
    let prompt = decoder.append(&prompts).unwrap();
    let step = decoder
        .step_batch(&sequences.map(|sequence| sequence[3]))
        .unwrap();
    for (batch, sequence) in sequences.iter().enumerate() {
        let mut got = rows(&prompt, batch);
        got.extend(rows(&step, batch));
        assert_eq!(got, reference(sequence), "sequence {batch}");
    }
    assert_eq!((decoder.batch(), decoder.past()), (3, 4));
}

#[test]
fn the_cache_is_measured_from_the_returned_tensors() {
    let mut decoder = Decoder::open_file(&data("toy/decoder.onnx"), &options()).unwrap();
    let layouts = decoder.layouts();
    assert_eq!(
        layouts[0].kind,
        CacheKind::KeyValue {
            heads: 2,
            key_width: 2,
            value_width: 2
        }
    );
    assert_eq!(
        (layouts[1].layer, layouts[1].kind),
        (1, CacheKind::Latent { width: 3 })
    );
    assert_eq!(decoder.cache_bytes_per_token(), None);
    decoder.append(&[&[1, 2, 3], &[4, 5, 6]]).unwrap();
    let numbers: usize = layouts
        .iter()
        .map(mlac_engines::ort::CacheLayout::numbers_per_token)
        .sum();
    assert_eq!(decoder.cache_bytes_per_token(), Some(numbers as f64 * 4.0));
    assert_eq!(decoder.cache_bytes(), numbers * 4 * 6);
}

#[test]
fn bad_ids_are_refused_and_leave_the_cache_alone() {
    let mut decoder = Decoder::open_file(&data("toy/decoder.onnx"), &options()).unwrap();
    decoder.prefill(&[1, 2]).unwrap();
    let cases: [(&[&[i64]], &str); 6] = [
        (&[], "at least one token, found none"),
        (&[&[]], "at least one token, found none"),
        (&[&[1], &[2]], "1 sequences, as in the cache, found 2"),
        (
            &[&[1, 2], &[3]],
            "2 tokens in every sequence, found 1 tokens in one",
        ),
        (&[&[99]], "could not run"),
        (&[&[-1]], "ids of the vocabulary, found -1"),
    ];
    for (ids, expected) in cases {
        let error = decoder
            .append(ids)
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default();
        assert!(error.contains(expected), "{ids:?}: {error}");
    }
    assert_eq!(decoder.past(), 2);
    assert_eq!(
        decoder.step(3).unwrap().last(0).as_ref(),
        reference(&[1, 2, 3])[2]
    );
}

#[test]
fn wrong_inputs_are_named() {
    let mut session = OrtSession::open(&data("toy/decoder.onnx"), &options()).unwrap();
    let ids = Value::new(HostTensor::i64([1, 1], vec![1])).unwrap();
    let float = Value::new(HostTensor::f32([1, 1], vec![1.0])).unwrap();
    let wide = Value::new(HostTensor::f32([1, 0, 4], vec![])).unwrap();
    let empty_key = Value::new(HostTensor::f32([1, 2, 0, 2], vec![])).unwrap();
    let latent = Value::new(HostTensor::f32([1, 0, 3], vec![])).unwrap();
    let full = |ids_value, latent_value, extra: Option<(&'static str, &'static str)>| {
        let mut inputs = vec![
            ("input_ids", ids_value),
            ("position_ids", &ids),
            ("attention_mask", &ids),
            ("past_key_values.0.key", &empty_key),
            ("past_key_values.0.value", &empty_key),
            ("past_latent.1", latent_value),
        ];
        if let Some((from, to)) = extra {
            for input in &mut inputs {
                if input.0 == from {
                    input.0 = to;
                }
            }
        }
        inputs
    };
    session.run(&full(&ids, &latent, None)).unwrap();
    let cases = [
        (
            full(&float, &latent, None),
            "input input_ids: expected I64 [batch, seq], found F32 [1, 1]",
        ),
        (
            full(&ids, &wide, None),
            "input past_latent.1: expected F32 [batch, past, 3], found F32 [1, 0, 4]",
        ),
        (
            full(&ids, &latent, Some(("position_ids", "positions"))),
            "input position_ids: expected a value, found none",
        ),
    ];
    for (inputs, expected) in cases {
        let error = session
            .run(&inputs)
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default();
        assert!(error.contains(expected), "{expected}\n{error}");
    }
}

#[test]
fn files_that_are_no_decoders_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let truncated = folder.path().join("truncated.onnx");
    let whole = std::fs::read(data("toy/decoder.onnx")).unwrap();
    std::fs::write(&truncated, &whole[..whole.len() / 2]).unwrap();
    let garbage = folder.path().join("garbage.onnx");
    std::fs::write(&garbage, b"not a protobuf at all").unwrap();
    for (file, expected) in [
        (folder.path().join("none.onnx"), "cannot open the model"),
        (truncated, "ONNX Runtime could not load the model"),
        (garbage, "ONNX Runtime could not load the model"),
        (
            data("half.onnx"),
            "past_key_values.{i}.key and .value, or past_latent.{i}, found none",
        ),
    ] {
        let error = Decoder::open_file(&file, &options())
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default();
        assert!(
            error.contains(expected) && error.contains(&file.display().to_string()),
            "{file:?}: {error}"
        );
    }
}

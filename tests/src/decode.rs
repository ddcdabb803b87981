//! A fixture's text through an exported folder in ONNX Runtime, piece by piece with the cache.

use std::path::Path;

use mlac_converter::CachePlan;
use mlac_engines::ort::{
    CacheKind, CacheLayout, Decoder, Dim, HostTensor, OrtSession, SessionOptions, Value,
};
use mlac_engines::{Decode, Logits};
use mlac_graph::builders::DecoderOptions;
use mlac_graph::ir::DType;
use mlac_model::ModelConfig;

use crate::compare::{Difference, require_close};
use crate::fixtures::Io;
use crate::{Outcome, text};

/// What decoding a fixture's text gave.
#[derive(Debug)]
pub struct Decoded {
    /// `[batch, seq, vocab]`, as in [`Io::logits`].
    pub logits: Vec<f32>,
    /// What each layer caches, as the graph declares it.
    pub layouts: Vec<CacheLayout>,
    /// Bytes cached of one sequence, measured on the last step's outputs.
    pub cached: usize,
}

/// Runs a text in `pieces` of so many tokens through the product's decoder.
///
/// The decoder takes texts of equal length; padded ones go through [`decode_padded`].
pub fn decode(folder: &Path, io: &Io, pieces: &[usize]) -> Outcome<Decoded> {
    let options = SessionOptions::default().with_threads(1);
    let mut decoder = Decoder::open(folder, &options).map_err(text)?;
    let rows: Vec<&[i64]> = io.input_ids.chunks(io.seq).collect();
    let mut results = Vec::new();
    let mut start = 0;
    for &piece in pieces {
        let end = start + piece;
        let ids: Vec<&[i64]> = rows.iter().map(|row| &row[start..end]).collect();
        results.push((start, decoder.append(&ids).map_err(text)?));
        start = end;
    }
    require_whole(start, io)?;
    let mut logits = vec![0.0; io.batch * io.seq * io.vocab];
    for (start, piece) in &results {
        place(&mut logits, io, *start, piece)?;
    }
    Ok(Decoded {
        logits,
        layouts: decoder.layouts(),
        cached: decoder.cache_bytes() / io.batch,
    })
}

fn require_whole(tokens: usize, io: &Io) -> Outcome {
    if tokens == io.seq {
        return Ok(());
    }
    Err(format!(
        "pieces of {tokens} tokens, the text has {}",
        io.seq
    ))
}

fn place(logits: &mut [f32], io: &Io, start: usize, piece: &Logits) -> Outcome {
    let [batch, seq, vocab] = piece.shape();
    if (batch, vocab) != (io.batch, io.vocab) {
        return Err(format!(
            "logits have shape {:?}, expected [{}, {seq}, {}]",
            piece.shape(),
            io.batch,
            io.vocab
        ));
    }
    for row in 0..batch {
        for position in 0..seq {
            let at = (row * io.seq + start + position) * vocab;
            logits[at..at + vocab].copy_from_slice(&piece.row(row, position));
        }
    }
    Ok(())
}

/// The same for texts padded on the left, with their attention mask and positions as inputs.
/// Gives the logits `[batch, seq, vocab]`.
pub fn decode_padded(folder: &Path, io: &Io, pieces: &[usize]) -> Outcome<Vec<f32>> {
    let options = SessionOptions::default().with_threads(1);
    let open = |name: &str| OrtSession::open(&folder.join(name), &options).map_err(text);
    let mut step = open("decoder.onnx")?;
    let mut first = if folder.join("prefill.onnx").is_file() {
        Some(open("prefill.onnx")?)
    } else {
        None
    };
    let mut caches: Vec<(String, Value)> = Vec::new();
    for port in step
        .inputs()
        .iter()
        .filter(|port| port.name.starts_with("past_"))
    {
        let mut shape: Vec<usize> = port
            .dims
            .iter()
            .map(|dim| match dim {
                // Not bound to its output: every run copies it, and a ring is as small as it may be.
                _ if dim.is_capacity() => dim.window().unwrap_or(io.seq),
                _ => dim.fixed().unwrap_or(0),
            })
            .collect();
        shape[0] = io.batch;
        if !matches!(port.dims[0], Dim::Dynamic(_)) {
            return Err(format!("{}: its batch axis is fixed", port.name));
        }
        let empty = HostTensor::zeros(port.element, shape);
        caches.push((port.name.clone(), Value::new(empty).map_err(text)?));
    }
    let mut logits = vec![0.0; io.batch * io.seq * io.vocab];
    let mut start = 0;
    for &piece in pieces {
        let end = start + piece;
        let session = match &mut first {
            Some(first) if piece > 1 => first,
            _ => &mut step,
        };
        let integers = |tensor: &[i64], range: std::ops::Range<usize>| {
            let shape = [io.batch, range.len()];
            Value::new(HostTensor::i64(shape, io.columns(tensor, range))).map_err(text)
        };
        let texts = [
            ("input_ids", integers(&io.input_ids, start..end)?),
            ("position_ids", integers(&io.position_ids, start..end)?),
            ("attention_mask", integers(&io.attention_mask, 0..end)?),
        ];
        let inputs: Vec<(&str, &Value)> = texts
            .iter()
            .map(|(name, value)| (*name, value))
            .chain(caches.iter().map(|(name, value)| (name.as_str(), value)))
            .filter(|(name, _)| session.input(name).is_some())
            .collect();
        let results = session.run(&inputs).map_err(text)?;
        drop(inputs);
        let output = |name: &str| -> Outcome<Value> {
            let at = session.outputs().iter().position(|port| port.name == name);
            at.map(|at| results[at].clone())
                .ok_or_else(|| format!("no output {name}"))
        };
        for (name, value) in &mut caches {
            let present = name.replacen("past_key_values.", "present.", 1).replacen(
                "past_latent.",
                "present_latent.",
                1,
            );
            *value = output(&present)?;
        }
        let numbers = output("logits")?.to_host();
        let numbers = numbers.to_f32();
        let width = (end - start) * io.vocab;
        for row in 0..io.batch {
            let at = (row * io.seq + start) * io.vocab;
            logits[at..at + width].copy_from_slice(&numbers[row * width..(row + 1) * width]);
        }
        start = end;
    }
    require_whole(start, io)?;
    Ok(logits)
}

/// Runs a fixture's text and compares its logits with `expected` `[batch, seq, vocab]`, and the
/// caches of the graph with what `config` says: their kinds, and the bytes that a step returned
/// with those that the plan promised.
pub fn compare(
    folder: &Path,
    config: &ModelConfig,
    options: DecoderOptions,
    (io, pieces): (&Io, &[usize]),
    (expected, tolerance): (&[f64], f64),
) -> Outcome<Difference> {
    let expected = io.real(expected);
    if io.padded() {
        let logits = decode_padded(folder, io, pieces)?;
        return require_close(&io.real(&logits), &expected, &[io.vocab], tolerance);
    }
    let decoded = decode(folder, io, pieces)?;
    let found = require_close(&io.real(&decoded.logits), &expected, &io.shape(), tolerance)?;
    let caches: Vec<CacheLayout> = (0..config.num_hidden_layers)
        .map(|layer| CacheLayout {
            layer,
            window: config.sliding_window[layer],
            kind: match config.mla_layer(layer) {
                Some(mla) => CacheKind::Latent {
                    width: mla.cache_width(),
                },
                None => CacheKind::KeyValue {
                    heads: config.num_key_value_heads,
                    key_width: config.head_dim,
                    value_width: config.head_dim,
                },
            },
        })
        .collect();
    if decoded.layouts != caches {
        return Err(format!("caches {:?}, expected {caches:?}", decoded.layouts));
    }
    let size = if options.dtype == DType::F16 { 2 } else { 4 };
    let planned = CachePlan::of(config, size).mla_bytes(io.seq);
    if decoded.cached as u64 != planned {
        return Err(format!(
            "{} bytes cached of {} tokens, the plan says {planned}",
            decoded.cached, io.seq
        ));
    }
    Ok(found)
}

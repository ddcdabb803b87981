//! A fixture's text through an exported folder in ONNX Runtime: one prefill, then token by token.

use std::path::Path;

use mlac_engines::ort::{
    CacheLayout, Decoder, Dim, HostTensor, Logits, OrtSession, SessionOptions, Value,
};

use crate::fixtures::Io;
use crate::{Outcome, text};

/// What decoding a fixture's text gave.
#[derive(Debug)]
pub struct Decoded {
    /// `[batch, prefill + steps, vocab]`, as in [`Io::logits`].
    pub logits: Vec<f32>,
    /// What each layer caches, as the graph declares it.
    pub layouts: Vec<CacheLayout>,
    /// Numbers cached per token and sequence, measured on the last step's outputs.
    pub cached_per_token: f64,
}

/// Runs the first `prefill` tokens at once and the rest one by one through the product's decoder.
///
/// The decoder takes texts of equal length; padded ones go through [`decode_padded`].
pub fn decode(folder: &Path, io: &Io, prefill: usize) -> Outcome<Decoded> {
    let options = SessionOptions::default().with_threads(1);
    let mut decoder = Decoder::open(folder, &options).map_err(text)?;
    let rows: Vec<&[i64]> = io.input_ids.chunks(io.seq).collect();
    let mut pieces = Vec::new();
    let mut start = 0;
    for end in std::iter::once(prefill).chain(prefill + 1..=io.seq) {
        let ids: Vec<&[i64]> = rows.iter().map(|row| &row[start..end]).collect();
        pieces.push((start, decoder.append(&ids).map_err(text)?));
        start = end;
    }
    let mut logits = vec![0.0; io.batch * io.seq * io.vocab];
    for (start, piece) in &pieces {
        place(&mut logits, io, *start, piece)?;
    }
    Ok(Decoded {
        logits,
        layouts: decoder.layouts(),
        // Element size: every fixture is exported in f32.
        cached_per_token: decoder.cache_bytes_per_token().unwrap_or(f64::NAN) / 4.0,
    })
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
/// Gives the logits `[batch, prefill + steps, vocab]`.
pub fn decode_padded(folder: &Path, io: &Io, prefill: usize) -> Outcome<Vec<f32>> {
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
            .map(|dim| dim.fixed().unwrap_or(0))
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
    for end in std::iter::once(prefill).chain(prefill + 1..=io.seq) {
        let session = match &mut first {
            Some(first) if start == 0 => first,
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
        let piece = output("logits")?;
        let numbers = piece.as_f32().ok_or("logits are not f32")?;
        let width = (end - start) * io.vocab;
        for row in 0..io.batch {
            let at = (row * io.seq + start) * io.vocab;
            logits[at..at + width].copy_from_slice(&numbers[row * width..(row + 1) * width]);
        }
        start = end;
    }
    Ok(logits)
}

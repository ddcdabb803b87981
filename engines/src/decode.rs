//! A decoder with its cache, whatever runs it: token ids in, logits out.

use std::borrow::Cow;

use mlac_model::Refusal;

use crate::error::Result;
use crate::ort::{CacheLayout, Value};

/// A model that continues sequences. The cache stays where it runs.
pub trait Decode {
    /// What each layer caches, in layer order.
    fn layouts(&self) -> Vec<CacheLayout>;

    /// Tokens in the cache.
    fn past(&self) -> usize;

    /// Sequences decoded side by side; 0 before the first tokens.
    fn batch(&self) -> usize;

    /// Forgets all tokens.
    fn reset(&mut self);

    /// Starts `batch` sequences of `tokens` tokens whose cached numbers are all zero. For timing a
    /// step at a context: the numbers do not change the work.
    ///
    /// # Errors
    /// When there is no room for them.
    fn fill_with_zeros(&mut self, batch: usize, tokens: usize) -> Result<()>;

    /// Bytes that the cached tokens take. A cache that is kept in place has room for more tokens.
    fn cache_bytes(&self) -> usize;

    /// Appends the same number of tokens to each sequence; logits `[batch, seq, vocab]`.
    ///
    /// # Errors
    /// When the sequences differ in length or number, or the runtime fails; the cache is then as
    /// it was before. If the runtime fails after it changed what was cached, all tokens are forgotten.
    fn append(&mut self, ids: &[&[i64]]) -> Result<Logits>;

    /// Bytes of cache per token and sequence; beyond a sliding window it may fall with every token. `None` before the first tokens.
    fn cache_bytes_per_token(&self) -> Option<f64> {
        let tokens = self.past() * self.batch();
        (tokens > 0).then(|| self.cache_bytes() as f64 / tokens as f64)
    }

    /// Appends a prompt of one sequence; logits `[1, ids, vocab]`.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    fn prefill(&mut self, ids: &[i64]) -> Result<Logits> {
        self.append(&[ids])
    }

    /// Appends one token to one sequence; logits `[1, 1, vocab]`.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    fn step(&mut self, id: i64) -> Result<Logits> {
        self.append(&[&[id]])
    }

    /// Appends one token to each sequence; logits `[batch, 1, vocab]`.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    fn step_batch(&mut self, ids: &[i64]) -> Result<Logits> {
        let rows: Vec<&[i64]> = ids.iter().map(std::slice::from_ref).collect();
        self.append(&rows)
    }
}

/// Logits `[batch, seq, vocab]`.
pub struct Logits {
    shape: [usize; 3],
    numbers: Numbers,
}

/// Where logits are.
enum Numbers {
    /// In ONNX Runtime's memory.
    Runtime(Value),
    /// In ours.
    Host(Vec<f32>),
}

impl Logits {
    /// Logits in ONNX Runtime's memory; the value has three axes.
    pub(crate) fn of_runtime(value: Value) -> Self {
        let shape = value.shape();
        Self {
            shape: [shape[0], shape[1], shape[2]],
            numbers: Numbers::Runtime(value),
        }
    }

    /// As many numbers as the shape has.
    pub(crate) fn of_host(shape: [usize; 3], numbers: Vec<f32>) -> Self {
        Self {
            shape,
            numbers: Numbers::Host(numbers),
        }
    }

    /// `[batch, seq, vocab]`.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// The logits of one position, `[vocab]`; without a copy when they are f32.
    ///
    /// # Panics
    /// When `batch` or `position` is out of range.
    pub fn row(&self, batch: usize, position: usize) -> Cow<'_, [f32]> {
        let [batches, positions, vocab] = self.shape;
        assert!(
            batch < batches && position < positions,
            "no logits ({batch}, {position}) in {:?}",
            self.shape
        );
        let start = (batch * positions + position) * vocab;
        let range = start..start + vocab;
        let value = match &self.numbers {
            Numbers::Host(numbers) => return Cow::Borrowed(&numbers[range]),
            Numbers::Runtime(value) => value,
        };
        match (value.as_f32(), value.as_f16()) {
            (Some(data), _) => Cow::Borrowed(&data[range]),
            (_, Some(data)) => data[range].iter().map(|value| value.to_f32()).collect(),
            _ => Cow::Borrowed(&[]),
        }
    }

    /// The logits of the last position, `[vocab]`.
    pub fn last(&self, batch: usize) -> Cow<'_, [f32]> {
        self.row(batch, self.shape[1] - 1)
    }
}

/// Sequences and tokens of `ids`, for a decoder that holds `batch` sequences (0: none yet).
///
/// # Errors
/// No tokens, sequences of different lengths or of another number than are cached, negative ids.
pub(crate) fn check_ids(ids: &[&[i64]], batch: usize) -> Result<(usize, usize)> {
    let seq = ids.first().map_or(0, |row| row.len());
    let refused = |expected: String, found: String| {
        Err(Refusal::new(
            "token ids",
            expected,
            found,
            "pass equally long, non-empty sequences of the tokenizer's ids",
        )
        .into())
    };
    if seq == 0 {
        return refused("at least one token".into(), "none".into());
    }
    if let Some(row) = ids.iter().find(|row| row.len() != seq) {
        return refused(
            format!("{seq} tokens in every sequence"),
            format!("{} tokens in one", row.len()),
        );
    }
    if let Some(id) = ids.iter().flat_map(|row| row.iter()).find(|id| **id < 0) {
        return refused("ids of the vocabulary".into(), id.to_string());
    }
    if batch != 0 && batch != ids.len() {
        return refused(
            format!("{batch} sequences, as in the cache"),
            format!("{} (reset first)", ids.len()),
        );
    }
    Ok((ids.len(), seq))
}

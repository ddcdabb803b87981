//! The specification in f64, position by position, and the comparison with it.

use super::problem::Problem;
use crate::Outcome;

/// A step's outputs.
#[derive(Debug, Clone)]
pub struct Answer {
    /// `[batch, query_tokens, heads, r]`.
    pub sums: Vec<f32>,
    /// `[batch, query_tokens, heads]`, where the backend gives it.
    pub lse: Option<Vec<f32>>,
    /// As the cache.
    pub cache: Option<Vec<f32>>,
}

impl Problem {
    /// Whether new token `t` of sequence `b` sees position `p`: the four conditions.
    fn sees(&self, b: usize, t: usize, p: usize) -> bool {
        let spec = &self.spec;
        let past = spec.past[b];
        let (position, past) = (p as i64, past as i64);
        let (own, before) = match &self.tree {
            None => (past + t as i64, position <= past + t as i64),
            Some(words) => {
                let word = words[b * spec.query_tokens + t] as u64;
                let set = |j: usize| word >> j & 1 == 1;
                let depth = (0..spec.query_tokens).filter(|&j| set(j)).count() as i64 - 1;
                (
                    past + depth,
                    position < past || set((position - past) as usize),
                )
            }
        };
        let near = spec.window.is_none_or(|w| own - position < w as i64);
        let shown = self
            .key_mask
            .as_ref()
            .is_none_or(|mask| mask[b * self.mask_length + p] != 0);
        before && near && shown
    }

    fn row(&self, b: usize, p: usize) -> &[f32] {
        let past = self.spec.past[b];
        if p < past {
            return &self.history[b][p];
        }
        let at = (b * self.spec.query_tokens + p - past) * self.width();
        &self.new_rows[at..at + self.width()]
    }

    /// What the specification says.
    pub fn reference(&self) -> Answer {
        let spec = &self.spec;
        let width = self.width();
        let (mut sums, mut lse) = (Vec::new(), Vec::new());
        for b in 0..self.batch() {
            for t in 0..spec.query_tokens {
                for head in 0..spec.heads {
                    let at = ((b * spec.query_tokens + t) * spec.heads + head) * width;
                    let query = &self.query[at..at + width];
                    let seen: Vec<(f64, &[f32])> = (0..spec.past[b] + spec.query_tokens)
                        .filter(|&p| self.sees(b, t, p))
                        .map(|p| {
                            let row = self.row(b, p);
                            let pairs = query.iter().zip(row);
                            let dot: f64 = pairs.map(|(&q, &x)| f64::from(q) * f64::from(x)).sum();
                            (dot * f64::from(spec.scale), row)
                        })
                        .collect();
                    let sink = self.sinks.as_ref().map(|sinks| f64::from(sinks[head]));
                    let (sum, log) = weigh(&seen, spec.rank, sink);
                    sums.extend(sum.into_iter().map(|x| x as f32));
                    lse.push(log as f32);
                }
            }
        }
        let mut cache = self.cache.clone();
        for b in 0..self.batch() {
            for t in 0..spec.query_tokens {
                let position = spec.past[b] + t;
                let at = self.slot(b, position) * width;
                cache[at..at + width].copy_from_slice(self.row(b, position));
            }
        }
        Answer {
            sums,
            lse: Some(lse),
            cache: Some(cache),
        }
    }

    /// Refuses an answer that is not the reference's to the rounding of the type. `slack` multiplies what sums may differ.
    pub fn require(&self, answer: &Answer, slack: f64) -> Outcome {
        let expected = self.reference();
        let largest = |rows: &[f32]| {
            let finite = rows.iter().filter(|x| x.is_finite());
            finite.fold(1.0_f64, |most, &x| most.max(f64::from(x).abs()))
        };
        let size = largest(&self.new_rows).max(largest(&self.cache));
        let limit = slack * size * (self.spec.kind.rounding() + 4e-6);
        close("sums", &answer.sums, &expected.sums, |_| limit)?;
        if let (Some(found), Some(expected)) = (&answer.lse, &expected.lse) {
            close("lse", found, expected, |x| 1e-5 * x.abs().max(1.0))?;
        }
        if let (Some(found), Some(expected)) = (&answer.cache, &expected.cache) {
            close("cache", found, expected, |_| 0.0)?;
        }
        Ok(())
    }
}

/// Weighted sum of latents, and log-sum-exp without the sink.
fn weigh(seen: &[(f64, &[f32])], rank: usize, sink: Option<f64>) -> (Vec<f64>, f64) {
    let top = seen.iter().fold(f64::NEG_INFINITY, |top, (s, _)| {
        if s.is_nan() { f64::NAN } else { top.max(*s) }
    });
    let mut out = vec![0.0; rank];
    if top == f64::NEG_INFINITY {
        return (out, f64::NEG_INFINITY);
    }
    let sum: f64 = seen.iter().map(|(s, _)| (s - top).exp()).sum();
    let all = sum + sink.map_or(0.0, |sink| (sink - top).exp());
    for (score, row) in seen {
        for (out, &x) in out.iter_mut().zip(*row) {
            *out += (score - top).exp() * f64::from(x) / all;
        }
    }
    (out, top + sum.ln())
}

/// Positions of NaN and infinities must agree, everything else to `limit` of the expected number.
fn close(what: &str, found: &[f32], expected: &[f32], limit: impl Fn(f64) -> f64) -> Outcome {
    if found.len() != expected.len() {
        return Err(format!(
            "{} {what}, expected {}",
            found.len(),
            expected.len()
        ));
    }
    for (at, (&f, &e)) in found.iter().zip(expected).enumerate() {
        let same = if e.is_finite() {
            (f64::from(f) - f64::from(e)).abs() <= limit(f64::from(e))
        } else {
            f.is_nan() == e.is_nan() && (e.is_nan() || f.to_bits() == e.to_bits())
        };
        if !same {
            return Err(format!("{what} {at}: {f}, expected {e}"));
        }
    }
    Ok(())
}

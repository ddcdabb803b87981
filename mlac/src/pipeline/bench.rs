//! Time of a decode step by context, for one or two folders of graphs or engines.
//!
//! Runs take turns, A B A B, so that a machine whose speed drifts is fair to both; the median counts.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::subject::open_decoder;
use crate::error::Error;
use crate::progress::Progress;

/// Decode times of one model at one context.
#[derive(Debug, Clone, Serialize)]
pub struct StepTimes {
    /// Cached tokens before the step.
    pub context: usize,
    /// Median milliseconds of each model, in the order given.
    pub milliseconds: Vec<f64>,
    /// Bytes of cache of each model at this context, measured.
    pub cache_bytes: Vec<usize>,
}

/// Times one decode step of each folder at each context. The cache holds zeros: its numbers do not
/// change the work. The step before is run too: zeros that nobody has written to lie in one page of memory, whatever their
/// number, and a cache in place may have to grow.
pub fn bench(
    folders: &[&Path],
    contexts: &[usize],
    repeats: usize,
    threads: usize,
    progress: Progress,
) -> Result<Vec<StepTimes>, Error> {
    let mut decoders = folders
        .iter()
        .map(|folder| open_decoder(folder, threads))
        .collect::<Result<Vec<_>, _>>()?;
    let stage = progress.stage("timing decode steps", (contexts.len() * repeats) as u64);
    let mut results = Vec::new();
    for &context in contexts {
        stage.doing(format!("context {context}"));
        let mut times: Vec<Vec<f64>> = vec![Vec::new(); decoders.len()];
        let mut cache_bytes = vec![0; decoders.len()];
        for round in 0..=repeats {
            for (i, decoder) in decoders.iter_mut().enumerate() {
                decoder.fill_with_zeros(1, context.saturating_sub(1))?;
                if context > 0 {
                    decoder.step(1)?;
                }
                cache_bytes[i] = decoder.cache_bytes();
                let started = Instant::now();
                decoder.step(1)?;
                let elapsed = started.elapsed().as_secs_f64() * 1e3;
                if round > 0 {
                    times[i].push(elapsed);
                }
            }
            if round > 0 {
                stage.step();
            }
        }
        results.push(StepTimes {
            context,
            milliseconds: times.iter_mut().map(|t| median(t)).collect(),
            cache_bytes,
        });
    }
    Ok(results)
}

/// The middle value; the mean of the two middle ones of an even number.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert!((median(&mut [3.0, 1.0, 2.0]) - 2.0).abs() < 1e-12);
        assert!((median(&mut [4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-12);
    }
}

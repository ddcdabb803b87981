//! SmolLM2-135M-Instruct against what transformers computed for it.

use std::path::Path;

use mlac_engines::Decode;
use mlac_engines::ort::{Decoder, SessionOptions};

use crate::cases::Cases;
use crate::compare::require_close;
use crate::fixtures::{self, PREFILL};
use crate::{Outcome, text};

/// Of the largest recorded number of a token; 30 layers in f32.
const TOLERANCE: f64 = 1e-4;

/// Decodes the oracle's text with an exported folder, a prefill and then token by token; one case
/// for each token: the most likely token, recorded logits and the logsumexp.
pub fn compare(cases: &mut Cases, folder: &Path) -> Outcome {
    let oracle = fixtures::smollm2()?;
    let mut decoder = Decoder::open(folder, &SessionOptions::default()).map_err(text)?;
    let first = decoder
        .prefill(&oracle.input_ids[..PREFILL])
        .map_err(text)?;
    let mut rows: Vec<Vec<f32>> = (0..PREFILL)
        .map(|at| first.row(0, at).into_owned())
        .collect();
    drop(first);
    for &id in &oracle.input_ids[PREFILL..] {
        rows.push(decoder.step(id).map_err(text)?.last(0).into_owned());
    }
    let probes = oracle.probe_logits.chunks(oracle.probe_ids.len());
    for (at, (row, probes)) in rows.iter().zip(probes).enumerate() {
        cases.measure(format!("token {at}"), || {
            let top = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            if top.map(|id| id as i64) != Some(oracle.top1[at]) {
                return Err(format!("top token {top:?}, expected {}", oracle.top1[at]));
            }
            let most = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|&x| f64::from(x - most).exp()).sum();
            // Recorded logits, then the logsumexp.
            let found: Vec<f64> = oracle
                .probe_ids
                .iter()
                .map(|&id| f64::from(row[id as usize]))
                .chain([f64::from(most) + sum.ln()])
                .collect();
            let expected: Vec<f64> = probes
                .iter()
                .chain([&oracle.logsumexp[at]])
                .map(|&x| f64::from(x))
                .collect();
            require_close(&found, &expected, &[found.len()], TOLERANCE)
        });
    }
    Ok(())
}

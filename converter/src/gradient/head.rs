//! The gradient at the top: final norm, logits, and a label drawn from the model's own prediction.

use rayon::prelude::*;

use super::rows::{norm_backward, norm_rows};
use crate::error::{Error, refuse};
use crate::linalg::Matrix;
use crate::statistics::split_mix;

/// Tokens whose logits are in memory at a time.
const CHUNK: usize = 256;

/// Gradient `[tokens, D]` of `sum_t -ln p_t(y_t)` at the last hidden states `hidden` `[tokens, D]`, `y_t` drawn
/// from `p_t = softmax(table . norm(hidden_t))` with `seed`; `table` `[vocab, D]`, `norm` `[D]`.
pub fn head_gradient(
    hidden: &Matrix<f32>,
    norm: &[f32],
    epsilon: f32,
    table: &Matrix<f32>,
    seed: u64,
) -> Result<Matrix<f32>, Error> {
    let (width, vocab) = (hidden.cols(), table.rows());
    if table.cols() != width || norm.len() != width || vocab == 0 {
        return Err(refuse(
            "output head",
            format!("rows and a norm of the hidden size, {width}"),
            format!("[{vocab}, {}] and [{}]", table.cols(), norm.len()),
            "make config.json and the checkpoint agree",
        ));
    }
    let mut out = Matrix::zeros(hidden.rows(), width);
    for start in (0..hidden.rows()).step_by(CHUNK) {
        let end = (start + CHUNK).min(hidden.rows());
        let rows = hidden.row_range(start, end);
        let mut errors = norm_rows(&rows, norm, epsilon).times_transposed(table);
        let finite: bool = errors
            .data_mut()
            .par_chunks_mut(vocab)
            .enumerate()
            .map(|(i, logits)| prediction_error(logits, uniform(seed, start + i)))
            .reduce(|| true, |a, b| a && b);
        if !finite {
            return Err(refuse(
                "logits of a calibration window",
                "finite numbers",
                "NaN or infinity",
                "calibrate on another text, or check the checkpoint",
            ));
        }
        let back = norm_backward(&rows, norm, epsilon, &errors.times(table));
        out.data_mut()[start * width..end * width].copy_from_slice(back.data());
    }
    Ok(out)
}

/// A number in [0, 1) for a token.
fn uniform(seed: u64, token: usize) -> f64 {
    let bits = split_mix(split_mix(seed) ^ token as u64);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Replaces logits by probabilities, less 1 at the label at which their sum passes `draw`; whether all are finite.
fn prediction_error(logits: &mut [f32], draw: f64) -> bool {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0f64;
    for x in logits.iter_mut() {
        *x = (*x - most).exp();
        sum += f64::from(*x);
    }
    if !sum.is_finite() {
        return false;
    }
    let (mut passed, mut label) = (0.0, None);
    for (i, x) in logits.iter_mut().enumerate() {
        passed += f64::from(*x);
        if label.is_none() && passed > draw * sum {
            label = Some(i);
        }
        *x = (f64::from(*x) / sum) as f32;
    }
    let label = label.unwrap_or(logits.len() - 1);
    logits[label] -= 1.0;
    true
}

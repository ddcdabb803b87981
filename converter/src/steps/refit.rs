//! Step 7: refit of the output projection.
//!
//! `W_o` is fitted anew so that the converted layer's head outputs X `[tokens, H*d]` give the
//! original layer's attention output T `[tokens, D]`: ridge regression towards the original
//! `W_0`, `min |T - X W^T - 1 b^T|^2 + lambda |W - W_0|^2`, lambda relative to the mean of the
//! diagonal of `X^T X` (so it does not depend on the number of tokens). With `fit_bias` the bias
//! is free: `b = mean(T) - W mean(X)`. Sums run window by window.
//!
//! In sequential calibration the converted layer's residual stream h' has drifted from the original
//! one, h. With `compensate` the caller gives `T + (h - h')` as the target: what the stream needs to be
//! right after this layer, not what the layer would have added to a right one. So every layer takes back
//! what it can of the errors below it.

use serde::{Deserialize, Serialize};

use crate::attention::max_abs_finite;
use crate::error::{Error, refuse};
use crate::layer::{AttentionShape, Projection};
use crate::linalg::{Matrix, Threads, gemm, gram_accumulate, ridge_solve};

/// How the output projection is refitted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RefitOptions {
    /// Ridge towards the original weights, relative to the mean diagonal of the normal matrix.
    pub lambda: f64,
    /// Whether the layer gets a (new) bias too.
    pub fit_bias: bool,
    /// Whether the target makes up for the drift of the residual stream.
    pub compensate: bool,
}

impl Default for RefitOptions {
    fn default() -> Self {
        Self {
            lambda: 0.01,
            fit_bias: false,
            compensate: true,
        }
    }
}

/// Normal equations of one layer's refit.
#[derive(Debug, Clone)]
pub struct OutputRefit {
    layer: usize,
    tokens: usize,
    /// `X^T X` `[H*d, H*d]`.
    gram: Matrix<f64>,
    /// `X^T T` `[H*d, D]`.
    cross: Matrix<f64>,
    head_sum: Vec<f64>,
    target_sum: Vec<f64>,
    target_square: f64,
}

/// A refitted output projection.
#[derive(Debug, Clone, PartialEq)]
pub struct Refitted {
    /// `[D, H*d]`.
    pub o: Matrix<f64>,
    /// `[D]`: the fitted bias, or the original one.
    pub bias: Option<Vec<f64>>,
    /// `|T - X W_0^T - b_0|^2 / |T|^2`.
    pub error_before: f64,
    /// The same with the new projection.
    pub error_after: f64,
}

impl OutputRefit {
    /// No tokens yet.
    pub fn new(layer: usize, shape: &AttentionShape) -> Self {
        let (n, hidden) = (shape.query_width(), shape.hidden);
        Self {
            layer,
            tokens: 0,
            gram: Matrix::zeros(n, n),
            cross: Matrix::zeros(n, hidden),
            head_sum: vec![0.0; n],
            target_sum: vec![0.0; hidden],
            target_square: 0.0,
        }
    }

    /// Adds a window: converted head outputs `[tokens, H*d]` and the attention output they should
    /// give `[tokens, D]`.
    pub fn accumulate(
        &mut self,
        tokens: usize,
        heads: &[f32],
        target: &[f32],
    ) -> Result<(), Error> {
        let (n, hidden) = (self.gram.rows(), self.cross.cols());
        for (name, data, width) in [
            ("head outputs", heads, n),
            ("attention outputs", target, hidden),
        ] {
            let subject = format!("{name} of layer {}", self.layer);
            if data.len() != tokens * width {
                return Err(refuse(
                    subject,
                    format!("{} numbers ([{tokens}, {width}])", tokens * width),
                    data.len().to_string(),
                    "export the calibration graph again from the same checkpoint",
                ));
            }
            if max_abs_finite(data).is_none() {
                return Err(refuse(
                    subject,
                    "finite activations",
                    "NaN or infinity",
                    "calibrate in f32, or convert with a larger rank",
                ));
            }
        }
        let x = faer::MatRef::from_row_major_slice(heads, tokens, n);
        let t = faer::MatRef::from_row_major_slice(target, tokens, hidden);
        gram_accumulate(&mut self.gram, x, Threads::All);
        let mut cross = Matrix::<f32>::zeros(n, hidden);
        gemm(cross.view_mut(), false, x.transpose(), t, 1.0, Threads::All);
        self.cross.add_scaled(&cross.cast(), 1.0);
        for (sums, rows) in [(&mut self.head_sum, heads), (&mut self.target_sum, target)] {
            for row in rows.chunks_exact(sums.len()) {
                for (total, x) in sums.iter_mut().zip(row) {
                    *total += f64::from(*x);
                }
            }
        }
        self.target_square += target
            .iter()
            .map(|&x| f64::from(x) * f64::from(x))
            .sum::<f64>();
        self.tokens += tokens;
        Ok(())
    }

    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Solves for the new projection, with ridge towards `original`.
    pub fn solve(&self, original: &Projection, options: RefitOptions) -> Result<Refitted, Error> {
        if self.tokens == 0 {
            return Err(refuse(
                format!("refit of o_proj of layer {}", self.layer),
                "at least one token",
                "none",
                "give a longer calibration text",
            ));
        }
        if !options.lambda.is_finite() || options.lambda < 0.0 {
            return Err(refuse(
                "ridge of the o_proj refit",
                "a number of at least 0",
                options.lambda.to_string(),
                "use the default of 0.01",
            ));
        }
        let (n, hidden, count) = (self.gram.rows(), self.cross.cols(), self.tokens as f64);
        if (original.weight.rows(), original.weight.cols()) != (hidden, n) {
            return Err(refuse(
                format!("layer {} o_proj.weight", self.layer),
                format!("shape [{hidden}, {n}]"),
                format!("[{}, {}]", original.weight.rows(), original.weight.cols()),
                "refit with the projection of the same layer",
            ));
        }
        let w0: Matrix<f64> = original.weight.cast();
        let b0: Vec<f64> = original.bias.as_ref().map_or_else(
            || vec![0.0; hidden],
            |b| b.iter().map(|&x| f64::from(x)).collect(),
        );

        // Normal matrix and right side of W - W_0, centred when the bias is free.
        let mut gram = self.gram.clone();
        let mut right = self.cross.clone();
        right.add_scaled(&self.gram.times_transposed(&w0), -1.0);
        let residual_sum: Vec<f64> = {
            let mapped = multiply(&w0, &self.head_sum);
            (0..hidden)
                .map(|j| self.target_sum[j] - mapped[j])
                .collect()
        };
        for i in 0..n {
            for j in 0..hidden {
                let shift = if options.fit_bias {
                    residual_sum[j] / count
                } else {
                    b0[j]
                };
                right[(i, j)] -= self.head_sum[i] * shift;
            }
            if options.fit_bias {
                for j in 0..n {
                    gram[(i, j)] -= self.head_sum[i] * self.head_sum[j] / count;
                }
            }
        }
        let mean_diagonal = (gram.trace() / n as f64).max(f64::MIN_POSITIVE);
        let ridge = mean_diagonal * options.lambda.max(1e-9);
        let change = ridge_solve(
            &gram,
            ridge,
            &right,
            &format!("refit of o_proj of layer {}", self.layer),
        )?;
        let mut o = w0.clone();
        o.add_scaled(&change.transpose(), 1.0);

        let bias = if options.fit_bias {
            let mapped = multiply(&o, &self.head_sum);
            Some(
                (0..hidden)
                    .map(|j| (self.target_sum[j] - mapped[j]) / count)
                    .collect(),
            )
        } else {
            original.bias.as_ref().map(|_| b0.clone())
        };
        let error_before = self.relative_error(&w0, &b0);
        let error_after = self.relative_error(&o, bias.as_ref().unwrap_or(&b0));
        Ok(Refitted {
            o,
            bias,
            error_before,
            error_after,
        })
    }

    /// `|T - X W^T - 1 b^T|^2 / |T|^2` from the sums.
    fn relative_error(&self, w: &Matrix<f64>, b: &[f64]) -> f64 {
        if self.target_square <= 0.0 {
            return 0.0;
        }
        let quadratic: f64 = w
            .times(&self.gram)
            .data()
            .iter()
            .zip(w.data())
            .map(|(x, y)| x * y)
            .sum();
        let mut linear = 0.0;
        for j in 0..w.rows() {
            linear += w
                .row(j)
                .iter()
                .enumerate()
                .map(|(i, x)| x * self.cross[(i, j)])
                .sum::<f64>();
        }
        let mapped = multiply(w, &self.head_sum);
        let with_bias: f64 = (0..b.len())
            .map(|j| {
                b[j] * (b[j] * self.tokens as f64 + 2.0 * mapped[j] - 2.0 * self.target_sum[j])
            })
            .sum();
        ((self.target_square - 2.0 * linear + quadratic + with_bias) / self.target_square).max(0.0)
    }
}

fn multiply(w: &Matrix<f64>, x: &[f64]) -> Vec<f64> {
    (0..w.rows())
        .map(|j| w.row(j).iter().zip(x).map(|(a, b)| a * b).sum())
        .collect()
}

//! The curvature of the loss over keys and values, as a product of a metric and a token moment.
//!
//! A linear map that loses `e_s = E s` of every stacked vector costs `sum_s (g_s^T E s)^2 / 2`, a quadratic form
//! in E whose matrix is `sum_s (g g^T) (x) (s s^T)`. It is replaced by one product `G (x) M`, the most likely
//! one for normally distributed `g s^T`, found by turns (the flip-flop algorithm, Dutilleul 1999,
//! doi 10.1080/00949659908811970): `G = mean_s (s^T M^{-1} s) g g^T`, `M = mean_s (g^T G^{-1} g) s s^T`.
//! With plain means instead, the few tokens with very large gradients would decide the metric: first tokens of
//! windows, whose stacked vectors are all alike, so that one direction of the latent holds them. By turns
//! they count as that one direction.

use faer::Side;
use faer::linalg::solvers::Solve;
use rayon::prelude::*;

use crate::error::{Error, numeric, refuse};
use crate::linalg::{Matrix, Threads, gram_accumulate};

/// Turns; other numbers were not compared.
const TURNS: usize = 3;

/// Ridge of an inverse, relative to the mean of its diagonal; other values were not compared.
const RIDGE: f64 = 2e-4;

/// Gradients and stacked vectors of one layer, by token.
#[derive(Debug, Clone, Default)]
pub struct TokenGradients {
    /// Windows of gradients `[tokens, 2*G*d]`.
    gradients: Vec<Matrix<f32>>,
    /// The stacked vectors they belong to.
    stacked: Vec<Matrix<f32>>,
}

impl TokenGradients {
    /// Adds a window.
    pub fn push(&mut self, stacked: Matrix<f32>, gradients: Matrix<f32>) -> Result<(), Error> {
        let width = self.gradients.first().map_or(stacked.cols(), Matrix::cols);
        let shape = (stacked.rows(), width);
        for (what, rows) in [
            ("keys and values", &stacked),
            ("their gradients", &gradients),
        ] {
            if (rows.rows(), rows.cols()) != shape || !rows.is_finite() {
                return Err(refuse(
                    format!("{what} of a calibration window"),
                    format!("finite numbers [{}, {width}]", shape.0),
                    format!("[{}, {}], or NaN or infinity", rows.rows(), rows.cols()),
                    "calibrate on another text, or leave out the step `gradient`",
                ));
            }
        }
        self.stacked.push(stacked);
        self.gradients.push(gradients);
        Ok(())
    }

    /// The metric G `[2*G*d, 2*G*d]` with trace 1; zero where nothing reaches the layer.
    pub fn metric(&self) -> Result<Matrix<f64>, Error> {
        let ones: Vec<Vec<f64>> = self.stacked.iter().map(|s| vec![1.0; s.rows()]).collect();
        let mut moment = weighted_moment(&self.stacked, &ones);
        for _ in 1..TURNS {
            let leverage = leverage(&self.stacked, &moment)?;
            let metric = weighted_moment(&self.gradients, &leverage);
            if metric.trace() == 0.0 {
                return Ok(metric);
            }
            moment = weighted_moment(&self.stacked, &self::leverage(&self.gradients, &metric)?);
        }
        Ok(weighted_moment(
            &self.gradients,
            &leverage(&self.stacked, &moment)?,
        ))
    }
}

/// `x^T A^{-1} x` of every row, with a ridge.
fn leverage(windows: &[Matrix<f32>], a: &Matrix<f64>) -> Result<Vec<Vec<f64>>, Error> {
    let n = a.rows();
    let mut system = a.clone();
    let ridge = (RIDGE * a.trace() / n as f64).max(f64::MIN_POSITIVE);
    for i in 0..n {
        system[(i, i)] += ridge;
    }
    let factor = system.view().llt(Side::Lower).map_err(|_| {
        numeric(
            "moment of keys and values or of their gradients",
            "a positive definite matrix",
        )
    })?;
    let by_window = windows.iter().map(|rows| {
        let columns: Matrix<f64> = rows.transpose().cast();
        let solved = factor.solve(columns.view());
        (0..rows.rows())
            .into_par_iter()
            .map(|t| (0..n).map(|i| columns[(i, t)] * solved[(i, t)]).sum())
            .collect()
    });
    Ok(by_window.collect())
}

/// `sum_t w_t x_t x_t^T` `[n, n]`, scaled to trace 1 (zero stays).
fn weighted_moment(windows: &[Matrix<f32>], weights: &[Vec<f64>]) -> Matrix<f64> {
    let n = windows.first().map_or(0, Matrix::cols);
    let mut total = Matrix::zeros(n, n);
    for (rows, weights) in windows.iter().zip(weights) {
        let mut rows = rows.clone();
        for (t, weight) in weights.iter().enumerate() {
            let factor = weight.max(0.0).sqrt() as f32;
            rows.row_mut(t).iter_mut().for_each(|x| *x *= factor);
        }
        gram_accumulate(&mut total, rows.view(), Threads::All);
    }
    let trace = total.trace();
    if trace > 0.0 {
        total.scale(1.0 / trace);
    }
    total
}

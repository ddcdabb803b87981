//! The error of a converted layer on the kept windows.
//!
//! `error = sum_t |W_o' o'_t + b' - T_t|^2 / sum_t |T_t|^2` over the evaluated query rows, o' the
//! head outputs of the converted layer, T what the layer should put out: the target given with the
//! window, or else `W_o o_t` of the original layer on the same window. Both attend over the same keys of the
//! window; the softmax is computed in full, so this is the true error of the layer, not a bound.

use faer::MatRef;
use rayon::prelude::*;

use crate::attention::{RotationTable, RowBlock, block_probabilities, row_blocks};
use crate::error::Error;
use crate::layer::{Attention, LayerFactors};
use crate::linalg::{Matrix, Threads, gemm};
use crate::statistics::{LayerStatistics, WindowSample};

/// Measures converted layers against the original on the kept windows of its statistics.
#[derive(Debug)]
pub struct LayerEvaluator<'a> {
    attention: &'a Attention,
    o: &'a Matrix<f32>,
    windows: Vec<Target<'a>>,
    energy: f64,
}

#[derive(Debug)]
struct Target<'a> {
    sample: &'a WindowSample,
    /// `W_o o_t`, `[rows, D]`.
    output: Matrix<f32>,
}

impl<'a> LayerEvaluator<'a> {
    /// Computes the original outputs; `None` when no windows were kept (statistics from weights
    /// alone).
    pub fn new(statistics: &'a LayerStatistics, o: &'a Matrix<f32>) -> Option<Self> {
        let attention = &statistics.attention;
        let windows: Vec<Target<'a>> = statistics
            .samples
            .iter()
            .map(|sample| Target {
                sample,
                output: sample
                    .targets
                    .clone()
                    .unwrap_or_else(|| original_heads(attention, sample).times_transposed(o)),
            })
            .collect();
        let energy: f64 = windows.iter().map(|w| square_sum(w.output.data())).sum();
        (energy > 0.0).then_some(Self {
            attention,
            o,
            windows,
            energy,
        })
    }

    /// Relative squared error of the layer's output; uses the refitted `o_proj` where there is one.
    pub fn error(&self, factors: &LayerFactors) -> f64 {
        self.windows
            .iter()
            .map(|w| self.square_error(w, factors))
            .sum::<f64>()
            / self.energy
    }

    fn square_error(&self, window: &Target<'_>, factors: &LayerFactors) -> f64 {
        let refitted = factors.o.as_ref().map(Matrix::cast::<f32>);
        let o = refitted.as_ref().unwrap_or(self.o);
        let mut difference =
            converted_heads(self.attention, factors, window.sample).times_transposed(o);
        difference.add_scaled(&window.output, -1.0);
        if let Some(bias) = &factors.o_bias {
            for t in 0..difference.rows() {
                for (x, b) in difference.row_mut(t).iter_mut().zip(bias) {
                    *x += *b as f32;
                }
            }
        }
        square_sum(difference.data())
    }
}

fn square_sum(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

/// Head outputs of the original layer at the evaluated rows: `[rows, H*d]`.
pub fn original_heads(attention: &Attention, sample: &WindowSample) -> Matrix<f32> {
    let shape = attention.shape;
    let (tokens, d) = (sample.stacked.rows(), shape.head_dim);
    let table = RotationTable::new(&attention.rotary.inv_freq, tokens);
    let factor = (attention.scale * attention.rotary.attention_factor.powi(2)) as f32;
    let keys: Vec<Matrix<f32>> = (0..shape.kv_heads)
        .into_par_iter()
        .map(|g| {
            let mut rotated = Matrix::zeros(tokens, d);
            for s in 0..tokens {
                table.rotate(
                    &sample.stacked.row(s)[g * d..(g + 1) * d],
                    rotated.row_mut(s),
                    s,
                    1.0,
                );
            }
            rotated
        })
        .collect();
    let queries = |h: usize, block: &RowBlock| {
        let mut rotated = Matrix::zeros(block.rows.len(), d);
        for (i, row) in block.rows.clone().enumerate() {
            table.rotate(
                &sample.queries.row(row)[h * d..(h + 1) * d],
                rotated.row_mut(i),
                sample.positions[row],
                factor,
            );
        }
        rotated
    };
    attend(
        attention,
        sample,
        d,
        queries,
        |h| keys[shape.group_of(h)].view(),
        |h, p, first| {
            let start = shape.kv_width() + shape.group_of(h) * d;
            let values = sample.stacked.view().submatrix(first, start, p.cols(), d);
            let mut out = Matrix::zeros(p.rows(), d);
            gemm(out.view_mut(), false, p.view(), values, 1.0, Threads::One);
            out
        },
    )
}

/// Head outputs of the converted layer at the evaluated rows: `[rows, H*d]`.
pub fn converted_heads(
    attention: &Attention,
    factors: &LayerFactors,
    sample: &WindowSample,
) -> Matrix<f32> {
    let (shape, r, d_r) = (
        factors.shape,
        factors.ranks.kv_lora_rank,
        factors.ranks.qk_rope_head_dim,
    );
    let (tokens, d) = (sample.stacked.rows(), shape.head_dim);
    let table = RotationTable::new(&factors.inv_freq, tokens);
    let mut rows = sample.stacked.times_transposed(&factors.encoder.cast());
    let mut rotated = vec![0.0; d_r];
    for s in 0..tokens {
        let part = &mut rows.row_mut(s)[r..];
        table.rotate(part, &mut rotated, s, 1.0);
        part.copy_from_slice(&rotated);
    }
    let per_head: Vec<(Matrix<f32>, Matrix<f32>, Matrix<f32>)> = (0..shape.query_heads)
        .map(|h| {
            (
                factors.w_uk[h].cast(),
                factors.q_rope[h].cast(),
                factors.w_uv[h].cast(),
            )
        })
        .collect();
    let queries = |h: usize, block: &RowBlock| {
        let q = sample
            .queries
            .view()
            .submatrix(block.rows.start, h * d, block.rows.len(), d);
        let (w_uk, q_rope, _) = &per_head[h];
        let mut absorbed = Matrix::zeros(block.rows.len(), r + d_r);
        gemm(
            absorbed.view_mut().subcols_mut(0, r),
            false,
            q,
            w_uk.view(),
            attention.scale,
            Threads::One,
        );
        gemm(
            absorbed.view_mut().subcols_mut(r, d_r),
            false,
            q,
            q_rope.view().transpose(),
            attention.scale,
            Threads::One,
        );
        let mut turned = vec![0.0; d_r];
        for (i, row) in block.rows.clone().enumerate() {
            let part = &mut absorbed.row_mut(i)[r..];
            table.rotate(part, &mut turned, sample.positions[row], 1.0);
            part.copy_from_slice(&turned);
        }
        absorbed
    };
    attend(
        attention,
        sample,
        d,
        queries,
        |_| rows.view(),
        |h, p, first| {
            let mut context = Matrix::<f32>::zeros(p.rows(), r);
            gemm(
                context.view_mut(),
                false,
                p.view(),
                rows.view().submatrix(first, 0, p.cols(), r),
                1.0,
                Threads::One,
            );
            let mut out = Matrix::zeros(p.rows(), d);
            gemm(
                out.view_mut(),
                false,
                context.view(),
                per_head[h].2.view().transpose(),
                1.0,
                Threads::One,
            );
            out
        },
    )
}

/// Runs attention over blocks of rows of every head; `queries` gives the block's scaled queries,
/// `keys` all keys of the head, `output` maps probabilities of a block (whose first key is given)
/// to head outputs.
fn attend<'k>(
    attention: &Attention,
    sample: &WindowSample,
    d: usize,
    queries: impl Fn(usize, &RowBlock) -> Matrix<f32> + Sync,
    keys: impl Fn(usize) -> MatRef<'k, f32> + Sync,
    output: impl Fn(usize, &Matrix<f32>, usize) -> Matrix<f32> + Sync,
) -> Matrix<f32> {
    let blocks = row_blocks(&sample.positions, attention);
    let heads = attention.shape.query_heads;
    let tasks: Vec<(usize, &RowBlock)> = (0..heads)
        .flat_map(|h| blocks.iter().map(move |b| (h, b)))
        .collect();
    let parts: Vec<Matrix<f32>> = tasks
        .par_iter()
        .map(|&(h, block)| {
            let keys = keys(h).subrows(block.keys.start, block.keys.len());
            let p = block_probabilities(
                attention,
                h,
                &sample.positions,
                block,
                queries(h, block).view(),
                keys,
            );
            output(h, &p, block.keys.start)
        })
        .collect();
    let mut result = Matrix::zeros(sample.positions.len(), heads * d);
    for ((h, block), part) in tasks.into_iter().zip(parts) {
        for (i, row) in block.rows.clone().enumerate() {
            result.row_mut(row)[h * d..(h + 1) * d].copy_from_slice(part.row(i));
        }
    }
    result
}

/// The error of `factors` on the samples of `statistics`, against the layer with output
/// projection `o`; `None` without samples.
pub fn layer_error(
    statistics: &LayerStatistics,
    o: &Matrix<f32>,
    factors: &LayerFactors,
) -> Result<Option<f64>, Error> {
    statistics.check()?;
    Ok(LayerEvaluator::new(statistics, o).map(|e| e.error(factors)))
}

//! Naive f64 references of GQA and MLA attention, and random layers.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test file uses its own part"
)]

use mlac_converter::{
    Attention, AttentionShape, LayerStatistics, LayerWeights, Matrix, MlaTensors, Projection,
    Rotary, StatisticsOptions, WindowActivations,
};
use mlac_model::MlaEncoder;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// `[tokens][width]`.
pub type Rows = Vec<Vec<f64>>;

pub const NORM_EPS: f64 = 1e-6;

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub heads: usize,
    pub groups: usize,
    pub head_dim: usize,
    pub hidden: usize,
    pub bias: bool,
    pub qk_norm: bool,
    pub attention_factor: f64,
    pub window: Option<usize>,
    pub sinks: bool,
    pub encoder: MlaEncoder,
}

impl Case {
    pub const fn plain(heads: usize, groups: usize, head_dim: usize, hidden: usize) -> Self {
        Self {
            heads,
            groups,
            head_dim,
            hidden,
            bias: false,
            qk_norm: false,
            attention_factor: 1.0,
            window: None,
            sinks: false,
            encoder: MlaEncoder::Hidden,
        }
    }
}

pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Roughly normal: the sum of four uniform numbers.
pub fn normal(rng: &mut StdRng) -> f64 {
    (0..4).map(|_| rng.random_range(-1.0..1.0)).sum::<f64>() * 0.866
}

pub fn random_matrix(rng: &mut StdRng, rows: usize, cols: usize, size: f64) -> Matrix<f32> {
    Matrix::from_fn(rows, cols, |_, _| (normal(rng) * size) as f32)
}

pub fn random_vector(rng: &mut StdRng, n: usize, size: f64) -> Vec<f32> {
    (0..n).map(|_| (normal(rng) * size) as f32).collect()
}

pub fn random_rows(rng: &mut StdRng, rows: usize, cols: usize) -> Rows {
    (0..rows)
        .map(|_| (0..cols).map(|_| normal(rng)).collect())
        .collect()
}

pub fn random_layer(case: Case, seed: u64) -> LayerWeights {
    let rng = &mut rng(seed);
    let Case {
        heads,
        groups,
        head_dim: d,
        hidden,
        ..
    } = case;
    let size = (hidden as f64).powf(-0.5);
    let mut projection = |out: usize, input: usize, size: f64, bias: bool| Projection {
        weight: random_matrix(rng, out, input, size),
        bias: bias.then(|| random_vector(rng, out, 0.7)),
    };
    let q = projection(heads * d, hidden, 1.5 * size, case.bias);
    let k = projection(groups * d, hidden, 1.5 * size, case.bias);
    let v = projection(groups * d, hidden, size, case.bias);
    let o = projection(
        hidden,
        heads * d,
        ((heads * d) as f64).powf(-0.5),
        case.bias,
    );
    let mut norm =
        |on: bool, n: usize| on.then(|| (0..n).map(|_| 1.0 + 0.3 * normal(rng) as f32).collect());
    LayerWeights {
        layer: 3,
        attention: Attention {
            shape: AttentionShape {
                hidden,
                query_heads: heads,
                kv_heads: groups,
                head_dim: d,
            },
            rotary: Rotary {
                inv_freq: (0..d / 2)
                    .map(|l| 10_000f64.powf(-2.0 * l as f64 / d as f64) as f32)
                    .collect(),
                attention_factor: case.attention_factor,
            },
            scale: (d as f64).powf(-0.5),
            sliding_window: case.window,
            // Large ones of both signs: some heads give most of their probability away.
            sinks: case
                .sinks
                .then(|| (0..heads).map(|h| 4.0 - 2.5 * h as f32).collect()),
        },
        encoder: if case.qk_norm {
            MlaEncoder::NormedKey
        } else {
            case.encoder
        },
        q,
        k,
        v,
        o,
        input_norm: None,
        q_norm: norm(case.qk_norm, d),
        k_norm: norm(case.qk_norm, d),
    }
}

pub fn linear(projection: &Projection, x: &[f64]) -> Vec<f64> {
    (0..projection.weight.rows())
        .map(|i| {
            let product: f64 = projection
                .weight
                .row(i)
                .iter()
                .zip(x)
                .map(|(w, x)| f64::from(*w) * x)
                .sum();
            product + projection.bias.as_ref().map_or(0.0, |b| f64::from(b[i]))
        })
        .collect()
}

pub fn apply(matrix: &Matrix<f32>, x: &[f64]) -> Vec<f64> {
    linear(
        &Projection {
            weight: matrix.clone(),
            bias: None,
        },
        x,
    )
}

fn head_norm(x: &mut [f64], weight: Option<&Vec<f32>>) {
    let Some(weight) = weight else { return };
    for head in x.chunks_mut(weight.len()) {
        let scale = (head.iter().map(|x| x * x).sum::<f64>() / head.len() as f64 + NORM_EPS)
            .sqrt()
            .recip();
        for (x, w) in head.iter_mut().zip(weight) {
            *x *= scale * f64::from(*w);
        }
    }
}

pub fn rotate(x: &[f64], inv_freq: &[f32], position: usize, factor: f64) -> Vec<f64> {
    let half = inv_freq.len();
    let mut y = vec![0.0; 2 * half];
    for l in 0..half {
        let (sin, cos) = (position as f64 * f64::from(inv_freq[l])).sin_cos();
        y[l] = (x[l] * cos - x[l + half] * sin) * factor;
        y[l + half] = (x[l + half] * cos + x[l] * sin) * factor;
    }
    y
}

pub fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(a, b)| a * b).sum()
}

/// Queries, keys and values before rotation, `[tokens][heads * d]`.
pub struct Qkv {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
}

pub fn qkv(weights: &LayerWeights, x: &Rows) -> Qkv {
    let mut q: Rows = x.iter().map(|x| linear(&weights.q, x)).collect();
    let mut k: Rows = x.iter().map(|x| linear(&weights.k, x)).collect();
    for q in &mut q {
        head_norm(q, weights.q_norm.as_ref());
    }
    for k in &mut k {
        head_norm(k, weights.k_norm.as_ref());
    }
    Qkv {
        q,
        k,
        v: x.iter().map(|x| linear(&weights.v, x)).collect(),
    }
}

pub struct Attended {
    /// `[H][t][s]`, scaled, before the softmax; only visible keys.
    pub scores: Vec<Rows>,
    /// `[tokens][D]`.
    pub output: Rows,
}

fn attend(
    attention: &Attention,
    tokens: usize,
    score: impl Fn(usize, usize, usize) -> f64,
    value: impl Fn(usize, usize) -> Vec<f64>,
    o: &Projection,
) -> Attended {
    let heads = attention.shape.query_heads;
    let mut scores = vec![Vec::new(); heads];
    let mut output = Vec::new();
    for t in 0..tokens {
        let first = attention.first_visible(t);
        let mut concat = Vec::new();
        for (h, scores) in scores.iter_mut().enumerate() {
            let row: Vec<f64> = (first..=t).map(|s| score(h, t, s)).collect();
            let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sink = attention
                .sink(h)
                .map_or(0.0, |sink| (f64::from(sink) - most).exp());
            let total = sink + row.iter().map(|x| (x - most).exp()).sum::<f64>();
            let mut out = vec![0.0; attention.shape.head_dim];
            for (i, x) in row.iter().enumerate() {
                let p = (x - most).exp() / total;
                for (o, v) in out.iter_mut().zip(value(h, first + i)) {
                    *o += p * v;
                }
            }
            concat.extend(out);
            scores.push(row);
        }
        output.push(linear(o, &concat));
    }
    Attended { scores, output }
}

/// GQA attention with RoPE, as `transformers` has it.
pub fn gqa(weights: &LayerWeights, x: &Rows) -> Attended {
    let attention = &weights.attention;
    let (shape, d) = (attention.shape, attention.shape.head_dim);
    let Qkv { q, k, v } = qkv(weights, x);
    let turn = |x: &[f64], s: usize| {
        rotate(
            x,
            &attention.rotary.inv_freq,
            s,
            attention.rotary.attention_factor,
        )
    };
    let turned = |rows: &Rows, heads: usize| -> Vec<Rows> {
        rows.iter()
            .enumerate()
            .map(|(s, x)| {
                (0..heads)
                    .map(|h| turn(&x[h * d..(h + 1) * d], s))
                    .collect()
            })
            .collect()
    };
    let (q, k) = (turned(&q, shape.query_heads), turned(&k, shape.kv_heads));
    attend(
        attention,
        x.len(),
        |h, t, s| attention.scale * dot(&q[t][h], &k[s][shape.group_of(h)]),
        |h, s| v[s][shape.group_of(h) * d..(shape.group_of(h) + 1) * d].to_vec(),
        &weights.o,
    )
}

/// MLA attention from the tensors of a checkpoint.
pub fn mla(attention: &Attention, tensors: &MlaTensors, x: &Rows) -> Attended {
    let (shape, d) = (attention.shape, attention.shape.head_dim);
    let (r, d_r) = (tensors.form.kv_lora_rank, tensors.form.qk_rope_head_dim);
    let inv_freq = &tensors.rotary_inv_freq;
    let mut rows = Rows::new();
    // [t][h] = (q_nope, rotated q_rope)
    let mut queries: Vec<Vec<(Vec<f64>, Vec<f64>)>> = Vec::new();
    for (s, x) in x.iter().enumerate() {
        let mut q = linear(&tensors.q_proj, x);
        let input = match (&tensors.k_proj, &tensors.v_proj) {
            (Some(k), Some(v)) => {
                let mut k = linear(k, x);
                head_norm(&mut k, tensors.k_norm.as_ref());
                head_norm(&mut q, tensors.q_norm.as_ref());
                [k, linear(v, x)].concat()
            }
            _ => x.clone(),
        };
        let mut row = linear(&tensors.kv_a_proj_with_mqa, &input);
        let turned = rotate(&row[r..], inv_freq, s, 1.0);
        row[r..].copy_from_slice(&turned);
        rows.push(row);
        let parts = (0..shape.query_heads).map(|h| {
            if let Some(rope) = &tensors.q_rope_proj {
                let q = q[h * d..(h + 1) * d].to_vec();
                let rope = apply(&rope.row_range(h * d_r, (h + 1) * d_r), &q);
                (q, rotate(&rope, inv_freq, s, 1.0))
            } else {
                let q = &q[h * (d + d_r)..(h + 1) * (d + d_r)];
                (q[..d].to_vec(), rotate(&q[d..], inv_freq, s, 1.0))
            }
        });
        queries.push(parts.collect());
    }
    let decoded: Vec<Vec<f64>> = rows
        .iter()
        .map(|row| apply(&tensors.kv_b_proj, &row[..r]))
        .collect();
    attend(
        attention,
        x.len(),
        |h, t, s| {
            let key = &decoded[s][h * 2 * d..h * 2 * d + d];
            attention.scale * (dot(&queries[t][h].0, key) + dot(&queries[t][h].1, &rows[s][r..]))
        },
        |h, s| decoded[s][h * 2 * d + d..(h + 1) * 2 * d].to_vec(),
        &tensors.o_proj,
    )
}

/// Largest difference over the root mean square of `expected`.
pub fn relative(found: &[Rows], expected: &[Rows]) -> f64 {
    let flat = |x: &[Rows]| x.iter().flatten().flatten().copied().collect::<Vec<f64>>();
    let (found, expected) = (flat(found), flat(expected));
    assert_eq!(found.len(), expected.len());
    let rms = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
    found
        .iter()
        .zip(&expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max)
        / rms
}

pub fn narrow(rows: &Rows) -> Vec<f32> {
    rows.iter().flatten().map(|&x| x as f32).collect()
}

/// Statistics of the layer over windows of hidden states.
pub fn gather(
    weights: &LayerWeights,
    windows: &[Rows],
    options: StatisticsOptions,
) -> LayerStatistics {
    let mut statistics = LayerStatistics::new(
        weights.layer,
        &weights.attention,
        &weights.o.weight,
        options,
    )
    .expect("valid layer");
    for x in windows {
        let Qkv { q, k, v } = qkv(weights, x);
        let (q, k, v) = (narrow(&q), narrow(&k), narrow(&v));
        statistics
            .accumulate(&WindowActivations {
                tokens: x.len(),
                q: &q,
                k: &k,
                v: &v,
            })
            .expect("finite window");
    }
    statistics
}

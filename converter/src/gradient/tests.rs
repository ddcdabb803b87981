use mlac_model::MlaEncoder;

use super::*;
use crate::layer::{Attention, AttentionShape, LayerWeights, Projection, Rotary};
use crate::linalg::Matrix;

const EPSILON: f64 = 1e-5;

/// A number in [-1, 1) by a counter.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = crate::statistics::split_mix(self.0);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    fn vector(&mut self, n: usize, size: f64) -> Vec<f32> {
        (0..n).map(|_| (size * self.next()) as f32).collect()
    }

    fn matrix(&mut self, rows: usize, cols: usize, size: f64) -> Matrix<f32> {
        Matrix::from_vec(rows, cols, self.vector(rows * cols, size))
    }

    fn projection(&mut self, out: usize, width: usize, bias: bool) -> Projection {
        Projection {
            weight: self.matrix(out, width, (width as f64).powf(-0.5) * 1.5),
            bias: bias.then(|| self.vector(out, 0.5)),
        }
    }

    fn norm(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (1.0 + 0.3 * self.next()) as f32).collect()
    }
}

/// The MLP of a random layer.
enum Block {
    Gated(GatedMlp),
    /// Router and experts.
    Mixture(Projection, Vec<Expert>),
}

const PER_TOKEN: usize = 2;
const LIMIT: f64 = 1.5;
const ALPHA: f64 = 1.702;

impl Block {
    fn backward(&self, layer: &DecoderLayer, of: [&Matrix<f32>; 3]) -> LayerGradients {
        let [hidden, attended, gradient] = of;
        match self {
            Self::Gated(mlp) => layer.backward(hidden, attended, mlp, gradient),
            Self::Mixture(router, experts) => {
                let experts = Experts {
                    router: router.clone(),
                    experts_per_token: PER_TOKEN,
                    limit: LIMIT as f32,
                    alpha: ALPHA as f32,
                    load: |e: usize| Ok(experts[e].clone()),
                };
                layer.backward(hidden, attended, &experts, gradient)
            }
        }
        .unwrap()
    }

    fn naive(&self, x: &[f64]) -> Vec<f64> {
        match self {
            Self::Gated(mlp) => {
                let gate = naive_linear(x, &mlp.gate);
                let up = naive_linear(x, &mlp.up);
                let inner: Vec<f64> = gate
                    .iter()
                    .zip(&up)
                    .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                    .collect();
                naive_linear(&inner, &mlp.down)
            }
            Self::Mixture(router, experts) => {
                let logits = naive_linear(x, router);
                let mut order: Vec<usize> = (0..logits.len()).collect();
                order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
                order.truncate(PER_TOKEN);
                let total: f64 = order.iter().map(|&e| logits[e].exp()).sum();
                let mut out = vec![0.0; x.len()];
                for e in order {
                    let both = naive_linear(x, &experts[e].gate_up);
                    let inner: Vec<f64> = both
                        .chunks(2)
                        .map(|pair| {
                            let gate = pair[0].min(LIMIT);
                            let up = pair[1].clamp(-LIMIT, LIMIT);
                            (up + 1.0) * gate / (1.0 + (-ALPHA * gate).exp())
                        })
                        .collect();
                    for (sum, y) in out.iter_mut().zip(naive_linear(&inner, &experts[e].down)) {
                        *sum += logits[e].exp() / total * y;
                    }
                }
                out
            }
        }
    }
}

/// What a random layer has.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a part of some layers"
)]
#[derive(Clone, Copy, Default)]
struct Kind {
    bias: bool,
    head_norm: bool,
    window: Option<usize>,
    sinks: bool,
    experts: bool,
}

fn layer(seed: u64, kind: Kind) -> (DecoderLayer, Block) {
    let Kind {
        bias,
        head_norm,
        window,
        sinks,
        experts,
    } = kind;
    let mut random = Random(seed);
    let shape = AttentionShape {
        hidden: 12,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 6,
    };
    let (hidden, inner, d) = (shape.hidden, 20, shape.head_dim);
    let attention = Attention {
        shape,
        rotary: Rotary {
            inv_freq: vec![1.0, 0.2, 0.03],
            attention_factor: 1.1,
        },
        scale: 0.9,
        sliding_window: window,
        sinks: sinks.then(|| random.vector(shape.query_heads, 2.0)),
    };
    let layer = DecoderLayer {
        attention: LayerWeights {
            layer: 0,
            attention,
            encoder: if head_norm {
                MlaEncoder::NormedKey
            } else {
                MlaEncoder::Hidden
            },
            q: random.projection(shape.query_width(), hidden, bias),
            k: random.projection(shape.kv_width(), hidden, bias),
            v: random.projection(shape.kv_width(), hidden, bias),
            o: random.projection(hidden, shape.query_width(), bias),
            input_norm: Some(random.norm(hidden)),
            q_norm: head_norm.then(|| random.norm(d)),
            k_norm: head_norm.then(|| random.norm(d)),
        },
        post_norm: random.norm(hidden),
        epsilon: EPSILON as f32,
    };
    let block = if experts {
        let all = (0..5).map(|_| Expert {
            gate_up: random.projection(2 * inner, hidden, true),
            down: random.projection(hidden, inner, true),
        });
        let all = all.collect();
        Block::Mixture(random.projection(5, hidden, true), all)
    } else {
        Block::Gated(GatedMlp {
            gate: random.projection(inner, hidden, bias),
            up: random.projection(inner, hidden, bias),
            down: random.projection(hidden, inner, bias),
        })
    };
    (layer, block)
}

/// Rows of f64 numbers.
type Rows = Vec<Vec<f64>>;

fn rows(x: &Matrix<f32>) -> Rows {
    (0..x.rows())
        .map(|t| x.row(t).iter().map(|&x| f64::from(x)).collect())
        .collect()
}

fn naive_linear(x: &[f64], p: &Projection) -> Vec<f64> {
    (0..p.weight.rows())
        .map(|i| {
            let bias = p.bias.as_ref().map_or(0.0, |b| f64::from(b[i]));
            let row = p.weight.row(i).iter().zip(x);
            bias + row.map(|(w, x)| f64::from(*w) * x).sum::<f64>()
        })
        .collect()
}

fn naive_norm(x: &[f64], weight: &[f32]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = (mean + EPSILON).sqrt().recip();
    x.iter()
        .zip(weight)
        .map(|(x, w)| x * scale * f64::from(*w))
        .collect()
}

fn naive_rotate(x: &[f64], inv_freq: &[f32], position: usize) -> Vec<f64> {
    let half = inv_freq.len();
    let mut out = vec![0.0; 2 * half];
    for l in 0..half {
        let (sin, cos) = (position as f64 * f64::from(inv_freq[l])).sin_cos();
        out[l] = x[l] * cos - x[l + half] * sin;
        out[l + half] = x[l + half] * cos + x[l] * sin;
    }
    out
}

/// What attention adds to `hidden` when `shift` is added to the stacked vectors.
fn naive_attended(layer: &DecoderLayer, hidden: &Rows, shift: &Rows) -> Rows {
    let weights = &layer.attention;
    let attention = &weights.attention;
    let AttentionShape {
        query_heads,
        kv_heads,
        head_dim: d,
        ..
    } = attention.shape;
    let by_head = |x: Vec<f64>, norm: &Option<Vec<f32>>| -> Rows {
        x.chunks(d)
            .map(|h| norm.as_ref().map_or(h.to_vec(), |w| naive_norm(h, w)))
            .collect()
    };
    let (mut queries, mut keys, mut values) = (vec![], vec![], vec![]);
    for (t, x) in hidden.iter().enumerate() {
        let x = naive_norm(x, weights.input_norm.as_ref().unwrap());
        queries.push(by_head(naive_linear(&x, &weights.q), &weights.q_norm));
        let mut k = by_head(naive_linear(&x, &weights.k), &weights.k_norm);
        let mut v = by_head(naive_linear(&x, &weights.v), &None);
        for g in 0..kv_heads {
            for i in 0..d {
                k[g][i] += shift[t][g * d + i];
                v[g][i] += shift[t][(kv_heads + g) * d + i];
            }
        }
        keys.push(k);
        values.push(v);
    }
    let factor = attention.scale * attention.rotary.attention_factor.powi(2);
    let table = &attention.rotary.inv_freq;
    (0..hidden.len())
        .map(|t| {
            let mut heads = vec![];
            for (h, query) in queries[t].iter().enumerate() {
                let g = h / (query_heads / kv_heads);
                let q = naive_rotate(query, table, t);
                let seen = attention.first_visible(t)..t + 1;
                let weights: Vec<f64> = seen
                    .clone()
                    .map(|s| {
                        let k = naive_rotate(&keys[s][g], table, s);
                        (factor * q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>()).exp()
                    })
                    .collect();
                let sink = attention.sink(h).map_or(0.0, |s| f64::from(s).exp());
                let total = weights.iter().sum::<f64>() + sink;
                let mut out = vec![0.0; d];
                for (s, w) in seen.zip(&weights) {
                    for (o, v) in out.iter_mut().zip(&values[s][g]) {
                        *o += w / total * v;
                    }
                }
                heads.extend(out);
            }
            naive_linear(&heads, &weights.o)
        })
        .collect()
}

fn naive_layer(layer: &DecoderLayer, block: &Block, hidden: &Rows, shift: &Rows) -> Rows {
    let attended = naive_attended(layer, hidden, shift);
    hidden
        .iter()
        .zip(&attended)
        .map(|(x, a)| {
            let after: Vec<f64> = x.iter().zip(a).map(|(x, a)| x + a).collect();
            let normed = naive_norm(&after, &layer.post_norm);
            let down = block.naive(&normed);
            after.iter().zip(&down).map(|(x, y)| x + y).collect()
        })
        .collect()
}

fn inner(a: &Rows, b: &Rows) -> f64 {
    a.iter()
        .flatten()
        .zip(b.iter().flatten())
        .map(|(x, y)| x * y)
        .sum()
}

/// Every derivative of `sum gradient o layer(hidden)` against central differences in f64.
#[test]
fn derivatives_are_those_of_the_layer() {
    let plain = Kind::default();
    for (seed, kind) in [
        (1, plain),
        (
            2,
            Kind {
                bias: true,
                window: Some(3),
                ..plain
            },
        ),
        (
            3,
            Kind {
                head_norm: true,
                ..plain
            },
        ),
        (
            4,
            Kind {
                bias: true,
                sinks: true,
                experts: true,
                ..plain
            },
        ),
        (
            5,
            Kind {
                experts: true,
                window: Some(4),
                ..plain
            },
        ),
    ] {
        let (layer, block) = layer(seed, kind);
        let mut random = Random(100 + seed);
        let tokens = 7;
        let hidden = random.matrix(tokens, 12, 2.0);
        let gradient = random.matrix(tokens, 12, 1.0);
        let zero = vec![vec![0.0; 24]; tokens];
        let attended = naive_attended(&layer, &rows(&hidden), &zero);
        let attended = Matrix::from_fn(tokens, 12, |t, i| attended[t][i] as f32);
        let found = block.backward(&layer, [&hidden, &attended, &gradient]);

        let (x, g) = (rows(&hidden), rows(&gradient));
        let derivative = |of: &dyn Fn(f64) -> Rows| {
            let step = 1e-5;
            (inner(&of(step), &g) - inner(&of(-step), &g)) / (2.0 * step)
        };
        let mut largest: f64 = 0.0;
        for t in 0..tokens {
            for i in 0..24 {
                let expected = derivative(&|step| {
                    let mut shift = zero.clone();
                    shift[t][i] = step;
                    naive_layer(&layer, &block, &x, &shift)
                });
                largest = largest.max(expected.abs());
                near(
                    f64::from(found.stacked_gradient[(t, i)]),
                    expected,
                    "stacked",
                    (seed, t, i),
                );
            }
            for i in 0..12 {
                let expected = derivative(&|step| {
                    let mut x = x.clone();
                    x[t][i] += step;
                    naive_layer(&layer, &block, &x, &zero)
                });
                near(
                    f64::from(found.input[(t, i)]),
                    expected,
                    "input",
                    (seed, t, i),
                );
            }
        }
        assert!(
            largest > 0.1,
            "derivatives of {largest} at most show nothing"
        );
    }
}

fn near(found: f64, expected: f64, what: &str, at: (u64, usize, usize)) {
    assert!(
        (found - expected).abs() < 2e-5 * (1.0 + expected.abs()),
        "{what} {at:?}: {found}, expected {expected}"
    );
}

/// The gradient at the head is that of the drawn labels' log likelihood, for some label of every token.
#[test]
fn the_heads_gradient_belongs_to_a_label() {
    let (tokens, width, vocab) = (300, 6, 5);
    let mut random = Random(9);
    let hidden = random.matrix(tokens, width, 1.0);
    let table = random.matrix(vocab, width, 2.0);
    let norm = random.norm(width);
    let found = head_gradient(&hidden, &norm, EPSILON as f32, &table, 3).unwrap();
    let head = Projection {
        weight: table.clone(),
        bias: None,
    };
    let likelihood = |x: &[f64], label: usize| -> f64 {
        let logits = naive_linear(&naive_norm(x, &norm), &head);
        logits.iter().map(|l| l.exp()).sum::<f64>().ln() - logits[label]
    };
    let (mut drawn, mut predicted) = (vec![0.0; vocab], vec![0.0; vocab]);
    for (t, x) in rows(&hidden).iter().enumerate() {
        let fits = |label: usize| {
            (0..width).all(|i| {
                let at = |step: f64| {
                    let mut x = x.clone();
                    x[i] += step;
                    likelihood(&x, label)
                };
                let expected = (at(1e-5) - at(-1e-5)) / 2e-5;
                (f64::from(found[(t, i)]) - expected).abs() < 2e-5 * (1.0 + expected.abs())
            })
        };
        let labels: Vec<usize> = (0..vocab).filter(|&label| fits(label)).collect();
        assert_eq!(labels.len(), 1, "token {t}: {labels:?}");
        drawn[labels[0]] += 1.0;
        for (label, p) in predicted.iter_mut().enumerate() {
            *p += (-likelihood(x, label)).exp();
        }
    }
    // Labels come as often as predicted, within four standard deviations.
    for (count, expected) in drawn.iter().zip(&predicted) {
        assert!(
            (count - expected).abs() < 4.0 * f64::sqrt(*expected) + 1.0,
            "{drawn:?} of {predicted:?}"
        );
    }
}

#[test]
fn what_is_not_finite_is_refused() {
    let mut random = Random(5);
    let good = random.matrix(4, 6, 1.0);
    let mut bad = good.clone();
    bad.row_mut(2)[1] = f32::NAN;
    let table = random.matrix(5, 6, 1.0);
    let norm = random.norm(6);
    let refused = head_gradient(&bad, &norm, 1e-5, &table, 0).unwrap_err();
    assert!(refused.to_string().contains("logits"), "{refused}");
    let mut tokens = TokenGradients::default();
    tokens.push(good.clone(), good.clone()).unwrap();
    let refused = tokens.push(good.clone(), bad).unwrap_err();
    assert!(refused.to_string().contains("gradients"), "{refused}");
    assert!(tokens.push(good, random.matrix(4, 5, 1.0)).is_err());
}

/// Normally distributed numbers, near enough.
fn normal(random: &mut Random) -> f64 {
    (0..12).map(|_| random.next()).sum::<f64>() / 2.0
}

/// The metric of gradients that have one is found again, whatever the tokens weigh. Loud tokens that share one
/// stacked vector count as the one direction they are.
#[test]
fn the_metric_is_that_of_the_gradients() {
    let (tokens, n) = (4000, 16);
    let scale = |i: usize| if i < 3 { 3.0 } else { 0.5 };
    let mut random = Random(6);
    let mut measure = |loud: usize| {
        let mut stacked = Matrix::<f32>::zeros(tokens, n);
        let mut gradients = Matrix::<f32>::zeros(tokens, n);
        for t in 0..tokens {
            let size = (0.3 * normal(&mut random)).exp();
            for i in 0..n {
                let (s, g) = if t < loud {
                    (5.0, 100.0 * normal(&mut random))
                } else {
                    (normal(&mut random), scale(i) * normal(&mut random))
                };
                stacked.row_mut(t)[i] = (size * s) as f32;
                gradients.row_mut(t)[i] = (g / size) as f32;
            }
        }
        let mut both = TokenGradients::default();
        both.push(stacked, gradients).unwrap();
        both.metric().unwrap()
    };
    let total: f64 = (0..n).map(|i| scale(i) * scale(i)).sum();
    for (loud, allowed) in [(0, 0.03), (20, 0.1)] {
        let found = measure(loud);
        for i in 0..n {
            for j in 0..n {
                let expected = if i == j {
                    scale(i).powi(2) / total
                } else {
                    0.0
                };
                let error = (found[(i, j)] - expected).abs();
                assert!(
                    error < allowed,
                    "{loud} loud tokens: {i} {j} {}",
                    found[(i, j)]
                );
            }
        }
    }
    let silent = Matrix::<f32>::zeros(8, n);
    let mut none = TokenGradients::default();
    none.push(random.matrix(8, n, 1.0), silent).unwrap();
    assert!(none.metric().unwrap().trace() < f64::MIN_POSITIVE);
}

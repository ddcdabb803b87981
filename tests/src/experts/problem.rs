//! Inputs of one call, the specification in f64, and the comparison with it.

use mlac_kernels::problem::Random;

use crate::Outcome;

/// The four-bit codes (E2M1) in the specification's order.
const FP4: [f64; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// What a problem is like; [`Problem::new`] fills in the numbers.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Leading axes.
    pub tokens: Vec<usize>,
    /// K.
    pub chosen: usize,
    /// E.
    pub experts: usize,
    /// D.
    pub hidden: usize,
    /// I.
    pub inner: usize,
    /// Limit of gate and up.
    pub limit: f32,
    /// Of the numbers.
    pub seed: u64,
}

impl Default for Spec {
    /// Three tokens that choose two of five experts.
    fn default() -> Self {
        Self {
            tokens: vec![3],
            chosen: 2,
            experts: 5,
            hidden: 64,
            inner: 96,
            limit: 7.0,
            seed: 1,
        }
    }
}

/// One projection of all experts `[E, out, in]`.
#[derive(Debug, Clone)]
pub struct Projection {
    /// `out` and `in`.
    pub shape: [usize; 2],
    /// `[E, out, in / 32, 16]`.
    pub blocks: Vec<u8>,
    /// `[E, out, in / 32]`.
    pub scales: Vec<u8>,
    /// `[E, out]`.
    pub bias: Vec<f32>,
}

/// One call with all of its inputs.
#[derive(Debug, Clone)]
pub struct Problem {
    /// What it is like.
    pub spec: Spec,
    /// Steepness of the gate.
    pub alpha: f32,
    /// `[tokens.., D]`.
    pub hidden: Vec<f32>,
    /// `[tokens.., K]`.
    pub experts: Vec<i64>,
    /// `[tokens.., K]`.
    pub weights: Vec<f32>,
    /// `[E, 2 I, D]`.
    pub gate_up: Projection,
    /// `[E, D, I]`.
    pub down: Projection,
}

/// What a problem must give, and how large the terms of each number's sum are.
struct Expected {
    out: Vec<f64>,
    size: Vec<f64>,
}

impl Projection {
    /// Random bytes with scales that keep sums of `input` terms near 1.
    fn new(experts: usize, out: usize, input: usize, random: &mut Random) -> Self {
        let blocks = experts * out * input / 32;
        let middle = 124 - (input as f64).log2().round() as u64 / 2;
        Self {
            shape: [out, input],
            blocks: (0..blocks * 16).map(|_| random.bits() as u8).collect(),
            scales: (0..blocks)
                .map(|_| (middle + random.below(4)) as u8)
                .collect(),
            bias: (0..experts * out).map(|_| random.eighth()).collect(),
        }
    }

    /// Row `row` of expert `expert`, decoded by the formula.
    fn row(&self, expert: usize, row: usize) -> Vec<f64> {
        let [out, input] = self.shape;
        let first = (expert * out + row) * input;
        (first..first + input)
            .map(|at| {
                let byte = self.blocks[at / 2];
                let code = if at % 2 == 0 { byte & 15 } else { byte >> 4 };
                let scale = self.scales[at / 32];
                if scale == 255 {
                    return f64::NAN;
                }
                FP4[usize::from(code)] * (f64::from(scale) - 127.0).exp2()
            })
            .collect()
    }

    /// The product with `x` and the bias, and the same of absolute values.
    fn times(&self, expert: usize, x: &[(f64, f64)]) -> Vec<(f64, f64)> {
        let [out, _] = self.shape;
        (0..out)
            .map(|row| {
                let bias = f64::from(self.bias[expert * out + row]);
                let start = (bias, bias.abs());
                let weights = self.row(expert, row);
                weights.iter().zip(x).fold(start, |(sum, size), (w, x)| {
                    (sum + w * x.0, size + w.abs() * x.1)
                })
            })
            .collect()
    }
}

impl Problem {
    /// Random numbers for a spec.
    pub fn new(spec: Spec) -> Self {
        let mut random = Random::new(spec.seed);
        let tokens: usize = spec.tokens.iter().product();
        let choices = tokens * spec.chosen;
        let mut experts: Vec<i64> = Vec::with_capacity(choices);
        for _ in 0..tokens {
            // Distinct where there are enough, as a router chooses.
            let mut of_token: Vec<i64> = Vec::new();
            while of_token.len() < spec.chosen {
                let expert = random.below(spec.experts as u64) as i64;
                if spec.chosen > spec.experts || !of_token.contains(&expert) {
                    of_token.push(expert);
                }
            }
            experts.extend(of_token);
        }
        Self {
            alpha: 1.702,
            hidden: (0..tokens * spec.hidden).map(|_| random.eighth()).collect(),
            experts,
            weights: (0..choices).map(|_| random.eighth()).collect(),
            gate_up: Projection::new(spec.experts, 2 * spec.inner, spec.hidden, &mut random),
            down: Projection::new(spec.experts, spec.hidden, spec.inner, &mut random),
            spec,
        }
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.spec.tokens.iter().product()
    }

    /// `[tokens.., last]`.
    pub fn with(&self, last: usize) -> Vec<usize> {
        let mut shape = self.spec.tokens.clone();
        shape.push(last);
        shape
    }

    /// A name for messages.
    pub fn name(&self) -> String {
        format!("{:?}", self.spec)
    }

    /// The activation of a choice, and a bound of what its terms' sizes come to.
    fn gated(&self, both: &[(f64, f64)]) -> Vec<(f64, f64)> {
        let (limit, alpha) = (f64::from(self.spec.limit), f64::from(self.alpha));
        // Comparisons let NaN through.
        let below = |x: f64| if x > limit { limit } else { x };
        let above = |x: f64| if x < -limit { -limit } else { x };
        both.chunks_exact(2)
            .map(|pair| {
                let (gate, up) = (below(pair[0].0), above(below(pair[1].0)));
                let silu = gate / (1.0 + (-alpha * gate).exp());
                let value = (up + 1.0) * silu;
                // How an error of gate and up moves the value: the slope of the gate's part is below 1.1.
                let size = 1.1 * (up.abs() + 1.0) * pair[0].1 + silu.abs() * pair[1].1;
                (value, value.abs().max(size))
            })
            .collect()
    }

    fn expected(&self) -> Expected {
        let hidden = self.spec.hidden;
        let count = self.tokens() * hidden;
        let mut expected = Expected {
            out: vec![0.0; count],
            size: vec![0.0; count],
        };
        for (choice, &expert) in self.experts.iter().enumerate() {
            let token = choice / self.spec.chosen;
            let x: Vec<(f64, f64)> = self.hidden[token * hidden..(token + 1) * hidden]
                .iter()
                .map(|&x| (f64::from(x), f64::from(x).abs()))
                .collect();
            let inner = self.gated(&self.gate_up.times(expert as usize, &x));
            let weight = f64::from(self.weights[choice]);
            let out = self.down.times(expert as usize, &inner);
            for (i, (value, size)) in out.into_iter().enumerate() {
                expected.out[token * hidden + i] += weight * value;
                expected.size[token * hidden + i] += weight.abs() * size;
            }
        }
        expected
    }

    /// What the specification says.
    pub fn reference(&self) -> Vec<f64> {
        self.expected().out
    }

    /// Refuses outputs that are off by more than f32 sums of such terms are: a few roundings of the terms' sizes.
    pub fn require(&self, found: &[f32]) -> Outcome {
        let Expected { out, size } = self.expected();
        if found.len() != out.len() {
            return Err(format!("{} numbers, expected {}", found.len(), out.len()));
        }
        for (at, (&f, (&e, &size))) in found.iter().zip(out.iter().zip(&size)).enumerate() {
            let same = if e.is_finite() {
                (f64::from(f) - e).abs() <= 1e-6 * size + 1e-30
            } else {
                f.is_nan() == e.is_nan() && (e.is_nan() || f64::from(f).to_bits() == e.to_bits())
            };
            if !same {
                return Err(format!("out {at}: {f}, expected {e}, terms of {size}"));
            }
        }
        Ok(())
    }
}

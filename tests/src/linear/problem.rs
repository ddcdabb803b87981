//! Inputs of one call, the specification in f64, and the comparison with it.

use half::{bf16, f16};
use mlac_kernels::problem::Random;
use mlac_ort::linear::Weight;

use crate::Outcome;

/// Type of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Upper halves of f32.
    Bf16,
    /// IEEE half precision.
    F16,
}

/// What a problem is like; [`Problem::new`] fills in the numbers.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Leading axes.
    pub tokens: Vec<usize>,
    /// `in`.
    pub input: usize,
    /// `out`.
    pub output: usize,
    /// Type of the weights.
    pub kind: Kind,
    /// Whether there is a bias.
    pub bias: bool,
    /// Of the numbers.
    pub seed: u64,
}

impl Default for Spec {
    /// Three tokens by a matrix of neither whole vectors nor whole panels.
    fn default() -> Self {
        Self {
            tokens: vec![3],
            input: 70,
            output: 37,
            kind: Kind::Bf16,
            bias: true,
            seed: 1,
        }
    }
}

/// The numbers of a matrix.
#[derive(Debug, Clone)]
pub enum Numbers {
    /// Of [`Kind::Bf16`].
    Bf16(Vec<bf16>),
    /// Of [`Kind::F16`].
    F16(Vec<f16>),
}

impl Numbers {
    /// Those of a kind that are nearest.
    pub fn of(kind: Kind, numbers: &[f32]) -> Self {
        let numbers = numbers.iter();
        match kind {
            Kind::Bf16 => Self::Bf16(numbers.map(|&x| bf16::from_f32(x)).collect()),
            Kind::F16 => Self::F16(numbers.map(|&x| f16::from_f32(x)).collect()),
        }
    }

    /// For the kernel.
    pub fn weight(&self) -> Weight<'_> {
        match self {
            Self::Bf16(numbers) => Weight::Bf16(numbers),
            Self::F16(numbers) => Weight::F16(numbers),
        }
    }

    /// Exactly.
    pub fn get(&self, at: usize) -> f64 {
        match self {
            Self::Bf16(numbers) => numbers[at].to_f64(),
            Self::F16(numbers) => numbers[at].to_f64(),
        }
    }

    /// Another number in a place.
    pub fn set(&mut self, at: usize, x: f32) {
        match self {
            Self::Bf16(numbers) => numbers[at] = bf16::from_f32(x),
            Self::F16(numbers) => numbers[at] = f16::from_f32(x),
        }
    }

    /// Little endian.
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Bf16(numbers) => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::F16(numbers) => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }
}

/// One call with all of its inputs.
#[derive(Debug, Clone)]
pub struct Problem {
    /// What it is like.
    pub spec: Spec,
    /// `[tokens.., in]`.
    pub x: Vec<f32>,
    /// `[out, in]`.
    pub weight: Numbers,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

impl Problem {
    /// Random numbers for a spec.
    pub fn new(spec: Spec) -> Self {
        let mut random = Random::new(spec.seed);
        let tokens: usize = spec.tokens.iter().product();
        let mut many = |count: usize| -> Vec<f32> {
            // Not eighths alone, whose sums would be exact in any order.
            (0..count)
                .map(|_| random.eighth() * (1.0 + 1.0 / 3.0 * random.eighth()))
                .collect()
        };
        Self {
            x: many(tokens * spec.input),
            weight: Numbers::of(spec.kind, &many(spec.output * spec.input)),
            bias: spec.bias.then(|| many(spec.output)),
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

    /// Every number that the specification asks for, and the sum of its terms' sizes.
    pub fn reference(&self) -> Vec<(f64, f64)> {
        let Spec { input, output, .. } = self.spec;
        let mut all = Vec::with_capacity(self.tokens() * output);
        for token in 0..self.tokens() {
            for row in 0..output {
                let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[row]));
                let (mut sum, mut size) = (bias, bias.abs());
                for k in 0..input {
                    let term =
                        self.weight.get(row * input + k) * f64::from(self.x[token * input + k]);
                    sum += term;
                    size += term.abs();
                }
                all.push((sum, size));
            }
        }
        all
    }

    /// Refuses outputs that are off by more than f32 sums of such terms are: a few roundings of the terms' sizes.
    pub fn require(&self, found: &[f32]) -> Outcome {
        let expected = self.reference();
        if found.len() != expected.len() {
            let expected = expected.len();
            return Err(format!("{} numbers, expected {expected}", found.len()));
        }
        for (at, (&f, (e, size))) in found.iter().zip(expected).enumerate() {
            let same = if e.is_finite() {
                (f64::from(f) - e).abs() <= 1e-6 * size + 1e-37
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

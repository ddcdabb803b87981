//! Shapes that an engine is built for.

use mlac_model::Refusal;
use serde::{Deserialize, Serialize};

use super::builder::{InputShapes, NetworkTensor};

/// Smallest, most usual and largest size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// Smallest.
    pub min: usize,
    /// The size to be fastest at.
    pub opt: usize,
    /// Largest.
    pub max: usize,
}

impl Range {
    /// Always this size.
    pub const fn only(size: usize) -> Self {
        Self {
            min: size,
            opt: size,
            max: size,
        }
    }

    /// From `min` to `max`, fastest at `opt`.
    pub const fn new(min: usize, opt: usize, max: usize) -> Self {
        Self { min, opt, max }
    }
}

/// Sizes of a decoder's three varying axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Sequences side by side.
    pub batch: Range,
    /// New tokens per run.
    pub seq: Range,
    /// Tokens already in the cache.
    pub past: Range,
}

impl Profile {
    /// Prompts of up to `context` tokens, into an empty or filled cache, up to `context` in all.
    pub fn prefill(context: usize) -> Self {
        Self {
            batch: Range::only(1),
            seq: Range::new(1, (context / 4).max(1), context.max(1)),
            past: Range::new(0, 0, context),
        }
    }

    /// One token at a time with up to `context` tokens before it.
    pub fn decode(context: usize) -> Self {
        Self {
            batch: Range::only(1),
            seq: Range::only(1),
            past: Range::new(0, context / 2, context),
        }
    }

    /// The shapes of a network's inputs, by the names and axes of an exported decoder.
    pub(super) fn shapes(
        &self,
        subject: &str,
        inputs: &[NetworkTensor],
    ) -> Result<Vec<InputShapes>, Refusal> {
        inputs
            .iter()
            .map(|input| self.shapes_of(subject, input))
            .collect()
    }

    fn shapes_of(&self, subject: &str, input: &NetworkTensor) -> Result<InputShapes, Refusal> {
        let total = Range {
            min: self.past.min + self.seq.min,
            opt: self.past.opt + self.seq.opt,
            max: self.past.max + self.seq.max,
        };
        let varying: &[(usize, Range)] = match input.name.as_str() {
            "input_ids" | "position_ids" => &[(0, self.batch), (1, self.seq)],
            "attention_mask" => &[(0, self.batch), (1, total)],
            name if name.starts_with("past_latent.") => &[(0, self.batch), (1, self.past)],
            name if name.starts_with("past_key_values.") => &[(0, self.batch), (2, self.past)],
            _ => &[],
        };
        let sizes = |pick: fn(&Range) -> usize| -> Option<Vec<usize>> {
            let axis = |(axis, dim): (usize, &Option<usize>)| {
                dim.or_else(|| {
                    varying
                        .iter()
                        .find(|(varies, _)| *varies == axis)
                        .map(|(_, range)| pick(range))
                })
            };
            input.dims.iter().enumerate().map(axis).collect()
        };
        match (
            sizes(|range| range.min),
            sizes(|range| range.opt),
            sizes(|range| range.max),
        ) {
            (Some(min), Some(opt), Some(max)) => Ok(InputShapes {
                name: input.name.clone(),
                min,
                opt,
                max,
            }),
            _ => Err(Refusal::new(
                format!("{subject}: input {}", input.name),
                "an input of an exported decoder, whose varying axes are batch, seq and past",
                format!("{:?}", input.dims),
                "export the model with `mlac export`",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(name: &str, dims: &[Option<usize>]) -> NetworkTensor {
        NetworkTensor {
            name: name.into(),
            element: "f16",
            dims: dims.to_vec(),
        }
    }

    #[test]
    fn axes_get_the_sizes_of_their_meaning() {
        let profile = Profile {
            batch: Range::new(1, 2, 4),
            seq: Range::new(1, 8, 16),
            past: Range::new(0, 32, 64),
        };
        for (name, dims, min, opt, max) in [
            (
                "input_ids",
                vec![None, None],
                vec![1, 1],
                vec![2, 8],
                vec![4, 16],
            ),
            (
                "attention_mask",
                vec![None, None],
                vec![1, 1],
                vec![2, 40],
                vec![4, 80],
            ),
            (
                "past_latent.3",
                vec![None, None, Some(192)],
                vec![1, 0, 192],
                vec![2, 32, 192],
                vec![4, 64, 192],
            ),
            (
                "past_key_values.0.key",
                vec![None, Some(3), None, Some(64)],
                vec![1, 3, 0, 64],
                vec![2, 3, 32, 64],
                vec![4, 3, 64, 64],
            ),
            // A fixed axis stays as it is.
            (
                "position_ids",
                vec![Some(1), None],
                vec![1, 1],
                vec![1, 8],
                vec![1, 16],
            ),
        ] {
            let shapes = profile.shapes("file", &[input(name, &dims)]).unwrap();
            assert_eq!(
                shapes,
                [InputShapes {
                    name: name.into(),
                    min,
                    opt,
                    max
                }]
            );
        }
    }

    #[test]
    fn an_axis_without_meaning_is_refused() {
        for (name, dims) in [
            ("other", vec![None]),
            ("past_latent.0", vec![None, None, None]),
        ] {
            let error = Profile::decode(64)
                .shapes("file", &[input(name, &dims)])
                .unwrap_err()
                .to_string();
            assert!(error.contains(&format!("file: input {name}")), "{error}");
        }
    }
}

//! Shapes that an engine is built for.

use mlac_model::Refusal;
use serde::{Deserialize, Serialize};

use super::builder::{InputShapes, NetworkTensor};
use crate::ort::Dim;

/// The plugin's caches have a multiple of so many rows.
const PAGE: usize = mlac_kernels::desc::PAGE as usize;

/// Whether a latent cache has all of its rows at every step (`docs/latent-attention.md`), instead of growing.
fn keeps_capacity(input: &NetworkTensor) -> bool {
    matches!(&input.dims.get(1), Some(Dim::Dynamic(name)) if name.starts_with("capacity"))
}

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

/// What a model's engines are to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profiles {
    /// Most sequences side by side.
    pub max_batch: usize,
    /// Most tokens of one sequence, prompt and answer together.
    pub max_context: usize,
    /// Most tokens of a prompt in one run; longer prompts go in pieces.
    pub max_prefill: usize,
}

impl Profiles {
    /// Prompts: fastest for one whole prompt into an empty cache.
    pub fn prefill(&self) -> Profile {
        Profile {
            batch: Range::new(1, 1, self.max_batch),
            seq: Range::new(1, self.max_prefill, self.max_prefill),
            past: Range::new(0, 0, self.max_context - self.max_prefill),
        }
    }

    /// Prompts in pieces of `tokens` tokens, which is what an engine with plugins has kernels for.
    ///
    /// # Errors
    /// A context that holds no piece.
    pub fn pieces(&self, tokens: usize) -> Result<Profile, Refusal> {
        if self.max_context < tokens {
            return Err(Refusal::new(
                "profiles",
                format!(
                    "a context of at least {tokens} tokens: prompts run in pieces of that many"
                ),
                self.max_context.to_string(),
                "choose a larger --max-context",
            ));
        }
        Ok(Profile {
            seq: Range::only(tokens),
            past: Range::new(0, 0, self.max_context - tokens),
            ..self.prefill()
        })
    }

    /// One token at a time: fastest in the middle of the context.
    pub fn decode(&self) -> Profile {
        Profile {
            batch: Range::new(1, 1, self.max_batch),
            seq: Range::only(1),
            past: Range::new(0, self.max_context / 2, self.max_context - 1),
        }
    }

    /// Sizes that contradict each other are refused before any work.
    pub fn check(&self) -> Result<(), Refusal> {
        if self.max_batch >= 1
            && (1..=self.max_context).contains(&self.max_prefill)
            && self.max_context >= 2
        {
            return Ok(());
        }
        Err(Refusal::new(
            "profiles",
            "batch of at least 1, context of at least 2 tokens, prompts of 1 to context tokens",
            format!(
                "batch {}, context {}, prompt {}",
                self.max_batch, self.max_context, self.max_prefill
            ),
            "correct the sizes",
        ))
    }
}

impl Profile {
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
            "input_ids" | "position_ids" | "hidden" => &[(0, self.batch), (1, self.seq)],
            "attention_mask" => &[(0, self.batch), (1, total)],
            "past_lengths" => &[(0, self.batch)],
            name if name.starts_with("past_latent.") && keeps_capacity(input) => &[
                (0, self.batch),
                (1, Range::only(total.max.next_multiple_of(PAGE))),
            ],
            name if name.starts_with("past_latent.") => &[(0, self.batch), (1, self.past)],
            name if name.starts_with("past_key_values.") => &[(0, self.batch), (2, self.past)],
            _ => &[],
        };
        let sizes = |pick: fn(&Range) -> usize| -> Option<Vec<usize>> {
            let axis = |(axis, dim): (usize, &Dim)| {
                dim.fixed().or_else(|| {
                    varying
                        .iter()
                        .find(|(varies, _)| *varies == axis)
                        .map(|(_, range)| dim.window().map_or(pick(range), |w| w.min(pick(range))))
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
        let dim = |size: &Option<usize>| match size {
            Some(size) => Dim::Fixed(*size),
            None => Dim::Dynamic("past".into()),
        };
        NetworkTensor {
            name: name.into(),
            element: "f16",
            dims: dims.iter().map(dim).collect(),
        }
    }

    #[test]
    fn a_window_bounds_its_own_axis() {
        let mut input = input("past_key_values.0.key", &[None, Some(3), None, Some(64)]);
        input.dims[2] = Dim::Dynamic("past_w48".into());
        let profile = Profile {
            batch: Range::new(1, 2, 4),
            seq: Range::new(1, 8, 16),
            past: Range::new(0, 32, 64),
        };
        let shapes = profile.shapes("file", &[input]).unwrap();
        assert_eq!(shapes[0].opt, [2, 3, 32, 64]);
        assert_eq!(shapes[0].max, [4, 3, 48, 64]);
    }

    #[test]
    fn a_cache_in_place_has_whole_pages_in_every_profile() {
        let profiles = Profiles {
            max_batch: 2,
            max_context: 100,
            max_prefill: 50,
        };
        let mut cache = input("past_latent.0", &[None, None, Some(192)]);
        cache.dims[1] = Dim::Dynamic("capacity".into());
        let inputs = [cache, input("past_lengths", &[None])];
        for profile in [profiles.decode(), profiles.pieces(16).unwrap()] {
            let shapes = profile.shapes("file", &inputs).unwrap();
            assert_eq!(
                (&shapes[0].min, &shapes[0].max),
                (&vec![1, 128, 192], &vec![2, 128, 192])
            );
            assert_eq!((&shapes[1].min, &shapes[1].max), (&vec![1], &vec![2]));
        }
        let error = profiles.pieces(101).unwrap_err().to_string();
        assert!(error.contains("at least 101 tokens"), "{error}");
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
    fn the_largest_shapes_reach_the_context_and_no_further() {
        for (max_context, max_prefill) in [(64, 64), (64, 8), (2, 1)] {
            let profiles = Profiles {
                max_batch: 3,
                max_context,
                max_prefill,
            };
            profiles.check().unwrap();
            for profile in [profiles.prefill(), profiles.decode()] {
                assert_eq!(profile.past.max + profile.seq.max, max_context);
                for range in [profile.batch, profile.seq, profile.past] {
                    assert!(
                        range.min <= range.opt && range.opt <= range.max,
                        "{range:?}"
                    );
                }
            }
        }
        for (max_batch, max_context, max_prefill) in
            [(0, 64, 8), (1, 64, 65), (1, 64, 0), (1, 1, 1)]
        {
            Profiles {
                max_batch,
                max_context,
                max_prefill,
            }
            .check()
            .unwrap_err();
        }
    }

    #[test]
    fn an_axis_without_meaning_is_refused() {
        for (name, dims) in [
            ("other", vec![None]),
            ("past_latent.0", vec![None, None, None]),
        ] {
            let profiles = Profiles {
                max_batch: 1,
                max_context: 64,
                max_prefill: 8,
            };
            let error = profiles
                .decode()
                .shapes("file", &[input(name, &dims)])
                .unwrap_err()
                .to_string();
            assert!(error.contains(&format!("file: input {name}")), "{error}");
        }
    }
}

//! From a budget to ranks.
//!
//! A budget is a fraction of the GQA cache of a layer, `2 * G * d` numbers per token. About a third
//! of it goes to the rotary key, but no more than a third of all key components: measured on
//! SmolLM2-135M (384 numbers), 128 + 64 beats 96 + 96 and 64 + 128 at one half, 64 + 32 beats 48 + 48
//! and 80 + 16 at one quarter, and at three quarters 224 + 64 is good.

use serde::{Deserialize, Serialize};

use crate::error::{Error, refuse};
use crate::layer::{AttentionShape, RankChoice};

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Budget {
    /// Fraction of the GQA cache, above 0 up to 1; 1 is exact.
    Fraction(f64),
    /// Given ranks.
    Ranks(RankChoice),
    /// Whatever is exact.
    Exact,
}

/// Ranks and how they came about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankPlan {
    /// r and `d_r`.
    pub ranks: RankChoice,
    /// Both are multiples of this.
    pub align: usize,
    /// Numbers of the GQA cache per token.
    pub gqa_width: usize,
    /// Why the alignment is smaller than asked, if it is.
    pub note: Option<String>,
}

impl RankPlan {
    /// Numbers cached per token as a fraction of the GQA cache.
    pub fn fraction(&self) -> f64 {
        self.ranks.width() as f64 / self.gqa_width as f64
    }
}

/// The default alignment of ranks: one tile of a tensor-core product.
pub const DEFAULT_ALIGN: usize = 16;

impl Budget {
    /// Ranks for a layer; r and `d_r` are multiples of `align` (a power of two) where the budget has
    /// room for that.
    pub fn ranks(self, shape: &AttentionShape, align: usize) -> Result<RankPlan, Error> {
        shape.check()?;
        let gqa_width = shape.stacked_width();
        let plan = |ranks: RankChoice, align: usize, note: Option<String>| {
            ranks.check(shape)?;
            Ok(RankPlan {
                ranks,
                align,
                gqa_width,
                note,
            })
        };
        match self {
            Self::Exact => plan(RankChoice::exact(shape), 1, None),
            Self::Ranks(ranks) => plan(ranks, 1, None),
            Self::Fraction(fraction) => {
                if !(fraction > 0.0 && fraction <= 1.0) {
                    return Err(refuse(
                        "--budget",
                        "a fraction above 0 and up to 1",
                        fraction.to_string(),
                        "give for example --budget 0.5",
                    ));
                }
                if align < 2 || !align.is_power_of_two() {
                    return Err(refuse(
                        "rank alignment",
                        "a power of two, at least 2",
                        align.to_string(),
                        "use the default of 16",
                    ));
                }
                if fraction >= 1.0 {
                    return plan(RankChoice::exact(shape), 1, None);
                }
                let total = (fraction * gqa_width as f64 + 1e-9).floor() as usize;
                // Three tiles: two for the latent, one for the rotary key.
                let mut step = align;
                while step > 2 && total < 3 * step {
                    step /= 2;
                }
                if total < step + 1 {
                    return Err(refuse(
                        "--budget",
                        format!("room for at least 3 of the {gqa_width} numbers a token has"),
                        format!("{fraction}, which is {total}"),
                        "raise the budget",
                    ));
                }
                let nearest = |x: f64| ((x / step as f64).round() as usize).max(1) * step;
                let third = nearest(total as f64 / 3.0).min(nearest(shape.kv_width() as f64 / 3.0));
                let rope = third.min(shape.kv_width() / 2 * 2);
                let room = (total - rope).min(gqa_width - rope);
                let latent = if room >= step {
                    room / step * step
                } else {
                    room
                };
                let note = (step < align)
                    .then(|| format!("the budget of {total} numbers is too small for multiples of {align}; ranks are multiples of {step}"));
                plan(
                    RankChoice {
                        kv_lora_rank: latent,
                        qk_rope_head_dim: rope,
                    },
                    step,
                    note,
                )
            }
        }
    }
}

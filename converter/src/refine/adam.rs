//! Adam (Kingma and Ba 2015) with step sizes of its own for every matrix.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

const MEAN_DECAY: f64 = 0.9;
/// Shorter than usual: there are only a few hundred steps.
const SQUARE_DECAY: f64 = 0.97;
/// Keeps 0 / 0 of parameters without a gradient at 0.
const SMALLEST: f64 = 1e-20;

/// The optimizer's state.
pub(super) struct Adam {
    slots: Vec<Slot>,
    steps: i32,
}

struct Slot {
    parameter: Var,
    /// Step size at rate 1, broadcast over the parameter.
    size: Tensor,
    mean: Tensor,
    square: Tensor,
}

impl Adam {
    /// Starts with `sizes[i]`, which broadcasts over `parameters[i]`, as its step at rate 1.
    pub(super) fn new(parameters: Vec<Var>, sizes: Vec<Tensor>) -> Result<Self> {
        let slots = parameters
            .into_iter()
            .zip(sizes)
            .map(|(parameter, size)| {
                Ok(Slot {
                    mean: parameter.zeros_like()?.detach(),
                    square: parameter.zeros_like()?.detach(),
                    parameter,
                    size,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { slots, steps: 0 })
    }

    /// One step down the gradient.
    pub(super) fn step(&mut self, gradients: &GradStore, rate: f64) -> Result<()> {
        self.steps += 1;
        let correct1 = 1.0 - MEAN_DECAY.powi(self.steps);
        let correct2 = (1.0 - SQUARE_DECAY.powi(self.steps)).sqrt();
        for slot in &mut self.slots {
            let Some(g) = gradients.get(&slot.parameter) else {
                continue;
            };
            let g = g.detach();
            slot.mean = ((&slot.mean * MEAN_DECAY)? + (&g * (1.0 - MEAN_DECAY))?)?;
            slot.square = ((&slot.square * SQUARE_DECAY)? + (g.sqr()? * (1.0 - SQUARE_DECAY))?)?;
            let direction = (&slot.mean / (slot.square.sqrt()? + SMALLEST)?)?;
            let step = direction
                .broadcast_mul(&slot.size)?
                .affine(rate * correct2 / correct1, 0.0)?;
            let moved = (slot.parameter.as_tensor() - step)?;
            slot.parameter.set(&moved.detach())?;
        }
        Ok(())
    }
}

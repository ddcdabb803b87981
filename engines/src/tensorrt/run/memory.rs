//! What a decoder keeps in the GPU's memory: caches of every layer, and inputs and logits of a run.

use half::f16;
use mlac_kernels::launch::{Buffer, Device, Stream};
use mlac_model::Refusal;

use super::engine::Engine;
use crate::error::Result;
use crate::ort::cache_parts;
use crate::tensorrt::builder::InputShapes;

/// Element of a cache or of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Float {
    F32,
    F16,
}

impl Float {
    pub(super) fn of(engine: &Engine, tensor: &str) -> Result<Self> {
        let found = engine.ports().iter().find(|port| port.name == tensor);
        match found.map(|port| port.element) {
            Some("f32") => Ok(Self::F32),
            Some("f16") => Ok(Self::F16),
            other => Err(Refusal::new(
                format!("{}: {tensor}", engine.subject()),
                "f32 or f16",
                other.unwrap_or("no such tensor"),
                "build the engine from a folder of `mlac export`",
            )
            .into()),
        }
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }

    /// The first numbers of a buffer.
    pub(super) fn read(self, buffer: &Buffer, count: usize) -> Result<Vec<f32>> {
        Ok(match self {
            Self::F32 => buffer.read::<f32>(count)?,
            Self::F16 => {
                let bits = buffer.read::<u16>(count)?;
                bits.into_iter()
                    .map(|x| f16::from_bits(x).to_f32())
                    .collect()
            }
        })
    }
}

/// One cache tensor.
pub(super) struct Cache {
    pub(super) input: String,
    pub(super) output: String,
    /// The axis of cached rows.
    axis: usize,
    /// Sizes with the largest batch and the most rows.
    largest: Vec<usize>,
    /// Most tokens held of a cache that grows, those of its window.
    window: Option<usize>,
    float: Float,
    place: Place,
}

enum Place {
    /// One buffer of the capacity, input and output at once.
    InPlace(Buffer),
    /// The cached rows come in and go out with the new ones: two buffers in turn, the first holds what is cached.
    Grows([Buffer; 2]),
}

impl Cache {
    /// The cache of input `shapes` for sequences of up to `context` tokens. `None` for another input.
    ///
    /// # Errors
    /// An engine whose outputs alias other inputs than these.
    pub(super) fn of(
        engine: &Engine,
        shapes: &InputShapes,
        window: Option<usize>,
        context: usize,
        device: &Device,
    ) -> Result<Option<Self>> {
        let Some((axis, output)) = cache_parts(&shapes.name) else {
            return Ok(None);
        };
        let float = Float::of(engine, &shapes.name)?;
        // A cache that grows begins with no rows.
        let in_place = shapes.min[axis] > 0;
        if let Some(alias) = engine.alias(&output)?
            && !(in_place && alias == shapes.name)
        {
            let expected = if in_place {
                format!("the memory of {}, or none named", shapes.name)
            } else {
                "memory of its own: it grows".to_owned()
            };
            return Err(Refusal::new(
                format!("{}: output {output}", engine.subject()),
                expected,
                format!("the memory of {alias}"),
                "build the engine from a folder of `mlac export --form tensorrt`",
            )
            .into());
        }
        let mut largest = shapes.max.clone();
        if !in_place {
            // What comes out has the new rows as well.
            largest[axis] = window.map_or(context, |window| window.min(context));
        }
        let bytes = (largest.iter().product::<usize>() * float.bytes()) as u64;
        let place = if in_place {
            Place::InPlace(device.buffer(bytes)?)
        } else {
            Place::Grows([device.buffer(bytes)?, device.buffer(bytes)?])
        };
        Ok(Some(Self {
            input: shapes.name.clone(),
            output,
            axis,
            largest,
            window,
            float,
            place,
        }))
    }

    /// Rows that are held of a sequence of `tokens` tokens: in place every one, without a ring.
    fn rows(&self, tokens: usize) -> usize {
        match (&self.place, self.window) {
            (Place::Grows(_), Some(window)) => tokens.min(window),
            _ => tokens,
        }
    }

    /// Shape of the input after `past` tokens.
    pub(super) fn input_shape(&self, batch: usize, past: usize) -> Vec<usize> {
        let rows = match &self.place {
            Place::InPlace(_) => self.largest[self.axis],
            Place::Grows(_) => self.rows(past),
        };
        self.sized(batch, rows)
    }

    /// Shape that the output must have at `total` tokens.
    pub(super) fn output_shape(&self, batch: usize, total: usize) -> Vec<usize> {
        self.input_shape(batch, total)
    }

    fn sized(&self, batch: usize, rows: usize) -> Vec<usize> {
        let mut shape = self.largest.clone();
        shape[0] = batch;
        shape[self.axis] = rows;
        shape
    }

    /// Addresses of input and output.
    pub(super) fn addresses(&self) -> (u64, u64) {
        match &self.place {
            Place::InPlace(buffer) => {
                let address = buffer.region().address();
                (address, address)
            }
            Place::Grows([from, to]) => (from.region().address(), to.region().address()),
        }
    }

    /// After a run: what came out is what is cached.
    pub(super) fn turn(&mut self) {
        if let Place::Grows(buffers) = &mut self.place {
            buffers.swap(0, 1);
        }
    }

    /// Zeros in all of it.
    pub(super) fn clear(&self, stream: &Stream) -> Result<()> {
        match &self.place {
            Place::InPlace(buffer) => buffer.fill(0, stream)?,
            Place::Grows([from, _]) => from.fill(0, stream)?,
        }
        Ok(())
    }

    /// Bytes of the rows held of `batch` sequences of `tokens` tokens.
    pub(super) fn bytes(&self, batch: usize, tokens: usize) -> usize {
        let shape = self.sized(batch, self.rows(tokens));
        shape.iter().product::<usize>() * self.float.bytes()
    }
}

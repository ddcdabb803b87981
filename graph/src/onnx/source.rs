//! Where the writer gets the numbers of a weight from.

use std::{borrow::Cow, collections::BTreeMap, error::Error};

use mlac_model::{Checkpoint, Refusal};

/// Gives the tensors of a checkpoint, one at a time.
pub trait WeightSource: Send + Sync {
    /// The elements of the tensor `name`, row-major, which must have the shape `shape`.
    fn f32(
        &self,
        name: &str,
        shape: &[usize],
    ) -> Result<Cow<'_, [f32]>, Box<dyn Error + Send + Sync>>;
}

impl WeightSource for Checkpoint {
    fn f32(
        &self,
        name: &str,
        shape: &[usize],
    ) -> Result<Cow<'_, [f32]>, Box<dyn Error + Send + Sync>> {
        Ok(Cow::Owned(Checkpoint::f32(self, name, shape)?))
    }
}

/// Tensors held in memory.
#[derive(Debug, Clone, Default)]
pub struct MemoryWeights {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl MemoryWeights {
    /// No tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a tensor; refuses numbers that do not fill the shape.
    pub fn insert(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        numbers: Vec<f32>,
    ) -> Result<(), Refusal> {
        let name = name.into();
        if shape.iter().product::<usize>() != numbers.len() {
            return Err(Refusal::new(
                format!("tensor {name}"),
                format!("numbers for the shape {shape:?}"),
                format!("{} numbers", numbers.len()),
                "give the tensor with its own shape",
            ));
        }
        self.tensors.insert(name, (shape.to_vec(), numbers));
        Ok(())
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}

impl WeightSource for MemoryWeights {
    fn f32(
        &self,
        name: &str,
        shape: &[usize],
    ) -> Result<Cow<'_, [f32]>, Box<dyn Error + Send + Sync>> {
        let refuse = |found: String| {
            Refusal::new(
                format!("tensor {name}"),
                format!("a tensor of shape {shape:?} in memory"),
                found,
                "insert the tensor that the graph reads",
            )
        };
        match self.tensors.get(name) {
            Some((own, numbers)) if own == shape => Ok(Cow::Borrowed(numbers)),
            Some((own, _)) => Err(refuse(format!("shape {own:?}")).into()),
            None => Err(refuse("none of that name".to_owned()).into()),
        }
    }
}

/// Tensors in memory that hide those of the same name in another source.
#[derive(Clone, Copy)]
pub struct Overlay<'a> {
    top: &'a MemoryWeights,
    bottom: &'a dyn WeightSource,
}

impl<'a> Overlay<'a> {
    /// `top` over `bottom`.
    pub fn new(top: &'a MemoryWeights, bottom: &'a dyn WeightSource) -> Self {
        Self { top, bottom }
    }
}

impl WeightSource for Overlay<'_> {
    fn f32(
        &self,
        name: &str,
        shape: &[usize],
    ) -> Result<Cow<'_, [f32]>, Box<dyn Error + Send + Sync>> {
        if self.top.contains(name) {
            self.top.f32(name, shape)
        } else {
            self.bottom.f32(name, shape)
        }
    }
}

//! Equal tensors, one per window: in memory while they are few, in an unnamed file when they would
//! pass the bound.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use mlac_engines::ort::{HostTensor, Value};

use super::streams::numbers;
use crate::error::Error;

/// Bytes that one set of tensors may take in memory.
const IN_MEMORY: usize = 256 << 20;

/// Tensors of one shape, f32.
pub struct Store {
    shape: Vec<usize>,
    count: usize,
    place: Place,
}

enum Place {
    Memory(Vec<Value>),
    /// Tensor i at byte `i * size`.
    File(File),
}

impl Store {
    /// A store for `count` tensors of `shape`, of which [`Store::push`] gives one after the other.
    pub fn new(count: usize, shape: &[usize]) -> Result<Self, Error> {
        Self::bounded(count, shape, IN_MEMORY)
    }

    /// The same in a file, however few they are: for sets of which there is one a layer.
    pub fn in_file(count: usize, shape: &[usize]) -> Result<Self, Error> {
        Self::bounded(count, shape, 0)
    }

    fn bounded(count: usize, shape: &[usize], bound: usize) -> Result<Self, Error> {
        let bytes = count * shape.iter().product::<usize>() * size_of::<f32>();
        let place = if bytes <= bound {
            Place::Memory(Vec::with_capacity(count))
        } else {
            let file = tempfile::tempfile().map_err(failed)?;
            Place::File(file)
        };
        Ok(Self {
            shape: shape.to_vec(),
            count: 0,
            place,
        })
    }

    /// Tensors in it.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Appends a tensor of the store's shape.
    pub fn push(&mut self, value: Value) -> Result<(), Error> {
        let at = self.count;
        if let Place::Memory(values) = &mut self.place {
            values.push(value);
        } else {
            self.set(at, value)?;
        }
        self.count += 1;
        Ok(())
    }

    /// Tensor `i`.
    pub fn get(&self, i: usize) -> Result<Value, Error> {
        match &self.place {
            Place::Memory(values) => Ok(values[i].clone()),
            Place::File(file) => {
                let mut data = vec![0.0f32; self.elements()];
                file.read_exact_at(bytemuck::cast_slice_mut(&mut data), self.offset(i))
                    .map_err(failed)?;
                Ok(Value::new(HostTensor::f32(self.shape.clone(), data))?)
            }
        }
    }

    /// Replaces tensor `i`.
    pub fn set(&mut self, i: usize, value: Value) -> Result<(), Error> {
        let offset = self.offset(i);
        match &mut self.place {
            Place::Memory(values) => values[i] = value,
            Place::File(file) => file
                .write_all_at(bytemuck::cast_slice(numbers(&value)?), offset)
                .map_err(failed)?,
        }
        Ok(())
    }

    /// The same tensors in a store of their own.
    pub fn copy(&self) -> Result<Self, Error> {
        if let Place::Memory(values) = &self.place {
            return Ok(Self {
                shape: self.shape.clone(),
                count: self.count,
                place: Place::Memory(values.clone()),
            });
        }
        let mut copy = Self::bounded(self.count, &self.shape, 0)?;
        for i in 0..self.count {
            copy.push(self.get(i)?)?;
        }
        Ok(copy)
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn offset(&self, i: usize) -> u64 {
        (i * self.elements() * size_of::<f32>()) as u64
    }
}

fn failed(source: io::Error) -> Error {
    Error::io("a temporary file of hidden states", source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_places_hold_the_same() {
        mlac_engines::ort::load().unwrap();
        let shape = [1, 2, 3];
        let tensor = |start: f32| -> Value {
            let data = (0..6).map(|i| start + i as f32).collect();
            Value::new(HostTensor::f32(shape, data)).unwrap()
        };
        for bound in [usize::MAX, 0] {
            let mut store = Store::bounded(3, &shape, bound).unwrap();
            assert_eq!(matches!(store.place, Place::File(_)), bound == 0);
            for i in 0..3 {
                store.push(tensor(10.0 * i as f32)).unwrap();
            }
            let copy = store.copy().unwrap();
            store.set(1, tensor(0.5)).unwrap();
            assert_eq!(store.count(), 3);
            for (store, firsts) in [(&store, [0.0, 0.5, 20.0]), (&copy, [0.0, 10.0, 20.0])] {
                for (i, first) in firsts.iter().enumerate() {
                    let found = store.get(i).unwrap();
                    assert_eq!(found.shape(), shape);
                    assert_eq!(numbers(&found).unwrap(), numbers(&tensor(*first)).unwrap());
                }
            }
        }
    }
}

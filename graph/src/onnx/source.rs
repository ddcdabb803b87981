//! Where the writer gets the numbers of a weight from.

use std::{borrow::Cow, collections::BTreeMap, error::Error};

use mlac_model::{Checkpoint, Dtype, Refusal, checkpoint::TensorReader, tensor::f32_from_bytes};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Gives the tensors of a checkpoint, one at a time.
pub trait WeightSource: Send + Sync {
    /// The elements of the tensor `name`, row-major, which must have the shape `shape`.
    fn f32(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [f32]>>;

    /// The tensor `name`, which must have the shape `shape`, as it is stored; `None` when the source
    /// has numbers only.
    fn stored(&self, _name: &str, _shape: &[usize]) -> Result<Option<StoredTensor<'_>>> {
        Ok(None)
    }

    /// The type in which the tensor `name` is stored; `None` when there is no such tensor or the source
    /// has numbers only.
    fn dtype(&self, _name: &str) -> Option<Dtype> {
        None
    }
}

/// The bytes of one tensor, row-major, little endian.
#[derive(Debug)]
pub struct StoredTensor<'a> {
    dtype: Dtype,
    bytes: Bytes<'a>,
}

#[derive(Debug)]
enum Bytes<'a> {
    File(TensorReader<'a>),
    Memory(&'a [u8]),
}

impl<'a> StoredTensor<'a> {
    /// A tensor in memory.
    pub fn in_memory(dtype: Dtype, bytes: &'a [u8]) -> Self {
        let bytes = Bytes::Memory(bytes);
        Self { dtype, bytes }
    }

    /// A tensor of a checkpoint.
    pub fn in_file(dtype: Dtype, reader: TensorReader<'a>) -> Self {
        let bytes = Bytes::File(reader);
        Self { dtype, bytes }
    }

    /// Type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        match &self.bytes {
            Bytes::File(reader) => reader.len(),
            Bytes::Memory(bytes) => bytes.len(),
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` from `offset` on, which must lie inside.
    pub fn read_at(&self, offset: usize, buffer: &mut [u8]) -> Result<()> {
        match &self.bytes {
            Bytes::File(reader) => reader.read_at(offset, buffer)?,
            Bytes::Memory(bytes) => buffer.copy_from_slice(&bytes[offset..offset + buffer.len()]),
        }
        Ok(())
    }
}

impl WeightSource for Checkpoint {
    fn f32(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Owned(Checkpoint::f32(self, name, shape)?))
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<Option<StoredTensor<'_>>> {
        let info = self.info(name)?;
        if info.shape != shape {
            return Err(Refusal::new(
                format!("tensor {name}"),
                format!("shape {shape:?}"),
                format!("shape {:?}", info.shape),
                "check that config.json belongs to these weights",
            )
            .into());
        }
        let reader = self.reader(name)?;
        Ok(Some(StoredTensor::in_file(info.dtype, reader)))
    }

    fn dtype(&self, name: &str) -> Option<Dtype> {
        self.info(name).ok().map(|info| info.dtype)
    }
}

/// Tensors held in memory.
#[derive(Debug, Clone, Default)]
pub struct MemoryWeights {
    tensors: BTreeMap<String, (Vec<usize>, Held)>,
}

#[derive(Debug, Clone)]
enum Held {
    Numbers(Vec<f32>),
    Bytes(Dtype, Vec<u8>),
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
    ) -> std::result::Result<(), Refusal> {
        let name = name.into();
        if shape.iter().product::<usize>() != numbers.len() {
            return Err(Refusal::new(
                format!("tensor {name}"),
                format!("numbers for the shape {shape:?}"),
                format!("{} numbers", numbers.len()),
                "give the tensor with its own shape",
            ));
        }
        let held = Held::Numbers(numbers);
        self.tensors.insert(name, (shape.to_vec(), held));
        Ok(())
    }

    /// Adds or replaces a tensor as it is stored; refuses bytes that do not fill the shape.
    pub fn insert_stored(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        dtype: Dtype,
        bytes: Vec<u8>,
    ) -> std::result::Result<(), Refusal> {
        let name = name.into();
        let needed = shape.iter().product::<usize>() * dtype.size();
        if needed != bytes.len() {
            return Err(Refusal::new(
                format!("tensor {name}"),
                format!("{needed} bytes for {dtype} of the shape {shape:?}"),
                format!("{} bytes", bytes.len()),
                "give the tensor with its own shape",
            ));
        }
        let held = Held::Bytes(dtype, bytes);
        self.tensors.insert(name, (shape.to_vec(), held));
        Ok(())
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}

impl MemoryWeights {
    fn find(&self, name: &str, shape: &[usize]) -> Result<&Held> {
        let refuse = |found: String| {
            Refusal::new(
                format!("tensor {name}"),
                format!("a tensor of shape {shape:?} in memory"),
                found,
                "insert the tensor that the graph reads",
            )
        };
        match self.tensors.get(name) {
            Some((own, held)) if own == shape => Ok(held),
            Some((own, _)) => Err(refuse(format!("shape {own:?}")).into()),
            None => Err(refuse("none of that name".to_owned()).into()),
        }
    }
}

impl WeightSource for MemoryWeights {
    fn f32(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [f32]>> {
        match self.find(name, shape)? {
            Held::Numbers(numbers) => Ok(Cow::Borrowed(numbers)),
            Held::Bytes(dtype, bytes) => {
                let numbers = f32_from_bytes(*dtype, bytes).ok_or_else(|| {
                    Refusal::new(
                        format!("tensor {name}"),
                        "a type of numbers",
                        dtype.to_string(),
                        "give the tensor as f32, f16 or bf16",
                    )
                })?;
                Ok(Cow::Owned(numbers))
            }
        }
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<Option<StoredTensor<'_>>> {
        Ok(match self.find(name, shape)? {
            Held::Numbers(_) => None,
            Held::Bytes(dtype, bytes) => Some(StoredTensor::in_memory(*dtype, bytes)),
        })
    }

    fn dtype(&self, name: &str) -> Option<Dtype> {
        match self.tensors.get(name)? {
            (_, Held::Numbers(_)) => None,
            (_, Held::Bytes(dtype, _)) => Some(*dtype),
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

impl Overlay<'_> {
    fn holder(&self, name: &str) -> &dyn WeightSource {
        if self.top.contains(name) {
            self.top
        } else {
            self.bottom
        }
    }
}

impl WeightSource for Overlay<'_> {
    fn f32(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [f32]>> {
        self.holder(name).f32(name, shape)
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<Option<StoredTensor<'_>>> {
        self.holder(name).stored(name, shape)
    }

    fn dtype(&self, name: &str) -> Option<Dtype> {
        self.holder(name).dtype(name)
    }
}

//! Tensors: owned ones of ours, and the runtime's own, which can go from an output to an input
//! without a copy.

use std::borrow::Cow;
use std::sync::Arc;

use half::f16;
use mlac_model::Refusal;
use ort::memory::Allocator;
use ort::value::{DynValue, Tensor, TensorElementType, ValueType};

use crate::error::{EngineError, Result};

/// Element type of a tensor at a session's boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 64-bit signed integer.
    I64,
}

impl Element {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
            Self::I64 => 8,
        }
    }

    pub(super) fn of(kind: TensorElementType) -> Option<Self> {
        match kind {
            TensorElementType::Float32 => Some(Self::F32),
            TensorElementType::Float16 => Some(Self::F16),
            TensorElementType::Int64 => Some(Self::I64),
            _ => None,
        }
    }
}

/// Elements in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub enum HostData {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 16-bit floats.
    F16(Vec<f16>),
    /// 64-bit integers.
    I64(Vec<i64>),
}

/// A dense row-major tensor in our own memory.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Size of each axis, outermost first.
    pub shape: Vec<usize>,
    /// The elements; their count is the product of `shape`.
    pub data: HostData,
}

impl HostTensor {
    /// A tensor of 32-bit floats.
    pub fn f32(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Self {
        Self {
            shape: shape.into(),
            data: HostData::F32(data),
        }
    }

    /// A tensor of 64-bit integers.
    pub fn i64(shape: impl Into<Vec<usize>>, data: Vec<i64>) -> Self {
        Self {
            shape: shape.into(),
            data: HostData::I64(data),
        }
    }

    /// Zeros (for an empty cache: a shape with a zero axis).
    pub fn zeros(element: Element, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        let count = shape.iter().product();
        let data = match element {
            Element::F32 => HostData::F32(vec![0.0; count]),
            Element::F16 => HostData::F16(vec![f16::ZERO; count]),
            Element::I64 => HostData::I64(vec![0; count]),
        };
        Self { shape, data }
    }

    /// The element type.
    pub fn element(&self) -> Element {
        match self.data {
            HostData::F32(_) => Element::F32,
            HostData::F16(_) => Element::F16,
            HostData::I64(_) => Element::I64,
        }
    }

    /// The elements as 32-bit floats, without a copy when they are.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        match &self.data {
            HostData::F32(data) => Cow::Borrowed(data),
            HostData::F16(data) => Cow::Owned(data.iter().map(|value| value.to_f32()).collect()),
            HostData::I64(data) => Cow::Owned(data.iter().map(|value| *value as f32).collect()),
        }
    }
}

/// A tensor of the runtime. Cloning shares it; passing an output back as an input copies nothing.
#[derive(Clone)]
pub struct Value {
    inner: Arc<DynValue>,
    element: Element,
    shape: Vec<usize>,
}

impl Value {
    /// Hands our tensor's memory to the runtime, without a copy.
    ///
    /// # Errors
    /// When the shape's product is not the number of elements, or there is no ONNX Runtime.
    pub fn new(tensor: HostTensor) -> Result<Self> {
        crate::ort::load()?;
        let HostTensor { shape, data } = tensor;
        let element;
        let made = match data {
            HostData::F32(data) => {
                element = Element::F32;
                Tensor::from_array((shape.clone(), data)).map(Tensor::into_dyn)
            }
            HostData::F16(data) => {
                element = Element::F16;
                Tensor::from_array((shape.clone(), data)).map(Tensor::into_dyn)
            }
            HostData::I64(data) => {
                element = Element::I64;
                Tensor::from_array((shape.clone(), data)).map(Tensor::into_dyn)
            }
        };
        let inner = made.map_err(EngineError::ort(
            &format!("tensor of shape {shape:?}"),
            "make an input",
        ))?;
        Ok(Self {
            inner: Arc::new(inner),
            element,
            shape,
        })
    }

    /// Zeros in the runtime's own memory: what a model can change in place
    /// ([`OrtSession::run_in_place`](super::OrtSession::run_in_place)).
    pub fn room(element: Element, shape: &[usize]) -> Result<Self> {
        let allocator = Allocator::default();
        let subject = format!("tensor of shape {shape:?}");
        let dims: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        let made = match element {
            Element::F32 => zeroed::<f32>(&allocator, dims),
            Element::F16 => zeroed::<f16>(&allocator, dims),
            Element::I64 => zeroed::<i64>(&allocator, dims),
        };
        Ok(Self {
            inner: Arc::new(made.map_err(EngineError::ort(&subject, "allocate"))?),
            element,
            shape: shape.to_vec(),
        })
    }

    /// A copy in the runtime's own memory, which a model can change in place.
    pub fn changeable(&self) -> Result<Self> {
        let mut copy = Self::room(self.element, &self.shape)?;
        let count = self.shape.iter().product();
        copy.copy_rows_of(self, count, count)?;
        Ok(copy)
    }

    /// A tensor of [`room`](Self::room) with another size of axis 1, which begins with the first rows of this one.
    pub(super) fn with_rows(&self, rows: usize) -> Result<Self> {
        let mut shape = self.shape.clone();
        let old = std::mem::replace(&mut shape[1], rows);
        let mut grown = Self::room(self.element, &shape)?;
        let width = shape[2..].iter().product::<usize>();
        grown.copy_rows_of(self, old * width, rows * width)?;
        Ok(grown)
    }

    /// Copies every `old` numbers of `from` to where there is room for `new`, the smaller of both.
    fn copy_rows_of(&mut self, from: &Self, old: usize, new: usize) -> Result<()> {
        let to = self.runtime_mut("tensor", "copy")?;
        match from.element {
            Element::F32 => copy_rows(from.as_f32(), to, old, new),
            Element::F16 => copy_rows(from.as_f16(), to, old, new),
            Element::I64 => copy_rows(from.as_i64(), to, old, new),
        }
        .map_err(EngineError::ort("tensor", "copy"))
    }

    /// The tensor to change.
    ///
    /// # Errors
    /// When it is shared: somebody would see it change.
    pub(super) fn runtime_mut(&mut self, subject: &str, name: &str) -> Result<&mut DynValue> {
        Arc::get_mut(&mut self.inner).ok_or_else(|| {
            Refusal::new(
                format!("{subject}: {name}"),
                "a tensor that nobody else holds, to be changed in place",
                "one that is shared",
                "drop its clones before the run",
            )
            .into()
        })
    }

    /// Takes an output of the runtime.
    pub(super) fn from_runtime(subject: &str, name: &str, value: DynValue) -> Result<Self> {
        let (element, shape) = match value.dtype() {
            ValueType::Tensor { ty, shape, .. } => (
                Element::of(*ty),
                shape.iter().map(|axis| (*axis).max(0) as usize).collect(),
            ),
            _ => (None, Vec::new()),
        };
        let Some(element) = element else {
            return Err(Refusal::new(
                format!("{subject}: output {name}"),
                "a tensor of f32, f16 or i64",
                value.dtype().to_string(),
                "export the model with `mlac export`",
            )
            .into());
        };
        Ok(Self {
            inner: Arc::new(value),
            element,
            shape,
        })
    }

    pub(super) fn runtime(&self) -> &DynValue {
        &self.inner
    }

    /// The element type.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Size of each axis, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.element.bytes()
    }

    fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    fn elements<T: ort::value::PrimitiveTensorElementType>(&self) -> Option<&[T]> {
        if self.is_empty() {
            return Some(&[]);
        }
        self.inner
            .try_extract_tensor::<T>()
            .ok()
            .map(|(_, data)| data)
    }

    /// The elements in place, when they are 32-bit floats.
    pub fn as_f32(&self) -> Option<&[f32]> {
        (self.element == Element::F32).then(|| self.elements::<f32>())?
    }

    /// The elements in place, when they are 16-bit floats.
    pub fn as_f16(&self) -> Option<&[f16]> {
        (self.element == Element::F16).then(|| self.elements::<f16>())?
    }

    /// The elements in place, when they are 64-bit integers.
    pub fn as_i64(&self) -> Option<&[i64]> {
        (self.element == Element::I64).then(|| self.elements::<i64>())?
    }

    /// A copy in our own memory.
    pub fn to_host(&self) -> HostTensor {
        let data = match self.element {
            Element::F32 => HostData::F32(self.as_f32().unwrap_or_default().to_vec()),
            Element::F16 => HostData::F16(self.as_f16().unwrap_or_default().to_vec()),
            Element::I64 => HostData::I64(self.as_i64().unwrap_or_default().to_vec()),
        };
        HostTensor {
            shape: self.shape.clone(),
            data,
        }
    }
}

fn zeroed<T>(allocator: &Allocator, shape: Vec<i64>) -> ort::Result<DynValue>
where
    T: ort::value::PrimitiveTensorElementType + Default + Clone + std::fmt::Debug,
{
    let empty = shape.contains(&0);
    let mut tensor = Tensor::<T>::new(allocator, shape)?;
    if !empty {
        tensor.extract_tensor_mut().1.fill(T::default());
    }
    Ok(tensor.into_dyn())
}

/// Copies `old` numbers of every sequence to where it has room for `new`, the smaller of both.
fn copy_rows<T>(from: Option<&[T]>, to: &mut DynValue, old: usize, new: usize) -> ort::Result<()>
where
    T: ort::value::PrimitiveTensorElementType + Copy,
{
    let (Some(from), true) = (from, old.min(new) > 0) else {
        return Ok(());
    };
    let (_, to) = to.try_extract_tensor_mut::<T>()?;
    let count = old.min(new);
    for (from, to) in from.chunks_exact(old).zip(to.chunks_exact_mut(new)) {
        to[..count].copy_from_slice(&from[..count]);
    }
    Ok(())
}

impl TryFrom<HostTensor> for Value {
    type Error = EngineError;

    fn try_from(tensor: HostTensor) -> Result<Self> {
        Self::new(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_gives_back_what_went_in() {
        crate::ort::load().unwrap();
        for element in [Element::F32, Element::F16, Element::I64] {
            for shape in [vec![2, 3], vec![2, 0, 3], vec![]] {
                let tensor = HostTensor::zeros(element, shape.clone());
                let value = Value::new(tensor.clone()).unwrap();
                assert_eq!(value.to_host(), tensor, "{element:?} {shape:?}");
                assert_eq!(
                    value.bytes(),
                    shape.iter().product::<usize>() * element.bytes()
                );
            }
        }
    }

    #[test]
    fn a_cache_grows_with_its_first_rows_in_every_sequence() {
        crate::ort::load().unwrap();
        let numbers: Vec<f32> = (0..12).map(|n| n as f32).collect();
        let cache = Value::new(HostTensor::f32([2, 3, 2], numbers)).unwrap();
        let grown = cache.with_rows(4).unwrap().to_host();
        let expected = [
            0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 0.0, 0.0,
        ];
        assert_eq!(grown, HostTensor::f32([2, 4, 2], expected.to_vec()));
        let cut = cache.with_rows(1).unwrap().to_host();
        assert_eq!(cut, HostTensor::f32([2, 1, 2], vec![0.0, 1.0, 6.0, 7.0]));
        let empty = Value::room(Element::F16, &[2, 0, 2]).unwrap();
        assert_eq!(
            empty.with_rows(1).unwrap().as_f16().unwrap(),
            [f16::ZERO; 4]
        );
    }

    #[test]
    fn what_is_shared_is_not_changed_in_place() {
        crate::ort::load().unwrap();
        let mut value = Value::room(Element::F32, &[1, 2, 3]).unwrap();
        let clone = value.clone();
        let error = value.runtime_mut("step", "cache").err().unwrap();
        assert!(error.to_string().contains("nobody else holds"), "{error}");
        drop(clone);
        assert!(value.runtime_mut("step", "cache").is_ok());
    }

    #[test]
    fn a_shape_that_contradicts_its_data_is_an_error() {
        crate::ort::load().unwrap();
        let error = Value::new(HostTensor::f32([2, 3], vec![0.0; 5]))
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("[2, 3]") && error.contains('5'), "{error}");
    }
}

//! What an operator tells the runtime about itself.

use std::ffi::{CStr, c_int};

use ort_sys::{
    ONNXTensorElementDataType as Type, OrtKernelContext, OrtKernelInfo, OrtShapeInferContext,
};

use super::api::{Api, Result};

/// An operator.
pub(super) struct Declaration {
    pub(super) name: &'static CStr,
    pub(super) inputs: &'static [Port],
    pub(super) outputs: &'static [Port],
    /// Tells the runtime which inputs' memory which outputs may take.
    pub(super) in_place: unsafe extern "system" fn(*mut *mut c_int, *mut *mut c_int) -> usize,
    /// Tells the runtime the outputs' shapes when it loads a graph; the caller gives its own context.
    pub(super) infer: Option<unsafe fn(Api, *mut OrtShapeInferContext) -> Result<()>>,
    /// Makes what runs a node; its caller gives the node's own information and the type it is registered for.
    pub(super) create: unsafe fn(Api, *const OrtKernelInfo, Type) -> Result<Box<dyn Node>>,
}

/// An input or output.
pub(super) struct Port {
    pub(super) name: &'static str,
    /// `None`: the type that the operator is registered for.
    pub(super) element: Option<Type>,
    pub(super) required: bool,
}

pub(super) const fn port(name: &'static str, element: Option<Type>, required: bool) -> Port {
    Port {
        name,
        element,
        required,
    }
}

pub(super) const F32: Option<Type> = Some(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
pub(super) const I32: Option<Type> = Some(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
pub(super) const I64: Option<Type> = Some(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
pub(super) const U8: Option<Type> = Some(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);

/// A node with its attributes.
pub(super) trait Node {
    fn api(&self) -> Api;

    /// The operator's name.
    fn name(&self) -> &'static str;

    /// # Safety
    /// `context` is what the runtime gave to this run.
    unsafe fn run(&self, context: *mut OrtKernelContext) -> Result<()>;
}

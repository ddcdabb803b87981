//! Shapes as the runtime has them when it loads a graph: what follows an operator then has known axes, by name where they vary.

use std::ffi::{CStr, CString, c_char};
use std::ptr;

use ort_sys::{ONNXTensorElementDataType as Type, OrtShapeInferContext, OrtTensorTypeAndShapeInfo};

use super::api::{Api, Result};

/// An axis: its size, or its name where it varies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Axis {
    Size(i64),
    Name(CString),
}

/// Element type and axes of an input, `None` when an axis is neither known nor named.
///
/// # Safety
/// `context` is what the runtime gave to the inference.
pub(super) unsafe fn axes(
    api: Api,
    context: *const OrtShapeInferContext,
    input: usize,
) -> Result<Option<(Type, Vec<Axis>)>> {
    let mut info = ptr::null_mut();
    let mut rank = 0;
    let mut element = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    // SAFETY: the caller's promise; the context keeps the shape and its names.
    unsafe {
        let get = api.0.ShapeInferContext_GetInputTypeShape;
        Api::check(get(context, input, &raw mut info))?;
        if info.is_null() {
            return Ok(None);
        }
        Api::check((api.0.GetTensorElementType)(info, &raw mut element))?;
        Api::check((api.0.GetDimensionsCount)(info, &raw mut rank))?;
        let mut sizes = vec![0_i64; rank];
        Api::check((api.0.GetDimensions)(info, sizes.as_mut_ptr(), rank))?;
        let mut names: Vec<*const c_char> = vec![ptr::null(); rank];
        let get = api.0.GetSymbolicDimensions;
        Api::check(get(info, names.as_mut_ptr(), rank))?;
        let axis = |(&size, &name): (&i64, &*const c_char)| {
            if size >= 0 {
                return Some(Axis::Size(size));
            }
            let name = (!name.is_null()).then(|| CStr::from_ptr(name).to_owned())?;
            (!name.is_empty()).then_some(Axis::Name(name))
        };
        let axes: Option<Vec<Axis>> = sizes.iter().zip(&names).map(axis).collect();
        Ok(axes.map(|axes| (element, axes)))
    }
}

/// Tells an output's element type, which the runtime takes from here too, and its shape. An axis that is neither known nor named must not be told: the
/// runtime would take it for a size.
///
/// # Safety
/// `context` is what the runtime gave to the inference.
pub(super) unsafe fn tell(
    api: Api,
    context: *mut OrtShapeInferContext,
    output: usize,
    element: Type,
    axes: &[Axis],
) -> Result<()> {
    let size = |axis: &Axis| match axis {
        Axis::Size(size) => *size,
        Axis::Name(_) => -1,
    };
    let name = |axis: &Axis| match axis {
        Axis::Size(_) => c"".as_ptr(),
        Axis::Name(name) => name.as_ptr(),
    };
    let sizes: Vec<i64> = axes.iter().map(size).collect();
    let mut names: Vec<*const c_char> = axes.iter().map(name).collect();
    let mut info: *mut OrtTensorTypeAndShapeInfo = ptr::null_mut();
    // SAFETY: the caller's promise; sizes and names are copied, `info` is released on every way out.
    unsafe {
        Api::check((api.0.CreateTensorTypeAndShapeInfo)(&raw mut info))?;
        let told = Api::check((api.0.SetTensorElementType)(info, element))
            .and_then(|()| {
                let set = api.0.SetDimensions;
                Api::check(set(info, sizes.as_ptr(), sizes.len()))
            })
            .and_then(|()| {
                let set = api.0.SetSymbolicDimensions;
                Api::check(set(info, names.as_mut_ptr(), names.len()))
            })
            .and_then(|()| {
                let set = api.0.ShapeInferContext_SetOutputTypeShape;
                Api::check(set(context, output, info))
            });
        (api.0.ReleaseTensorTypeAndShapeInfo)(info);
        told
    }
}

//! ONNX Runtime's C interface as far as an operator needs it, with statuses as results.

use std::ffi::{CStr, CString, c_void};
use std::ptr;

use ort_sys::{
    ONNXTensorElementDataType, OrtApi, OrtErrorCode, OrtKernelContext, OrtKernelInfo, OrtStatusPtr,
    OrtValue,
};

use crate::refusal::Refusal;

/// ONNX Runtime's functions.
#[derive(Clone, Copy)]
pub(super) struct Api(pub(super) &'static OrtApi);

/// A failure as ONNX Runtime has it; owned.
pub(super) struct Status(OrtStatusPtr);

pub(super) type Result<T> = std::result::Result<T, Status>;

impl Status {
    /// For the caller of the operator.
    pub(super) fn into_raw(self) -> OrtStatusPtr {
        self.0
    }

    /// Its text.
    pub(super) fn into_message(self, api: Api) -> String {
        // SAFETY: a status of the runtime, whose text is copied before it is released.
        unsafe {
            let text = CStr::from_ptr((api.0.GetErrorMessage)(self.0.0));
            let text = text.to_string_lossy().into_owned();
            (api.0.ReleaseStatus)(self.0.0);
            text
        }
    }
}

/// A tensor of the runtime: where its elements are, their type and its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tensor {
    pub(super) data: *mut u8,
    pub(super) element: ONNXTensorElementDataType,
    pub(super) shape: Vec<usize>,
}

impl Tensor {
    pub(super) fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Api {
    pub(super) fn check(status: OrtStatusPtr) -> Result<()> {
        if status.0.is_null() {
            Ok(())
        } else {
            Err(Status(status))
        }
    }

    /// A failure with a message.
    pub(super) fn status(self, code: OrtErrorCode, message: &str) -> Status {
        let text: Vec<u8> = message.bytes().filter(|&byte| byte != 0).collect();
        let text = CString::new(text).unwrap_or_default();
        // SAFETY: the text ends with 0 and is copied.
        Status(unsafe { (self.0.CreateStatus)(code, text.as_ptr()) })
    }

    /// A refusal of an operator's input or attribute.
    pub(super) fn refused(self, code: OrtErrorCode, operator: &str, refusal: &Refusal) -> Status {
        self.status(code, &format!("mlac::{operator}: {refusal}"))
    }

    /// A refusal of an input's value or shape.
    pub(super) fn invalid(self, operator: &str, refusal: &Refusal) -> Status {
        self.refused(OrtErrorCode::ORT_INVALID_ARGUMENT, operator, refusal)
    }

    /// An integer attribute, `None` when the node has none of that name.
    ///
    /// # Safety
    /// `info` is what the runtime gave to the kernel's creation.
    pub(super) unsafe fn int(self, info: *const OrtKernelInfo, name: &str) -> Option<i64> {
        let name = CString::new(name).ok()?;
        let mut value = 0;
        // SAFETY: the caller's promise.
        let status =
            unsafe { (self.0.KernelInfoGetAttribute_int64)(info, name.as_ptr(), &raw mut value) };
        self.found(status).then_some(value)
    }

    /// A float attribute, `None` when the node has none of that name.
    ///
    /// # Safety
    /// As for [`int`](Self::int).
    pub(super) unsafe fn float(self, info: *const OrtKernelInfo, name: &str) -> Option<f32> {
        let name = CString::new(name).ok()?;
        let mut value = 0.0;
        // SAFETY: the caller's promise.
        let status =
            unsafe { (self.0.KernelInfoGetAttribute_float)(info, name.as_ptr(), &raw mut value) };
        self.found(status).then_some(value)
    }

    /// The bytes of a string attribute, `None` when the node has none of that name.
    ///
    /// # Safety
    /// As for [`int`](Self::int).
    pub(super) unsafe fn bytes(
        self,
        info: *const OrtKernelInfo,
        name: &str,
    ) -> Result<Option<Vec<u8>>> {
        let Ok(name) = CString::new(name) else {
            return Ok(None);
        };
        let get = self.0.KernelInfoGetAttribute_string;
        let mut count = 0;
        // SAFETY: the caller's promise; without a place the runtime tells how many bytes there are, a zero at the end counted.
        let status = unsafe { get(info, name.as_ptr(), ptr::null_mut(), &raw mut count) };
        if !self.found(status) {
            return Ok(None);
        }
        let mut bytes = vec![0_u8; count];
        // SAFETY: as above; there is room for all of them.
        Self::check(unsafe {
            get(
                info,
                name.as_ptr(),
                bytes.as_mut_ptr().cast(),
                &raw mut count,
            )
        })?;
        bytes.truncate(count.saturating_sub(1));
        Ok(Some(bytes))
    }

    /// The stream of the node's execution provider.
    ///
    /// # Safety
    /// As for [`input`](Self::input).
    pub(super) unsafe fn stream(self, context: *const OrtKernelContext) -> Result<*mut c_void> {
        let mut stream = ptr::null_mut();
        // SAFETY: the caller's promise.
        let status =
            unsafe { (self.0.KernelContext_GetGPUComputeStream)(context, &raw mut stream) };
        Self::check(status).map(|()| stream)
    }

    fn found(self, status: OrtStatusPtr) -> bool {
        let none = status.0.is_null();
        if !none {
            // SAFETY: a status of the runtime, released once.
            unsafe { (self.0.ReleaseStatus)(status.0) };
        }
        none
    }

    /// An input, `None` when it is left out.
    ///
    /// # Safety
    /// `context` is what the runtime gave to this run.
    pub(super) unsafe fn input(
        self,
        context: *mut OrtKernelContext,
        index: usize,
    ) -> Result<Option<Tensor>> {
        // SAFETY: the caller's promise; values live as long as the run.
        unsafe {
            let mut count = 0;
            Self::check((self.0.KernelContext_GetInputCount)(
                context,
                &raw mut count,
            ))?;
            let mut value: *const OrtValue = ptr::null();
            if index < count {
                let status = (self.0.KernelContext_GetInput)(context, index, &raw mut value);
                Self::check(status)?;
            }
            if value.is_null() {
                return Ok(None);
            }
            self.tensor(value.cast_mut()).map(Some)
        }
    }

    /// All inputs of an operator that has `N`, in order.
    ///
    /// # Safety
    /// As for [`input`](Self::input).
    pub(super) unsafe fn inputs<const N: usize>(
        self,
        context: *mut OrtKernelContext,
    ) -> Result<[Option<Tensor>; N]> {
        let mut all = [const { None }; N];
        for (index, input) in all.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *input = unsafe { self.input(context, index)? };
        }
        Ok(all)
    }

    /// An output of a shape, `None` when nobody wants it.
    ///
    /// # Safety
    /// As for [`input`](Self::input).
    pub(super) unsafe fn output(
        self,
        context: *mut OrtKernelContext,
        index: usize,
        shape: &[usize],
    ) -> Result<Option<Tensor>> {
        let dims: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        // SAFETY: the caller's promise; the shape is read during the call.
        unsafe {
            let mut count = 0;
            Self::check((self.0.KernelContext_GetOutputCount)(
                context,
                &raw mut count,
            ))?;
            let mut value: *mut OrtValue = ptr::null_mut();
            if index < count {
                Self::check((self.0.KernelContext_GetOutput)(
                    context,
                    index,
                    dims.as_ptr(),
                    dims.len(),
                    &raw mut value,
                ))?;
            }
            if value.is_null() {
                return Ok(None);
            }
            self.tensor(value).map(Some)
        }
    }

    /// # Safety
    /// `value` is a tensor of the runtime.
    unsafe fn tensor(self, value: *mut OrtValue) -> Result<Tensor> {
        // SAFETY: the caller's promise; `info` is released on every way out.
        unsafe {
            let mut info = ptr::null_mut();
            Self::check((self.0.GetTensorTypeAndShape)(value, &raw mut info))?;
            let mut element = ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
            let mut rank = 0;
            let mut dims = Vec::new();
            let read = Self::check((self.0.GetTensorElementType)(info, &raw mut element))
                .and_then(|()| Self::check((self.0.GetDimensionsCount)(info, &raw mut rank)))
                .and_then(|()| {
                    dims.resize(rank, 0_i64);
                    Self::check((self.0.GetDimensions)(info, dims.as_mut_ptr(), rank))
                });
            (self.0.ReleaseTensorTypeAndShapeInfo)(info);
            read?;
            let mut data = ptr::null_mut();
            Self::check((self.0.GetTensorMutableData)(value, &raw mut data))?;
            Ok(Tensor {
                data: data.cast(),
                element,
                shape: dims.into_iter().map(|n| n.max(0) as usize).collect(),
            })
        }
    }
}

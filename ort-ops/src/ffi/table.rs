//! ONNX Runtime's table of functions for each operator and type.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use ort_sys::{
    ONNXTensorElementDataType as Type, ORT_API_VERSION, OrtApi, OrtCustomOp,
    OrtCustomOpInputOutputCharacteristic as Presence, OrtErrorCode, OrtKernelContext,
    OrtKernelInfo, OrtMemType, OrtShapeInferContext, OrtStatusPtr,
};

use super::api::{self, Api, Status};
use super::declaration::{Declaration, Node};
use super::{latent_attention, linear16, mxfp4_experts, the_runtime};

/// An operator for one type of the numbers whose type is not fixed, on one execution provider.
#[repr(C)]
pub(super) struct Op {
    table: OrtCustomOp,
    declaration: Declaration,
    element: Type,
    provider: &'static CStr,
}

const F32: Type = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
const F16: Type = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
const BF16: Type = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
const CPU: &CStr = c"CPUExecutionProvider";
const CUDA: &CStr = c"CUDAExecutionProvider";

/// What is registered.
pub(super) static OPS: [Op; 8] = [
    Op::new(latent_attention::ON_CPU, F32, CPU),
    Op::new(latent_attention::ON_CPU, F16, CPU),
    Op::new(latent_attention::ON_CPU, BF16, CPU),
    Op::new(latent_attention::ON_CUDA, F16, CUDA),
    Op::new(latent_attention::ON_CUDA, BF16, CUDA),
    Op::new(mxfp4_experts::DECLARATION, F32, CPU),
    Op::new(linear16::DECLARATION, BF16, CPU),
    Op::new(linear16::DECLARATION, F16, CPU),
];

/// The CUDA kernels where "device" memory is the host's: see [`super::add_cuda_in_host_memory`].
pub(super) static OPS_IN_HOST_MEMORY: [Op; 2] = [
    Op::new(latent_attention::ON_CUDA, F16, CPU),
    Op::new(latent_attention::ON_CUDA, BF16, CPU),
];

/// Runs what may fail or panic; neither crosses into the runtime.
pub(super) fn guard(api: Api, who: &str, run: impl FnOnce() -> api::Result<()>) -> OrtStatusPtr {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => OrtStatusPtr::default(),
        Ok(Err(status)) => status.into_raw(),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            let message = format!("mlac::{who}: a mistake in the operator: {text}");
            let status: Status = api.status(OrtErrorCode::ORT_RUNTIME_EXCEPTION, &message);
            status.into_raw()
        }
    }
}

impl Op {
    const fn new(declaration: Declaration, element: Type, provider: &'static CStr) -> Self {
        Self {
            table: OrtCustomOp {
                version: ORT_API_VERSION,
                CreateKernel: None,
                GetName: Some(name),
                GetExecutionProviderType: Some(provider_of),
                GetInputType: Some(input_type),
                GetInputTypeCount: Some(input_count),
                GetOutputType: Some(output_type),
                GetOutputTypeCount: Some(output_count),
                KernelCompute: None,
                KernelDestroy: Some(destroy),
                GetInputCharacteristic: Some(input_presence),
                GetOutputCharacteristic: Some(output_presence),
                GetInputMemoryType: Some(memory),
                GetVariadicInputMinArity: Some(no_variadic),
                GetVariadicInputHomogeneity: Some(no_variadic),
                GetVariadicOutputMinArity: Some(no_variadic),
                GetVariadicOutputHomogeneity: Some(no_variadic),
                CreateKernelV2: Some(create),
                KernelComputeV2: Some(compute),
                InferOutputShapeFn: if declaration.infer.is_some() {
                    Some(infer_shapes)
                } else {
                    None
                },
                GetStartVersion: Some(version),
                GetEndVersion: Some(version),
                GetMayInplace: Some(declaration.in_place),
                ReleaseMayInplace: Some(release_pairs),
                GetAliasMap: Some(no_alias),
                ReleaseAliasMap: Some(release_pairs),
            },
            declaration,
            element,
            provider,
        }
    }

    /// For the runtime, which gives it back to every function below.
    pub(super) fn table(&self) -> *const OrtCustomOp {
        ptr::from_ref(self).cast()
    }

    fn typed(&self, of: Option<Type>) -> Type {
        of.unwrap_or(self.element)
    }
}

/// # Safety
/// `op` is one of those that are registered here.
unsafe fn op_of<'a>(op: *const OrtCustomOp) -> &'a Op {
    // SAFETY: the table is the first field of every `Op`, and only those are registered.
    unsafe { &*op.cast::<Op>() }
}

unsafe extern "system" fn name(op: *const OrtCustomOp) -> *const c_char {
    // SAFETY: the runtime gives back what was registered, here and below.
    unsafe { op_of(op) }.declaration.name.as_ptr()
}

unsafe extern "system" fn provider_of(op: *const OrtCustomOp) -> *const c_char {
    // SAFETY: as above.
    unsafe { op_of(op) }.provider.as_ptr()
}

unsafe extern "system" fn input_count(op: *const OrtCustomOp) -> usize {
    // SAFETY: as above.
    unsafe { op_of(op) }.declaration.inputs.len()
}

unsafe extern "system" fn output_count(op: *const OrtCustomOp) -> usize {
    // SAFETY: as above.
    unsafe { op_of(op) }.declaration.outputs.len()
}

unsafe extern "system" fn input_type(op: *const OrtCustomOp, index: usize) -> Type {
    // SAFETY: as above.
    let op = unsafe { op_of(op) };
    op.typed(op.declaration.inputs[index].element)
}

unsafe extern "system" fn output_type(op: *const OrtCustomOp, index: usize) -> Type {
    // SAFETY: as above.
    let op = unsafe { op_of(op) };
    op.typed(op.declaration.outputs[index].element)
}

fn presence(required: bool) -> Presence {
    if required {
        Presence::INPUT_OUTPUT_REQUIRED
    } else {
        Presence::INPUT_OUTPUT_OPTIONAL
    }
}

unsafe extern "system" fn input_presence(op: *const OrtCustomOp, index: usize) -> Presence {
    // SAFETY: as above.
    presence(unsafe { op_of(op) }.declaration.inputs[index].required)
}

unsafe extern "system" fn output_presence(op: *const OrtCustomOp, index: usize) -> Presence {
    // SAFETY: as above.
    presence(unsafe { op_of(op) }.declaration.outputs[index].required)
}

unsafe extern "system" fn memory(_: *const OrtCustomOp, _: usize) -> OrtMemType {
    OrtMemType::OrtMemTypeDefault
}

unsafe extern "system" fn no_variadic(_: *const OrtCustomOp) -> c_int {
    0
}

unsafe extern "system" fn version(_: *const OrtCustomOp) -> c_int {
    1
}

/// No output takes an input's memory.
pub(super) unsafe extern "system" fn nothing_in_place(
    inputs: *mut *mut c_int,
    outputs: *mut *mut c_int,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe { no_alias(inputs, outputs) }
}

/// Input 2 may be output 1: a cache that nobody else reads; a session's inputs stay.
pub(super) unsafe extern "system" fn cache_in_place(
    inputs: *mut *mut c_int,
    outputs: *mut *mut c_int,
) -> usize {
    // SAFETY: the runtime passes places for two pointers.
    unsafe {
        *inputs = Box::into_raw(Box::new(2));
        *outputs = Box::into_raw(Box::new(1));
    }
    1
}

unsafe extern "system" fn no_alias(inputs: *mut *mut c_int, outputs: *mut *mut c_int) -> usize {
    // SAFETY: the runtime passes places for two pointers.
    unsafe {
        *inputs = ptr::null_mut();
        *outputs = ptr::null_mut();
    }
    0
}

unsafe extern "system" fn release_pairs(inputs: *mut c_int, outputs: *mut c_int) {
    for pointer in [inputs, outputs] {
        if !pointer.is_null() {
            // SAFETY: made by `cache_in_place`, released once.
            drop(unsafe { Box::from_raw(pointer) });
        }
    }
}

/// The runtime does not say which it is: with two of them in a process nothing is inferred.
unsafe extern "system" fn infer_shapes(
    op: *const OrtCustomOp,
    context: *mut OrtShapeInferContext,
) -> OrtStatusPtr {
    // SAFETY: as above.
    let declaration = &unsafe { op_of(op) }.declaration;
    let (Some(api), Some(infer)) = (the_runtime(), declaration.infer) else {
        return OrtStatusPtr::default();
    };
    guard(api, &declaration.name.to_string_lossy(), || {
        // SAFETY: the runtime's own context.
        unsafe { infer(api, context) }
    })
}

unsafe extern "system" fn create(
    op: *const OrtCustomOp,
    api: *const OrtApi,
    info: *const OrtKernelInfo,
    kernel: *mut *mut c_void,
) -> OrtStatusPtr {
    // SAFETY: the runtime's own table.
    let api = Api(unsafe { &*api });
    // SAFETY: as above.
    let op = unsafe { op_of(op) };
    let declaration = &op.declaration;
    guard(api, &declaration.name.to_string_lossy(), || {
        // SAFETY: the runtime's own pointers; the kernel goes to `destroy`.
        unsafe {
            let made: Box<dyn Node> = (declaration.create)(api, info, op.element)?;
            *kernel = Box::into_raw(Box::new(made)).cast();
        }
        Ok(())
    })
}

unsafe extern "system" fn compute(
    kernel: *mut c_void,
    context: *mut OrtKernelContext,
) -> OrtStatusPtr {
    // SAFETY: made by `create`; runs may be side by side, the kernel is only read.
    let kernel = unsafe { &*kernel.cast::<Box<dyn Node>>() };
    guard(kernel.api(), kernel.name(), || {
        // SAFETY: the runtime's own context.
        unsafe { kernel.run(context) }
    })
}

unsafe extern "system" fn destroy(kernel: *mut c_void) {
    // SAFETY: made by `create`, destroyed once.
    drop(unsafe { Box::from_raw(kernel.cast::<Box<dyn Node>>()) });
}

//! The seam to ONNX Runtime: registration and the table of functions of each operator.

mod api;
mod infer;
mod kernel;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use ort_sys::{
    ONNXTensorElementDataType as Type, ORT_API_VERSION, OrtApi, OrtApiBase, OrtCustomOp,
    OrtCustomOpDomain, OrtCustomOpInputOutputCharacteristic as Presence, OrtErrorCode,
    OrtKernelContext, OrtKernelInfo, OrtMemType, OrtSessionOptions, OrtShapeInferContext,
    OrtStatusPtr,
};

use self::api::{Api, Status};
use self::kernel::{INPUTS, Kernel, OUTPUTS};

const DOMAIN: &CStr = c"mlac";

/// `mlac::LatentAttention` for one type of cached numbers.
#[repr(C)]
struct Op {
    table: OrtCustomOp,
    element: Type,
}

static OPS: [Op; 3] = [
    Op::new(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT),
    Op::new(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16),
    Op::new(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16),
];

/// The domain by runtime: it must live as long as any session, so it stays. Addresses, for they have no owner.
static DOMAINS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Adds `mlac::LatentAttention` to a session's options. Null on success, else a status with the reason.
///
/// # Safety
/// For ONNX Runtime to call: both pointers are its own, and are valid.
#[unsafe(no_mangle)]
pub unsafe extern "system" fn RegisterCustomOps(
    options: *mut OrtSessionOptions,
    base: *const OrtApiBase,
) -> OrtStatusPtr {
    // SAFETY: the runtime's base table.
    let api = unsafe { ((*base).GetApi)(ORT_API_VERSION) };
    if api.is_null() {
        // SAFETY: version 1 of the table is in every runtime.
        let Some(first) = (unsafe { ((*base).GetApi)(1).as_ref() }) else {
            return OrtStatusPtr::default();
        };
        let message = format!(
            "libmlac_ort.so: expected ONNX Runtime 1.{ORT_API_VERSION} or later, found an older one; install a later one"
        );
        return Api(first)
            .status(OrtErrorCode::ORT_FAIL, &message)
            .into_raw();
    }
    // SAFETY: the table lives as long as the runtime.
    let api = Api(unsafe { &*api });
    guard(api, || {
        // SAFETY: the caller's promise.
        unsafe { register(api, options) }
    })
}

/// Adds `mlac::LatentAttention` to a session's options, from a program that has the operator in itself.
///
/// # Errors
/// The runtime's message.
///
/// # Safety
/// `options` is of the runtime that `api` is of.
pub unsafe fn add_to_options(
    options: *mut OrtSessionOptions,
    api: &'static OrtApi,
) -> Result<(), String> {
    let api = Api(api);
    // SAFETY: the caller's promise.
    unsafe { register(api, options) }.map_err(|status| status.into_message(api))
}

/// # Safety
/// `options` is the runtime's.
unsafe fn register(api: Api, options: *mut OrtSessionOptions) -> api::Result<()> {
    let key = ptr::from_ref::<OrtApi>(api.0) as usize;
    let mut domains = DOMAINS.lock().unwrap_or_else(PoisonError::into_inner);
    let known = domains.iter().find(|(of, _)| *of == key);
    // SAFETY: the operators are static and the domain is never released.
    unsafe {
        let domain = if let Some(&(_, domain)) = known {
            domain as *mut OrtCustomOpDomain
        } else {
            let mut domain = ptr::null_mut();
            let status = (api.0.CreateCustomOpDomain)(DOMAIN.as_ptr(), &raw mut domain);
            Api::check(status)?;
            for op in &OPS {
                Api::check((api.0.CustomOpDomain_Add)(domain, &raw const op.table))?;
            }
            domains.push((key, domain as usize));
            domain
        };
        Api::check((api.0.AddCustomOpDomain)(options, domain))
    }
}

/// Runs what may fail or panic; neither crosses into the runtime.
fn guard(api: Api, run: impl FnOnce() -> api::Result<()>) -> OrtStatusPtr {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => OrtStatusPtr::default(),
        Ok(Err(status)) => status.into_raw(),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            let message = format!("mlac::LatentAttention: a mistake in the operator: {text}");
            let status: Status = api.status(OrtErrorCode::ORT_RUNTIME_EXCEPTION, &message);
            status.into_raw()
        }
    }
}

impl Op {
    const fn new(element: Type) -> Self {
        Self {
            table: OrtCustomOp {
                version: ORT_API_VERSION,
                CreateKernel: None,
                GetName: Some(name),
                GetExecutionProviderType: Some(provider),
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
                InferOutputShapeFn: Some(infer_shapes),
                GetStartVersion: Some(version),
                GetEndVersion: Some(version),
                GetMayInplace: Some(may_inplace),
                ReleaseMayInplace: Some(release_pairs),
                GetAliasMap: Some(no_alias),
                ReleaseAliasMap: Some(release_pairs),
            },
            element,
        }
    }

    fn typed(&self, of: Option<Type>) -> Type {
        of.unwrap_or(self.element)
    }
}

/// # Safety
/// `op` is one of [`OPS`].
unsafe fn op_of<'a>(op: *const OrtCustomOp) -> &'a Op {
    // SAFETY: the table is the first field of every `Op`, and only those are registered.
    unsafe { &*op.cast::<Op>() }
}

unsafe extern "system" fn name(_: *const OrtCustomOp) -> *const c_char {
    c"LatentAttention".as_ptr()
}

unsafe extern "system" fn provider(_: *const OrtCustomOp) -> *const c_char {
    c"CPUExecutionProvider".as_ptr()
}

unsafe extern "system" fn input_count(_: *const OrtCustomOp) -> usize {
    INPUTS.len()
}

unsafe extern "system" fn output_count(_: *const OrtCustomOp) -> usize {
    OUTPUTS.len()
}

unsafe extern "system" fn input_type(op: *const OrtCustomOp, index: usize) -> Type {
    // SAFETY: the runtime gives back what was registered.
    unsafe { op_of(op) }.typed(INPUTS[index].element)
}

unsafe extern "system" fn output_type(op: *const OrtCustomOp, index: usize) -> Type {
    // SAFETY: as above.
    unsafe { op_of(op) }.typed(OUTPUTS[index].element)
}

fn presence(required: bool) -> Presence {
    if required {
        Presence::INPUT_OUTPUT_REQUIRED
    } else {
        Presence::INPUT_OUTPUT_OPTIONAL
    }
}

unsafe extern "system" fn input_presence(_: *const OrtCustomOp, index: usize) -> Presence {
    presence(INPUTS[index].required)
}

unsafe extern "system" fn output_presence(_: *const OrtCustomOp, index: usize) -> Presence {
    presence(OUTPUTS[index].required)
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

/// The cache, input 2, may be output 1. The runtime does so for a cache that nobody else reads; a session's inputs stay.
unsafe extern "system" fn may_inplace(inputs: *mut *mut c_int, outputs: *mut *mut c_int) -> usize {
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
            // SAFETY: made by `may_inplace`, released once.
            drop(unsafe { Box::from_raw(pointer) });
        }
    }
}

/// The runtime does not say which it is: with two of them in a process nothing is inferred.
unsafe extern "system" fn infer_shapes(
    _: *const OrtCustomOp,
    context: *mut OrtShapeInferContext,
) -> OrtStatusPtr {
    let runtime = match DOMAINS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .as_slice()
    {
        &[(runtime, _)] => runtime as *const OrtApi,
        _ => return OrtStatusPtr::default(),
    };
    // SAFETY: the table of the runtime that registered the operator, the only one.
    let api = Api(unsafe { &*runtime });
    guard(api, || {
        // SAFETY: the runtime's own context.
        unsafe { infer::infer(api, context) }
    })
}

unsafe extern "system" fn create(
    _: *const OrtCustomOp,
    api: *const OrtApi,
    info: *const OrtKernelInfo,
    kernel: *mut *mut c_void,
) -> OrtStatusPtr {
    // SAFETY: the runtime's own table.
    let api = Api(unsafe { &*api });
    guard(api, || {
        // SAFETY: the runtime's own pointers; the kernel goes to `destroy`.
        unsafe {
            let made = Kernel::new(api, info)?;
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
    let kernel = unsafe { &*kernel.cast::<Kernel>() };
    guard(kernel.api(), || {
        // SAFETY: the runtime's own context.
        unsafe { kernel.run(context) }
    })
}

unsafe extern "system" fn destroy(kernel: *mut c_void) {
    // SAFETY: made by `create`, destroyed once.
    drop(unsafe { Box::from_raw(kernel.cast::<Kernel>()) });
}

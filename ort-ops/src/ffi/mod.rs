//! The seam to ONNX Runtime: registration and the table of functions of each operator.

mod api;
mod cuda;
mod infer;
mod kernel;
mod node;

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
use self::cuda::CudaKernel;
use self::kernel::Kernel;
use self::node::{INPUTS, OUTPUTS};

const DOMAIN: &CStr = c"mlac";

/// What runs a node.
trait Node: Sized {
    /// # Safety
    /// `info` is what the runtime gave to the kernel's creation; `element` is the type of the node's cached numbers.
    unsafe fn new(api: Api, info: *const OrtKernelInfo, element: Type) -> api::Result<Self>;

    fn api(&self) -> Api;

    /// # Safety
    /// `context` is what the runtime gave to this run.
    unsafe fn run(&self, context: *mut OrtKernelContext) -> api::Result<()>;
}

/// `mlac::LatentAttention` for one type of cached numbers on one execution provider.
#[repr(C)]
struct Op {
    table: OrtCustomOp,
    element: Type,
    provider: &'static CStr,
}

const CPU: &CStr = c"CPUExecutionProvider";
const CUDA: &CStr = c"CUDAExecutionProvider";

static OPS: [Op; 5] = [
    Op::of::<Kernel>(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, CPU),
    Op::of::<Kernel>(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, CPU),
    Op::of::<Kernel>(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, CPU),
    Op::of::<CudaKernel>(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, CUDA),
    Op::of::<CudaKernel>(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, CUDA),
];

/// The CUDA kernels where "device" memory is the host's: see [`add_cuda_in_host_memory`].
static OPS_IN_HOST_MEMORY: [Op; 2] = [
    Op::of::<CudaKernel>(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, CPU),
    Op::of::<CudaKernel>(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, CPU),
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

/// Adds the CUDA operator alone, for the CPU's execution provider: for tests with a driver that runs kernels on the CPU. On a
/// real driver its kernels would be given host addresses.
///
/// # Errors
/// The runtime's message.
///
/// # Safety
/// As for [`add_to_options`]; the process's `libcuda.so.1` is one that reads host memory.
#[doc(hidden)]
pub unsafe fn add_cuda_in_host_memory(
    options: *mut OrtSessionOptions,
    api: &'static OrtApi,
) -> Result<(), String> {
    let api = Api(api);
    // SAFETY: the caller's promise.
    unsafe { domain_of(api, &OPS_IN_HOST_MEMORY) }
        // SAFETY: the domain is never released.
        .and_then(|domain| Api::check(unsafe { (api.0.AddCustomOpDomain)(options, domain) }))
        .map_err(|status| status.into_message(api))
}

/// # Safety
/// `ops` are as the runtime wants them.
unsafe fn domain_of(api: Api, ops: &'static [Op]) -> api::Result<*mut OrtCustomOpDomain> {
    let mut domain = ptr::null_mut();
    // SAFETY: the operators are static and the domain is never released.
    unsafe {
        Api::check((api.0.CreateCustomOpDomain)(
            DOMAIN.as_ptr(),
            &raw mut domain,
        ))?;
        for op in ops {
            Api::check((api.0.CustomOpDomain_Add)(domain, &raw const op.table))?;
        }
    }
    Ok(domain)
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
            let domain = domain_of(api, &OPS)?;
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
    const fn of<K: Node>(element: Type, provider: &'static CStr) -> Self {
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
                KernelDestroy: Some(destroy::<K>),
                GetInputCharacteristic: Some(input_presence),
                GetOutputCharacteristic: Some(output_presence),
                GetInputMemoryType: Some(memory),
                GetVariadicInputMinArity: Some(no_variadic),
                GetVariadicInputHomogeneity: Some(no_variadic),
                GetVariadicOutputMinArity: Some(no_variadic),
                GetVariadicOutputHomogeneity: Some(no_variadic),
                CreateKernelV2: Some(create::<K>),
                KernelComputeV2: Some(compute::<K>),
                InferOutputShapeFn: Some(infer_shapes),
                GetStartVersion: Some(version),
                GetEndVersion: Some(version),
                GetMayInplace: Some(may_inplace),
                ReleaseMayInplace: Some(release_pairs),
                GetAliasMap: Some(no_alias),
                ReleaseAliasMap: Some(release_pairs),
            },
            element,
            provider,
        }
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

unsafe extern "system" fn name(_: *const OrtCustomOp) -> *const c_char {
    c"LatentAttention".as_ptr()
}

unsafe extern "system" fn provider_of(op: *const OrtCustomOp) -> *const c_char {
    // SAFETY: the runtime gives back what was registered.
    unsafe { op_of(op) }.provider.as_ptr()
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

unsafe extern "system" fn create<K: Node>(
    op: *const OrtCustomOp,
    api: *const OrtApi,
    info: *const OrtKernelInfo,
    kernel: *mut *mut c_void,
) -> OrtStatusPtr {
    // SAFETY: the runtime's own table.
    let api = Api(unsafe { &*api });
    guard(api, || {
        // SAFETY: the runtime's own pointers; the kernel goes to `destroy`.
        unsafe {
            let made = K::new(api, info, op_of(op).element)?;
            *kernel = Box::into_raw(Box::new(made)).cast();
        }
        Ok(())
    })
}

unsafe extern "system" fn compute<K: Node>(
    kernel: *mut c_void,
    context: *mut OrtKernelContext,
) -> OrtStatusPtr {
    // SAFETY: made by `create`; runs may be side by side, the kernel is only read.
    let kernel = unsafe { &*kernel.cast::<K>() };
    guard(kernel.api(), || {
        // SAFETY: the runtime's own context.
        unsafe { kernel.run(context) }
    })
}

unsafe extern "system" fn destroy<K>(kernel: *mut c_void) {
    // SAFETY: made by `create`, destroyed once.
    drop(unsafe { Box::from_raw(kernel.cast::<K>()) });
}

//! The seam to ONNX Runtime: registration and the table of functions of each operator.

mod api;
mod declaration;
mod latent_attention;
mod linear16;
mod mxfp4_experts;
mod run;
mod shapes;
mod table;

use std::ffi::CStr;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use ort_sys::{
    ORT_API_VERSION, OrtApi, OrtApiBase, OrtCustomOpDomain, OrtErrorCode, OrtSessionOptions,
    OrtStatusPtr,
};

use self::api::Api;
use self::table::{OPS, OPS_IN_HOST_MEMORY, Op, guard};

const DOMAIN: &CStr = c"mlac";

/// The domain by runtime: it must live as long as any session, so it stays. Addresses, for they have no owner.
static DOMAINS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Adds mlac's operators to a session's options. Null on success, else a status with the reason.
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
    guard(api, "RegisterCustomOps", || {
        // SAFETY: the caller's promise.
        unsafe { register(api, options) }
    })
}

/// Adds mlac's operators to a session's options, from a program that has them in itself.
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

/// The only runtime that the operators were registered with, if it is one.
fn the_runtime() -> Option<Api> {
    let domains = DOMAINS.lock().unwrap_or_else(PoisonError::into_inner);
    let &[(runtime, _)] = domains.as_slice() else {
        return None;
    };
    // SAFETY: the table of the runtime that registered the operators, which lives as long as the runtime.
    Some(Api(unsafe { &*(runtime as *const OrtApi) }))
}

/// # Safety
/// `ops` are as the runtime wants them.
unsafe fn domain_of(api: Api, ops: &'static [Op]) -> api::Result<*mut OrtCustomOpDomain> {
    let mut domain = ptr::null_mut();
    // SAFETY: the operators are static and the domain is never released.
    unsafe {
        let status = (api.0.CreateCustomOpDomain)(DOMAIN.as_ptr(), &raw mut domain);
        Api::check(status)?;
        for op in ops {
            Api::check((api.0.CustomOpDomain_Add)(domain, op.table()))?;
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

//! Shapes of the outputs from those of the inputs.

use std::ffi::c_void;
use std::ptr;

use ort_sys::{OrtOpAttrType, OrtShapeInferContext};

use super::super::api::{Api, Result};
use super::super::shapes::{Axis, axes, tell};

/// Tells the shapes of `sums` and `cache_out`. Nothing is told of an output when an axis of it is neither known nor named.
/// `lse` is left out: the runtime does not say whether a node has it.
///
/// # Safety
/// `context` is what the runtime gave to the inference.
pub(super) unsafe fn infer(api: Api, context: *mut OrtShapeInferContext) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe {
        let (query, cache) = (axes(api, context, 0)?, axes(api, context, 2)?);
        if let (Some((element, query)), Some(rank)) = (query, kv_lora_rank(api, context)?)
            && let [batch, tokens, heads, _] = query.as_slice()
        {
            let sums = [
                batch.clone(),
                tokens.clone(),
                heads.clone(),
                Axis::Size(rank),
            ];
            tell(api, context, 0, element, &sums)?;
        }
        if let Some((element, cache)) = cache.filter(|(_, axes)| axes.len() == 3) {
            tell(api, context, 1, element, &cache)?;
        }
    }
    Ok(())
}

/// The attribute, `None` without.
///
/// # Safety
/// As for [`infer`].
unsafe fn kv_lora_rank(api: Api, context: *const OrtShapeInferContext) -> Result<Option<i64>> {
    let (mut attribute, mut rank, mut bytes) = (ptr::null(), 0_i64, 0);
    // SAFETY: the caller's promise; a place for one integer.
    unsafe {
        let get = api.0.ShapeInferContext_GetAttribute;
        let name = c"kv_lora_rank".as_ptr();
        Api::check(get(context, name, &raw mut attribute))?;
        if attribute.is_null() {
            return Ok(None);
        }
        Api::check((api.0.ReadOpAttr)(
            attribute,
            OrtOpAttrType::ORT_OP_ATTR_INT,
            (&raw mut rank).cast::<c_void>(),
            size_of::<i64>(),
            &raw mut bytes,
        ))?;
    }
    Ok(Some(rank))
}

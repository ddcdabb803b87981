//! mlac's own operators in every session.
#![expect(
    unsafe_code,
    reason = "the operators are added to the runtime's own options"
)]

use ort::AsPointer;
use ort::session::builder::SessionBuilder;

/// Adds `mlac::LatentAttention` to what a session knows.
pub(super) fn add(builder: &mut SessionBuilder) -> Result<(), String> {
    // SAFETY: both are of the one ONNX Runtime of the process.
    unsafe { mlac_ort::add_to_options(builder.ptr_mut(), ort::api()) }
}

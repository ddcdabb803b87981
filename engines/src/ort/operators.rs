//! mlac's own operators in every session.
#![expect(
    unsafe_code,
    reason = "the operators are added to the runtime's own options"
)]

use std::sync::{Mutex, OnceLock, PoisonError};

use ort::AsPointer;
use ort::session::builder::SessionBuilder;

/// Adds `mlac::LatentAttention` to what a session knows.
pub(super) fn add(builder: &mut SessionBuilder) -> Result<(), String> {
    // SAFETY: both are of the one ONNX Runtime of the process.
    unsafe { mlac_ort::add_to_options(builder.ptr_mut(), ort::api()) }
}

/// Makes a session, and the first of the process alone: it adds the domain `mlac` to a map of ONNX Runtime's
/// that knows no threads. Two that do so at once fail, or worse.
pub(super) fn first_alone<T, E>(make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    static FIRST: Mutex<()> = Mutex::new(());
    static ADDED: OnceLock<()> = OnceLock::new();
    if ADDED.get().is_some() {
        return make();
    }
    let _alone = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    let made = make();
    if made.is_ok() {
        ADDED.get_or_init(|| ());
    }
    made
}

//! What TensorRT says while it works.
#![expect(unsafe_code, reason = "called by TensorRT with pointers")]

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, PoisonError};

/// Collects TensorRT's messages; it may log from threads of its own.
#[derive(Default)]
pub(super) struct Log {
    errors: Mutex<Vec<String>>,
    warnings: Mutex<Vec<String>>,
}

impl Log {
    pub(super) fn take_errors(&self) -> Vec<String> {
        std::mem::take(&mut self.errors.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn warn(&self, text: &str) {
        self.warnings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(text.to_owned());
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        self.warnings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

pub(super) extern "C" fn collect(user: *mut c_void, severity: i32, message: *const c_char) {
    // SAFETY: `user` is the `Log` that `Builder` boxes and drops after everything that can log.
    let log = unsafe { &*user.cast::<Log>() };
    let list = match severity {
        0 | 1 => &log.errors,
        2 => &log.warnings,
        _ => return,
    };
    list.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(text(message));
}

pub(super) fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: not null; TensorRT passes C strings that live at least as long as the call.
    unsafe { CStr::from_ptr(pointer) }
        .to_string_lossy()
        .trim()
        .to_owned()
}

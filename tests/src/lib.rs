//! What the cross-crate tests share: fixtures computed by other programs, a table of cases that
//! reports every failure, and the runtimes that set-up installs.

pub mod cases;
pub mod compare;
pub mod decode;
pub mod experts;
pub mod export;
pub mod fixtures;
pub mod latent;
pub mod linear;
pub mod python;
pub mod runtime;
pub mod smollm2;
pub mod words;

/// What a test step fails with: any error as text.
pub type Outcome<T = ()> = Result<T, String>;

/// Any error as text, for `map_err`.
pub fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

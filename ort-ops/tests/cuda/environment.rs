//! ONNX Runtime, loaded once.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;

pub(crate) fn environment() -> &'static Environment {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let runtime = std::env::var_os("MLAC_RUNTIME_DIR")
            .filter(|value| !value.is_empty())
            .map_or_else(
                || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/runtime"),
                PathBuf::from,
            );
        let environment = ort::init_from(runtime.join("onnxruntime/libonnxruntime.so"))
            .unwrap_or_else(|error| {
                panic!("ONNX Runtime: found {error}, needed libonnxruntime.so, fix: run `cargo xtask setup`")
            })
            .with_telemetry(false)
            .build()
            .unwrap();
        environment.set_log_level(ort::logging::LogLevel::Fatal);
        environment
    })
}

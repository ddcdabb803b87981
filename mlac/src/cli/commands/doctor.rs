//! `mlac doctor`.

use std::fmt::Write as _;

use mlac_engines::doctor::{Part, examine};
use mlac_kernels::{Compiler, CompilerName, Toolchain};

use super::Context;
use crate::error::Error;

pub(super) fn run(context: Context) -> Result<bool, Error> {
    let mut parts = examine();
    parts.extend(CompilerName::ALL.map(cuda_compiler));
    let mut text = String::new();
    for part in &parts {
        let _ = writeln!(text, "{}", part.component);
        let _ = writeln!(
            text,
            "  found:  {}",
            part.found.as_deref().unwrap_or("nothing")
        );
        let _ = writeln!(text, "  needed: {}", part.needed);
        if let Some(fix) = &part.fix {
            let _ = writeln!(text, "  fix:    {fix}");
        }
    }
    context.show(&parts, &text)?;
    Ok(parts.iter().all(|p| p.found.is_some() || !p.required))
}

/// A compiler of our own kernels, as `mlac kernels build` would take it.
fn cuda_compiler(name: CompilerName) -> Part {
    let needed = match name {
        CompilerName::Nvrtc => {
            "NVRTC, cuobjdump and nvdisasm of CUDA 13.0, to compile and check mlac's own kernels"
        }
        CompilerName::Nvcc => {
            "nvcc of CUDA 13.0 beside NVRTC, and g++, for `mlac kernels build --compiler nvcc` only"
        }
    };
    let mut part = Part {
        component: format!("CUDA compiler {name}"),
        found: None,
        version: None,
        needed: needed.into(),
        fix: None,
        required: false,
    };
    let toolchain = match Toolchain::find() {
        Ok(toolchain) => toolchain,
        Err(refusal) => {
            part.fix = Some(refusal.to_string());
            return part;
        }
    };
    match Compiler::load(&toolchain, name) {
        Ok(compiler) => {
            part.found = Some(toolchain.folder().display().to_string());
            part.version = Some(compiler.version().to_owned());
        }
        Err(error) => part.fix = Some(error.to_string()),
    }
    part
}

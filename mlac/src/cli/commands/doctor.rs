//! `mlac doctor`.

use std::fmt::Write as _;

use mlac_engines::doctor::{Part, examine};
use mlac_kernels::{Compiler, Toolchain};

use super::Context;
use crate::error::Error;

pub(super) fn run(context: Context) -> Result<bool, Error> {
    let mut parts = examine();
    parts.push(cuda_compiler());
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

/// The compiler of our own kernels, as `mlac kernels build` would take it.
fn cuda_compiler() -> Part {
    let mut part = Part {
        component: "CUDA compiler".into(),
        found: None,
        version: None,
        needed:
            "NVRTC, cuobjdump and nvdisasm of CUDA 13.0, to compile and check mlac's own kernels"
                .into(),
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
    match Compiler::load(&toolchain) {
        Ok(compiler) => {
            part.found = Some(toolchain.folder().display().to_string());
            let (major, minor) = compiler.version();
            part.version = Some(format!("{major}.{minor}"));
        }
        Err(error) => part.fix = Some(error.to_string()),
    }
    part
}

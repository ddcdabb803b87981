//! `mlac export`.

use std::fmt::Write as _;

use mlac_graph::builders::{GqaForm, Runtime};
use mlac_graph::ir::DType;
use mlac_kernels::Arch;
use mlac_model::{Checkpoint, Refusal};

use super::Context;
use crate::cli::args::{DtypeArg, ExportArgs, FormArg, GqaFormArg};
use crate::cli::units::show_bytes;
use crate::error::Error;
use crate::pipeline::export::{ExportOptions, export};

pub(super) fn run(args: &ExportArgs, context: Context) -> Result<bool, Error> {
    let cuda = args.form == FormArg::OrtCuda;
    let usual = if cuda { DtypeArg::F16 } else { DtypeArg::F32 };
    let dtype = match args.dtype.unwrap_or(usual) {
        DtypeArg::F32 => DType::F32,
        DtypeArg::F16 => DType::F16,
        DtypeArg::Bf16 => {
            return Err(Refusal::new(
                "--dtype",
                "f32 or f16",
                "bf16",
                "ONNX Runtime's CPU kernels take no bf16; export f16 or f32",
            )
            .into());
        }
    };
    let gqa_form = match args.gqa_form {
        GqaFormArg::Primitives => GqaForm::Primitives,
        GqaFormArg::Operator => GqaForm::GroupQueryAttention,
    };
    let runtime = match args.form {
        _ if args.tensorrt => Runtime::TensorRt,
        FormArg::Standard => Runtime::Standard,
        FormArg::Ort => Runtime::OnnxRuntime,
        FormArg::OrtCuda => Runtime::OnnxRuntimeCuda,
        FormArg::Tensorrt => Runtime::TensorRtPlugin,
    };
    let arch = target(args)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let exported = export(
        &checkpoint,
        &args.output,
        ExportOptions {
            dtype,
            gqa_form,
            runtime,
            arch,
        },
        context.progress,
    )?;
    let mut text = String::new();
    for (name, bytes) in &exported.files {
        let _ = writeln!(
            text,
            "{}  {}",
            args.output.join(name).display(),
            show_bytes(*bytes)
        );
    }
    if let Some(arch) = arch {
        let _ = writeln!(
            text,
            "for ONNX Runtime's CUDA execution provider on {arch}; not run on a GPU"
        );
    }
    context.show(&exported, &text)?;
    Ok(true)
}

/// The GPU that the nodes bring kernels for.
fn target(args: &ExportArgs) -> Result<Option<Arch>, Refusal> {
    match (args.form, args.target.as_deref()) {
        (FormArg::OrtCuda, Some(target)) => target.parse().map(Some),
        (FormArg::OrtCuda, None) => Err(Refusal::new(
            "--target",
            "the GPU architecture that the kernels are compiled for",
            "none",
            "give for example --target sm_90a (H100 and H200)",
        )),
        (_, None) => Ok(None),
        (_, Some(target)) => Err(Refusal::new(
            "--target",
            "--form ort-cuda, the only form that is for one GPU",
            format!("--target {target} with another form"),
            "leave --target out, or give --form ort-cuda",
        )),
    }
}

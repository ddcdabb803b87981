//! `mlac export`.

use std::fmt::Write as _;

use mlac_graph::builders::{GqaForm, Runtime};
use mlac_graph::ir::DType;
use mlac_model::{Checkpoint, Refusal};

use super::Context;
use crate::cli::args::{DtypeArg, ExportArgs, FormArg, GqaFormArg};
use crate::cli::units::show_bytes;
use crate::error::Error;
use crate::pipeline::export::{ExportOptions, export};

pub(super) fn run(args: &ExportArgs, context: Context) -> Result<bool, Error> {
    let dtype = match args.dtype {
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
        FormArg::Tensorrt => Runtime::TensorRtPlugin,
    };
    let checkpoint = Checkpoint::open(&args.model)?;
    let exported = export(
        &checkpoint,
        &args.output,
        ExportOptions {
            dtype,
            gqa_form,
            runtime,
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
    context.show(&exported, &text)?;
    Ok(true)
}

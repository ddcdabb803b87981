//! `mlac compile`: the whole way.

use mlac_model::Checkpoint;

use super::Context;
use super::build::{profiles, targets};
use super::convert::{convert_request, forget_refined};
use crate::cli::args::{CompileArgs, CompileFormArg, DtypeArg};
use crate::cli::summary;
use crate::error::Error;
use crate::pipeline::compile::{CompileRequest, compile};
use crate::report::data::Form;

pub(super) fn run(args: &CompileArgs, context: Context) -> Result<bool, Error> {
    crate::staging::refuse_existing(&args.output)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let staging = crate::staging::Staging::create(&args.output)?;
    let folder = staging.path().join("checkpoint");
    let convert = convert_request(
        &checkpoint,
        (&folder, &args.output),
        &args.ranks,
        &args.calib,
        DtypeArg::F32,
        5 << 30,
        context,
    )?;
    let refine = convert.refine.clone();
    let request = CompileRequest {
        convert,
        staging: staging.path(),
        output: &args.output,
        source: &args.model,
        form: match args.form {
            CompileFormArg::Standard => Form::Standard,
            CompileFormArg::Ort => Form::Ort,
        },
        evaluation: args.eval.as_deref(),
        eval_window: args.eval_window,
        eval_windows: args.eval_windows,
        targets: targets(&args.profile)?,
        profiles: profiles(&args.profile),
        contexts: &args.contexts,
        prompt: &args.prompt,
        command: std::env::args().collect::<Vec<_>>().join(" "),
    };
    let report = compile(&request, context.progress)?;
    staging.finish()?;
    forget_refined(refine.as_ref())?;
    context.show(&report, &summary::text(&report, &args.output))?;
    Ok(report.parity.iter().all(|p| p.passed != Some(false)))
}

//! `mlac eval`.

use super::Context;
use crate::cli::args::EvalArgs;
use crate::error::Error;
use crate::pipeline::evaluate;
use crate::pipeline::subject::Subject;

pub(super) fn run(args: &EvalArgs, context: Context) -> Result<bool, Error> {
    let mut subject = Subject::open(&args.model, context.threads)?;
    let result = evaluate::evaluate(
        &mut subject,
        &args.text,
        args.window,
        args.windows,
        context.threads,
        context.progress,
    )?;
    let text = format!(
        "perplexity {:.4} over {} windows of {} tokens ({:.1} s)",
        result.perplexity,
        result.losses.len(),
        result.window,
        result.seconds
    );
    context.show(&result, &text)?;
    Ok(true)
}

//! `mlac verify`.

use std::fmt::Write as _;

use mlac_engines::parity::Tolerance;

use super::Context;
use crate::cli::args::VerifyArgs;
use crate::error::Error;
use crate::pipeline::subject::Subject;
use crate::pipeline::verify;

pub(super) fn run(args: &VerifyArgs, context: Context) -> Result<bool, Error> {
    let mut a = Subject::open(&args.a, context.threads)?;
    let mut b = Subject::open(&args.b, context.threads)?;
    let tolerance = Tolerance {
        max_abs: args.max_abs,
        max_rel: f64::INFINITY,
        min_cosine: -1.0,
        max_mean_kl: f64::INFINITY,
        min_top1: args.min_top1,
    };
    let result = verify::verify(
        &mut a,
        &mut b,
        args.text.as_deref(),
        args.tokens,
        args.steps,
        &tolerance,
        context.threads,
        context.progress,
    )?;
    let f = &result.figures;
    let mut text = format!(
        "{} tokens, logits of scale {:.3}\nmax abs   {:.3e}\nmax rel   {:.3e}\ncosine    {:.9}\nmean KL   {:.3e}\nmax KL    {:.3e}\ntop-1     {:.2} %\n",
        f.tokens,
        f.scale,
        f.max_abs,
        f.max_rel,
        f.cosine,
        f.mean_kl,
        f.max_kl,
        f.top1 * 100.0
    );
    if let Some(w) = &f.worst {
        let _ = writeln!(
            text,
            "worst     token {}, id {}: {} and {}",
            w.token, w.vocab, w.a, w.b
        );
    }
    for failure in &result.failures {
        let _ = writeln!(
            text,
            "FAILED    {}: limit {}, found {}",
            failure.gate, failure.limit, failure.found
        );
    }
    if result.failures.is_empty() {
        text.push_str("within tolerance\n");
    }
    context.show(&result, &text)?;
    Ok(result.failures.is_empty())
}

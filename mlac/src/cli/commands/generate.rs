//! `mlac generate`.

use super::Context;
use crate::cli::args::GenerateArgs;
use crate::error::Error;
use crate::pipeline::generate;
use crate::pipeline::subject::Subject;

pub(super) fn run(args: &GenerateArgs, context: Context) -> Result<bool, Error> {
    let mut subject = Subject::open(&args.model, context.threads)?;
    let result = generate::generate(&mut subject, &args.prompt, args.max_tokens)?;
    let text = format!(
        "{}{}\n\n({} tokens, {:.1} tokens a second, {} bytes of cache a token)",
        result.prompt,
        result.text,
        result.tokens,
        result.tokens_per_second,
        result.cache_bytes_per_token
    );
    context.show(&result, &text)?;
    Ok(true)
}

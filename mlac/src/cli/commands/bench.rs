//! `mlac bench`.

use std::path::Path;

use super::Context;
use crate::cli::args::BenchArgs;
use crate::cli::units::{show_bytes, show_tokens, table};
use crate::error::Error;
use crate::pipeline::bench;

pub(super) fn run(args: &BenchArgs, context: Context) -> Result<bool, Error> {
    let folders: Vec<&Path> = std::iter::once(args.a.as_path())
        .chain(args.b.as_deref())
        .collect();
    let results = bench::bench(
        &folders,
        &args.contexts,
        args.repeats,
        context.threads,
        context.progress,
    )?;
    let mut head = vec!["context", "A ms", "A cache"];
    if args.b.is_some() {
        head.extend(["B ms", "B cache", "A / B"]);
    }
    let rows: Vec<Vec<String>> = results
        .iter()
        .map(|r| {
            let mut row = vec![show_tokens(r.context)];
            for (ms, bytes) in r.milliseconds.iter().zip(&r.cache_bytes) {
                row.extend([format!("{ms:.2}"), show_bytes(*bytes as u64)]);
            }
            if let [a, b] = r.milliseconds[..] {
                row.push(format!("{:.2}", a / b));
            }
            row
        })
        .collect();
    context.show(&results, &table(&head, &rows))?;
    Ok(true)
}

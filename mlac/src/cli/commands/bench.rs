//! `mlac bench`.

use std::path::{Path, PathBuf};

use super::Context;
use crate::cli::args::BenchArgs;
use crate::cli::units::{show_bytes, show_tokens, table};
use crate::error::Error;
use crate::pipeline::bench;

pub(super) fn run(args: &BenchArgs, context: Context) -> Result<bool, Error> {
    let folders: Vec<&Path> = args.models.iter().map(PathBuf::as_path).collect();
    let results = bench::bench(
        &folders,
        &args.contexts,
        args.repeats,
        context.threads,
        context.progress,
    )?;
    let name = |i: usize| char::from(b'A' + (i % 26) as u8);
    let last = folders.len() - 1;
    let mut head = vec!["context".to_owned()];
    head.extend((0..=last).flat_map(|i| [format!("{} ms", name(i)), format!("{} cache", name(i))]));
    head.extend((0..last).map(|i| format!("{} / {}", name(i), name(last))));
    let rows: Vec<Vec<String>> = results
        .iter()
        .map(|r| {
            let mut row = vec![show_tokens(r.context)];
            for (ms, bytes) in r.milliseconds.iter().zip(&r.cache_bytes) {
                row.extend([format!("{ms:.2}"), show_bytes(*bytes as u64)]);
            }
            let ratio = |ms: &f64| format!("{:.2}", ms / r.milliseconds[last]);
            row.extend(r.milliseconds[..last].iter().map(ratio));
            row
        })
        .collect();
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    context.show(&results, &table(&head, &rows))?;
    Ok(true)
}

//! `mlac plan`: ranks and cache bytes, before any work.

use std::fmt::Write as _;

use mlac_converter::RankChoice;
use mlac_model::Checkpoint;
use serde::Serialize;

use super::Context;
use crate::cli::args::{PlanArgs, RankArgs};
use crate::cli::units::{show_bytes, show_tokens, table};
use crate::error::Error;
use crate::pipeline::ranks::{RankRequest, cache_plan};

pub(super) fn request(ranks: &RankArgs, checkpoint: &Checkpoint) -> Result<RankRequest, Error> {
    RankRequest::resolve(
        ranks.budget,
        ranks.kv_lora_rank.as_deref(),
        ranks.rope_dim,
        &ranks.layers,
        ranks.align,
        checkpoint.config(),
    )
}

#[derive(Serialize)]
struct PlanOutput {
    model: String,
    layers: Vec<(usize, RankChoice)>,
    gqa_numbers_per_token: usize,
    mla_numbers_per_token: usize,
    cache: Vec<PlanRow>,
    note: Option<String>,
}

#[derive(Serialize)]
struct PlanRow {
    context: usize,
    gqa_bytes: u64,
    mla_bytes: u64,
    decode_floor_speedup: f64,
}

/// Bytes of weights that a decode step of one sequence reads: of the experts those that are chosen.
fn weights_read(checkpoint: &Checkpoint) -> Result<u64, Error> {
    let mut total = 0.0;
    for info in checkpoint.tensors() {
        let share = match &checkpoint.config().moe {
            Some(moe) if info.name.contains(".mlp.experts.") => {
                moe.experts_per_token as f64 / moe.num_experts as f64
            }
            _ => 1.0,
        };
        total += share * info.byte_len()? as f64;
    }
    Ok(total as u64)
}

pub(super) fn run(args: &PlanArgs, context: Context) -> Result<bool, Error> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let config = checkpoint.config();
    let (layers, note) = request(&args.ranks, &checkpoint)?.plan(config)?;
    let cache = cache_plan(config, &layers, args.cache_bytes);
    let numbers = cache.numbers_per_token();
    let weights = weights_read(&checkpoint)?;
    let rows: Vec<PlanRow> = args
        .contexts
        .iter()
        .map(|&tokens| PlanRow {
            context: tokens,
            gqa_bytes: cache.gqa_bytes(tokens),
            mla_bytes: cache.mla_bytes(tokens),
            decode_floor_speedup: cache.decode_speedup(tokens, 1, weights),
        })
        .collect();
    let mut text = format!(
        "{}: {:?}, {} layers, {} query heads, {} KV heads of {}\n",
        args.model.display(),
        config.architecture,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim
    );
    if let Some(first) = layers.first() {
        let _ = writeln!(
            text,
            "{} layers to MLA: latent {} + rotary key {} = {} numbers a token instead of {}",
            layers.len(),
            first.ranks.kv_lora_rank,
            first.ranks.qk_rope_head_dim,
            first.ranks.width(),
            config.gqa_cache_width()
        );
    }
    if let Some(note) = &note {
        let _ = writeln!(text, "note: {note}");
    }
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                show_tokens(r.context),
                show_bytes(r.gqa_bytes),
                show_bytes(r.mla_bytes),
                format!("{:.1} %", 100.0 * r.mla_bytes as f64 / r.gqa_bytes as f64),
                format!("{:.2}", r.decode_floor_speedup),
            ]
        })
        .collect();
    text.push_str(&table(
        &[
            "context",
            "GQA cache",
            "MLA cache",
            "share",
            "decode speed-up, if memory-bound",
        ],
        &cells,
    ));
    let _ = writeln!(
        text,
        "({} bytes a cached number, batch 1; weights and cache read once a step)",
        args.cache_bytes
    );
    let output = PlanOutput {
        model: args.model.display().to_string(),
        layers: layers.iter().map(|l| (l.layer, l.ranks)).collect(),
        gqa_numbers_per_token: numbers.0,
        mla_numbers_per_token: numbers.1,
        cache: rows,
        note,
    };
    context.show(&output, &text)?;
    Ok(true)
}

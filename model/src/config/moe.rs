//! The experts of GPT-OSS.

use super::{
    Architecture, ExpertFormat, ModelConfig, MoeConfig,
    fields::{Fields, short},
};
use crate::{Refusal, mxfp4::BLOCK};

/// Keys that only this family may have.
pub(super) const KEYS: [&str; 2] = ["quantization_config", "num_local_experts"];
/// Most experts of a layer.
const MOST_EXPERTS: usize = 4096;
/// Defaults of `GptOssConfig`.
const ALPHA: f64 = 1.702;
const LIMIT: f64 = 7.0;

/// The experts, for a family that has them.
pub(super) fn read(
    fields: &Fields<'_>,
    architecture: Architecture,
) -> Result<Option<MoeConfig>, Refusal> {
    if architecture != Architecture::GptOss {
        return Ok(None);
    }
    let num_experts = fields.size_to("num_local_experts", MOST_EXPERTS)?;
    let experts_per_token = experts_per_token(fields)?;
    if experts_per_token > num_experts {
        return Err(fields.refuse(
            "num_experts_per_tok",
            format!("at most num_local_experts = {num_experts}"),
            experts_per_token,
            "correct the value in the file",
        ));
    }
    Ok(Some(MoeConfig {
        num_experts,
        experts_per_token,
        swiglu_limit: fields.opt_positive("swiglu_limit")?.unwrap_or(LIMIT),
        swiglu_alpha: fields.opt_positive("swiglu_alpha")?.unwrap_or(ALPHA),
        format: format(fields)?,
    }))
}

/// Published files carry the number under two names.
fn experts_per_token(fields: &Fields<'_>) -> Result<usize, Refusal> {
    let (key, twin) = ("num_experts_per_tok", "experts_per_token");
    let first = fields.opt_size_to(key, MOST_EXPERTS)?;
    let second = fields.opt_size_to(twin, MOST_EXPERTS)?;
    match (first, second) {
        (Some(a), Some(b)) if a != b => Err(fields.refuse(
            twin,
            format!("the same number as {key} = {a}"),
            b,
            "restore the file from the model's publisher",
        )),
        (Some(number), _) | (None, Some(number)) => Ok(number),
        (None, None) => Err(fields.missing(key, "a whole number")),
    }
}

fn format(fields: &Fields<'_>) -> Result<ExpertFormat, Refusal> {
    let Some(quantization) = fields.get("quantization_config") else {
        return Ok(ExpertFormat::Dense);
    };
    match quantization.get("quant_method").and_then(|v| v.as_str()) {
        Some("mxfp4") => Ok(ExpertFormat::Mxfp4),
        _ => Err(fields.refuse(
            "quantization_config",
            "quant_method \"mxfp4\", or no such key",
            short(quantization),
            "use the checkpoint as its publisher has it, or its bf16 form",
        )),
    }
}

/// MXFP4 scales whole blocks of a row.
pub(super) fn check_blocks(fields: &Fields<'_>, config: &ModelConfig) -> Result<(), Refusal> {
    if config
        .moe
        .is_none_or(|moe| moe.format != ExpertFormat::Mxfp4)
    {
        return Ok(());
    }
    for (key, size) in [
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
    ] {
        if !size.is_multiple_of(BLOCK) {
            return Err(fields.refuse(
                key,
                format!("a multiple of {BLOCK}, the size of an MXFP4 block"),
                size,
                "correct the value in the file",
            ));
        }
    }
    Ok(())
}

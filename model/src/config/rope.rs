//! Rotary parameters of a `config.json`: `rope_theta` and `rope_scaling` (transformers 4) or
//! `rope_parameters` (transformers 5).

use serde_json::Value;

use super::fields::{Fields, short};
use crate::{Refusal, RopeScaling, RopeSpec};

/// transformers' `default_theta`, the base of files from before `rope_theta` existed (Llama 1, 2).
const DEFAULT_THETA: f64 = 10_000.0;

/// Keys of the rotary object that mlac understands; of these, a rule ignores those of the others,
/// as transformers does.
const KNOWN_KEYS: [&str; 14] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
];

pub(super) fn read(
    fields: &Fields<'_>,
    file: &str,
    max_position_embeddings: usize,
) -> Result<RopeSpec, Refusal> {
    refuse_partial(fields)?;
    let empty = Value::Object(serde_json::Map::new());
    let (object, prefix) = match (fields.get("rope_scaling"), fields.get("rope_parameters")) {
        (Some(old), Some(new)) if old != new => {
            return Err(fields.refuse(
                "rope_scaling",
                "the same as rope_parameters, or only one of the two keys",
                short(old),
                "remove the key that is out of date",
            ));
        }
        (Some(old), _) => (old, "rope_scaling."),
        (None, Some(new)) => (new, "rope_parameters."),
        (None, None) => (&empty, "rope_scaling."),
    };
    let scaling = Fields::new(object, file, prefix)?;
    for key in scaling.keys() {
        if !KNOWN_KEYS.contains(&key.as_str())
            && let Some(value) = scaling.get(key)
        {
            return Err(scaling.refuse(
                key,
                "no such key: mlac does not implement what it asks for",
                short(value),
                "use a model with one rotary embedding of type default, linear, llama3 or yarn",
            ));
        }
    }
    refuse_partial(&scaling)?;
    let theta = match scaling.opt_positive("rope_theta")? {
        Some(theta) => theta,
        None => fields.opt_positive("rope_theta")?.unwrap_or(DEFAULT_THETA),
    };
    let kind = match scaling.opt_str("rope_type")? {
        Some(kind) => kind,
        None => scaling.opt_str("type")?.unwrap_or("default"),
    };
    // transformers: the key beside the rotary object wins, then the one inside, then the length
    // the configuration promises.
    let original = |fields: &Fields<'_>| -> Result<usize, Refusal> {
        let key = "original_max_position_embeddings";
        Ok(match fields.opt_size(key)? {
            Some(length) => length,
            None => scaling.opt_size(key)?.unwrap_or(max_position_embeddings),
        })
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: scaling.positive("factor")?,
        },
        "llama3" => {
            let low_freq_factor = scaling.positive("low_freq_factor")?;
            let high_freq_factor = scaling.positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(scaling.refuse(
                    "high_freq_factor",
                    format!("a number above low_freq_factor = {low_freq_factor}"),
                    high_freq_factor,
                    "correct the value in the file",
                ));
            }
            RopeScaling::Llama3 {
                factor: scaling.positive("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original(fields)?,
            }
        }
        "yarn" => {
            let original = original(fields)?;
            RopeScaling::Yarn {
                // A null factor means the ratio of the two lengths.
                factor: match scaling.opt_positive("factor")? {
                    Some(factor) => factor,
                    None if scaling.has("factor") => {
                        max_position_embeddings as f64 / original as f64
                    }
                    None => return Err(scaling.missing("factor", "a number above 0")),
                },
                // 32, 1 and true are what `_compute_yarn_parameters` takes for absent keys.
                beta_fast: scaling.opt_positive("beta_fast")?.unwrap_or(32.0),
                beta_slow: scaling.opt_positive("beta_slow")?.unwrap_or(1.0),
                original_max_position_embeddings: original,
                attention_factor: scaling.opt_positive("attention_factor")?,
                mscale: scaling.opt_number("mscale")?,
                mscale_all_dim: scaling.opt_number("mscale_all_dim")?,
                truncate: scaling.opt_bool("truncate")?.unwrap_or(true),
            }
        }
        other => {
            return Err(scaling.refuse(
                "rope_type",
                "default, linear, llama3 or yarn",
                format!("{other:?}"),
                "use a model with one of these rotary embeddings",
            ));
        }
    };
    Ok(RopeSpec { theta, scaling })
}

fn refuse_partial(fields: &Fields<'_>) -> Result<(), Refusal> {
    match fields.opt_number("partial_rotary_factor")? {
        Some(factor) if (factor - 1.0).abs() > 0.0 => Err(fields.refuse(
            "partial_rotary_factor",
            "1, the whole head is rotated",
            factor,
            "use a model whose rotary embedding covers the whole head",
        )),
        _ => Ok(()),
    }
}

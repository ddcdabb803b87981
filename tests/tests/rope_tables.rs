//! Frequencies and attention factors equal transformers' for settings of published models and for
//! the corners of each rule.

use mlac_model::ModelConfig;
use mlac_tests::cases::Cases;
use mlac_tests::{Outcome, fixtures, text};
use serde_json::Value;

/// Relative: transformers and mlac both compute in f32, in different math libraries.
const TOLERANCE: f64 = 1e-6;

#[test]
fn rope_tables_equal_transformers() {
    let tables = fixtures::json("rope_tables.json").unwrap();
    let mut cases = Cases::new();
    for case in tables.as_array().unwrap() {
        cases.run(case["name"].as_str().unwrap(), || check(case));
    }
    cases.finish(21);
}

fn check(case: &Value) -> Outcome {
    let mut json = case["config"].clone();
    // mlac reads no gpt_oss configuration; its RoPE keys mean the same in a llama one.
    if json["model_type"] == "gpt_oss" {
        json["model_type"] = "llama".into();
    }
    let config = ModelConfig::from_json(&json, "config.json").map_err(text)?;
    let table = config.rope.table(config.head_dim);
    let expected: Vec<f64> = case["inv_freq"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_f64)
        .collect();
    if expected.is_empty() || table.inv_freq.len() != expected.len() {
        return Err(format!(
            "{} frequencies, expected {}",
            table.inv_freq.len(),
            expected.len()
        ));
    }
    for (l, (found, expected)) in table.inv_freq.iter().zip(&expected).enumerate() {
        let error = (f64::from(*found) - expected).abs() / expected;
        if error.is_nan() || error > TOLERANCE {
            return Err(format!(
                "inv_freq[{l}] = {found:e}, expected {expected:e}: relative difference {error:.1e}"
            ));
        }
    }
    let factor = case["attention_factor"].as_f64().unwrap_or(f64::NAN);
    let error = (table.attention_factor - factor).abs() / factor;
    if error.is_nan() || error > TOLERANCE {
        return Err(format!(
            "attention factor {}, expected {factor}",
            table.attention_factor
        ));
    }
    Ok(())
}

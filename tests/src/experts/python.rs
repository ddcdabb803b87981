//! The operator in Python's onnxruntime, through the library that `register_custom_ops_library` loads.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::backends::parts;
use super::problem::Problem;
use crate::latent::python::{library, read};
use crate::{Outcome, runtime, text};

/// Answers of all problems, by one process.
pub fn answers(problems: &[Problem], scratch: &Path) -> Outcome<Vec<Vec<f32>>> {
    let mut folders = Vec::new();
    for (i, problem) in problems.iter().enumerate() {
        let folder = scratch.join(i.to_string());
        write(problem, &folder)?;
        folders.push(folder);
    }
    let mut command = runtime::python("python/mxfp4_experts.py")?;
    command.arg(library()?).args(&folders);
    runtime::output(&mut command)?;
    folders
        .iter()
        .map(|folder| read(&folder.join("out")))
        .collect()
}

fn write(problem: &Problem, folder: &Path) -> Outcome {
    fs::create_dir_all(folder).map_err(text)?;
    let spec = &problem.spec;
    let mut tensors = Vec::new();
    let mut put = |name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>| -> Outcome {
        tensors.push(json!({"name": name, "dtype": dtype, "shape": shape}));
        fs::write(folder.join(name), bytes).map_err(text)
    };
    let f32s = |numbers: &[f32]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let choices = problem.with(spec.chosen);
    let hidden = problem.with(spec.hidden);
    put("hidden", "float32", &hidden, f32s(&problem.hidden))?;
    let chosen = problem.experts.iter().flat_map(|e| e.to_le_bytes());
    put("experts", "int64", &choices, chosen.collect())?;
    put("weights", "float32", &choices, f32s(&problem.weights))?;
    for (part, of) in parts(problem) {
        let ([out, input], count) = (of.shape, spec.experts);
        let blocks = input / 32;
        let name = |what: &str| format!("{part}_{what}");
        let shape = [count, out, blocks, 16];
        put(&name("blocks"), "uint8", &shape, of.blocks.clone())?;
        put(&name("scales"), "uint8", &shape[..3], of.scales.clone())?;
        put(&name("bias"), "float32", &shape[..2], f32s(&of.bias))?;
    }
    // As text: JSON has no infinity.
    let (limit, alpha) = (spec.limit.to_string(), problem.alpha.to_string());
    let about = json!({
        "tensors": tensors,
        "attributes": {"swiglu_limit": limit, "swiglu_alpha": alpha},
    });
    fs::write(folder.join("problem.json"), about.to_string()).map_err(text)
}

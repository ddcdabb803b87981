//! The operator in Python's onnxruntime, through the library that `register_custom_ops_library` loads.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::problem::{Kind, Problem};
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
    let mut command = runtime::python("python/linear16.py")?;
    command.arg(library()?).args(&folders);
    runtime::output(&mut command)?;
    folders
        .iter()
        .map(|folder| read(&folder.join("out")))
        .collect()
}

fn write(problem: &Problem, folder: &Path) -> Outcome {
    fs::create_dir_all(folder).map_err(text)?;
    let put = |name: &str, bytes: Vec<u8>| fs::write(folder.join(name), bytes).map_err(text);
    let f32s = |numbers: &[f32]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    put("x", f32s(&problem.x))?;
    put("weight", problem.weight.bytes())?;
    if let Some(bias) = &problem.bias {
        put("bias", f32s(bias))?;
    }
    let kind = match problem.spec.kind {
        Kind::Bf16 => "bfloat16",
        Kind::F16 => "float16",
    };
    let about = json!({
        "x": problem.with(problem.spec.input),
        "weight": [problem.spec.output, problem.spec.input],
        "kind": kind,
        "bias": problem.bias.is_some(),
    });
    put("problem.json", about.to_string().into_bytes())
}

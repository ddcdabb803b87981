//! The operator in Python's onnxruntime, through the library that `register_custom_ops_library` loads.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::problem::Problem;
use super::reference::Answer;
use crate::{Outcome, runtime, text};

/// The library that was built with this test.
pub fn library() -> Outcome<PathBuf> {
    let program = std::env::current_exe().map_err(text)?;
    program
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("libmlac_ort.so"))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            format!(
                "libmlac_ort.so: found none beside {}, needed for Python; fix: cargo build -p mlac-ort-ops",
                program.display()
            )
        })
}

/// Shapes that the runtime infers behind the operator, by case and output.
pub fn shapes() -> Outcome<serde_json::Value> {
    let mut command = runtime::python("python/latent_shapes.py")?;
    let said = runtime::output(command.arg(library()?))?;
    serde_json::from_str(&said).map_err(text)
}

/// Answers of all problems, by one process.
pub fn answers(problems: &[Problem], scratch: &Path) -> Outcome<Vec<Answer>> {
    let mut folders = Vec::new();
    for (i, problem) in problems.iter().enumerate() {
        let folder = scratch.join(i.to_string());
        write(problem, &folder)?;
        folders.push(folder);
    }
    let mut command = runtime::python("python/latent_attention.py")?;
    command.arg(library()?).args(&folders);
    runtime::output(&mut command)?;
    folders
        .iter()
        .map(|folder| {
            Ok(Answer {
                sums: read(&folder.join("sums"))?,
                lse: Some(read(&folder.join("lse"))?),
                cache: Some(read(&folder.join("cache_out"))?),
            })
        })
        .collect()
}

fn write(problem: &Problem, folder: &Path) -> Outcome {
    fs::create_dir_all(folder).map_err(text)?;
    let spec = &problem.spec;
    let (batch, tokens, width) = (problem.batch(), spec.query_tokens, problem.width());
    let mut tensors = Vec::new();
    let mut put = |name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>| -> Outcome {
        tensors.push(json!({"name": name, "dtype": dtype, "shape": shape}));
        fs::write(folder.join(name), bytes).map_err(text)
    };
    let f32s = |numbers: &[f32]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let i64s = |numbers: &[i64]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let i32s = |numbers: &[i32]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let query = [batch, tokens, spec.heads, width];
    put("query", spec.kind.name(), &query, f32s(&problem.query))?;
    let rows = [batch, tokens, width];
    put("new_rows", spec.kind.name(), &rows, f32s(&problem.new_rows))?;
    let cache = problem.cache_shape();
    put("cache", spec.kind.name(), &cache, f32s(&problem.cache))?;
    let past: Vec<i32> = spec.past.iter().map(|&n| n as i32).collect();
    put("past_lengths", "int32", &[batch], i32s(&past))?;
    if let Some(table) = &problem.page_table {
        let shape = [batch, table.len() / batch];
        put("page_table", "int32", &shape, i32s(table))?;
    }
    if let Some(sinks) = &problem.sinks {
        put("sinks", "float32", &[spec.heads], f32s(sinks))?;
    }
    if let Some(tree) = &problem.tree {
        put("tree_mask", "int64", &[batch, tokens], i64s(tree))?;
    }
    if let Some(mask) = &problem.key_mask {
        let shape = [batch, problem.mask_length];
        put("key_mask", "int64", &shape, i64s(mask))?;
    }
    let about = json!({
        "tensors": tensors,
        "attributes": {
            "kv_lora_rank": spec.rank,
            "scale": spec.scale,
            "sliding_window": spec.window.unwrap_or(0),
        },
    });
    fs::write(folder.join("problem.json"), about.to_string()).map_err(text)
}

/// f32 numbers of a file.
pub fn read(path: &Path) -> Outcome<Vec<f32>> {
    let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let numbers = bytes.chunks_exact(4);
    Ok(numbers
        .map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]]))
        .collect())
}

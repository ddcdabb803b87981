//! The Python scripts of `tests/`, run with the packages of set-up.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::fixtures::{PREFILL, STEPS};
use crate::{Outcome, runtime, text};

/// A folder, the text it answers, and where the answer goes.
#[derive(Debug, Clone)]
pub struct Job {
    /// A checkpoint or an exported folder.
    pub folder: PathBuf,
    /// A safetensors file with `input_ids`, `attention_mask` and `position_ids`.
    pub io: PathBuf,
    /// The file to write.
    pub out: PathBuf,
}

/// A job's answer.
#[derive(Debug)]
pub struct Answer {
    /// `[batch, seq, vocab]`.
    pub shape: Vec<usize>,
    /// Row-major.
    pub logits: Vec<f64>,
    /// What the script printed about it.
    pub report: Value,
}

/// Logits of each job from the float64 reference, `oracle/mla_reference.py`.
pub fn reference(jobs: &[Job], expanded: bool) -> Outcome<Vec<Answer>> {
    let mut command = runtime::python("oracle/mla_reference.py")?;
    if expanded {
        command.arg("--expanded");
    }
    for job in jobs {
        command.args([&job.folder, &job.io, &job.out]);
    }
    answers(jobs, &runtime::output(&mut command)?, 8)
}

/// Logits of each exported folder from Python's onnxruntime: one prefill, then token by token.
pub fn onnxruntime(jobs: &[Job]) -> Outcome<Vec<Answer>> {
    let mut command = runtime::python("python/run_onnx.py")?;
    command.arg("logits");
    command.args(["--prefill", &PREFILL.to_string()]);
    command.args(["--steps", &STEPS.to_string()]);
    for job in jobs {
        command.args([&job.folder, &job.io, &job.out]);
    }
    answers(jobs, &runtime::output(&mut command)?, 4)
}

/// A folder and what it continues.
#[derive(Debug, Clone)]
pub struct Generation {
    /// An exported folder.
    pub folder: PathBuf,
    /// The prompt.
    pub ids: Vec<i64>,
    /// How many tokens to add.
    pub count: usize,
}

/// What a folder said.
#[derive(Debug)]
pub struct Generated {
    /// The most likely tokens.
    pub tokens: Vec<i64>,
    /// Caches that were kept in place.
    pub kept: Vec<String>,
}

/// Greedy tokens of each folder from Python's onnxruntime with mlac's library of operators.
pub fn generate(jobs: &[Generation], operators: &Path) -> Outcome<Vec<Generated>> {
    let mut command = runtime::python("python/run_onnx.py")?;
    command.arg("generate").arg("--operators").arg(operators);
    for job in jobs {
        let ids: Vec<String> = job.ids.iter().map(ToString::to_string).collect();
        command.arg(&job.folder).arg(ids.join(","));
        command.arg(job.count.to_string());
    }
    let printed = runtime::output(&mut command)?;
    let list = |report: &Value, name: &str| report[name].as_array().cloned().unwrap_or_default();
    printed
        .lines()
        .map(|line| {
            let report: Value = serde_json::from_str(line).map_err(text)?;
            let names = list(&report, "kept");
            Ok(Generated {
                tokens: list(&report, "tokens")
                    .iter()
                    .filter_map(Value::as_i64)
                    .collect(),
                kept: names
                    .iter()
                    .filter_map(|n| n.as_str().map(str::to_owned))
                    .collect(),
            })
        })
        .collect()
}

/// `onnx.checker` with full checking on every file of the folders; its report, a line per file.
pub fn check(folders: &[PathBuf]) -> Outcome<String> {
    let mut command = runtime::python("python/run_onnx.py")?;
    command.arg("check").args(folders);
    runtime::output(&mut command)
}

/// Writes MLA checkpoints from GQA ones by definition: source, target, `exact` or `random`.
pub fn synthetic_mla(triples: &[(PathBuf, PathBuf, &str)]) -> Outcome {
    let mut command = runtime::python("oracle/synthetic_mla.py")?;
    for (source, target, kind) in triples {
        command.arg(source).arg(target).arg(kind);
    }
    runtime::output(&mut command).map(drop)
}

fn answers(jobs: &[Job], printed: &str, width: usize) -> Outcome<Vec<Answer>> {
    let reports: Vec<Value> = printed
        .lines()
        .map(|line| serde_json::from_str(line).map_err(|error| format!("{line}: {error}")))
        .collect::<Outcome<_>>()?;
    if reports.len() != jobs.len() {
        return Err(format!("{} answers to {} jobs", reports.len(), jobs.len()));
    }
    jobs.iter()
        .zip(reports)
        .map(|(job, report)| answer(&job.out, report, width))
        .collect()
}

fn answer(file: &Path, report: Value, width: usize) -> Outcome<Answer> {
    let bytes = fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let shape: Vec<usize> = serde_json::from_value(report["shape"].clone()).map_err(text)?;
    if bytes.len() != shape.iter().product::<usize>() * width {
        return Err(format!(
            "{}: {} bytes do not fill {shape:?}",
            file.display(),
            bytes.len()
        ));
    }
    let number = |chunk: &[u8]| {
        let bits = chunk
            .iter()
            .rev()
            .fold(0_u64, |bits, byte| (bits << 8) | u64::from(*byte));
        if width == 8 {
            f64::from_bits(bits)
        } else {
            f64::from(f32::from_bits(bits as u32))
        }
    };
    Ok(Answer {
        shape,
        logits: bytes.chunks(width).map(number).collect(),
        report,
    })
}

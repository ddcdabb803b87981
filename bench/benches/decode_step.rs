//! Decode step of one attention layer in ONNX Runtime: MLA against GQA in primitives and GQA as
//! ONNX Runtime's own operator, by context.

use criterion::{BenchmarkId, Criterion, criterion_group};
use mlac_bench::random_model::{Random, RandomLlama};
use mlac_bench::{estimates, results};

/// Contexts in tokens.
const CONTEXTS: [usize; 4] = [1024, 4096, 16384, 32768];

fn main() {}

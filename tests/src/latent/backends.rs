//! What must give the reference's answer, in Rust: the kernel alone, the operator in
//! ONNX Runtime, the emulator of the CUDA kernels.

use half::{bf16, f16};
use mlac_engines::ort::{HostData, HostTensor, Kept, OrtSession, SessionOptions, Value};
use mlac_graph::ValidGraph;
use mlac_graph::ir::{DType, GraphBuilder, Op};
use mlac_graph::onnx::{MemoryWeights, to_bytes};
use mlac_kernels::arch::Arch;
use mlac_kernels::config::AttentionConfig;
use mlac_kernels::desc::{AttentionDesc, Dtype, Mask};
use mlac_kernels::emulate::emulate;
use mlac_kernels::problem as kernel;
use mlac_ort::attention::{Inputs, Layout, Shape, Step, append, attend, copy};
use mlac_ort::{Element, Isa, Pool};

use super::problem::{Kind, Problem};
use super::reference::Answer;
use crate::{Outcome, text};

/// Tasks on threads of their own.
pub struct Threads(pub usize);

impl Pool for Threads {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for first in 0..self.0 {
                scope.spawn(move || (first..count).step_by(self.0).for_each(task));
            }
        });
    }

    fn threads(&self) -> usize {
        self.0
    }
}

/// The kernel of the library, without ONNX Runtime.
pub fn kernel(problem: &Problem, isa: Isa, threads: usize) -> Outcome<Answer> {
    match problem.spec.kind {
        Kind::F32 => typed(problem, isa, threads, |x| x, |x| x),
        Kind::F16 => typed(problem, isa, threads, f16::from_f32, f16::to_f32),
        Kind::Bf16 => typed(problem, isa, threads, bf16::from_f32, bf16::to_f32),
    }
}

fn typed<T: Element>(
    problem: &Problem,
    isa: Isa,
    threads: usize,
    to: fn(f32) -> T,
    from: fn(T) -> f32,
) -> Outcome<Answer> {
    let spec = &problem.spec;
    let all = |numbers: &[f32]| numbers.iter().map(|&x| to(x)).collect::<Vec<T>>();
    let (query, new_rows, cache) = (
        all(&problem.query),
        all(&problem.new_rows),
        all(&problem.cache),
    );
    let past: Vec<i32> = spec.past.iter().map(|&n| n as i32).collect();
    let shape = Shape {
        batch: problem.batch(),
        query_tokens: spec.query_tokens,
        heads: spec.heads,
        kv_lora_rank: spec.rank,
        width: problem.width(),
        layout: problem.layout,
        sliding_window: spec.window,
        scale: spec.scale,
    };
    let inputs = Inputs {
        query: &query,
        new_rows: &new_rows,
        past_lengths: &past,
        page_table: problem.page_table.as_deref(),
        sinks: problem.sinks.as_deref(),
        tree_mask: problem.tree.as_deref(),
        key_mask: problem.key_mask.as_deref(),
    };
    let step = Step::new(shape, inputs).map_err(text)?;
    let pool = Threads(threads);
    let mut sums = vec![T::ZERO; shape.sums_numbers()];
    let mut lse = vec![0.0; shape.rows()];
    attend(&step, &cache, &mut sums, Some(&mut lse), isa, &pool);
    let mut kept = vec![T::ZERO; cache.len()];
    copy(&cache, &mut kept, &pool);
    append(&step, &mut kept);
    Ok(Answer {
        sums: sums.into_iter().map(from).collect(),
        lse: Some(lse),
        cache: Some(kept.into_iter().map(from).collect()),
    })
}

/// The operator as a graph of one node.
pub fn graph(problem: &Problem) -> Outcome<ValidGraph> {
    let spec = &problem.spec;
    let dtype = match spec.kind {
        Kind::F32 => DType::F32,
        Kind::F16 => DType::F16,
        Kind::Bf16 => return Err("mlac builds no graph in bf16".into()),
    };
    if spec.page.is_some() || spec.tree {
        return Err("mlac builds no paged caches and trees".into());
    }
    let mut b = GraphBuilder::new("latent_attention");
    let (batch, tokens, width) = (problem.batch(), spec.query_tokens, problem.width());
    let known = |shape: &[usize]| shape.iter().map(|&n| n.into()).collect();
    let query = b.input("query", dtype, known(&[batch, tokens, spec.heads, width]));
    let rows = b.input("new_rows", dtype, known(&[batch, tokens, width]));
    let cache = b.input("cache", dtype, known(&problem.cache_shape()));
    let past = b.input("past", DType::I64, known(&[batch]));
    let past = b.cast("past_lengths", past, DType::I32).map_err(text)?;
    let mut inputs = vec![Some(query), Some(rows), Some(cache), Some(past)];
    if spec.sinks || spec.key_mask {
        let sinks = || b.input("sinks", DType::F32, known(&[spec.heads]));
        let sinks = spec.sinks.then(sinks);
        inputs.extend([None, sinks]);
    }
    if spec.key_mask {
        let mask = b.input("key_mask", DType::I64, known(&[batch, problem.mask_length]));
        inputs.extend([None, Some(mask)]);
    }
    let op = Op::LatentAttention {
        kv_lora_rank: spec.rank,
        scale: spec.scale,
        sliding_window: spec.window,
        plugin: None,
        kernels: None,
    };
    let out = b.apply("attention", op, &inputs).map_err(text)?;
    b.output("sums", out[0]);
    b.output("cache_out", out[1]);
    b.finish().map_err(text)
}

/// The operator in a session of mlac's, its cache copied or in place.
pub fn operator(problem: &Problem, in_place: bool) -> Outcome<Answer> {
    session(problem, &graph(problem)?, in_place)
}

fn session(problem: &Problem, graph: &ValidGraph, in_place: bool) -> Outcome<Answer> {
    let spec = &problem.spec;
    let bytes = to_bytes(graph, &MemoryWeights::new()).map_err(text)?;
    let options = SessionOptions::default();
    let mut session = OrtSession::from_bytes("latent attention", &bytes, &options).map_err(text)?;
    let (batch, tokens, width) = (problem.batch(), spec.query_tokens, problem.width());
    let float = |shape: &[usize], numbers: &[f32]| {
        let data = match spec.kind {
            Kind::F32 => HostData::F32(numbers.to_vec()),
            _ => HostData::F16(numbers.iter().map(|&x| f16::from_f32(x)).collect()),
        };
        let shape = shape.to_vec();
        Value::new(HostTensor { shape, data }).map_err(text)
    };
    let mut inputs = vec![
        (
            "query",
            float(&[batch, tokens, spec.heads, width], &problem.query)?,
        ),
        (
            "new_rows",
            float(&[batch, tokens, width], &problem.new_rows)?,
        ),
    ];
    let integers = |shape: Vec<usize>, data| Value::new(HostTensor::i64(shape, data)).map_err(text);
    let past = spec.past.iter().map(|&n| n as i64).collect();
    inputs.push(("past", integers(vec![batch], past)?));
    if let Some(sinks) = &problem.sinks {
        let sinks = HostTensor::f32([spec.heads], sinks.clone());
        inputs.push(("sinks", Value::new(sinks).map_err(text)?));
    }
    if let Some(mask) = &problem.key_mask {
        let shape = vec![batch, problem.mask_length];
        inputs.push(("key_mask", integers(shape, mask.clone())?));
    }
    let cache = float(&problem.cache_shape(), &problem.cache)?;
    let (sums, cache) = if in_place {
        let mut cache = cache.changeable().map_err(text)?;
        let given: Vec<(&str, &Value)> = inputs.iter().map(|(n, v)| (*n, v)).collect();
        let kept = Kept {
            input: "cache",
            output: "cache_out",
            value: &mut cache,
        };
        let out = session.run_in_place(&given, &mut [kept]).map_err(text)?;
        (out[0].to_host(), cache.to_host())
    } else {
        inputs.push(("cache", cache));
        let given: Vec<(&str, &Value)> = inputs.iter().map(|(n, v)| (*n, v)).collect();
        let out = session.run(&given).map_err(text)?;
        (out[0].to_host(), out[1].to_host())
    };
    Ok(Answer {
        sums: sums.to_f32().into_owned(),
        lse: None,
        cache: Some(cache.to_f32().into_owned()),
    })
}

/// The tile order of the CUDA kernels, where their shapes allow it; its cache must hold the new rows already.
pub fn emulator(problem: &Problem, arch: Arch, parts: u32) -> Outcome<Answer> {
    let spec = &problem.spec;
    let Layout::Paged { max_pages, .. } = problem.layout else {
        return Err("the kernels take pages".into());
    };
    let mut desc =
        AttentionDesc::latent(spec.heads as u32, spec.rank as u32, spec.rope as u32, arch);
    desc.query_tokens = spec.query_tokens as u32;
    desc.mask = if spec.tree { Mask::Tree } else { Mask::Causal };
    desc.window = spec.window.map(|w| w as u32);
    desc.sinks = spec.sinks;
    desc.dtype = match spec.kind {
        Kind::F16 => Dtype::F16,
        Kind::Bf16 => Dtype::Bf16,
        Kind::F32 => return Err("the kernels take no f32".into()),
    };
    let config = AttentionConfig::choose(&desc).map_err(text)?;
    let lengths = spec.past.iter().map(|&n| (n + spec.query_tokens) as u32);
    let ours = kernel::Problem {
        scales: Vec::new(),
        desc,
        lengths: lengths.collect(),
        pages: problem.page_table.clone().unwrap_or_default(),
        page_stride: max_pages as u32,
        q: problem.query.clone(),
        cache: problem.reference().cache.unwrap_or_default(),
        values: Vec::new(),
        sinks: problem.sinks.clone().unwrap_or_default(),
        tree: problem
            .tree
            .iter()
            .flatten()
            .map(|&word| word as u64 & !(u64::MAX << spec.query_tokens))
            .collect(),
        scale: spec.scale,
    };
    let answer = emulate(&ours, &config, parts);
    Ok(Answer {
        sums: answer.out,
        lse: Some(answer.lse),
        cache: None,
    })
}

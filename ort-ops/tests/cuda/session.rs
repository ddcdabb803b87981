//! A step of the operator through a session of ONNX Runtime.

use half::{bf16, f16};
use mlac_kernels::config::AttentionConfig;
use mlac_kernels::problem::{Answer, Problem, bits, from_bits};
use mlac_kernels::{AttentionDesc, Dtype, Mask};
use ort::AsPointer;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::value::{DynTensor, PrimitiveTensorElementType, Tensor};

use crate::environment::environment;
use crate::onnx::{Attribute, model};

pub(crate) struct Step {
    pub(crate) desc: AttentionDesc,
    pub(crate) config: AttentionConfig,
    pub(crate) problem: Problem,
    pub(crate) paged: bool,
    /// The cache, `[rows, row]`; where the new rows will be, NaN.
    pub(crate) before: Vec<u16>,
    pub(crate) after: Vec<u16>,
    /// `[batch, query_tokens, row]`.
    pub(crate) fresh: Vec<u16>,
    pub(crate) kernels: Option<Vec<u8>>,
    pub(crate) with_lse: bool,
    /// Whether one buffer is bound to both ends of the cache.
    pub(crate) in_place: bool,
    /// An input or attribute that is made wrong.
    pub(crate) change: Option<&'static str>,
}

/// What a run left.
pub(crate) struct Found {
    pub(crate) answer: Answer,
    pub(crate) cache: Vec<u16>,
}

/// A type of cached numbers, by its bits.
trait Half: PrimitiveTensorElementType + Copy + std::fmt::Debug + 'static {
    fn of(bits: u16) -> Self;
    fn bits(self) -> u16;
}

impl Half for bf16 {
    fn of(bits: u16) -> Self {
        Self::from_bits(bits)
    }
    fn bits(self) -> u16 {
        self.to_bits()
    }
}

impl Half for f16 {
    fn of(bits: u16) -> Self {
        Self::from_bits(bits)
    }
    fn bits(self) -> u16 {
        self.to_bits()
    }
}

/// Runs a step so many times, each on the cache as it was.
pub(crate) fn run(step: &Step, times: usize) -> Result<Vec<Found>, String> {
    match step.desc.dtype {
        Dtype::Bf16 => typed::<bf16>(step, times, 16),
        Dtype::F16 => typed::<f16>(step, times, 10),
    }
}

fn tensor<T: PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static>(
    shape: &[usize],
    data: Vec<T>,
) -> DynTensor {
    Tensor::from_array((shape.to_vec(), data)).unwrap().upcast()
}

fn typed<T: Half>(step: &Step, times: usize, element: u64) -> Result<Vec<Found>, String> {
    let (desc, problem) = (&step.desc, &step.problem);
    let batch = problem.lengths.len();
    let (tokens, heads) = (desc.query_tokens as usize, desc.query_heads as usize);
    let (row, rank) = (desc.row() as usize, desc.out_row() as usize);
    let rows = step.before.len() / row;
    let halves =
        |numbers: &[u16]| -> Vec<T> { numbers.iter().map(|&number| T::of(number)).collect() };
    let query: Vec<u16> = problem.q.iter().map(|&x| bits(desc.dtype, x)).collect();
    let tree = desc.mask == Mask::Tree;
    let sinks = desc.sinks && step.change != Some("sinks");
    let masked = step.change == Some("key_mask");
    let name = |there: bool, name: &'static str| if there { name } else { "" };
    let inputs = [
        ("query", element, 4),
        ("new_rows", element, 3),
        ("cache", element, 3),
        ("past_lengths", 6, 1),
        (name(step.paged, "page_table"), 6, 2),
        (name(sinks, "sinks"), 1, 1),
        (name(tree, "tree_mask"), 7, 2),
        (name(masked, "key_mask"), 7, 2),
    ];
    let outputs = [
        ("sums", element, 4),
        ("cache_out", element, 3),
        (name(step.with_lse, "lse"), 1, 3),
    ];
    let wrong = |what| i64::from(step.change == Some(what));
    let mut attributes = vec![
        (
            "kv_lora_rank",
            Attribute::Int(rank as i64 - wrong("kv_lora_rank")),
        ),
        ("scale", Attribute::Float(problem.scale)),
        (
            "sliding_window",
            Attribute::Int(i64::from(desc.window.unwrap_or(0)) + wrong("sliding_window")),
        ),
    ];
    if let Some(kernels) = &step.kernels {
        attributes.push(("kernels", Attribute::Bytes(kernels.clone())));
    }
    let bytes = model(&inputs, &outputs, &attributes);
    let say = |error: ort::Error| error.to_string();
    let mut builder = Session::builder(environment()).map_err(say)?;
    // SAFETY: both are of the one ONNX Runtime of the process, and its driver is the tests' own.
    unsafe { mlac_ort::add_cuda_in_host_memory(builder.ptr_mut(), ort::api())? };
    let mut session = builder.commit_from_memory(&bytes).map_err(say)?;

    let (first, second) = if step.paged {
        (rows / 64, 64)
    } else {
        (batch, rows / batch)
    };
    let extra = usize::from(step.change == Some("capacity"));
    let cache_shape = [first, second + extra, row];
    let mut before = step.before.clone();
    before.resize(cache_shape.iter().product(), 0);
    let pasts: Vec<i32> = problem
        .lengths
        .iter()
        .map(|length| (length - desc.query_tokens) as i32)
        .collect();
    let mut values = vec![
        (
            "query",
            tensor(&[batch, tokens, heads, row], halves(&query)),
        ),
        (
            "new_rows",
            tensor(&[batch, tokens, row], halves(&step.fresh)),
        ),
        ("past_lengths", tensor(&[batch], pasts)),
    ];
    if step.paged {
        let columns = problem.page_stride as usize;
        let pages = problem.pages.clone();
        values.push(("page_table", tensor(&[batch, columns], pages)));
    }
    if sinks {
        values.push(("sinks", tensor(&[heads], problem.sinks.clone())));
    }
    if tree {
        // Bits beyond the query tokens count for nothing.
        let words = problem
            .tree
            .iter()
            .map(|word| (word | 1 << 63 | 1 << tokens) as i64);
        values.push(("tree_mask", tensor(&[batch, tokens], words.collect())));
    }
    if masked {
        values.push(("key_mask", tensor(&[batch, 500], vec![1_i64; batch * 500])));
    }

    let mut all = Vec::new();
    for _ in 0..times {
        // Only a tensor that the runtime allocated can be bound to an output.
        let mut cache = Tensor::<T>::new(&Allocator::default(), cache_shape.to_vec()).unwrap();
        cache
            .extract_tensor_mut()
            .1
            .copy_from_slice(&halves(&before));
        let mut binding = session.create_binding().map_err(say)?;
        for (name, value) in &values {
            binding.bind_input(*name, value).map_err(say)?;
        }
        binding.bind_input("cache", &cache).map_err(say)?;
        let host = MemoryInfo::new(
            AllocationDevice::CPU,
            0,
            AllocatorType::Device,
            MemoryType::Default,
        )
        .map_err(say)?;
        let mut made = vec!["sums"];
        if step.with_lse {
            made.push("lse");
        }
        if step.in_place {
            binding
                .bind_output("cache_out", cache.view_mut())
                .map_err(say)?;
        } else {
            made.push("cache_out");
        }
        for name in &made {
            binding.bind_output_to_device(*name, &host).map_err(say)?;
        }
        let results = session.run_binding(&binding).map_err(say)?;
        let numbers = |name: &str| -> Vec<u16> {
            let (_, data) = results[name].try_extract_tensor::<T>().unwrap();
            data.iter().map(|x| x.bits()).collect()
        };
        let sums = numbers("sums");
        let out = sums.iter().map(|&x| from_bits(desc.dtype, x)).collect();
        let lse = if step.with_lse {
            let (_, data) = results["lse"].try_extract_tensor::<f32>().unwrap();
            data.to_vec()
        } else {
            Vec::new()
        };
        let kept = (!step.in_place).then(|| numbers("cache_out"));
        drop(results);
        drop(binding);
        let kept = kept.unwrap_or_else(|| {
            let (_, data) = cache.extract_tensor();
            data.iter().map(|x| x.bits()).collect()
        });
        if !step.in_place {
            let (_, data) = cache.extract_tensor();
            let same = data.iter().zip(&before).all(|(x, &y)| x.bits() == y);
            assert!(same, "an input was written to");
        }
        all.push(Found {
            answer: Answer { out, lse },
            cache: kept,
        });
    }
    Ok(all)
}

//! A fixture's text through an exported graph, fed as `docs/latent-attention.md` says.

use std::path::Path;

use half::f16;
use mlac_tests::fixtures::Io;
use ort::AsPointer;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::value::{DynTensor, PrimitiveTensorElementType, Tensor, ValueType};

use crate::environment::environment;

/// Rows of every latent cache: whole pages, more than the text has tokens.
const CAPACITY: usize = 128;

/// A cache tensor.
struct Cache {
    input: String,
    output: String,
    value: Tensor<f16>,
    /// Whether it is kept in place.
    latent: bool,
}

fn tensor<T: PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static>(
    shape: &[usize],
    data: Vec<T>,
) -> DynTensor {
    Tensor::from_array((shape.to_vec(), data)).unwrap().upcast()
}

/// The empty caches of a graph. Those of latents hold NaN, which nothing may read.
fn caches(session: &Session, batch: usize) -> Vec<Cache> {
    let mut found = Vec::new();
    for port in session.inputs() {
        let name = port.name();
        let Some(rest) = name
            .strip_prefix("past_")
            .filter(|_| name != "past_lengths")
        else {
            continue;
        };
        let ValueType::Tensor { shape, .. } = port.dtype() else {
            unreachable!()
        };
        let latent = rest.starts_with("latent.");
        let size = |(axis, &size): (usize, &i64)| match (axis, size) {
            (0, _) => batch,
            (_, size) if size >= 0 => size as usize,
            _ if latent => CAPACITY,
            _ => 0,
        };
        let shape: Vec<usize> = shape.iter().enumerate().map(size).collect();
        let mut value = Tensor::<f16>::new(&Allocator::default(), shape).unwrap();
        value.extract_tensor_mut().1.fill(f16::NAN);
        found.push(Cache {
            input: name.to_owned(),
            output: match rest.strip_prefix("key_values.") {
                Some(rest) => format!("present.{rest}"),
                None => format!("present_{rest}"),
            },
            value,
            latent,
        });
    }
    found
}

/// Runs a text in pieces; gives the logits `[batch, seq, vocab]`.
pub(crate) fn decode(graph: &Path, io: &Io, pieces: &[usize]) -> Vec<f32> {
    let mut builder = Session::builder(environment()).unwrap();
    // SAFETY: both are of the one ONNX Runtime of the process, and its driver is the tests' own.
    unsafe { mlac_ort::add_cuda_in_host_memory(builder.ptr_mut(), ort::api()).unwrap() };
    let mut session = builder.commit_from_file(graph).unwrap();
    let mut caches = caches(&session, io.batch);
    assert!(caches.iter().any(|cache| cache.latent));
    let host = MemoryInfo::new(
        AllocationDevice::CPU,
        0,
        AllocatorType::Device,
        MemoryType::Default,
    )
    .unwrap();
    let mut logits = vec![0.0; io.batch * io.seq * io.vocab];
    let mut start = 0;
    for &piece in pieces {
        let tokens = [io.batch, piece];
        let columns = |all: &[i64]| tensor(&tokens, io.columns(all, start..start + piece));
        let lengths = vec![start as i32; io.batch];
        let fed = [
            ("input_ids", columns(&io.input_ids)),
            ("position_ids", columns(&io.position_ids)),
            ("past_lengths", tensor(&[io.batch], lengths)),
        ];
        let mut binding = session.create_binding().unwrap();
        for (name, value) in &fed {
            binding.bind_input(*name, value).unwrap();
        }
        binding.bind_output_to_device("logits", &host).unwrap();
        for cache in &mut caches {
            binding.bind_input(&cache.input, &cache.value).unwrap();
            if cache.latent {
                let place = cache.value.view_mut();
                binding.bind_output(&cache.output, place).unwrap();
            } else {
                binding.bind_output_to_device(&cache.output, &host).unwrap();
            }
        }
        let results = session.run_binding(&binding).unwrap();
        let numbers = |name: &str| {
            let (shape, data) = results[name].try_extract_tensor::<f16>().unwrap();
            let shape: Vec<usize> = shape.iter().map(|&size| size as usize).collect();
            (shape, data.to_vec())
        };
        let (_, found) = numbers("logits");
        let width = piece * io.vocab;
        for (row, found) in found.chunks(width).enumerate() {
            let at = (row * io.seq + start) * io.vocab;
            for (place, x) in logits[at..at + width].iter_mut().zip(found) {
                *place = x.to_f32();
            }
        }
        let grown: Vec<_> = caches
            .iter()
            .map(|cache| (!cache.latent).then(|| numbers(&cache.output)))
            .collect();
        drop(results);
        drop(binding);
        for (cache, grown) in caches.iter_mut().zip(grown) {
            if let Some((shape, data)) = grown {
                cache.value = Tensor::from_array((shape, data)).unwrap();
            }
        }
        start += piece;
    }
    assert_eq!(start, io.seq);
    logits
}

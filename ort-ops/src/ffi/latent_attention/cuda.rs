//! One node on a GPU: a run from the execution provider's tensors to the kernels that the node brought.

use std::sync::{Arc, Mutex, PoisonError};

use ort_sys::{ONNXTensorElementDataType as Type, OrtErrorCode, OrtKernelContext, OrtKernelInfo};

use super::super::api::{Api, Result, Tensor};
use super::super::declaration::Node;
use super::node::Attributes;
use super::{INPUTS, NAME};
use crate::attention::{Layout, Shape};
use crate::cuda::{Bundle, Call, Kernel, Loaded, copy};
use crate::refusal::{Refusal, refuse};

/// Most sequences of a step.
const MOST_BATCH: usize = 65_535;

/// A node's attributes and its kernels, loaded when they are first run.
pub(super) struct CudaKernel {
    api: Api,
    attributes: Attributes,
    bundle: Bundle,
    /// As the bundle's kernels.
    loaded: Vec<Mutex<Option<Arc<Loaded>>>>,
}

impl CudaKernel {
    /// # Safety
    /// `info` is what the runtime gave to the kernel's creation; `element` is the type of the node's cached numbers.
    pub(super) unsafe fn new(api: Api, info: *const OrtKernelInfo, element: Type) -> Result<Self> {
        // SAFETY: the caller's promise.
        let (attributes, bytes) =
            unsafe { (Attributes::read(api, info)?, api.bytes(info, "kernels")?) };
        let invalid =
            |refusal: Refusal| api.refused(OrtErrorCode::ORT_INVALID_GRAPH, NAME, &refusal);
        let bytes = bytes.ok_or_else(|| {
            invalid(refuse(
                "attribute `kernels`",
                "cubins with their recipes, which the CUDA execution provider runs",
                "none",
                "give the node its kernels, or run it on the CPU execution provider",
            ))
        })?;
        let bundle = Bundle::read(bytes).map_err(invalid)?;
        agree(&attributes, element, bundle.first()).map_err(invalid)?;
        Ok(Self {
            api,
            attributes,
            loaded: (0..bundle.len()).map(|_| Mutex::new(None)).collect(),
            bundle,
        })
    }
}

impl Node for CudaKernel {
    fn api(&self) -> Api {
        self.api
    }

    fn name(&self) -> &'static str {
        NAME
    }

    unsafe fn run(&self, context: *mut OrtKernelContext) -> Result<()> {
        let api = self.api;
        let invalid = |refusal: Refusal| api.invalid(NAME, &refusal);
        // SAFETY: the caller's promise; the execution provider's tensors are memory of its device.
        unsafe {
            let inputs = api.inputs::<{ INPUTS.len() }>(context)?;
            let shape = self.attributes.shape(&inputs).map_err(invalid)?;
            let (place, kernel) = self
                .bundle
                .for_tokens(shape.query_tokens)
                .map_err(invalid)?;
            let pages = covered(kernel, &shape, &inputs).map_err(invalid)?;
            let Shape {
                batch,
                query_tokens,
                heads,
                ..
            } = shape;
            let cache = inputs[2].as_ref();
            let sums = api.output(
                context,
                0,
                &[batch, query_tokens, heads, shape.kv_lora_rank],
            )?;
            let kept = api.output(context, 1, cache.map_or(&[], |cache| &cache.shape))?;
            let lse = api.output(context, 2, &[batch, query_tokens, heads])?;
            let address = |tensor: Option<&Tensor>| tensor.map_or(0, |tensor| tensor.data as u64);
            let (before, after) = (address(cache), address(kept.as_ref()));
            let stream = api.stream(context)?;
            if before != after && shape.cache_numbers() > 0 {
                copy(after, before, shape.cache_numbers() * 2, stream).map_err(invalid)?;
            }
            if batch == 0 {
                return Ok(());
            }
            let call = Call {
                tensors: [
                    address(inputs[0].as_ref()),
                    address(inputs[1].as_ref()),
                    after,
                    address(inputs[3].as_ref()),
                    address(inputs[4].as_ref()),
                    address(inputs[5].as_ref()),
                    address(inputs[6].as_ref()),
                    address(sums.as_ref()),
                    address(lse.as_ref()),
                ],
                batch: batch as i32,
                page_stride: pages.of_a_sequence,
                cache_pages: pages.of_the_cache,
                scale: shape.scale,
            };
            let loaded = self.loaded(place).map_err(invalid)?;
            loaded.run(kernel, &call, stream).map_err(invalid)
        }
    }
}

impl CudaKernel {
    /// A kernel in the context that is current on this thread.
    fn loaded(&self, place: usize) -> std::result::Result<Arc<Loaded>, Refusal> {
        let mut slot = self.loaded[place]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = &*slot {
            if loaded.is_of_current_context()? {
                return Ok(Arc::clone(loaded));
            }
            return Err(refuse(
                "CUDA context",
                "the one that the node's kernels were loaded into",
                "another",
                "run a session on one device",
            ));
        }
        let loaded = Arc::new(Loaded::new(&self.bundle, place)?);
        *slot = Some(Arc::clone(&loaded));
        Ok(loaded)
    }
}

/// Whether the node is the one that its kernels were compiled for.
fn agree(
    attributes: &Attributes,
    element: Type,
    kernel: &Kernel,
) -> std::result::Result<(), Refusal> {
    let window = attributes.sliding_window.unwrap_or(0);
    let type_of = |f16: bool| if f16 { "f16" } else { "bf16" };
    let given_f16 = element == Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    for (name, compiled, given) in [
        (
            "kv_lora_rank",
            kernel.kv_lora_rank.to_string(),
            attributes.kv_lora_rank.to_string(),
        ),
        (
            "sliding_window",
            kernel.window.to_string(),
            window.to_string(),
        ),
        (
            "type of the cache",
            type_of(kernel.f16).to_owned(),
            type_of(given_f16).to_owned(),
        ),
    ] {
        if compiled != given {
            let expected = format!("{compiled}, which {} was compiled for", kernel.name);
            let fix = "give the node the kernels of its own layer";
            return Err(refuse(name, expected, given, fix));
        }
    }
    Ok(())
}

/// Pages as the kernels count them.
#[derive(Debug)]
struct Pages {
    of_a_sequence: i32,
    of_the_cache: i32,
}

/// Refuses what the kernel was not compiled for.
fn covered(
    kernel: &Kernel,
    shape: &Shape,
    inputs: &[Option<Tensor>; INPUTS.len()],
) -> std::result::Result<Pages, Refusal> {
    let same = |name: &str, compiled: usize, given: usize| {
        if compiled == given {
            return Ok(());
        }
        let expected = format!("{compiled}, which {} was compiled for", kernel.name);
        let fix = "give the node kernels for this shape";
        Err(refuse(name, expected, given.to_string(), fix))
    };
    same("heads of `query`", kernel.heads, shape.heads)?;
    same("row of `query`", kernel.row(), shape.width)?;
    for (index, wanted) in [(5, kernel.sinks), (6, kernel.tree), (7, false)] {
        let given = inputs[index].is_some();
        if given != wanted {
            let words = |there| if there { "given" } else { "left out" };
            let name = INPUTS[index].name;
            return Err(refuse(
                &format!("input `{name}`"),
                format!("it {}: so {} was compiled", words(wanted), kernel.name),
                words(given),
                if index == 7 {
                    "run prompts without padding, or the node on the CPU execution provider"
                } else {
                    "give the node kernels for these inputs"
                },
            ));
        }
    }
    let page = kernel.page;
    let (stride, pages) = match shape.layout {
        Layout::Contiguous { capacity } => {
            if capacity == 0 || capacity % page != 0 {
                return Err(refuse(
                    "cache",
                    format!("a capacity that is a multiple of {page}"),
                    capacity.to_string(),
                    "allocate whole pages",
                ));
            }
            (capacity / page, capacity / page * shape.batch)
        }
        Layout::Paged {
            num_pages,
            page_size,
            max_pages,
        } => {
            same("page size of `cache`", page, page_size)?;
            (max_pages, num_pages)
        }
    };
    let most = i32::MAX as usize;
    if shape.batch > MOST_BATCH || stride == 0 || stride > most / page || pages > most {
        return Err(refuse(
            "step",
            format!(
                "at most {MOST_BATCH} sequences, 1 to {} pages of one, {most} pages",
                most / page
            ),
            format!(
                "{} sequences, {stride} pages of one, {pages} pages",
                shape.batch
            ),
            "run them in several batches, or divide the cache",
        ));
    }
    Ok(Pages {
        of_a_sequence: stride as i32,
        of_the_cache: pages as i32,
    })
}

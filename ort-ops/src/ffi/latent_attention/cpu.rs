//! One node on the CPU: a run from the runtime's tensors to [`crate::attention`].

use half::{bf16, f16};
use ort_sys::{ONNXTensorElementDataType as Type, OrtKernelContext, OrtKernelInfo};

use super::super::api::{Api, Result, Tensor};
use super::super::declaration::Node;
use super::super::run::{OrtPool, all, all_mut};
use super::node::Attributes;
use super::{INPUTS, NAME};
use crate::attention::{Inputs, Shape, Step, append, attend, copy};
use crate::element::Element;
use crate::products::Isa;
use crate::refusal::Refusal;

/// A node's attributes and what runs it.
pub(super) struct Kernel {
    api: Api,
    attributes: Attributes,
    isa: Isa,
}

impl Node for Kernel {
    fn api(&self) -> Api {
        self.api
    }

    fn name(&self) -> &'static str {
        NAME
    }

    unsafe fn run(&self, context: *mut OrtKernelContext) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.run_step(context) }
    }
}

impl Kernel {
    /// # Safety
    /// `info` is what the runtime gave to the kernel's creation.
    pub(super) unsafe fn new(api: Api, info: *const OrtKernelInfo) -> Result<Self> {
        Ok(Self {
            api,
            // SAFETY: the caller's promise.
            attributes: unsafe { Attributes::read(api, info)? },
            isa: Isa::available()[0],
        })
    }

    /// # Safety
    /// `context` is what the runtime gave to this run.
    unsafe fn run_step(&self, context: *mut OrtKernelContext) -> Result<()> {
        // SAFETY: the caller's promise.
        let inputs = unsafe { self.api.inputs::<{ INPUTS.len() }>(context)? };
        let invalid = |refusal: Refusal| self.api.invalid(NAME, &refusal);
        let shape = self.attributes.shape(&inputs).map_err(invalid)?;
        let pool = OrtPool::new(self.api, context);
        let element = inputs[0].as_ref().map(|query| query.element);
        // SAFETY: the runtime checked the inputs' types against the operator's, which are those of the arms.
        let ran = unsafe {
            match element {
                Some(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) => {
                    self.typed::<f16>(shape, &inputs, context, &pool)
                }
                Some(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16) => {
                    self.typed::<bf16>(shape, &inputs, context, &pool)
                }
                _ => self.typed::<f32>(shape, &inputs, context, &pool),
            }
        };
        ran?.map_err(invalid)?;
        pool.finish(NAME)
    }

    /// # Safety
    /// The inputs are this run's, of the operator's types with `T` for the cached numbers, and have the shapes of `shape`.
    unsafe fn typed<T: Element>(
        &self,
        shape: Shape,
        inputs: &[Option<Tensor>; INPUTS.len()],
        context: *mut OrtKernelContext,
        pool: &OrtPool,
    ) -> Result<std::result::Result<(), Refusal>> {
        // SAFETY: the caller's promise; the runtime changes no input during a run, but for a cache that is also the output.
        unsafe {
            let given = Inputs {
                query: all::<T>(inputs[0].as_ref()).unwrap_or_default(),
                new_rows: all::<T>(inputs[1].as_ref()).unwrap_or_default(),
                past_lengths: all(inputs[3].as_ref()).unwrap_or_default(),
                page_table: all(inputs[4].as_ref()),
                sinks: all(inputs[5].as_ref()),
                tree_mask: all(inputs[6].as_ref()),
                key_mask: all(inputs[7].as_ref()),
            };
            let step = match Step::new(shape, given) {
                Ok(step) => step,
                Err(refusal) => return Ok(Err(refusal)),
            };
            let out = |index: usize, shape: &[usize]| self.api.output(context, index, shape);
            let Shape {
                batch,
                query_tokens,
                heads,
                ..
            } = shape;
            let sums = out(0, &[batch, query_tokens, heads, shape.kv_lora_rank])?;
            let lse = out(2, &[batch, query_tokens, heads])?;
            let cache = inputs[2].as_ref();
            let cache_out = out(1, cache.map_or(&[], |cache| &cache.shape))?;
            let sums = all_mut::<T>(sums.as_ref()).unwrap_or_default();
            let lse = all_mut::<f32>(lse.as_ref());
            let rows = all::<T>(cache).unwrap_or_default();
            attend(&step, rows, sums, lse, self.isa, pool);
            // The attention is done: from here on the cache is only written.
            let same = cache.map(|t| t.data) == cache_out.as_ref().map(|t| t.data);
            let kept = all_mut::<T>(cache_out.as_ref()).unwrap_or_default();
            if !same {
                copy(all::<T>(cache).unwrap_or_default(), kept, pool);
            }
            append(&step, kept);
        }
        Ok(Ok(()))
    }
}

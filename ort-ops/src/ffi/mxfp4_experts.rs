//! `mlac::Mxfp4Experts`: its attributes, and a run from the runtime's tensors to [`crate::experts`].

use ort_sys::{OrtErrorCode, OrtKernelContext, OrtKernelInfo};

use super::api::{Api, Result, Tensor};
use super::declaration::{Declaration, F32, I64, Node, Port, U8, port};
use super::run::{OrtPool, all, all_mut};
use super::table::nothing_in_place;
use crate::experts::{Inputs, Projection, Shape, Step, compute};
use crate::products::Isa;
use crate::refusal::{Refusal, refuse};

const NAME: &str = "Mxfp4Experts";

/// The operator.
pub(super) const DECLARATION: Declaration = Declaration {
    name: c"Mxfp4Experts",
    inputs: &INPUTS,
    outputs: &[port("out", F32, true)],
    in_place: nothing_in_place,
    infer: None,
    // SAFETY: the caller's promise is this function's.
    create: |api, info, _| unsafe { Ok(Box::new(Kernel::new(api, info)?)) },
};

const INPUTS: [Port; 9] = [
    port("hidden", F32, true),
    port("experts", I64, true),
    port("weights", F32, true),
    port("gate_up_blocks", U8, true),
    port("gate_up_scales", U8, true),
    port("gate_up_bias", F32, true),
    port("down_blocks", U8, true),
    port("down_scales", U8, true),
    port("down_bias", F32, true),
];

/// A node's attributes and what runs it.
struct Kernel {
    api: Api,
    swiglu_limit: f32,
    swiglu_alpha: f32,
    isa: Isa,
}

impl Kernel {
    /// # Safety
    /// `info` is what the runtime gave to the kernel's creation.
    unsafe fn new(api: Api, info: *const OrtKernelInfo) -> Result<Self> {
        let attribute = |name: &str, valid: fn(f32) -> bool, expected: &str| {
            // SAFETY: the caller's promise.
            let found = unsafe { api.float(info, name) };
            found.filter(|x| valid(*x)).ok_or_else(|| {
                let found = found.map_or_else(|| "no such attribute".into(), |x| x.to_string());
                let refusal = refuse(name, expected, found, "export the model again");
                api.refused(OrtErrorCode::ORT_INVALID_GRAPH, NAME, &refusal)
            })
        };
        Ok(Self {
            api,
            swiglu_limit: attribute("swiglu_limit", |x| x > 0.0, "a positive number")?,
            swiglu_alpha: attribute("swiglu_alpha", f32::is_finite, "a number")?,
            isa: Isa::available()[0],
        })
    }

    /// Sizes, from the inputs' shapes.
    fn shape(
        &self,
        inputs: &[Option<Tensor>; INPUTS.len()],
    ) -> std::result::Result<Shape, Refusal> {
        let dims = |index: usize| inputs[index].as_ref().map_or(&[][..], |t| &t.shape[..]);
        let wrong = |index: usize, expected: &str| {
            let found = format!("{:?}", dims(index));
            refuse(INPUTS[index].name, expected, found, "give it that shape")
        };
        let [lead @ .., hidden_size] = dims(0) else {
            return Err(wrong(0, "[tokens.., hidden_size]"));
        };
        let [others @ .., experts_per_token] = dims(1) else {
            return Err(wrong(1, "[tokens.., experts_per_token]"));
        };
        let &[num_experts, hidden_again, _, _] = dims(6) else {
            return Err(wrong(6, "[num_experts, hidden_size, blocks, 16]"));
        };
        let &[_, both, _, _] = dims(3) else {
            return Err(wrong(3, "[num_experts, 2 * intermediate_size, blocks, 16]"));
        };
        let (hidden_size, experts_per_token) = (*hidden_size, *experts_per_token);
        let inner = both / 2;
        let exact = |index: usize, expected: &[usize]| {
            if dims(index) == expected {
                return Ok(());
            }
            Err(wrong(index, &format!("{expected:?}")))
        };
        if lead != others {
            return Err(wrong(1, &format!("{lead:?} choices of the tokens")));
        }
        exact(2, dims(1))?;
        let (gate_up, down) = (hidden_size / 32, inner / 32);
        exact(3, &[num_experts, 2 * inner, gate_up, 16])?;
        exact(4, &[num_experts, 2 * inner, gate_up])?;
        exact(5, &[num_experts, 2 * inner])?;
        exact(6, &[num_experts, hidden_size, down, 16])?;
        exact(7, &[num_experts, hidden_again, down])?;
        exact(8, &[num_experts, hidden_size])?;
        Ok(Shape {
            tokens: lead.iter().product(),
            experts_per_token,
            num_experts,
            hidden_size,
            intermediate_size: inner,
            swiglu_limit: self.swiglu_limit,
            swiglu_alpha: self.swiglu_alpha,
        })
    }
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
        let inputs = unsafe { self.api.inputs::<{ INPUTS.len() }>(context)? };
        let invalid = |refusal: Refusal| self.api.invalid(NAME, &refusal);
        let shape = self.shape(&inputs).map_err(invalid)?;
        // SAFETY: the runtime checked the inputs' types against the operator's and changes none of them during a run.
        let given = unsafe {
            let projection = |first: usize| Projection {
                blocks: all(inputs[first].as_ref()).unwrap_or_default(),
                scales: all(inputs[first + 1].as_ref()).unwrap_or_default(),
                bias: all(inputs[first + 2].as_ref()).unwrap_or_default(),
            };
            Inputs {
                hidden: all(inputs[0].as_ref()).unwrap_or_default(),
                experts: all(inputs[1].as_ref()).unwrap_or_default(),
                weights: all(inputs[2].as_ref()).unwrap_or_default(),
                gate_up: projection(3),
                down: projection(6),
            }
        };
        let step = Step::new(shape, given).map_err(invalid)?;
        let dims = inputs[0].as_ref().map_or(&[][..], |hidden| &hidden.shape);
        let pool = OrtPool::new(self.api, context);
        // SAFETY: the output is this run's own; nobody else has it.
        unsafe {
            let out = self.api.output(context, 0, dims)?;
            let out = all_mut::<f32>(out.as_ref()).unwrap_or_default();
            compute(&step, out, self.isa, &pool);
        }
        pool.finish(NAME)
    }
}

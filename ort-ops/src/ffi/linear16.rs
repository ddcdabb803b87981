//! `mlac::Linear16`: a run from the runtime's tensors to [`crate::linear`], and the output's shape.

use ort_sys::{ONNXTensorElementDataType as Type, OrtKernelContext, OrtShapeInferContext};

use super::api::{Api, Result, Tensor};
use super::declaration::{Declaration, F32, Node, Port, port};
use super::run::{OrtPool, all, all_mut};
use super::shapes::{axes, tell};
use super::table::nothing_in_place;
use crate::linear::{Inputs, Shape, Step, Weight, compute};
use crate::products::Isa;
use crate::refusal::{Refusal, refuse};

const NAME: &str = "Linear16";

/// The operator, for the type of its weights.
pub(super) const DECLARATION: Declaration = Declaration {
    name: c"Linear16",
    inputs: &INPUTS,
    outputs: &[port("out", F32, true)],
    in_place: nothing_in_place,
    infer: Some(infer),
    create: |api, _, weights| {
        Ok(Box::new(Kernel {
            api,
            weights,
            isa: Isa::available()[0],
        }))
    },
};

const INPUTS: [Port; 3] = [
    port("x", F32, true),
    port("weight", None, true),
    port("bias", F32, false),
];

/// What runs a node.
struct Kernel {
    api: Api,
    weights: Type,
    isa: Isa,
}

/// Sizes, from the inputs' shapes.
fn shape(inputs: &[Option<Tensor>; INPUTS.len()]) -> std::result::Result<Shape, Refusal> {
    let dims = |index: usize| inputs[index].as_ref().map_or(&[][..], |t| &t.shape[..]);
    let wrong = |index: usize, expected: &str| {
        let found = format!("{:?}", dims(index));
        refuse(INPUTS[index].name, expected, found, "give it that shape")
    };
    let [lead @ .., columns] = dims(0) else {
        return Err(wrong(0, "[tokens.., in]"));
    };
    let &[rows, found] = dims(1) else {
        return Err(wrong(1, &format!("[out, {columns}]")));
    };
    if lead.is_empty() {
        return Err(wrong(0, "[tokens.., in]"));
    }
    if found != *columns {
        return Err(wrong(1, &format!("[out, {columns}]")));
    }
    if inputs[2].is_some() && dims(2) != [rows] {
        return Err(wrong(2, &format!("[{rows}]")));
    }
    Ok(Shape {
        tokens: lead.iter().product(),
        rows,
        columns: *columns,
    })
}

/// `out` has the axes of `x`, the last one of `weight`'s first.
///
/// # Safety
/// `context` is what the runtime gave to the inference.
unsafe fn infer(api: Api, context: *mut OrtShapeInferContext) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe {
        let (x, weight) = (axes(api, context, 0)?, axes(api, context, 1)?);
        let (Some((element, mut x)), Some((_, weight))) = (x, weight) else {
            return Ok(());
        };
        if let (Some(last), [rows, _]) = (x.last_mut(), weight.as_slice()) {
            last.clone_from(rows);
            tell(api, context, 0, element, &x)?;
        }
    }
    Ok(())
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
        let shape = shape(&inputs).map_err(invalid)?;
        // SAFETY: the runtime checked the inputs' types against the operator's and changes none of them during a run.
        let given = unsafe {
            let weight = inputs[1].as_ref();
            Inputs {
                x: all(inputs[0].as_ref()).unwrap_or_default(),
                weight: if self.weights == Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 {
                    Weight::Bf16(all(weight).unwrap_or_default())
                } else {
                    Weight::F16(all(weight).unwrap_or_default())
                },
                bias: all(inputs[2].as_ref()),
            }
        };
        let step = Step::new(shape, given).map_err(invalid)?;
        let mut dims = inputs[0]
            .as_ref()
            .map_or_else(Vec::new, |x| x.shape.clone());
        if let Some(last) = dims.last_mut() {
            *last = shape.rows;
        }
        let pool = OrtPool::new(self.api, context);
        // SAFETY: the output is this run's own; nobody else has it.
        unsafe {
            let out = self.api.output(context, 0, &dims)?;
            let out = all_mut::<f32>(out.as_ref()).unwrap_or_default();
            compute(&step, out, self.isa, &pool);
        }
        pool.finish(NAME)
    }
}

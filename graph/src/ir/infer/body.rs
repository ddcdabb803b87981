//! Operators with a graph inside.

use super::{Args, Inferred, Mismatch, Result};
use crate::ir::{DType, Dim, Graph, TensorType};

/// Inputs of a body before the carried values: the run's number and whether to go on.
const OWN: usize = 2;

/// Inputs and outputs as [`crate::ir::Op::Loop`] lists them.
pub(super) fn repeat(body: &Graph, carried: usize, args: Args<'_>) -> Result<Vec<Inferred>> {
    let trips = args.ty(0)?;
    if trips.dtype != DType::I64 || trips.rank() != 0 {
        return Err(Mismatch::new("an i64 scalar as input 0", trips));
    }
    if let Some(condition) = args.optional(1) {
        return Err(Mismatch::new("no input 1", condition));
    }
    let (inputs, outputs) = (body.inputs(), body.outputs());
    if inputs.len() < OWN + carried || inputs.len() != args.0.len() {
        return Err(Mismatch::new(
            format!("{} inputs, as the body has", inputs.len()),
            args.0.len(),
        ));
    }
    if outputs.len() != 1 + carried {
        return Err(Mismatch::new(
            format!("{} outputs of the body", 1 + carried),
            outputs.len(),
        ));
    }
    let scalar = |dtype| TensorType::new(dtype, vec![]);
    let ty = |id| &body.value(id).ty;
    let own = [
        (inputs[0], scalar(DType::I64)),
        (inputs[1], scalar(DType::Bool)),
        (outputs[0], scalar(DType::Bool)),
    ];
    for (id, expected) in &own {
        if ty(*id) != expected {
            return Err(Mismatch::new(
                format!("{expected} as {} of the body", body.value(*id).name),
                ty(*id),
            ));
        }
    }
    for (i, &inner) in inputs.iter().enumerate().skip(OWN) {
        let (given, inner) = (args.given(i)?, body.value(inner));
        if *given.ty != inner.ty {
            return Err(Mismatch::new(
                format!("{} as input {i}, {} of the body", inner.ty, inner.name),
                given.ty,
            ));
        }
        let known: Option<&[Dim]> = inner.content.as_deref();
        if known.is_some() && known != given.content {
            return Err(Mismatch::new(
                format!("the elements that the body knows of {}", inner.name),
                "others",
            ));
        }
    }
    let mut results = vec![];
    for (&start, &end) in inputs[OWN..].iter().zip(&outputs[1..]) {
        if ty(start) != ty(end) {
            return Err(Mismatch::new(
                format!("{} again as {}", ty(start), body.value(end).name),
                ty(end),
            ));
        }
        results.push(Inferred::new(ty(end).dtype, ty(end).shape.clone()));
    }
    Ok(results)
}

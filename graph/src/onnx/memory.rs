//! One message with the weights inside, for graphs that are run from memory.

use std::convert::Infallible;

use mlac_model::{Dtype, Refusal};
use prost::Message as _;

use super::{
    WeightSource,
    layout::{LayoutError, stored_type, write_in_order, write_stored, write_weight},
    lower,
};
use crate::{
    error::Error,
    ir::{Transform, WeightRef},
    validate::ValidGraph,
};

/// Largest message that every reader takes, in bytes; protobuf's own limit is 2 GiB.
const LARGEST: usize = (2 << 30) - (1 << 20);

/// The ONNX message of `graph` with all its weights inside; refused near 2 GiB.
pub fn to_bytes(graph: &ValidGraph, source: &dyn WeightSource) -> Result<Vec<u8>, Error> {
    let weights: usize = graph.graph().weights().map(WeightRef::bytes).sum();
    if weights > LARGEST {
        return Err(Error::Refused(Refusal::new(
            format!("graph {}", graph.graph().name()),
            format!("at most {LARGEST} bytes of weights inside one message"),
            format!("{weights} bytes"),
            "write the graph as a folder with external data",
        )));
    }
    let model = lower::model(graph, |weight, tensor| {
        let mut bytes = Vec::with_capacity(weight.bytes());
        stream(weight, source, &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })
        .map_err(|e| match e {
            StreamError::Error(e) => e,
            StreamError::Io(source) => Error::Io {
                path: weight.name.clone().into(),
                action: "copy",
                source,
            },
        })?;
        tensor.raw_data = Some(bytes);
        Ok::<_, Error>(())
    })?;
    Ok(model.encode_to_vec())
}

pub(super) enum StreamError {
    Error(Error),
    Io(std::io::Error),
}

/// Reads one weight and hands its bytes to `sink`; numbers of the right type go through as they are
/// stored, others through f32.
pub(super) fn stream(
    weight: &WeightRef,
    source: &dyn WeightSource,
    sink: &mut dyn FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<(), StreamError> {
    let failed = |source| {
        StreamError::Error(Error::Source {
            name: weight.name.clone(),
            source,
        })
    };
    let laid_out = |e| match e {
        LayoutError::Refused(r) => StreamError::Error(Error::Refused(r)),
        LayoutError::Source(e) => failed(e),
        LayoutError::Io(e) => StreamError::Io(e),
    };
    let wanted = stored_type(weight);
    let must = wanted.is_some_and(|d| !matches!(d, Dtype::F32 | Dtype::F16));
    if must || (wanted.is_some() && source.dtype(&weight.name) == wanted) {
        let stored = source
            .stored(&weight.name, &weight.source_shape)
            .map_err(failed)?;
        if let Some(stored) = stored {
            return write_stored(weight, &stored, sink).map_err(laid_out);
        }
        return Err(StreamError::Error(Error::Refused(Refusal::new(
            format!("tensor {}", weight.name),
            "a source that has it as it is stored",
            "numbers only",
            "write from the checkpoint",
        ))));
    }
    let floats = [Dtype::F32, Dtype::F16, Dtype::BF16];
    let dtype = source.dtype(&weight.name);
    if weight.transform == Transform::AsIs && dtype.is_some_and(|d| floats.contains(&d)) {
        let stored = source
            .stored(&weight.name, &weight.source_shape)
            .map_err(failed)?;
        if let Some(stored) = stored {
            return write_in_order(weight, &stored, sink).map_err(laid_out);
        }
    }
    let numbers = source
        .f32(&weight.name, &weight.source_shape)
        .map_err(failed)?;
    let expected: usize = weight.source_shape.iter().product();
    if numbers.len() != expected {
        return Err(StreamError::Error(Error::Refused(Refusal::new(
            format!("tensor {}", weight.name),
            format!("{expected} numbers for the shape {:?}", weight.source_shape),
            format!("{} numbers", numbers.len()),
            "check that the source belongs to this configuration",
        ))));
    }
    write_weight(weight, &numbers, sink).map_err(laid_out)
}

/// Never fails; for callers of [`lower::model`] that only point at weights.
pub(super) fn infallible<T>(result: Result<T, Infallible>) -> T {
    match result {
        Ok(value) => value,
        Err(never) => match never {},
    }
}

//! Gives every node of `mlac::LatentAttention` the attribute `kernels`: its recipes and cubins, which TensorRT's parser hands to
//! the plugin.
//!
//! The kernels belong to a GPU, the ONNX file to none, so they join in memory, on the protobuf wire: ModelProto.graph = 7,
//! GraphProto.node = 1, NodeProto: input = 1, op_type = 4, attribute = 5; AttributeProto: name = 1, s = 4, type = 20 (onnx.proto).
//! Everything else is copied as it is.

use std::path::Path;
use std::sync::Arc;

use mlac_model::Refusal;

use crate::error::Result;

const OPERATOR: &[u8] = b"LatentAttention";
const ATTRIBUTE: &[u8] = b"kernels";
/// AttributeProto.type of a string.
const STRING: u8 = 3;
/// The cache is input 2, and an input of the graph of this name with the layer's number.
const CACHE: (usize, &str) = (2, "past_latent.");

/// The model with kernels, and the layers that got some, in the order of their nodes.
pub(super) fn attach(
    path: &Path,
    model: &[u8],
    kernels: &mut dyn FnMut(usize) -> Result<Arc<[u8]>>,
) -> Result<(Vec<u8>, Vec<usize>)> {
    let mut layers = Vec::new();
    let model = rewrite(path, model, 7, &mut |graph| {
        let graph = rewrite(path, graph, 1, &mut |node| {
            let Some(layer) = layer_of(path, node)? else {
                return Ok(node.to_vec());
            };
            layers.push(layer);
            let mut node = node.to_vec();
            let bytes = kernels(layer)?;
            field(&mut node, 5, &attribute(&bytes));
            Ok(node)
        })?;
        Ok(graph)
    })?;
    Ok((model, layers))
}

/// The layer of a node of the operator; none of other nodes.
fn layer_of(path: &Path, node: &[u8]) -> Result<Option<usize>> {
    let (mut operator, mut inputs, mut given) = (false, Vec::new(), false);
    for part in parts(path, node)? {
        match part.number {
            1 => inputs.push(String::from_utf8_lossy(part.bytes).into_owned()),
            4 => operator = part.bytes == OPERATOR,
            5 => {
                given |= parts(path, part.bytes)?
                    .iter()
                    .any(|name| name.number == 1 && name.bytes == ATTRIBUTE);
            }
            _ => {}
        }
    }
    if !operator {
        return Ok(None);
    }
    let cache = inputs.get(CACHE.0).map_or("", String::as_str);
    let layer = cache
        .strip_prefix(CACHE.1)
        .and_then(|layer| layer.parse().ok());
    if given || layer.is_none() {
        return Err(Refusal::new(
            format!("{}: a node of mlac::LatentAttention", path.display()),
            "the graph's input past_latent.{layer} as its cache, and no kernels yet",
            if given {
                "an attribute `kernels`".to_owned()
            } else {
                format!("the cache `{cache}`")
            },
            "export the model with `mlac export --form tensorrt`",
        )
        .into());
    }
    Ok(layer)
}

fn attribute(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    field(&mut out, 1, ATTRIBUTE);
    field(&mut out, 4, bytes);
    varint(&mut out, 20 << 3);
    out.push(STRING);
    out
}

/// Copies a message, with every length-delimited field of that number changed.
fn rewrite(
    path: &Path,
    message: &[u8],
    number: u64,
    change: &mut dyn FnMut(&[u8]) -> Result<Vec<u8>>,
) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(message.len());
    for part in parts(path, message)? {
        if part.number == number && part.delimited {
            field(&mut out, number, &change(part.bytes)?);
        } else {
            out.extend(part.whole);
        }
    }
    Ok(out)
}

fn field(out: &mut Vec<u8>, number: u64, bytes: &[u8]) {
    varint(out, number << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A field of a message.
struct Part<'a> {
    number: u64,
    delimited: bool,
    /// Its content, without tag and length.
    bytes: &'a [u8],
    /// All of it.
    whole: &'a [u8],
}

/// The fields of a message, in order.
fn parts<'a>(path: &Path, message: &'a [u8]) -> Result<Vec<Part<'a>>> {
    let mut parts = Vec::new();
    let mut rest = message;
    while !rest.is_empty() {
        let (part, after) = part(rest).ok_or_else(|| {
            Refusal::new(
                path.display().to_string(),
                "an ONNX file",
                format!(
                    "a field that is cut short, {} bytes before the end of its message",
                    rest.len()
                ),
                "export the model again; the file may have been cut short",
            )
        })?;
        parts.push(part);
        rest = after;
    }
    Ok(parts)
}

fn part(rest: &[u8]) -> Option<(Part<'_>, &[u8])> {
    let whole = rest;
    let (tag, mut rest) = number(rest)?;
    let length = match tag & 7 {
        0 => rest.len() - number(rest)?.1.len(),
        1 => 8,
        2 => {
            let (length, after) = number(rest)?;
            rest = after;
            usize::try_from(length).ok()?
        }
        5 => 4,
        _ => return None,
    };
    let (bytes, after) = rest.split_at_checked(length)?;
    let part = Part {
        number: tag >> 3,
        delimited: tag & 7 == 2,
        bytes,
        whole: &whole[..whole.len() - after.len()],
    };
    Some((part, after))
}

fn number(mut rest: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0_u64;
    for index in 0..10 {
        let (&byte, after) = rest.split_first()?;
        rest = after;
        value |= u64::from(byte & 0x7f).checked_shl(7 * index).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Some((value, rest));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    fn data(name: &str) -> Vec<u8> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
        fs::read(folder.join(name)).unwrap()
    }

    /// A model of one node with these inputs.
    fn model(operator: &str, inputs: &[&str]) -> Vec<u8> {
        let mut node = Vec::new();
        for input in inputs {
            field(&mut node, 1, input.as_bytes());
        }
        field(&mut node, 4, operator.as_bytes());
        let (mut graph, mut model) = (Vec::new(), vec![8, 10]);
        field(&mut graph, 1, &node);
        field(&mut graph, 2, b"name");
        field(&mut model, 7, &graph);
        field(&mut model, 2, b"mlac");
        model
    }

    fn attached(model: &[u8]) -> Result<(Vec<u8>, Vec<usize>)> {
        attach(Path::new("file.onnx"), model, &mut |layer| {
            Ok([layer as u8; 300].into())
        })
    }

    #[test]
    fn the_node_gets_its_layers_kernels_and_nothing_else_changes() {
        let plain = model(
            "LatentAttention",
            &["q", "rows", "past_latent.7", "lengths"],
        );
        let (with, layers) = attached(&plain).unwrap();
        assert_eq!(layers, [7]);
        // Taken out again, it is what it was.
        let back = rewrite(Path::new(""), &with, 7, &mut |graph| {
            rewrite(Path::new(""), graph, 1, &mut |node| {
                let mut kept = Vec::new();
                for part in parts(Path::new(""), node)? {
                    if part.number == 5 {
                        let fields = parts(Path::new(""), part.bytes)?;
                        let of = |number| fields.iter().find(|f| f.number == number).unwrap().bytes;
                        assert_eq!(of(1), b"kernels");
                        assert_eq!(of(4), [7; 300]);
                        assert_eq!(of(20), [STRING]);
                    } else {
                        kept.extend(part.whole);
                    }
                }
                Ok(kept)
            })
        })
        .unwrap();
        assert_eq!(back, plain);
    }

    #[test]
    fn other_files_stay_as_they_are_byte_for_byte() {
        for name in ["half.onnx", "toy/decoder.onnx", "unsupported.onnx"] {
            let bytes = data(name);
            assert_eq!(attached(&bytes).unwrap(), (bytes, vec![]), "{name}");
        }
    }

    #[test]
    fn a_node_whose_layer_is_unknown_or_that_has_kernels_is_refused() {
        for inputs in [
            &["q", "rows", "cache"][..],
            &["q"],
            &["q", "r", "past_latent.x"],
        ] {
            let error = attached(&model("LatentAttention", inputs))
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("past_latent.{layer} as its cache"),
                "{error}"
            );
        }
        let (with, _) = attached(&model("LatentAttention", &["", "", "past_latent.0"])).unwrap();
        let error = attached(&with).unwrap_err().to_string();
        assert!(error.contains("found an attribute `kernels`"), "{error}");
    }

    #[test]
    fn every_cut_is_an_error_or_a_shorter_model_and_never_a_panic() {
        let whole = model("LatentAttention", &["q", "rows", "past_latent.7"]);
        for end in 0..whole.len() {
            if let Ok((_, layers)) = attached(&whole[..end]) {
                assert!(layers.is_empty() || end > 40, "cut at {end}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = attached(&bytes);
        }
    }
}

//! The cache of a decoder graph, discovered from the names and shapes of its inputs.

use mlac_model::Refusal;
use serde::{Deserialize, Serialize};

use super::session::{Dim, OrtSession, Port};
use super::tensor::{Element, HostTensor, Value};
use crate::error::Result;

/// What a layer caches per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum CacheKind {
    /// Keys and values, each `[batch, heads, past, width]`.
    KeyValue {
        /// Key and value heads.
        heads: usize,
        /// Numbers per key.
        key_width: usize,
        /// Numbers per value.
        value_width: usize,
    },
    /// One latent row `[batch, past, width]` shared by all heads: r + d_r numbers.
    Latent {
        /// Numbers per token.
        width: usize,
    },
}

/// One layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheLayout {
    /// Index of the layer in the model.
    pub layer: usize,
    /// What it caches.
    #[serde(flatten)]
    pub kind: CacheKind,
    /// Most tokens it holds, those of its sliding window; `None`: all.
    #[serde(default)]
    pub window: Option<usize>,
}

impl CacheLayout {
    /// Numbers that the layer caches per token.
    pub fn numbers_per_token(&self) -> usize {
        match self.kind {
            CacheKind::KeyValue {
                heads,
                key_width,
                value_width,
            } => heads * (key_width + value_width),
            CacheKind::Latent { width } => width,
        }
    }

    /// Tokens that the layer holds of a sequence of `context` tokens.
    pub fn tokens(&self, context: usize) -> usize {
        self.window.map_or(context, |window| window.min(context))
    }
}

/// Numbers that `layers` hold of a sequence of `context` tokens.
pub fn cached_numbers(layers: &[CacheLayout], context: usize) -> usize {
    layers
        .iter()
        .map(|layer| layer.numbers_per_token() * layer.tokens(context))
        .sum()
}

/// One cache tensor: an input of the graph, and the output that replaces it.
#[derive(Debug, Clone)]
pub(super) struct CachePort {
    part: Part,
    pub(super) input: String,
    pub(super) output: String,
    element: Element,
    /// Fixed sizes after the batch axis, without the past axis.
    sizes: Vec<usize>,
    /// Most tokens held.
    window: Option<usize>,
    /// Whether the graph keeps it in place: `[batch, capacity, width]`, with a window a ring.
    pub(super) in_place: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Key,
    Value,
    Latent,
}

impl Part {
    /// The axis of past tokens.
    fn past_axis(self) -> usize {
        match self {
            Self::Key | Self::Value => 2,
            Self::Latent => 1,
        }
    }
}

/// Layer, part and output name of a cache input; `None` for any other input.
fn parse(name: &str) -> Option<(usize, Part, String)> {
    if let Some(layer) = name.strip_prefix("past_latent.") {
        return Some((
            layer.parse().ok()?,
            Part::Latent,
            format!("present_latent.{layer}"),
        ));
    }
    let (layer, part) = name.strip_prefix("past_key_values.")?.split_once('.')?;
    let kind = match part {
        "key" => Part::Key,
        "value" => Part::Value,
        _ => return None,
    };
    Some((layer.parse().ok()?, kind, format!("present.{layer}.{part}")))
}

/// The axis of cached rows of a cache input, and the output that replaces it; `None` for any other input.
pub(crate) fn cache_parts(name: &str) -> Option<(usize, String)> {
    let (_, part, output) = parse(name)?;
    Some((part.past_axis(), output))
}

/// The layer of a cache input.
pub(crate) fn cache_layer(name: &str) -> Option<usize> {
    parse(name).map(|(layer, ..)| layer)
}

/// The cache tensors of a graph, in the order of its inputs.
pub(super) fn ports(session: &OrtSession) -> Result<Vec<CachePort>> {
    let mut found = Vec::new();
    for port in session.inputs() {
        let Some((_, part, output)) = parse(&port.name) else {
            continue;
        };
        if !session
            .outputs()
            .iter()
            .any(|candidate| candidate.name == output)
        {
            return Err(refusal(
                session,
                port,
                format!("an output {output} to replace it"),
                "none",
            )
            .into());
        }
        found.push(CachePort {
            part,
            input: port.name.clone(),
            output,
            element: port.element,
            sizes: sizes(session, port, part)?,
            window: port.dims[part.past_axis()].window(),
            in_place: port.dims[part.past_axis()].is_capacity(),
        });
    }
    if found.is_empty() {
        return Err(Refusal::new(
            session.subject(),
            "inputs past_key_values.{i}.key and .value, or past_latent.{i}",
            "none",
            "pass the folder that `mlac export` wrote",
        )
        .into());
    }
    Ok(found)
}

fn sizes(session: &OrtSession, port: &Port, part: Part) -> Result<Vec<usize>> {
    let rank = if part == Part::Latent { 3 } else { 4 };
    let sizes: Option<Vec<usize>> = port
        .dims
        .iter()
        .enumerate()
        .filter(|(axis, _)| *axis != 0 && *axis != part.past_axis())
        .map(|(_, dim)| dim.fixed())
        .collect();
    match sizes {
        Some(sizes) if port.dims.len() == rank => Ok(sizes),
        _ => Err(refusal(
            session,
            port,
            format!("{rank} axes, of which only batch and past vary"),
            &format!("{:?}", port.dims),
        )
        .into()),
    }
}

fn refusal(session: &OrtSession, port: &Port, expected: String, found: &str) -> Refusal {
    Refusal::new(
        format!("{}: input {}", session.subject(), port.name),
        expected,
        found,
        "export the model with `mlac export`",
    )
}

/// Rows by which a cache that is kept in place grows at least.
const ROOM_STEP: usize = 64;

impl CachePort {
    /// A cache without tokens.
    pub(super) fn empty(&self, batch: usize) -> Result<Value> {
        self.zeros(batch, 0)
    }

    /// Makes a cache that is kept in place large enough for a sequence of `context` tokens. It grows by doubling, so
    /// that few steps copy it.
    pub(super) fn make_room(&self, value: &mut Value, context: usize) -> Result<()> {
        let capacity = value.shape()[self.part.past_axis()];
        if !self.in_place || self.held(context) <= capacity {
            return Ok(());
        }
        let wanted = context.max(2 * capacity).next_multiple_of(ROOM_STEP);
        *value = value.with_rows(self.held(wanted))?;
        Ok(())
    }

    /// Bytes of the tokens held of a sequence of `context` tokens.
    pub(super) fn bytes(&self, value: &Value, context: usize) -> usize {
        if !self.in_place {
            return value.bytes();
        }
        let batch = value.shape()[0];
        batch * self.held(context) * self.sizes.iter().product::<usize>() * self.element.bytes()
    }

    /// Whether a step that ends at `context` tokens overwrites rows.
    pub(super) fn overwrites(&self, context: usize) -> bool {
        self.in_place && self.window.is_some_and(|window| window < context)
    }

    /// Tokens held of a sequence of `context` tokens.
    pub(super) fn held(&self, context: usize) -> usize {
        self.window.map_or(context, |window| window.min(context))
    }

    /// The cache of a sequence of `context` tokens, of zeros.
    pub(super) fn zeros(&self, batch: usize, context: usize) -> Result<Value> {
        let mut shape = vec![batch];
        shape.extend(&self.sizes);
        shape.insert(self.part.past_axis(), self.held(context));
        if self.in_place {
            return Value::room(self.element, &shape);
        }
        Value::new(HostTensor::zeros(self.element, shape))
    }

    /// Tokens in a cache tensor.
    pub(super) fn tokens(&self, value: &Value) -> usize {
        value
            .shape()
            .get(self.part.past_axis())
            .copied()
            .unwrap_or(0)
    }
}

/// The cache of every layer, in layer order, from the names and axes of a decoder's inputs. Other
/// inputs are passed over.
pub fn cache_layouts<'a>(inputs: impl Iterator<Item = (&'a str, &'a [Dim])>) -> Vec<CacheLayout> {
    let mut layers: Vec<CacheLayout> = Vec::new();
    for (name, dims) in inputs {
        let Some((layer, part, _)) = parse(name) else {
            continue;
        };
        let at = |axis: usize| dims.get(axis).and_then(Dim::fixed).unwrap_or(0);
        let window = dims.get(part.past_axis()).and_then(Dim::window);
        if part == Part::Latent {
            layers.push(CacheLayout {
                layer,
                kind: CacheKind::Latent { width: at(2) },
                window,
            });
            continue;
        }
        let index = layers
            .iter()
            .position(|known| known.layer == layer)
            .unwrap_or_else(|| {
                let kind = CacheKind::KeyValue {
                    heads: at(1),
                    key_width: 0,
                    value_width: 0,
                };
                layers.push(CacheLayout {
                    layer,
                    kind,
                    window,
                });
                layers.len() - 1
            });
        if let CacheKind::KeyValue {
            key_width,
            value_width,
            ..
        } = &mut layers[index].kind
        {
            *(if part == Part::Key {
                key_width
            } else {
                value_width
            }) = at(3);
        }
    }
    layers.sort_unstable_by_key(|layout| layout.layer);
    layers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_and_caches_in_place_are_told_from_growing_ones() {
        for (axis, window, in_place) in [
            ("past", None, false),
            ("past_w128", Some(128), false),
            ("capacity", None, true),
            ("capacity_w64", Some(64), true),
            ("capacity_wx", None, true),
        ] {
            let dim = Dim::Dynamic(axis.into());
            assert_eq!(
                (dim.window(), dim.is_capacity()),
                (window, in_place),
                "{axis}"
            );
        }
        assert!(!Dim::Fixed(3).is_capacity());
    }

    #[test]
    fn only_cache_inputs_are_taken() {
        for (name, expected) in [
            (
                "past_key_values.3.key",
                Some((3, Part::Key, "present.3.key")),
            ),
            (
                "past_key_values.12.value",
                Some((12, Part::Value, "present.12.value")),
            ),
            ("past_latent.0", Some((0, Part::Latent, "present_latent.0"))),
            ("past_latent.x", None),
            ("past_key_values.3.keys", None),
            ("past_key_values.key", None),
            ("input_ids", None),
        ] {
            let found = parse(name);
            let found = found
                .as_ref()
                .map(|(layer, part, output)| (*layer, *part, output.as_str()));
            assert_eq!(found, expected, "{name}");
        }
    }
}

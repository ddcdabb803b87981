//! What a node is, whatever runs it: its attributes, and the shape of a step.

use ort_sys::{OrtErrorCode, OrtKernelInfo};

use super::super::api::{Api, Result, Tensor};
use super::{INPUTS, NAME};
use crate::attention::{Layout, Shape};
use crate::refusal::{Refusal, refuse};

/// A node's attributes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes {
    pub(super) kv_lora_rank: usize,
    pub(super) scale: f32,
    pub(super) sliding_window: Option<usize>,
}

impl Attributes {
    /// # Safety
    /// `info` is what the runtime gave to the kernel's creation.
    pub(super) unsafe fn read(api: Api, info: *const OrtKernelInfo) -> Result<Self> {
        // SAFETY: the caller's promise.
        let (rank, scale, window) = unsafe {
            (
                api.int(info, "kv_lora_rank"),
                api.float(info, "scale"),
                api.int(info, "sliding_window").unwrap_or(0),
            )
        };
        let invalid =
            |refusal: Refusal| api.refused(OrtErrorCode::ORT_INVALID_GRAPH, NAME, &refusal);
        let text = |value: Option<String>| value.unwrap_or_else(|| "no such attribute".into());
        let kv_lora_rank = rank
            .and_then(|rank| usize::try_from(rank).ok())
            .filter(|&rank| rank > 0)
            .ok_or_else(|| {
                let found = text(rank.map(|rank| rank.to_string()));
                invalid(refuse(
                    "kv_lora_rank",
                    "1 or more",
                    found,
                    "export the model again",
                ))
            })?;
        let scale = scale
            .filter(|scale| *scale > 0.0 && scale.is_finite())
            .ok_or_else(|| {
                let found = text(scale.map(|scale| scale.to_string()));
                invalid(refuse(
                    "scale",
                    "a positive number",
                    found,
                    "export the model again",
                ))
            })?;
        let sliding_window = usize::try_from(window).map_err(|_| {
            let found = window.to_string();
            invalid(refuse(
                "sliding_window",
                "0 or more",
                found,
                "export the model again",
            ))
        })?;
        Ok(Self {
            kv_lora_rank,
            scale,
            sliding_window: (sliding_window > 0).then_some(sliding_window),
        })
    }

    /// The step's shape, from the inputs' shapes.
    pub(super) fn shape(
        &self,
        inputs: &[Option<Tensor>; INPUTS.len()],
    ) -> std::result::Result<Shape, Refusal> {
        let dims =
            |index: usize, axes: usize, text: &str| -> std::result::Result<&[usize], Refusal> {
                let shape = inputs[index].as_ref().map_or(&[][..], |t| &t.shape[..]);
                if shape.len() == axes {
                    return Ok(shape);
                }
                let name = INPUTS[index].name;
                Err(refuse(
                    name,
                    text,
                    format!("{shape:?}"),
                    "give it that shape",
                ))
            };
        let query = dims(0, 4, "[batch, query_tokens, heads, r + d_r]")?;
        let (batch, query_tokens, heads, width) = (query[0], query[1], query[2], query[3]);
        let exact = |index: usize, expected: &[usize]| {
            let Some(tensor) = &inputs[index] else {
                return Ok(());
            };
            if tensor.shape == expected {
                return Ok(());
            }
            let (expected, found) = (format!("{expected:?}"), format!("{:?}", tensor.shape));
            let name = INPUTS[index].name;
            Err(refuse(
                name,
                expected,
                found,
                "give it the shape that `query` implies",
            ))
        };
        exact(1, &[batch, query_tokens, width])?;
        exact(3, &[batch])?;
        exact(5, &[heads])?;
        exact(6, &[batch, query_tokens])?;
        if let Some(mask) = &inputs[7] {
            let columns = dims(7, 2, "[batch, mask_length]")?[1];
            exact(7, &[batch, columns])?;
            debug_assert_eq!(mask.count(), batch * columns, "elements of the mask");
        }
        let cache = dims(2, 3, "[batch, capacity, r + d_r], or pages of such rows")?;
        let layout = if inputs[4].is_none() {
            exact(2, &[batch, cache[1], width])?;
            Layout::Contiguous { capacity: cache[1] }
        } else {
            let max_pages = dims(4, 2, "[batch, max_pages]")?[1];
            exact(4, &[batch, max_pages])?;
            exact(2, &[cache[0], cache[1], width])?;
            if cache[1] == 0 {
                let found = format!("{cache:?}");
                return Err(refuse(
                    "cache",
                    "pages of a row or more",
                    found,
                    "allocate pages",
                ));
            }
            Layout::Paged {
                num_pages: cache[0],
                page_size: cache[1],
                max_pages,
            }
        };
        for (axis, size) in [("query_tokens", query_tokens), ("heads", heads)] {
            if size == 0 {
                let found = format!("{query:?}");
                let fix = "run nothing for no tokens";
                return Err(refuse("query", format!("{axis} of 1 or more"), found, fix));
            }
        }
        Ok(Shape {
            batch,
            query_tokens,
            heads,
            kv_lora_rank: self.kv_lora_rank,
            width,
            layout,
            sliding_window: self.sliding_window,
            scale: self.scale,
        })
    }
}

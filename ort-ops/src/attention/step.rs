//! One step's shapes and inputs, and the checks of their values.

use crate::refusal::{Refusal, refuse};

/// How the rows of the cache lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `[batch, capacity, w]`; with a window a ring.
    Contiguous {
        /// Rows of a sequence.
        capacity: usize,
    },
    /// `[num_pages, page_size, w]`.
    Paged {
        /// Pages.
        num_pages: usize,
        /// Rows of a page.
        page_size: usize,
        /// Columns of the page table.
        max_pages: usize,
    },
}

/// The operator's attributes and shapes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// New tokens of a sequence.
    pub query_tokens: usize,
    /// Query heads.
    pub heads: usize,
    /// `kv_lora_rank`, r.
    pub kv_lora_rank: usize,
    /// `w = r + d_r`.
    pub width: usize,
    /// The cache.
    pub layout: Layout,
    /// A token sees itself and the `sliding_window - 1` positions before.
    pub sliding_window: Option<usize>,
    /// Factor on the scores.
    pub scale: f32,
}

/// A step's inputs apart from the cache; shapes as in `docs/latent-attention.md`.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, T> {
    /// `[batch, query_tokens, heads, w]`.
    pub query: &'a [T],
    /// `[batch, query_tokens, w]`.
    pub new_rows: &'a [T],
    /// `[batch]`.
    pub past_lengths: &'a [i32],
    /// `[batch, max_pages]`; there when the layout is paged.
    pub page_table: Option<&'a [i32]>,
    /// `[heads]`.
    pub sinks: Option<&'a [f32]>,
    /// `[batch, query_tokens]`.
    pub tree_mask: Option<&'a [i64]>,
    /// `[batch, mask_length]`.
    pub key_mask: Option<&'a [i64]>,
}

/// A checked step.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a, T> {
    pub(crate) shape: Shape,
    pub(crate) inputs: Inputs<'a, T>,
    /// Columns of `key_mask`.
    pub(crate) mask_length: usize,
}

impl Shape {
    /// Numbers in the cache.
    pub fn cache_numbers(&self) -> usize {
        self.width
            * match self.layout {
                Layout::Contiguous { capacity } => self.batch * capacity,
                Layout::Paged {
                    num_pages,
                    page_size,
                    ..
                } => num_pages * page_size,
            }
    }

    /// Numbers in `sums`.
    pub fn sums_numbers(&self) -> usize {
        self.rows() * self.kv_lora_rank
    }

    /// Query rows: `batch * query_tokens * heads`.
    pub fn rows(&self) -> usize {
        self.batch * self.query_tokens * self.heads
    }
}

impl<'a, T> Step<'a, T> {
    /// Checks what shapes alone do not say.
    ///
    /// # Errors
    /// The conditions of `docs/latent-attention.md`, section Errors.
    pub fn new(shape: Shape, inputs: Inputs<'a, T>) -> Result<Self, Refusal> {
        let Shape { width, .. } = shape;
        let counts = [
            ("query", inputs.query.len(), shape.rows() * width),
            (
                "new_rows",
                inputs.new_rows.len(),
                shape.batch * shape.query_tokens * width,
            ),
            ("past_lengths", inputs.past_lengths.len(), shape.batch),
            (
                "sinks",
                inputs.sinks.map_or(shape.heads, <[_]>::len),
                shape.heads,
            ),
            (
                "tree_mask",
                inputs
                    .tree_mask
                    .map_or(shape.batch * shape.query_tokens, <[_]>::len),
                shape.batch * shape.query_tokens,
            ),
        ];
        for (name, found, expected) in counts {
            if found != expected {
                let (expected, found) = (format!("{expected} elements"), found.to_string());
                return Err(refuse(
                    name,
                    expected,
                    found,
                    "give it the shape that `query` implies",
                ));
            }
        }
        if shape.kv_lora_rank == 0 || shape.kv_lora_rank > width {
            let found = shape.kv_lora_rank.to_string();
            let fix = "the latent is the first part of a cached row";
            return Err(refuse("kv_lora_rank", format!("1 to {width}"), found, fix));
        }
        if !(shape.scale > 0.0 && shape.scale.is_finite()) {
            let found = shape.scale.to_string();
            let fix = "1 / sqrt(head size) of the original model";
            return Err(refuse("scale", "a positive number", found, fix));
        }
        if inputs.tree_mask.is_some() && shape.query_tokens > 64 {
            let found = format!("{} new tokens", shape.query_tokens);
            let fix = "verify fewer tokens at a time";
            return Err(refuse("tree_mask", "at most 64 new tokens", found, fix));
        }
        let mask_length = inputs
            .key_mask
            .map_or(0, |mask| mask.len() / shape.batch.max(1));
        let step = Self {
            shape,
            inputs,
            mask_length,
        };
        for b in 0..shape.batch {
            step.check_sequence(b)?;
        }
        Ok(step)
    }

    /// Cached tokens of a sequence.
    pub(crate) fn past(&self, b: usize) -> usize {
        usize::try_from(self.inputs.past_lengths[b]).unwrap_or(0)
    }

    fn check_sequence(&self, b: usize) -> Result<(), Refusal> {
        let shape = &self.shape;
        let past = self.inputs.past_lengths[b];
        if past < 0 {
            let fix = "count the cached tokens";
            return Err(refuse(
                "past_lengths",
                "0 or more",
                format!("{past} in sequence {b}"),
                fix,
            ));
        }
        let total = past as usize + shape.query_tokens;
        let tokens = || format!("{total} tokens in sequence {b}");
        match shape.layout {
            Layout::Contiguous { capacity } => {
                let ring = shape.sliding_window.is_some_and(|w| w <= capacity);
                if total > capacity && !ring {
                    let fix = "allocate a longer cache";
                    return Err(refuse(
                        "cache",
                        format!("room for the tokens, capacity {capacity}"),
                        tokens(),
                        fix,
                    ));
                }
                if total > capacity && self.inputs.tree_mask.is_some() {
                    let fix = "draft tokens may be dropped again, so their rows must not overwrite others";
                    return Err(refuse(
                        "tree_mask",
                        format!("a cache that does not wrap, capacity {capacity}"),
                        tokens(),
                        fix,
                    ));
                }
            }
            Layout::Paged {
                num_pages,
                page_size,
                max_pages,
            } => {
                if total > max_pages * page_size {
                    let expected = format!("room for the tokens, {max_pages} pages of {page_size}");
                    return Err(refuse("page_table", expected, tokens(), "add pages"));
                }
                // In a tree a token that sees nothing of the draft has depth -1.
                let end = past as usize + usize::from(self.inputs.tree_mask.is_none());
                let window = shape.sliding_window;
                let first = window.map_or(0, |window| end.saturating_sub(window));
                let table = self.inputs.page_table.unwrap_or_default();
                for column in first / page_size..total.div_ceil(page_size) {
                    let page = table[b * max_pages + column];
                    if usize::try_from(page).is_ok_and(|page| page < num_pages) {
                        continue;
                    }
                    return Err(refuse(
                        "page_table",
                        format!("pages 0 to {}", num_pages.saturating_sub(1)),
                        format!("{page} at sequence {b}, column {column}"),
                        "give every page that is read or written a number of the cache",
                    ));
                }
            }
        }
        if self.inputs.key_mask.is_some() && self.mask_length < total {
            return Err(refuse(
                "key_mask",
                format!("a column for every token, {total} in sequence {b}"),
                format!("{} columns", self.mask_length),
                "extend the mask by the new tokens",
            ));
        }
        Ok(())
    }
}

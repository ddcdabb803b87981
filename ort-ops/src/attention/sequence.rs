//! One sequence of a step: where its rows lie and which of them a new token sees.

use std::ops::Range;

use super::step::{Layout, Step};
use crate::element::Element;

/// A sequence with its cached rows.
#[derive(Clone, Copy)]
pub(crate) struct Sequence<'a, T> {
    step: &'a Step<'a, T>,
    cache: &'a [T],
    index: usize,
    past: usize,
}

/// Positions that the tokens of a tile meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Span {
    /// Some token may see these.
    pub(crate) some: Range<usize>,
    /// All tokens see these, but for the key mask.
    pub(crate) all: Range<usize>,
}

impl<'a, T: Element> Sequence<'a, T> {
    pub(crate) fn new(step: &'a Step<'a, T>, cache: &'a [T], index: usize) -> Self {
        Self {
            step,
            cache,
            index,
            past: step.past(index),
        }
    }

    /// The row at a position: a cached one, or one of the new.
    pub(crate) fn row(&self, position: usize) -> &'a [T] {
        let width = self.step.shape.width;
        if position >= self.past {
            let token = self.index * self.step.shape.query_tokens + position - self.past;
            return &self.step.inputs.new_rows[token * width..(token + 1) * width];
        }
        let slot = slot(self.step, self.index, position);
        &self.cache[slot * width..(slot + 1) * width]
    }

    /// Whether the key mask shows a position.
    pub(crate) fn unmasked(&self, position: usize) -> bool {
        let at = self.index * self.step.mask_length + position;
        self.step.inputs.key_mask.is_none_or(|mask| mask[at] != 0)
    }

    /// Tree bits of a new token: those of tokens that there are.
    fn tree(&self, token: usize) -> Option<u64> {
        let tokens = self.step.shape.query_tokens;
        let words = self.step.inputs.tree_mask?;
        Some(words[self.index * tokens + token] as u64 & (u64::MAX >> (64 - tokens)))
    }

    /// The oldest position in a token's window.
    fn oldest(&self, token: usize) -> usize {
        let Some(window) = self.step.shape.sliding_window else {
            return 0;
        };
        // One past the token's own position; a token that sees nothing of the draft has depth -1.
        let end = match self.tree(token) {
            Some(bits) => self.past + bits.count_ones() as usize,
            None => self.past + token + 1,
        };
        end.saturating_sub(window)
    }

    /// Whether a new token sees a position, the key mask aside.
    pub(crate) fn sees(&self, token: usize, position: usize) -> bool {
        let before = match self.tree(token) {
            Some(bits) => position < self.past || bits >> (position - self.past) & 1 == 1,
            None => position <= self.past + token,
        };
        before && position >= self.oldest(token)
    }

    /// What the tokens `tokens` meet.
    pub(crate) fn span(&self, tokens: &Range<usize>) -> Span {
        let oldest = tokens.clone().map(|token| self.oldest(token));
        let first = oldest.clone().min().unwrap_or(0);
        let (seen, end) = if self.step.inputs.tree_mask.is_some() {
            (self.past, self.past + self.step.shape.query_tokens)
        } else {
            (self.past + tokens.start + 1, self.past + tokens.end)
        };
        let all = oldest.max().unwrap_or(0);
        Span {
            some: first..end,
            all: all..seen.max(all),
        }
    }
}

/// The slot of a position in the cache, in rows.
pub(crate) fn slot<T>(step: &Step<'_, T>, b: usize, position: usize) -> usize {
    match step.shape.layout {
        Layout::Contiguous { capacity } => b * capacity + position % capacity,
        Layout::Paged {
            page_size,
            max_pages,
            ..
        } => {
            let table = step.inputs.page_table.unwrap_or_default();
            let page = table[b * max_pages + position / page_size] as usize;
            page * page_size + position % page_size
        }
    }
}

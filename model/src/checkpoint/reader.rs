//! Reading a tensor piece by piece, so that memory does not grow with its size.

use std::{borrow::Cow, ops::Range};

use super::map::Map;
use crate::Error;

/// The stored bytes of one tensor, read by position.
///
/// Nothing is kept: memory is the caller's buffer. Only tensors of a GGUF file that are computed
/// on reading (quantised, or rows put into another order) are held whole. Several threads may read
/// at once.
#[derive(Debug)]
pub struct TensorReader<'a> {
    /// The tensor, as messages name it.
    subject: String,
    source: Source<'a>,
    len: usize,
}

#[derive(Debug)]
pub(super) enum Source<'a> {
    File { map: &'a Map, range: Range<usize> },
    Memory(Cow<'a, [u8]>),
}

impl<'a> TensorReader<'a> {
    pub(super) fn new(subject: String, source: Source<'a>) -> Self {
        let len = match &source {
            Source::File { range, .. } => range.len(),
            Source::Memory(bytes) => bytes.len(),
        };
        Self {
            subject,
            source,
            len,
        }
    }

    /// Bytes of the tensor.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buffer` with the tensor's bytes from `offset` on; refuses to read past its end.
    pub fn read_at(&self, offset: usize, buffer: &mut [u8]) -> Result<(), Error> {
        let range = self.part(offset, buffer.len())?;
        match &self.source {
            Source::File { map, range: whole } => map.read_at(whole.start + range.start, buffer),
            Source::Memory(bytes) => {
                buffer.copy_from_slice(&bytes[range]);
                Ok(())
            }
        }
    }

    /// Passes the tensor through `take` in pieces of `chunk_bytes`, in order; the last may be
    /// shorter. What lies ahead is fetched from the disk meanwhile.
    pub fn for_each_chunk<E: From<Error>>(
        &self,
        chunk_bytes: usize,
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let chunk_bytes = chunk_bytes.max(1);
        if let Source::Memory(bytes) = &self.source {
            return bytes.chunks(chunk_bytes).try_for_each(take);
        }
        let mut buffer = vec![0; chunk_bytes.min(self.len)];
        let ahead = AHEAD.next_multiple_of(chunk_bytes);
        self.prefetch(0..ahead);
        for offset in (0..self.len).step_by(chunk_bytes) {
            self.prefetch(offset + ahead..offset + ahead + chunk_bytes);
            let chunk = &mut buffer[..chunk_bytes.min(self.len - offset)];
            self.read_at(offset, chunk)?;
            take(chunk)?;
        }
        Ok(())
    }

    fn prefetch(&self, range: Range<usize>) {
        if let Source::File { map, range: whole } = &self.source {
            let end = range.end.min(self.len);
            map.prefetch(whole.start + range.start.min(end)..whole.start + end);
        }
    }

    fn part(&self, offset: usize, length: usize) -> Result<Range<usize>, Error> {
        offset
            .checked_add(length)
            .filter(|&end| end <= self.len)
            .map(|end| offset..end)
            .ok_or_else(|| {
                Error::refusal(
                    self.subject.as_str(),
                    format!("a part of its {} bytes", self.len),
                    format!("{length} bytes from {offset} on"),
                    "read within the tensor",
                )
            })
    }
}

/// How far ahead of the reader the disk works.
const AHEAD: usize = 16 << 20;

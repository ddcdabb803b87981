//! Reading the parts of a GGUF header one after the other, never past its end.

use super::{
    block::BlockType,
    header::{DAMAGED, Value},
};
use crate::{Error, tensor::shape_text};

/// Arrays inside arrays deeper than this are refused.
const DEEPEST_ARRAY: usize = 4;

/// A tensor whose place in the file is not checked yet: its offset is from the start of the data.
pub(super) struct RawTensor<'a> {
    pub(super) name: &'a str,
    pub(super) shape: Vec<usize>,
    pub(super) block: BlockType,
    pub(super) offset: u64,
    pub(super) length: usize,
}

/// A position in the bytes of a header.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file: &'a str,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8], file: &'a str) -> Self {
        Self { bytes, at: 0, file }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn take(&mut self, length: usize, what: &str) -> Result<&'a [u8], Error> {
        let taken = self
            .bytes
            .get(self.at..)
            .and_then(|rest| rest.get(..length));
        match taken {
            Some(taken) => {
                self.at += length;
                Ok(taken)
            }
            None => Err(self.cut_short(what, length as u64)),
        }
    }

    fn cut_short(&self, what: &str, needed: u64) -> Error {
        Error::refusal(
            format!("{}: header, {what}", self.file),
            format!("{needed} bytes at byte {}", self.at),
            format!("{} bytes", self.bytes.len() - self.at),
            "the file is cut short or damaged: get it again",
        )
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        let taken = self.take(N, what)?;
        let mut array = [0; N];
        array.copy_from_slice(taken);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, Error> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, Error> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Result<&'a [u8], Error> {
        let length = self.u64(what)?;
        match usize::try_from(length) {
            Ok(length) => self.take(length, what),
            Err(_) => Err(self.cut_short(what, length)),
        }
    }

    pub(super) fn name(&mut self, what: &str) -> Result<&'a str, Error> {
        let at = self.at;
        std::str::from_utf8(self.text(what)?).map_err(|_| {
            Error::refusal(
                format!("{}: {what} at byte {at}", self.file),
                "UTF-8 text",
                "other bytes",
                DAMAGED,
            )
        })
    }

    pub(super) fn value(&mut self, kind: u32, key: &str) -> Result<Value<'a>, Error> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>(key)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            7 => Value::Bool(self.array::<1>(key)?[0] != 0),
            8 => Value::Text(self.text(key)?),
            9 => {
                let kind = self.u32(key)?;
                let count = self.u64(key)?;
                let start = self.at;
                self.skip(kind, count, key, 1)?;
                // Every element has at least one byte, so the count fits.
                Value::Array {
                    kind,
                    count: count as usize,
                    bytes: &self.bytes[start..self.at],
                }
            }
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            other => return Err(self.unknown_kind(other, key)),
        })
    }

    fn unknown_kind(&self, kind: u32, key: &str) -> Error {
        Error::refusal(
            format!("{}: {key}", self.file),
            "a value of type 0 to 12",
            format!("type {kind}"),
            DAMAGED,
        )
    }

    /// Steps over the elements of an array.
    fn skip(&mut self, kind: u32, count: u64, key: &str, depth: usize) -> Result<(), Error> {
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => {
                for _ in 0..count {
                    self.text(key)?;
                }
                return Ok(());
            }
            9 if depth < DEEPEST_ARRAY => {
                for _ in 0..count {
                    let kind = self.u32(key)?;
                    let count = self.u64(key)?;
                    self.skip(kind, count, key, depth + 1)?;
                }
                return Ok(());
            }
            9 => {
                return Err(Error::refusal(
                    format!("{}: {key}", self.file),
                    format!("arrays nested at most {DEEPEST_ARRAY} deep"),
                    "deeper ones",
                    DAMAGED,
                ));
            }
            other => return Err(self.unknown_kind(other, key)),
        };
        let length = count
            .checked_mul(size)
            .and_then(|length| usize::try_from(length).ok());
        match length {
            Some(length) => self.take(length, key).map(|_| ()),
            None => Err(self.cut_short(key, u64::MAX)),
        }
    }

    pub(super) fn tensor(&mut self) -> Result<RawTensor<'a>, Error> {
        let name = self.name("tensor name")?;
        let subject = format!("{}: tensor {name}", self.file);
        let axes = self.u32(name)?;
        if !(1..=4).contains(&axes) {
            return Err(Error::refusal(
                subject,
                "1 to 4 axes",
                axes.to_string(),
                DAMAGED,
            ));
        }
        let mut shape = Vec::with_capacity(axes as usize);
        for _ in 0..axes {
            let extent = self.u64(name)?;
            shape.push(usize::try_from(extent).unwrap_or(usize::MAX));
        }
        shape.reverse();
        let kind = self.u32(name)?;
        let offset = self.u64(name)?;
        let block = BlockType::from_number(kind).map_err(|found| {
            Error::refusal(
                subject.clone(),
                format!("one of {}", BlockType::KNOWN),
                found,
                "use a file quantised to one of these types, or the safetensors checkpoint",
            )
        })?;
        let row = shape.last().copied().unwrap_or(0);
        let length = shape
            .iter()
            .try_fold(1_usize, |product, &extent| product.checked_mul(extent))
            .filter(|_| row.is_multiple_of(block.elements()))
            .and_then(|elements| (elements / block.elements()).checked_mul(block.bytes()));
        let Some(length) = length else {
            return Err(Error::refusal(
                subject,
                format!(
                    "a shape of whole rows of {} blocks of {}",
                    block.name(),
                    block.elements()
                ),
                shape_text(&shape),
                DAMAGED,
            ));
        };
        Ok(RawTensor {
            name,
            shape,
            block,
            offset,
            length,
        })
    }
}

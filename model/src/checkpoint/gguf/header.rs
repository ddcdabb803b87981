//! The header of a GGUF file: metadata and the list of tensors.
//!
//! Format: ggml's `docs/gguf.md`, versions 2 and 3, little-endian. The header is read here, not by
//! candle, because a hostile one has to be refused before anything is allocated by its numbers and
//! because messages have to name the key or the tensor. Values borrow from the mapped file.

use std::{collections::BTreeMap, ops::Range};

use super::block::BlockType;
use crate::{Error, tensor::shape_text};

/// Arrays inside arrays deeper than this are refused.
const DEEPEST_ARRAY: usize = 4;

const DAMAGED: &str = "the file is damaged: get it again";

/// A metadata value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    /// Not checked to be UTF-8 yet.
    Text(&'a [u8]),
    /// Elements are decoded when they are asked for.
    Array {
        kind: u32,
        count: usize,
        bytes: &'a [u8],
    },
}

/// One tensor, as the header describes it.
#[derive(Debug, Clone)]
pub(super) struct Tensor<'a> {
    pub(super) name: &'a str,
    /// Extents, slowest axis first (GGUF stores them the other way round).
    pub(super) shape: Vec<usize>,
    pub(super) block: BlockType,
    /// Its bytes in the file.
    pub(super) range: Range<usize>,
}

/// A checked header.
#[derive(Debug)]
pub(super) struct Header<'a> {
    pub(super) file: &'a str,
    pub(super) metadata: BTreeMap<&'a str, Value<'a>>,
    /// In file order.
    pub(super) tensors: Vec<Tensor<'a>>,
}

impl<'a> Header<'a> {
    /// Reads and checks the header of a whole file; `file` names it in messages.
    pub(super) fn read(bytes: &'a [u8], file: &'a str) -> Result<Self, Error> {
        let mut cursor = Cursor { bytes, at: 0, file };
        if cursor.take(4, "magic")? != b"GGUF" {
            return Err(Error::refusal(
                file,
                "a GGUF file",
                "another format",
                "give a .gguf file or a folder with safetensors",
            ));
        }
        let version = cursor.u32("version")?;
        if !(2..=3).contains(&version) {
            return Err(Error::refusal(
                format!("{file}: version"),
                "2 or 3, little-endian",
                version.to_string(),
                "convert the file with a current llama.cpp",
            ));
        }
        let tensor_count = cursor.u64("tensor count")?;
        let key_count = cursor.u64("key count")?;

        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = cursor.name("metadata key")?;
            let kind = cursor.u32(key)?;
            let value = cursor.value(kind, key)?;
            if metadata.insert(key, value).is_some() {
                return Err(Error::refusal(
                    format!("{file}: {key}"),
                    "each key once",
                    "it twice",
                    DAMAGED,
                ));
            }
        }
        let mut raw = Vec::new();
        for _ in 0..tensor_count {
            raw.push(cursor.tensor()?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Unsigned(number))
                if *number > 0 && *number <= 1 << 20 && number % 8 == 0 =>
            {
                *number as usize
            }
            Some(other) => {
                return Err(Error::refusal(
                    format!("{file}: general.alignment"),
                    "a multiple of 8 up to 2^20",
                    format!("{other:?}"),
                    DAMAGED,
                ));
            }
        };
        let data = cursor.at.next_multiple_of(alignment);
        let tensors = place(raw, data, alignment, bytes.len(), file)?;
        Ok(Self {
            file,
            metadata,
            tensors,
        })
    }

    pub(super) fn refuse(
        &self,
        key: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Error {
        Error::refusal(format!("{}: {key}", self.file), expected, found, fix)
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        self.refuse(key, expected, "a value of another type or range", DAMAGED)
    }

    pub(super) fn get(&self, key: &str) -> Option<Value<'a>> {
        self.metadata.get(key).copied()
    }

    /// A whole number that is not negative.
    pub(super) fn integer(&self, key: &str) -> Result<Option<u64>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(number)) => Ok(Some(number)),
            Some(Value::Signed(number)) if number >= 0 => Ok(Some(number as u64)),
            Some(_) => Err(self.wrong(key, "a whole number that is not negative")),
        }
    }

    /// A number; an f32 as the shortest decimal that rounds to it, which is what was meant.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        let number = match self.get(key) {
            None => return Ok(None),
            Some(Value::F32(number)) => number.to_string().parse().unwrap_or(f64::NAN),
            Some(Value::F64(number)) => number,
            Some(Value::Unsigned(number)) => number as f64,
            Some(Value::Signed(number)) => number as f64,
            Some(_) => f64::NAN,
        };
        if number.is_finite() {
            Ok(Some(number))
        } else {
            Err(self.wrong(key, "a finite number"))
        }
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(bytes)) => std::str::from_utf8(bytes)
                .map(Some)
                .map_err(|_| self.wrong(key, "UTF-8 text")),
            Some(_) => Err(self.wrong(key, "a text")),
        }
    }

    /// The elements of an array.
    fn array(&self, key: &str) -> Result<Option<Vec<Value<'a>>>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array { kind, count, bytes }) => {
                let mut cursor = Cursor {
                    bytes,
                    at: 0,
                    file: self.file,
                };
                let elements: Result<Vec<_>, _> =
                    (0..count).map(|_| cursor.value(kind, key)).collect();
                elements.map(Some)
            }
            Some(_) => Err(self.wrong(key, "an array")),
        }
    }

    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, Error> {
        let Some(elements) = self.array(key)? else {
            return Ok(None);
        };
        elements
            .into_iter()
            .map(|element| match element {
                Value::Text(bytes) => {
                    std::str::from_utf8(bytes).map_err(|_| self.wrong(key, "texts in UTF-8"))
                }
                _ => Err(self.wrong(key, "an array of texts")),
            })
            .collect::<Result<_, _>>()
            .map(Some)
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, Error> {
        let Some(elements) = self.array(key)? else {
            return Ok(None);
        };
        elements
            .into_iter()
            .map(|element| match element {
                Value::F32(number) => Ok(f64::from(number)),
                Value::F64(number) => Ok(number),
                Value::Unsigned(number) => Ok(number as f64),
                Value::Signed(number) => Ok(number as f64),
                _ => Err(self.wrong(key, "an array of numbers")),
            })
            .collect::<Result<_, _>>()
            .map(Some)
    }
}

/// A tensor whose place in the file is not checked yet: its offset is from the start of the data.
struct RawTensor<'a> {
    name: &'a str,
    shape: Vec<usize>,
    block: BlockType,
    offset: u64,
    length: usize,
}

/// Checks that tensors lie inside the file, aligned and apart.
fn place<'a>(
    raw: Vec<RawTensor<'a>>,
    data: usize,
    alignment: usize,
    file_len: usize,
    file: &str,
) -> Result<Vec<Tensor<'a>>, Error> {
    let mut tensors = Vec::with_capacity(raw.len());
    for RawTensor {
        name,
        shape,
        block,
        offset,
        length,
    } in raw
    {
        let subject = || format!("{file}: tensor {name}");
        if offset % alignment as u64 != 0 {
            return Err(Error::refusal(
                subject(),
                format!("data at a multiple of {alignment}"),
                format!("offset {offset}"),
                DAMAGED,
            ));
        }
        let start = usize::try_from(offset)
            .ok()
            .and_then(|offset| data.checked_add(offset));
        let end = start.and_then(|start| start.checked_add(length));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => {
                tensors.push(Tensor {
                    name,
                    shape,
                    block,
                    range: start..end,
                });
            }
            _ => {
                return Err(Error::refusal(
                    subject(),
                    format!("{length} bytes at offset {offset} of the data"),
                    format!(
                        "a file of {file_len} bytes with data from byte {data}: it is cut short"
                    ),
                    DAMAGED,
                ));
            }
        }
    }
    let mut order: Vec<&Tensor<'_>> = tensors.iter().collect();
    order.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    for pair in order.windows(2) {
        if pair[1].range.start < pair[0].range.end {
            return Err(Error::refusal(
                format!("{file}: tensor {}", pair[1].name),
                format!(
                    "data after byte {}, where {} ends",
                    pair[0].range.end, pair[0].name
                ),
                format!("byte {}: they overlap", pair[1].range.start),
                DAMAGED,
            ));
        }
    }
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name).collect();
    names.sort_unstable();
    if let Some([name, ..]) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::refusal(
            format!("{file}: tensor {name}"),
            "each tensor once",
            "it twice",
            DAMAGED,
        ));
    }
    Ok(tensors)
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file: &'a str,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, length: usize, what: &str) -> Result<&'a [u8], Error> {
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

    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Result<&'a [u8], Error> {
        let length = self.u64(what)?;
        match usize::try_from(length) {
            Ok(length) => self.take(length, what),
            Err(_) => Err(self.cut_short(what, length)),
        }
    }

    fn name(&mut self, what: &str) -> Result<&'a str, Error> {
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

    fn value(&mut self, kind: u32, key: &str) -> Result<Value<'a>, Error> {
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

    fn tensor(&mut self) -> Result<RawTensor<'a>, Error> {
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

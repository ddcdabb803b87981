//! The header of a GGUF file: metadata and the list of tensors.
//!
//! Format: ggml's `docs/gguf.md`, versions 2 and 3, little-endian. The header is read here, not by
//! candle, because a hostile one has to be refused before anything is allocated by its numbers and
//! because messages have to name the key or the tensor. Values borrow from the mapped file.

use std::{collections::BTreeMap, ops::Range};

use super::{
    block::BlockType,
    cursor::{Cursor, RawTensor},
};
use crate::Error;

pub(super) const DAMAGED: &str = "the file is damaged: get it again";

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
        let mut cursor = Cursor::new(bytes, file);
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
        let data = cursor.at().next_multiple_of(alignment);
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
                let mut cursor = Cursor::new(bytes, self.file);
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

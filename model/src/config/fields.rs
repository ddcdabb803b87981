//! Typed access to the keys of a JSON object; every refusal names the file and the key.

use std::fmt::Display;

use serde_json::{Map, Value};

use crate::Refusal;

/// Largest size a configuration may name unless a key has a limit of its own.
const LARGEST_SIZE: usize = 1 << 24;

/// A JSON object and the name it has in messages.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    file: &'a str,
    /// Path of the object inside the file: nothing, or `rope_scaling.`.
    prefix: &'a str,
}

impl<'a> Fields<'a> {
    pub(super) fn new(value: &'a Value, file: &'a str, prefix: &'a str) -> Result<Self, Refusal> {
        let object = value.as_object().ok_or_else(|| {
            let subject = format!("{file}: {prefix}");
            Refusal::new(
                subject.trim_end_matches(['.', ':', ' ']),
                "a JSON object",
                kind(value),
                "restore the file from the model's publisher",
            )
        })?;
        Ok(Self {
            object,
            file,
            prefix,
        })
    }

    /// The value of a key; a null counts as absent, as it does in transformers.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there, null or not.
    pub(super) fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &'a String> {
        self.object.keys()
    }

    pub(super) fn refuse(
        &self,
        key: &str,
        expected: impl Into<String>,
        found: impl Display,
        fix: impl Into<String>,
    ) -> Refusal {
        Refusal::new(
            format!("{}: {}{key}", self.file, self.prefix),
            expected,
            found.to_string(),
            fix,
        )
    }

    fn wrong(&self, key: &str, expected: &str, value: &Value) -> Refusal {
        self.refuse(key, expected, short(value), "correct the value in the file")
    }

    pub(super) fn missing(&self, key: &str, expected: &str) -> Refusal {
        self.refuse(
            key,
            expected,
            "no such key",
            "add the key as the model's publisher has it",
        )
    }

    /// A size: a whole number from 1 to `largest`.
    pub(super) fn opt_size_to(&self, key: &str, largest: usize) -> Result<Option<usize>, Refusal> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(size) if (1..=largest as u64).contains(&size) => Ok(Some(size as usize)),
            _ => Err(self.wrong(key, &format!("a whole number from 1 to {largest}"), value)),
        }
    }

    pub(super) fn opt_size(&self, key: &str) -> Result<Option<usize>, Refusal> {
        self.opt_size_to(key, LARGEST_SIZE)
    }

    pub(super) fn size_to(&self, key: &str, largest: usize) -> Result<usize, Refusal> {
        self.opt_size_to(key, largest)?
            .ok_or_else(|| self.missing(key, "a whole number"))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, Refusal> {
        self.size_to(key, LARGEST_SIZE)
    }

    /// A finite number.
    pub(super) fn opt_number(&self, key: &str) -> Result<Option<f64>, Refusal> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.wrong(key, "a finite number", value)),
        }
    }

    /// A finite number above 0.
    pub(super) fn opt_positive(&self, key: &str) -> Result<Option<f64>, Refusal> {
        match self.opt_number(key)? {
            Some(number) if number <= 0.0 => Err(self.refuse(
                key,
                "a number above 0",
                number,
                "correct the value in the file",
            )),
            other => Ok(other),
        }
    }

    pub(super) fn positive(&self, key: &str) -> Result<f64, Refusal> {
        self.opt_positive(key)?
            .ok_or_else(|| self.missing(key, "a number above 0"))
    }

    pub(super) fn opt_bool(&self, key: &str) -> Result<Option<bool>, Refusal> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong(key, "true or false", value))
    }

    pub(super) fn opt_str(&self, key: &str) -> Result<Option<&'a str>, Refusal> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong(key, "a string", value))
    }

    /// A list of sizes, or one size that stands for `count` equal ones; 0 is allowed.
    pub(super) fn sizes(&self, key: &str, count: usize) -> Result<Vec<usize>, Refusal> {
        let value = self
            .get(key)
            .ok_or_else(|| self.missing(key, "a whole number or a list"))?;
        let one = |value: &Value| match value.as_u64() {
            Some(size) if size <= LARGEST_SIZE as u64 => Ok(size as usize),
            _ => Err(self.wrong(key, &format!("whole numbers up to {LARGEST_SIZE}"), value)),
        };
        match value {
            Value::Array(list) if list.len() == count => list.iter().map(one).collect(),
            Value::Array(list) => Err(self.refuse(
                key,
                format!("a number, or one for each of the {count} layers in mla_layers"),
                format!("a list of {}", list.len()),
                "convert the model again",
            )),
            value => Ok(vec![one(value)?; count]),
        }
    }
}

/// The value as it is shown in a message, cut to a readable length.
pub(super) fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

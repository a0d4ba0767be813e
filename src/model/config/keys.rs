//! Takes the keys of a JSON object one by one, so that what h1 does not know is what is left.

use serde_json::{Map, Value};

use super::ConfigError;

pub(super) type Result<T> = std::result::Result<T, ConfigError>;

/// An object whose known keys are being taken.
pub(super) struct Keys {
    map: Map<String, Value>,
    /// Path of the object, with a dot at its end; empty at the top.
    prefix: &'static str,
}

impl Keys {
    pub(super) fn new(value: Value, key: &str, prefix: &'static str) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Keys { map, prefix }),
            other => Err(ConfigError::value(key, other, "an object")),
        }
    }

    /// What was not taken.
    pub(super) fn rest(self) -> Map<String, Value> {
        self.map
    }

    pub(super) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The value, `null` too.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key)
    }

    /// The value, unless it is absent or `null`.
    pub(super) fn take_some(&mut self, key: &str) -> Option<Value> {
        self.take(key).filter(|value| !value.is_null())
    }

    pub(super) fn put(&mut self, key: &str, value: Value) {
        self.map.insert(key.to_owned(), value);
    }

    pub(super) fn discard(&mut self, keys: &[&str]) {
        for key in keys {
            self.take(key);
        }
    }

    pub(super) fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing { key: self.path(key) }
    }

    /// A size; an absent or `null` one is `default`, or an error without one.
    pub(super) fn size(&mut self, key: &str, default: Option<usize>) -> Result<usize> {
        match (self.take_some(key), default) {
            (Some(value), _) => self.as_size(key, &value),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.missing(key)),
        }
    }

    /// A size that may be `null`; an absent one is `default`.
    pub(super) fn nullable_size(&mut self, key: &str, default: Option<usize>) -> Result<Option<usize>> {
        match self.take(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) => self.as_size(key, &value).map(Some),
        }
    }

    pub(super) fn as_size(&self, key: &str, value: &Value) -> Result<usize> {
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        number.ok_or_else(|| ConfigError::value(self.path(key), value, "a whole number, 0 or more"))
    }

    pub(super) fn number(&mut self, key: &str, default: Option<f64>) -> Result<f64> {
        match (self.take_some(key), default) {
            (Some(value), _) => value.as_f64().ok_or_else(|| ConfigError::value(self.path(key), value, "a number")),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.missing(key)),
        }
    }

    pub(super) fn numbers(&mut self, key: &str) -> Result<Vec<f64>> {
        let list = self.take_some(key).ok_or_else(|| self.missing(key))?;
        let numbers = list.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        numbers.ok_or_else(|| ConfigError::value(self.path(key), list, "a list of numbers"))
    }

    pub(super) fn flag(&mut self, key: &str, default: bool) -> Result<bool> {
        match self.take_some(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(ConfigError::value(self.path(key), other, "true or false")),
        }
    }

    /// A key that changes the maths and of which h1 has one value only.
    pub(super) fn only(&mut self, key: &str, supported: &Value, words: &'static str) -> Result<()> {
        match self.take_some(key) {
            Some(value) if value != *supported => Err(ConfigError::unsupported(self.path(key), &value, words)),
            _ => Ok(()),
        }
    }

    /// A token id, a list of them, or `null` for none; `default` when absent.
    pub(super) fn token_ids(&mut self, key: &str, default: Option<u32>) -> Result<Vec<u32>> {
        let id = |value: &Value| {
            let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
            number.ok_or_else(|| ConfigError::value(self.path(key), value, "a token id"))
        };
        match self.map.get(key) {
            None => Ok(default.into_iter().collect()),
            Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
        .inspect(|_| {
            self.map.shift_remove(key);
        })
    }
}

//! What can be wrong with a configuration.

use serde_json::Value;

/// A configuration that h1 cannot take; the text names the key, its value and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The text is not JSON.
    #[error("not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A key without a default is not there.
    #[error("`{key}` is missing")]
    Missing {
        /// The key, with a dot for each level.
        key: String,
    },
    /// A value of the wrong type, out of bounds, or at odds with another.
    #[error("`{key}` is {found}, expected {expected}")]
    Value {
        /// The key, with a dot for each level.
        key: String,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// A model that exists, but that h1 does not compute.
    #[error("`{key}` is {found}: h1 supports {supported} only")]
    Unsupported {
        /// The key, with a dot for each level.
        key: String,
        /// Its value.
        found: String,
        /// What it may be.
        supported: &'static str,
    },
}

impl ConfigError {
    pub(super) fn value(key: impl Into<String>, found: impl std::fmt::Display, expected: impl Into<String>) -> Self {
        ConfigError::Value { key: key.into(), found: shorten(found.to_string()), expected: expected.into() }
    }

    pub(super) fn unsupported(key: impl Into<String>, found: &Value, supported: &'static str) -> Self {
        ConfigError::Unsupported { key: key.into(), found: shorten(found.to_string()), supported }
    }
}

/// A value may be a whole document: a sentence has room for its beginning.
fn shorten(text: String) -> String {
    const LONGEST: usize = 80;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

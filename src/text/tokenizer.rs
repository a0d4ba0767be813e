//! The tokenizer of a model folder: text to ids and back, whole or as a stream.

use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};

/// The file that holds a tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// The file that names a tokenizer's special tokens.
pub const CONFIG_FILE: &str = "tokenizer_config.json";

/// The files beside the weights that say how to turn text into ids: those that a new checkpoint takes over from its
/// source.
pub const FILES: [&str; 5] =
    [TOKENIZER_FILE, CONFIG_FILE, "special_tokens_map.json", "chat_template.jinja", "generation_config.json"];

/// Why a tokenizer could not be had, or could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The folder has no `tokenizer.json`.
    #[error("{}: no {TOKENIZER_FILE} in this folder; a model folder in Hugging Face form has one", folder.display())]
    Missing {
        /// The folder.
        folder: PathBuf,
    },
    /// A file's content is not what its name says.
    #[error("{}: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        problem: String,
    },
    /// The text could not be encoded, or the ids could not be decoded.
    #[error("the tokenizer failed: {0}")]
    Failed(String),
}

/// A tokenizer with the ids that begin and end a text.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Vec<u32>,
    adds_bos: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder, and bos and eos from `tokenizer_config.json`, `config.json` and
    /// `generation_config.json`, as far as they are there.
    ///
    /// Truncation and padding that a `tokenizer.json` may ask for are dropped: no text is cut or filled in silence.
    pub fn from_folder(folder: &Path) -> Result<Tokenizer, TokenizerError> {
        let path = folder.join(TOKENIZER_FILE);
        let Some(bytes) = read(&path)? else {
            return Err(match folder.is_dir() {
                true => TokenizerError::Missing { folder: folder.to_path_buf() },
                false => TokenizerError::Format { path: folder.to_path_buf(), problem: "no such folder".into() },
            });
        };
        let format =
            |error: tokenizers::Error| TokenizerError::Format { path: path.clone(), problem: error.to_string() };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(format)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(format)?;

        let (mut bos, mut eos) = (Vec::new(), Vec::new());
        let config = Config::read(folder.join(CONFIG_FILE))?;
        bos.extend(config.token("bos_token", &inner)?);
        eos.extend(config.token("eos_token", &inner)?);
        for name in ["config.json", "generation_config.json"] {
            let config = Config::read(folder.join(name))?;
            bos.extend(config.ids("bos_token_id")?);
            for id in config.ids("eos_token_id")? {
                if !eos.contains(&id) {
                    eos.push(id);
                }
            }
        }
        let mut tokenizer = Tokenizer { inner, bos: bos.first().copied(), eos, adds_bos: false };
        let empty = tokenizer.encode("", true)?;
        tokenizer.adds_bos = tokenizer.bos.is_some() && empty.first().copied() == tokenizer.bos;
        Ok(tokenizer)
    }

    /// The ids of `text`; `special` adds what the tokenizer puts around a text (for most models, bos in front).
    ///
    /// Special tokens that are spelt out in `text` become their ids either way.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, special).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`; `skip_special` leaves special tokens out. An id that the vocabulary does not have says
    /// nothing; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special).map_err(failed)
    }

    /// The number of tokens, special ones included; a model's `vocab_size` may be greater.
    pub fn vocabulary_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token by its spelling in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The id that begins a text: of `tokenizer_config.json`, else of `config.json`.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether encoding with special tokens puts [`bos`](Self::bos) in front.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The id that ends a text in training: of `tokenizer_config.json`, else of `config.json`.
    pub fn eos(&self) -> Option<u32> {
        self.eos.first().copied()
    }

    /// Every id that ends a generation: [`eos`](Self::eos) first, then what else the model's configurations name.
    pub fn ends(&self) -> &[u32] {
        &self.eos
    }
}

/// Copies those of [`FILES`] that are there from one model folder to another.
pub fn copy_files(from: &Path, to: &Path) -> Result<(), TokenizerError> {
    for name in FILES {
        let (source, target) = (from.join(name), to.join(name));
        if source.exists() {
            std::fs::copy(&source, &target).map_err(|error| TokenizerError::Io { path: target, source: error })?;
        }
    }
    Ok(())
}

/// Text as its tokens come, never half a character: a piece is held back until the bytes of its last character are
/// there.
///
/// The pieces, and [`finish`](Self::finish) after them, make up what [`Tokenizer::decode`] gives for all ids at once.
#[derive(Clone, Debug, Default)]
pub struct DecodeStream {
    /// The last piece that was given out, and what came since.
    ids: Vec<u32>,
    /// How many of `ids` were given out: they are decoded again, since a token's text may depend on the one before it.
    given: usize,
}

impl DecodeStream {
    /// The text that `id` completes; empty while a character is incomplete. Special tokens say nothing.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let text = self.pending(tokenizer)?;
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Ok(text)
    }

    /// What was held back and will not be completed; the stream is empty after it.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let text = self.pending(tokenizer)?;
        *self = DecodeStream::default();
        Ok(text)
    }

    /// The text of the ids that were not given out.
    fn pending(&self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let given = tokenizer.decode(&self.ids[..self.given], true)?;
        let text = tokenizer.decode(&self.ids, true)?;
        let shared: usize = std::iter::zip(given.chars(), text.chars())
            .take_while(|(before, now)| before == now)
            .map(|(character, _)| character.len_utf8())
            .sum();
        Ok(text[shared..].to_string())
    }
}

/// A JSON object beside the weights; absent files have no keys.
struct Config {
    path: PathBuf,
    value: Value,
}

impl Config {
    fn read(path: PathBuf) -> Result<Config, TokenizerError> {
        let value = match read(&path)? {
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| TokenizerError::Format { path: path.clone(), problem: error.to_string() })?,
            None => Value::Null,
        };
        Ok(Config { path, value })
    }

    /// The id of the token that `key` names: a string, or an object with `content`.
    fn token(&self, key: &str, tokenizer: &tokenizers::Tokenizer) -> Result<Option<u32>, TokenizerError> {
        let token = match &self.value[key] {
            Value::Null => return Ok(None),
            Value::Object(token) => token.get("content").and_then(Value::as_str),
            token => token.as_str(),
        };
        let Some(token) = token else {
            return Err(self.wrong(key, "a token or an object with its `content`"));
        };
        match tokenizer.token_to_id(token) {
            Some(id) => Ok(Some(id)),
            None => Err(self.wrong(key, &format!("a token of {TOKENIZER_FILE}"))),
        }
    }

    /// The ids under `key`: none, one or a list.
    fn ids(&self, key: &str) -> Result<Vec<u32>, TokenizerError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match &self.value[key] {
            Value::Null => Some(Vec::new()),
            Value::Array(list) => list.iter().map(id).collect(),
            value => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, "a token id or a list of them"))
    }

    fn wrong(&self, key: &str, expected: &str) -> TokenizerError {
        let found = &self.value[key];
        TokenizerError::Format {
            path: self.path.clone(),
            problem: format!("`{key}`: expected {expected}, found {found}"),
        }
    }
}

fn failed(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Failed(error.to_string())
}

/// The bytes of a file, or nothing if it is not there.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Io { path: path.to_path_buf(), source }),
    }
}

#[cfg(test)]
mod tests;

//! What a tokenizer is made of, in the form of the hub: `tokenizer.json`, `tokenizer_config.json` and
//! `generation_config.json`. Every other form is turned into these first, so that they can be written too.

use super::{CONFIG_FILE, TEKKEN_FILE, TEMPLATE_FILE, TOKENIZER_FILE, TokenizerError, gguf, tekken};
use crate::checkpoint::gguf::GgufFile;
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};

/// No longer file of a tokenizer is read.
const LONGEST: u64 = 1 << 28;

/// The files of a tokenizer, and where they come from.
#[derive(Clone, Debug)]
pub(super) struct Files {
    /// The folder or file that errors name.
    pub(super) path: PathBuf,
    /// `tokenizer.json`.
    pub(super) tokenizer: Value,
    /// `tokenizer_config.json`, with the template in it.
    pub(super) config: Object,
    /// `config.json` and `generation_config.json`: the ids that begin and end a text.
    pub(super) others: Vec<Object>,
}

impl Files {
    /// Reads those of a model: a folder, or a GGUF file.
    pub(super) fn open(path: &Path) -> Result<Files, TokenizerError> {
        match path.is_dir() {
            true => Files::of_folder(path),
            false if path.is_file() => gguf::files(&GgufFile::open(path)?),
            false => Err(TokenizerError::Format { path: path.to_path_buf(), problem: "no such folder".into() }),
        }
    }

    /// A `tokenizer.json` alone.
    pub(super) fn of_json(name: &str, text: &[u8]) -> Result<Files, TokenizerError> {
        let path = PathBuf::from(name);
        let tokenizer = serde_json::from_slice(text)
            .map_err(|error| TokenizerError::Format { path: path.clone(), problem: error.to_string() })?;
        let config = Object { path: path.clone(), value: Value::Null };
        Ok(Files { path, tokenizer, config, others: Vec::new() })
    }

    fn of_folder(folder: &Path) -> Result<Files, TokenizerError> {
        let path = folder.join(TOKENIZER_FILE);
        let mut config = Object::read(folder.join(CONFIG_FILE))?;
        if let Some(template) = read(&folder.join(TEMPLATE_FILE))? {
            let path = folder.join(TEMPLATE_FILE);
            let wrong = |_| TokenizerError::Format { path: path.clone(), problem: "expected UTF-8 text".into() };
            config.set("chat_template", json!(String::from_utf8(template).map_err(wrong)?));
        }
        let others = ["config.json", "generation_config.json"];
        let others = others.iter().map(|name| Object::read(folder.join(name))).collect::<Result<_, _>>()?;
        if let Some(tokenizer) = read_json(&path)? {
            return Ok(Files { path, tokenizer, config, others });
        }
        let path = folder.join(TEKKEN_FILE);
        match read(&path)? {
            Some(bytes) => {
                let mut files = tekken::files(&path, &bytes)?;
                for (key, value) in config.value.as_object().into_iter().flatten() {
                    files.config.set(key, value.clone());
                }
                Ok(Files { others, ..files })
            }
            None => Err(TokenizerError::Missing { folder: folder.to_path_buf() }),
        }
    }
}

/// A JSON object beside the weights; absent files have no keys.
#[derive(Clone, Debug)]
pub(super) struct Object {
    pub(super) path: PathBuf,
    pub(super) value: Value,
}

impl Object {
    fn read(path: PathBuf) -> Result<Object, TokenizerError> {
        Ok(Object { value: read_json(&path)?.unwrap_or_default(), path })
    }

    /// Gives a key a value; what is no object becomes one.
    fn set(&mut self, key: &str, value: Value) {
        if !self.value.is_object() {
            self.value = json!({});
        }
        self.value[key] = value;
    }

    /// The text of the token under `key`: a string, or an object with `content`.
    pub(super) fn token(&self, key: &str) -> Result<Option<&str>, TokenizerError> {
        let token = match &self.value[key] {
            Value::Null => return Ok(None),
            Value::Object(token) => token.get("content").and_then(Value::as_str),
            token => token.as_str(),
        };
        token.map(Some).ok_or_else(|| self.wrong(key, "a token or an object with its `content`"))
    }

    /// The ids under `key`: none, one or a list.
    pub(super) fn ids(&self, key: &str) -> Result<Vec<u32>, TokenizerError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match &self.value[key] {
            Value::Null => Some(Vec::new()),
            Value::Array(list) => list.iter().map(id).collect(),
            value => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, "a token id or a list of them"))
    }

    /// The template: a text, or of several with names the one called `default`.
    pub(super) fn template(&self) -> Result<Option<&str>, TokenizerError> {
        const KEY: &str = "chat_template";
        let named = |list: &'_ Vec<Value>| list.iter().position(|entry| entry["name"] == "default");
        match &self.value[KEY] {
            Value::Null => Ok(None),
            Value::String(template) => Ok(Some(template)),
            Value::Array(list) => match named(list).and_then(|at| list[at]["template"].as_str()) {
                Some(template) => Ok(Some(template)),
                None => Err(self.wrong(KEY, "a template with the name `default` among them")),
            },
            _ => Err(self.wrong(KEY, "a template")),
        }
    }

    pub(super) fn wrong(&self, key: &str, expected: &str) -> TokenizerError {
        let mut found = self.value[key].to_string();
        if let Some((end, _)) = found.char_indices().nth(80) {
            found.truncate(end);
            found.push('…');
        }
        TokenizerError::Format {
            path: self.path.clone(),
            problem: format!("`{key}`: expected {expected}, found {found}"),
        }
    }
}

fn read_json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let value = serde_json::from_slice(&bytes)
        .map_err(|error| TokenizerError::Format { path: path.to_path_buf(), problem: error.to_string() })?;
    Ok(Some(value))
}

/// The bytes of a file, or nothing if it is not there.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    let io = |source| TokenizerError::Io { path: path.to_path_buf(), source };
    match std::fs::metadata(path) {
        Ok(file) if file.len() > LONGEST => {
            let problem = format!("{} bytes are too many for a file of a tokenizer", file.len());
            Err(TokenizerError::Format { path: path.to_path_buf(), problem })
        }
        Ok(_) => std::fs::read(path).map(Some).map_err(io),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io(error)),
    }
}

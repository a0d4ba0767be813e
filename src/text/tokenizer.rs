//! The tokenizer of a model: text to ids and back, whole or as a stream.

mod byte_level;
mod check;
mod files;
mod gguf;
mod pre;
mod stream;
mod tekken;

use super::template::{ChatTemplate, TemplateError};
use crate::checkpoint::{CheckpointError, write_file};
use byte_level::ByteLevel;
use files::Files;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
pub use stream::DecodeStream;
use tokenizers::{Decoder, DecoderWrapper};

/// The file that holds a tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// The file that names a tokenizer's special tokens.
pub const CONFIG_FILE: &str = "tokenizer_config.json";

/// Mistral's form of a tokenizer.
pub const TEKKEN_FILE: &str = "tekken.json";

/// A chat template that is not in [`CONFIG_FILE`].
pub const TEMPLATE_FILE: &str = "chat_template.jinja";

/// The file that says which ids end a text.
const GENERATION_FILE: &str = "generation_config.json";

/// The special tokens that a template may name.
const NAMED: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

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
    /// The folder has no `tokenizer.json` and no `tekken.json`.
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
    /// A GGUF file could not be read.
    #[error(transparent)]
    Gguf(#[from] Box<CheckpointError>),
    /// The chat template could not be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// There is a conversation to be rendered, but no chat template.
    #[error("the model has no chat template: give plain text instead of messages")]
    NoTemplate,
    /// The text could not be encoded, or the ids could not be decoded.
    #[error("the tokenizer failed: {0}")]
    Failed(String),
}

impl From<CheckpointError> for TokenizerError {
    fn from(error: CheckpointError) -> Self {
        TokenizerError::Gguf(Box::new(error))
    }
}

/// A tokenizer with the ids that begin and end a text, and the chat template of its model.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bytes: Option<ByteLevel>,
    bos: Option<u32>,
    eos: Vec<u32>,
    adds_bos: bool,
    template: Option<ChatTemplate>,
    files: Vec<(&'static str, Value)>,
    identity: [u8; 32],
}

impl Tokenizer {
    /// The tokenizer of a model: a folder in Hugging Face form, or a GGUF file.
    ///
    /// In a folder it is `tokenizer.json`, or `tekken.json` where there is none; bos, eos and the template come from
    /// `tokenizer_config.json`, `chat_template.jinja`, `config.json` and `generation_config.json`, as far as they are
    /// there. Truncation and padding that a `tokenizer.json` may ask for are dropped: no text is cut or filled in silence.
    ///
    /// # Errors
    /// When there is none, or it is not one that h1 takes.
    pub fn open(model: &Path) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::new(Files::open(model)?)
    }

    /// A tokenizer from the text of a `tokenizer.json` alone.
    ///
    /// # Errors
    /// When it is none.
    pub fn from_json(text: &[u8]) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::new(Files::of_json(TOKENIZER_FILE, text)?)
    }

    /// A tokenizer from the text of a `tekken.json` alone.
    ///
    /// # Errors
    /// When it is none.
    pub fn from_tekken(text: &[u8]) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::new(tekken::files(Path::new(TEKKEN_FILE), text)?)
    }

    fn new(files: Files) -> Result<Tokenizer, TokenizerError> {
        let Files { path, mut tokenizer, config, others } = files;
        let format = |problem: String| TokenizerError::Format { path: path.clone(), problem };
        check::check(&mut tokenizer).map_err(format)?;
        let mut identity = Sha256::new();
        identity.update(tokenizer.to_string());
        let inner: tokenizers::Tokenizer = contained(|| serde_json::from_value(tokenizer.clone()))
            .map_err(|error| format(error.to_string()))?
            .map_err(|error| format(error.to_string()))?;

        let (mut bos, mut eos) = (Vec::new(), Vec::new());
        let mut named = Vec::new();
        for key in NAMED {
            let Some(token) = config.token(key)? else { continue };
            let id = inner.token_to_id(token);
            match (key, id) {
                ("bos_token", Some(id)) => bos.push(id),
                ("eos_token", Some(id)) => eos.push(id),
                ("bos_token" | "eos_token", None) => {
                    return Err(config.wrong(key, &format!("a token of {TOKENIZER_FILE}")));
                }
                _ => {}
            }
            named.push((key.to_owned(), token.to_owned()));
        }
        for other in &others {
            bos.extend(other.ids("bos_token_id")?);
            for id in other.ids("eos_token_id")? {
                if !eos.contains(&id) {
                    eos.push(id);
                }
            }
        }
        let template = config.template()?.map(|source| ChatTemplate::new(source, named)).transpose()?;
        let bytes = is_byte_level(inner.get_decoder()).then(ByteLevel::new);
        let generation = serde_json::json!({ "bos_token_id": bos.first(), "eos_token_id": eos });
        let files = vec![(TOKENIZER_FILE, tokenizer), (CONFIG_FILE, config.value), (GENERATION_FILE, generation)];
        let mut tokenizer = Tokenizer {
            inner,
            bytes,
            bos: bos.first().copied(),
            eos,
            adds_bos: false,
            template,
            files,
            identity: identity.finalize().into(),
        };
        let empty = tokenizer.encode("", true)?;
        tokenizer.adds_bos = tokenizer.bos.is_some() && empty.first().copied() == tokenizer.bos;
        Ok(tokenizer)
    }

    /// The ids of `text`; `special` adds what the tokenizer puts around a text (for most models, bos in front).
    ///
    /// Special tokens that are spelt out in `text` become their ids either way. What the vocabulary has no token for is
    /// left out, as everywhere; [`Self::missing_bytes`] says what that is.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = contained(|| self.inner.encode_fast(text, special))?.map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`; `skip_special` leaves special tokens out. An id that the vocabulary does not have says
    /// nothing; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        contained(|| self.inner.decode(ids, skip_special))?.map_err(failed)
    }

    /// The ids of bytes that need not be UTF-8: what is text is encoded as such, every other byte by itself.
    ///
    /// # Errors
    /// When they are no text and this is no byte-level tokenizer, or it lacks one of the bytes.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::new();
        for chunk in bytes.utf8_chunks() {
            ids.extend(self.encode(chunk.valid(), false)?);
            for byte in chunk.invalid() {
                let id = self.bytes.as_ref().and_then(|level| self.id(&level.spell(&[*byte])));
                ids.push(id.ok_or_else(|| {
                    TokenizerError::Failed(format!("it has no token for the byte 0x{byte:02x}, which is no text"))
                })?);
            }
        }
        Ok(ids)
    }

    /// The bytes of `ids`, special tokens spelt out; of a tokenizer that is not byte-level, those of its text.
    pub fn decode_bytes(&self, ids: &[u32]) -> Result<Vec<u8>, TokenizerError> {
        let Some(level) = &self.bytes else { return Ok(self.decode(ids, false)?.into_bytes()) };
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let token = |id: &u32| match added.get(id) {
            Some(token) => token.content.clone().into_bytes(),
            None => self.inner.id_to_token(*id).map(|token| level.bytes(&token)).unwrap_or_default(),
        };
        Ok(ids.iter().flat_map(token).collect())
    }

    /// The bytes that a byte-level vocabulary has no token for: text with one of them loses it.
    pub fn missing_bytes(&self) -> Vec<u8> {
        match &self.bytes {
            Some(level) => (0..=255).filter(|byte| self.id(&level.spell(&[*byte])).is_none()).collect(),
            None => Vec::new(),
        }
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

    /// The chat template of the model, where it has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Tells this tokenizer from every other that gives other ids or another text of a conversation.
    pub fn identity(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.identity);
        hash.update(format!("{:?} {:?} {}", self.bos, self.eos, self.adds_bos));
        hash.update(self.template.as_ref().map(ChatTemplate::identity).unwrap_or_default());
        hash.finalize().into()
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` with the template, and `generation_config.json` into a folder that
    /// is there; each appears whole or not at all.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write(&self, folder: &Path) -> Result<(), TokenizerError> {
        for (name, value) in &self.files {
            let path = folder.join(name);
            write_file(&path, |file| {
                writeln!(file, "{value:#}").map_err(|source| CheckpointError::Io {
                    action: "write",
                    path: path.clone(),
                    source,
                })
            })?;
        }
        Ok(())
    }
}

/// The folder whose files say how the text of `model` becomes ids: its own, or one that `make` gives for a model that is a file.
///
/// # Errors
/// When it cannot be written.
pub fn folder_of<E: From<TokenizerError>>(
    model: &Path,
    make: impl FnOnce(&dyn Fn(&Path) -> Result<(), TokenizerError>) -> Result<PathBuf, E>,
) -> Result<PathBuf, E> {
    if !model.is_file() {
        return Ok(model.to_path_buf());
    }
    let tokenizer = Tokenizer::open(model)?;
    make(&|folder| tokenizer.write(folder))
}

fn is_byte_level(decoder: Option<&DecoderWrapper>) -> bool {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => true,
        Some(DecoderWrapper::Sequence(_)) => {
            // What a sequence is made of is private: a byte-level one gives the byte back.
            let bytes = decoder.map(|decoder| decoder.decode_chain(vec!["Ċ".to_owned()]));
            bytes.and_then(Result::ok).is_some_and(|text| text.concat() == "\n")
        }
        _ => false,
    }
}

/// What the tokenizers library does, with a panic of it as an error.
fn contained<T>(work: impl FnOnce() -> T) -> Result<T, TokenizerError> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| TokenizerError::Failed("the tokenizers library gave up".into()))
}

fn failed(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Failed(error.to_string())
}

#[cfg(test)]
mod tests;

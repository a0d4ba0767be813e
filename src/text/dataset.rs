//! Data sets: files of texts and of questions with their answers, read as records, and records as tokens.

use super::tokenizer::{Tokenizer, TokenizerError};
use rayon::prelude::*;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

/// How many bad lines an error quotes.
const QUOTED_LINES: usize = 10;

/// One text, with its question apart where it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What is given; nothing for a plain text.
    pub prompt: Option<String>,
    /// What is to be learnt: the answer, or the whole of a plain text.
    pub response: String,
}

/// Why a data set could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The name does not say what is in the file.
    #[error("{}: expected .jsonl or .ndjson (one JSON object a line) or .txt (one text)", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// The file has no text in it.
    #[error("{}: the file holds no text", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Lines that are no record, one sentence each.
    #[error("{}", quote(path, lines, *more))]
    Lines {
        /// The file.
        path: PathBuf,
        /// The number of each of the first bad lines, from 1, and what was expected there.
        lines: Vec<(usize, String)>,
        /// How many bad lines there are beyond these.
        more: usize,
    },
    /// A share is no share.
    #[error("a validation share of {0} was asked for; expected at least 0 and less than 1")]
    Share(f64),
}

fn quote(path: &Path, lines: &[(usize, String)], more: usize) -> String {
    let sentences: Vec<String> =
        lines.iter().map(|(line, problem)| format!("{}:{line}: {problem}", path.display())).collect();
    let mut text = sentences.join("\n");
    if more > 0 {
        text += &format!("\nand {more} more bad lines");
    }
    text
}

/// The records of a file, in its order.
///
/// A line of `.jsonl` is an object with `text`; with `prompt` and `completion`; or with `question` and `answer`, which
/// are set apart by a newline. Other keys and blank lines mean nothing. A `.txt` is one text.
pub fn read_records(path: &Path) -> Result<Vec<Record>, DatasetError> {
    let path = path.to_path_buf();
    let io = |source| DatasetError::Io { path: path.clone(), source };
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default().to_ascii_lowercase();
    let parse: fn(&[u8]) -> Result<Option<Record>, String> = match extension.as_str() {
        "txt" => plain,
        "jsonl" | "ndjson" => json_line,
        _ => return Err(DatasetError::UnknownFormat { path }),
    };
    let end = if extension == "txt" { None } else { Some(b'\n') };
    let mut file = BufReader::new(File::open(&path).map_err(io)?);
    let (mut records, mut lines, mut more) = (Vec::new(), Vec::new(), 0);
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let read = match end {
            Some(end) => file.read_until(end, &mut bytes),
            None => io::Read::read_to_end(&mut file, &mut bytes),
        };
        if read.map_err(io)? == 0 {
            break;
        }
        let mark = if line == 1 { "\u{feff}" } else { "" };
        match parse(bytes.strip_prefix(mark.as_bytes()).unwrap_or(&bytes)) {
            Ok(record) => records.extend(record),
            Err(_) if lines.len() == QUOTED_LINES => more += 1,
            Err(problem) => lines.push((line, problem)),
        }
    }
    match (lines.is_empty(), records.is_empty()) {
        (false, _) => Err(DatasetError::Lines { path, lines, more }),
        (true, true) => Err(DatasetError::Empty { path }),
        (true, false) => Ok(records),
    }
}

fn utf8(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes)
        .map_err(|error| format!("expected UTF-8 text, found other bytes from byte {} on", error.valid_up_to() + 1))
}

fn plain(bytes: &[u8]) -> Result<Option<Record>, String> {
    let text = utf8(bytes)?;
    Ok((!text.is_empty()).then(|| Record { prompt: None, response: text.to_string() }))
}

fn json_line(bytes: &[u8]) -> Result<Option<Record>, String> {
    let line = utf8(bytes)?;
    if line.trim().is_empty() {
        return Ok(None);
    }
    let value: Value =
        serde_json::from_str(line).map_err(|error| format!("expected a JSON object, found no JSON: {error}"))?;
    let Value::Object(object) = value else {
        return Err(format!("expected a JSON object, found {}", kind(&value)));
    };
    if object.contains_key("text") {
        let response = string(&object, "text")?;
        return match response.is_empty() {
            true => Err("expected some text under `text`, found none".to_string()),
            false => Ok(Some(Record { prompt: None, response })),
        };
    }
    for (prompt, response, between) in [("prompt", "completion", ""), ("question", "answer", "\n")] {
        if object.contains_key(prompt) || object.contains_key(response) {
            let prompt = string(&object, prompt)? + between;
            return Ok(Some(Record { prompt: Some(prompt), response: string(&object, response)? }));
        }
    }
    let found: Vec<&str> = object.keys().map(String::as_str).collect();
    let found = if found.is_empty() { "no keys".to_string() } else { format!("only {}", found.join(", ")) };
    Err(format!("expected `text`, `prompt` and `completion`, or `question` and `answer`; found {found}"))
}

fn string(object: &Map<String, Value>, key: &str) -> Result<String, String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("`{key}`: expected a string, found {}", kind(other))),
        None => Err(format!("expected the key `{key}` beside the others, found none")),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Train and validation: a `share` of the records, chosen by a hash of their text, is held out.
///
/// Which side a text is on depends on nothing but the text and the share, and a text that comes twice is on one side.
pub fn split(records: Vec<Record>, share: f64) -> Result<(Vec<Record>, Vec<Record>), DatasetError> {
    if !(0.0..1.0).contains(&share) {
        return Err(DatasetError::Share(share));
    }
    let held_out = (share * 2_f64.powi(64)) as u64;
    Ok(records.into_iter().partition(|record| {
        let text = record.prompt.clone().unwrap_or_default() + &record.response;
        super::text_hash("validation split", text.as_bytes()) >= held_out
    }))
}

/// Which tokens of a document are learnt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossOn {
    /// The response and the end of the text; of a plain text, all.
    #[default]
    Response,
    /// The prompt too.
    All,
}

/// The ids of a record: bos where the tokenizer puts one, the prompt, the response, eos where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedRecord {
    /// The ids.
    pub ids: Vec<u32>,
    /// How many of them are given: bos and the prompt, as a generation would begin. 0 for a plain text.
    pub given: usize,
}

/// The tokens of a record.
///
/// The prompt's ids are those that it has alone, so that what follows it in training follows it in generation; the
/// response is encoded after its prompt where that leaves the prompt's ids alone, otherwise by itself.
pub fn encode_record(record: &Record, tokenizer: &Tokenizer) -> Result<EncodedRecord, TokenizerError> {
    let mut ids: Vec<u32> = tokenizer.bos().filter(|_| tokenizer.adds_bos()).into_iter().collect();
    let mut given = 0;
    match &record.prompt {
        None => ids.extend(tokenizer.encode(&record.response, false)?),
        Some(prompt) => {
            let start = tokenizer.encode(prompt, false)?;
            let whole = tokenizer.encode(&(prompt.clone() + &record.response), false)?;
            given = ids.len() + start.len();
            match whole.strip_prefix(start.as_slice()) {
                Some(_) => ids.extend(whole),
                None => {
                    ids.extend(start);
                    ids.extend(tokenizer.encode(&record.response, false)?);
                }
            }
        }
    }
    ids.extend(tokenizer.eos());
    Ok(EncodedRecord { ids, given })
}

/// Tokenised texts, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Documents {
    ids: Vec<u32>,
    counts: Vec<bool>,
    ends: Vec<usize>,
}

/// One text of [`Documents`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document<'a> {
    /// The ids.
    pub ids: &'a [u32],
    /// Whether each token is to be learnt: the logits before it count.
    pub counts: &'a [bool],
}

impl Documents {
    /// The documents of `records`, in their order.
    pub fn tokenise(records: &[Record], tokenizer: &Tokenizer, loss: LossOn) -> Result<Documents, TokenizerError> {
        let encoded: Vec<EncodedRecord> =
            records.par_iter().map(|record| encode_record(record, tokenizer)).collect::<Result<_, _>>()?;
        let mut documents = Documents::default();
        for record in encoded {
            let given = if loss == LossOn::All { 0 } else { record.given };
            documents.push(&record.ids, given);
        }
        Ok(documents)
    }

    /// Appends a document whose tokens are to be learnt from the one at `given` on.
    pub fn push(&mut self, ids: &[u32], given: usize) {
        self.ids.extend_from_slice(ids);
        self.counts.extend((0..ids.len()).map(|index| index >= given));
        self.ends.push(self.ids.len());
    }

    /// The number of documents.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no document.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The number of tokens of all documents.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// The document at `index`, if there are so many.
    pub fn get(&self, index: usize) -> Option<Document<'_>> {
        let end = *self.ends.get(index)?;
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some(Document { ids: &self.ids[start..end], counts: &self.counts[start..end] })
    }

    /// Sixteen hexadecimal digits that tell these documents from others: the start of a SHA-256 over everything in
    /// them.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for end in &self.ends {
            hash.update((*end as u64).to_le_bytes());
        }
        for (id, counts) in std::iter::zip(&self.ids, &self.counts) {
            let [a, b, c, d] = id.to_le_bytes();
            hash.update([a, b, c, d, u8::from(*counts)]);
        }
        hash.finalize().iter().take(8).fold(String::new(), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

#[cfg(test)]
mod tests;

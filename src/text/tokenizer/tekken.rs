//! Mistral's Tekken: ranked byte strings, a pattern, and special tokens before them.
//!
//! Source of the format: `mistral-common`. Ids begin with the special tokens; rank r has id r + their number. A text is
//! split by the pattern, and the two neighbours whose bytes together have the lowest rank are joined until there are none.

use super::byte_level::ByteLevel;
use super::files::{Files, Object};
use super::{TokenizerError, pre};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;

/// A longer token is none: each is cut in two everywhere to find its merges.
const LONGEST_TOKEN: usize = 4096;

/// The special tokens of files that do not list them; the rest are fillers.
const SPECIAL: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

#[derive(Deserialize)]
struct Tekken {
    config: Config,
    vocab: Vec<Ranked>,
    special_tokens: Option<Vec<Special>>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    default_vocab_size: usize,
    default_num_special_tokens: usize,
}

#[derive(Deserialize)]
struct Ranked {
    rank: usize,
    token_bytes: String,
}

#[derive(Deserialize)]
struct Special {
    rank: usize,
    token_str: String,
}

/// The files that say the same as `tekken.json`.
pub(super) fn files(path: &Path, bytes: &[u8]) -> Result<Files, TokenizerError> {
    let wrong = |problem: String| TokenizerError::Format { path: path.to_path_buf(), problem };
    let tekken: Tekken = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
    let ranked = tekken.ranked().map_err(wrong)?;
    let special = tekken.special().map_err(wrong)?;
    let level = ByteLevel::new();
    let mut vocabulary = Map::new();
    for token in &special {
        if vocabulary.insert(token.clone(), json!(vocabulary.len())).is_some() {
            return Err(wrong(format!("the special token `{token}` comes twice")));
        }
    }
    for (rank, token) in ranked.iter().enumerate() {
        if vocabulary.insert(level.spell(token), json!(special.len() + rank)).is_some() {
            return Err(wrong(format!("the token of rank {rank} is there already")));
        }
    }
    let spelt = |(left, right): (&[u8], &[u8])| json!([level.spell(left), level.spell(right)]);
    let merges: Vec<Value> = merges(&ranked).into_iter().map(spelt).collect();
    let added = special.iter().enumerate().map(|(id, token)| {
        json!({
            "id": id, "content": token, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    });
    let named = |token: &str| special.iter().position(|other| other == token);
    let post_processor = named("<s>").map(|id| {
        let bos = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
        let text = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
        json!({
            "type": "TemplateProcessing", "single": [bos, text("A")], "pair": [bos, text("A"), text("B")],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [id], "tokens": ["<s>"] } },
        })
    });
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": pre::byte_level(&[&tekken.config.pattern]),
        "post_processor": post_processor,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": vocabulary, "merges": merges,
        },
    });
    let mut config = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false });
    for (key, token) in [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")] {
        if named(token).is_some() {
            config[key] = json!(token);
        }
    }
    let config = Object { path: path.to_path_buf(), value: config };
    Ok(Files { path: path.to_path_buf(), tokenizer, config, others: Vec::new() })
}

impl Tekken {
    /// The bytes of each rank that is used.
    fn ranked(&self) -> Result<Vec<Vec<u8>>, String> {
        let Config { default_vocab_size: all, default_num_special_tokens: special, .. } = self.config;
        let used = all.checked_sub(special).filter(|used| *used <= self.vocab.len()).ok_or_else(|| {
            let listed = self.vocab.len();
            format!("a vocabulary of {all} with {special} special tokens is claimed, but {listed} tokens are listed")
        })?;
        let mut ranked = Vec::with_capacity(used);
        for (entry, rank) in self.vocab[..used].iter().zip(0..) {
            let bytes = base64(&entry.token_bytes).filter(|bytes| !bytes.is_empty());
            match bytes {
                _ if entry.rank != rank => {
                    return Err(format!("expected the token of rank {rank}, found rank {}", entry.rank));
                }
                Some(bytes) if bytes.len() <= LONGEST_TOKEN => ranked.push(bytes),
                Some(bytes) => return Err(format!("the token of rank {rank} has {} bytes", bytes.len())),
                None => return Err(format!("the bytes of rank {rank} are no base64")),
            }
        }
        match (0..=255_u8).find(|byte| ranked.get(usize::from(*byte)).is_none_or(|token| token[..] != [*byte])) {
            Some(byte) => Err(format!("expected rank {byte} to be the byte {byte}")),
            None => Ok(ranked),
        }
    }

    /// The special tokens, as many as the configuration says.
    fn special(&self) -> Result<Vec<String>, String> {
        let listed: Vec<(usize, &str)> = match &self.special_tokens {
            Some(listed) => listed.iter().map(|token| (token.rank, &token.token_str[..])).collect(),
            None => SPECIAL.into_iter().enumerate().collect(),
        };
        let count = self.config.default_num_special_tokens;
        // As many as tokens may be claimed; what is used of those was listed.
        if count > self.vocab.len() + SPECIAL.len() + listed.len() {
            return Err(format!("{count} special tokens are claimed, of which {} are listed", listed.len()));
        }
        let mut special: Vec<String> = (0..count).map(|id| format!("<SPECIAL_{id}>")).collect();
        for (rank, token) in listed {
            match special.get_mut(rank) {
                Some(place) => *place = token.to_owned(),
                None if self.special_tokens.is_some() => {
                    return Err(format!("the special token `{token}` has rank {rank}, but there are {count}"));
                }
                None => {}
            }
        }
        Ok(special)
    }
}

/// Every way to cut a token in two tokens, the tokens by rank.
fn merges(ranked: &[Vec<u8>]) -> Vec<(&[u8], &[u8])> {
    let ranks: HashMap<&[u8], usize> = ranked.iter().enumerate().map(|(rank, token)| (&token[..], rank)).collect();
    let mut merges = Vec::with_capacity(ranked.len());
    for token in ranked {
        let cuts = (1..token.len()).map(|at| token.split_at(at));
        let mut ways: Vec<_> =
            cuts.filter_map(|(left, right)| Some(((*ranks.get(left)?, *ranks.get(right)?), (left, right)))).collect();
        ways.sort_unstable_by_key(|(ranks, _)| *ranks);
        merges.extend(ways.into_iter().map(|(_, pair)| pair));
    }
    merges
}

/// The bytes of a base64 text with its padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let digit = |character: u8| match character {
        b'A'..=b'Z' => Some(character - b'A'),
        b'a'..=b'z' => Some(character - b'a' + 26),
        b'0'..=b'9' => Some(character - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let digits = text.strip_suffix("==").or(text.strip_suffix('=')).unwrap_or(text).as_bytes();
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in digits.chunks(4) {
        let mut bits = 0_u32;
        for character in group {
            bits = bits << 6 | u32::from(digit(*character)?);
        }
        bits <<= 6 * (4 - group.len());
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_with_and_without_padding() {
        for (text, bytes) in [("", &b""[..]), ("AA==", b"\0"), ("ICA=", b"  "), ("//79", b"\xff\xfe\xfd")] {
            assert_eq!(base64(text).as_deref(), Some(bytes));
        }
        for text in ["A", "AA=", "A===", "AA=A", "é===", "A\n=="] {
            assert_eq!(base64(text), None, "{text}");
        }
    }
}

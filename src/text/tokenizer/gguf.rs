//! The tokenizer inside a GGUF file: byte-level BPE, which names the way it splits text, and SentencePiece.
//!
//! Source of the rules: llama.cpp's vocabulary and its conversion from the hub's form.

use super::files::{Files, Object};
use super::{TokenizerError, pre};
use crate::checkpoint::gguf::GgufFile;
use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// The space of SentencePiece.
const SPACE: &str = "\u{2581}";
/// A longer piece of SentencePiece is none: each is cut in two everywhere to find its merges.
const LONGEST_PIECE: usize = 512;

/// `tokenizer.ggml.token_type`.
mod kind {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
}

/// The metadata of a tokenizer.
struct Metadata<'a> {
    file: &'a GgufFile,
    tokens: Vec<&'a str>,
    kinds: Vec<i32>,
}

/// The files that say the same as the metadata of `file`.
pub(super) fn files(file: &GgufFile) -> Result<Files, TokenizerError> {
    let metadata = Metadata::read(file)?;
    let key = "tokenizer.ggml.model";
    let Some(model) = file.get_str(key)? else {
        return Err(metadata.wrong(format!("it has no `{key}`: no tokenizer")));
    };
    let (mut tokenizer, rules) = match model {
        "gpt2" => metadata.byte_level()?,
        "llama" => metadata.sentence_piece()?,
        other => {
            return Err(metadata
                .wrong(format!("`{key}` is `{other}`; expected gpt2 (byte-level BPE) or llama (SentencePiece)")));
        }
    };
    tokenizer["added_tokens"] = metadata.added();
    let special = metadata.special(rules)?;
    tokenizer["post_processor"] = special.post_processor();
    let others = vec![Object { path: file.path().to_path_buf(), value: special.generation(&metadata)? }];
    let config = Object { path: file.path().to_path_buf(), value: special.config(file)? };
    Ok(Files { path: file.path().to_path_buf(), tokenizer, config, others })
}

/// What a tokenizer does where the metadata say nothing.
#[derive(Clone, Copy, Debug, Default)]
struct Rules {
    adds_bos: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
}

impl<'a> Metadata<'a> {
    fn read(file: &'a GgufFile) -> Result<Self, TokenizerError> {
        let tokens = file.get_array_str("tokenizer.ggml.tokens")?.unwrap_or_default();
        let kinds = file.get_array_i32("tokenizer.ggml.token_type")?;
        let kinds = kinds.unwrap_or_else(|| vec![kind::NORMAL; tokens.len()]);
        let metadata = Metadata { file, tokens, kinds };
        if metadata.tokens.is_empty() {
            return Err(metadata.wrong("it has no `tokenizer.ggml.tokens`: no tokenizer".into()));
        }
        let (tokens, kinds) = (metadata.tokens.len(), metadata.kinds.len());
        if tokens != kinds {
            return Err(metadata.wrong(format!("it has {tokens} tokens, but {kinds} types of tokens")));
        }
        Ok(metadata)
    }

    fn wrong(&self, problem: String) -> TokenizerError {
        TokenizerError::Format { path: self.file.path().to_path_buf(), problem }
    }

    /// Every token with its id.
    fn vocabulary(&self) -> Result<Map<String, Value>, TokenizerError> {
        let mut vocabulary = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(other) = vocabulary.insert((*token).to_owned(), json!(id)) {
                return Err(self.wrong(format!("the tokens {other} and {id} are both `{token}`")));
            }
        }
        Ok(vocabulary)
    }

    fn byte_level(&self) -> Result<(Value, Rules), TokenizerError> {
        let name = self.file.get_str("tokenizer.ggml.pre")?.unwrap_or("default");
        let Some(pre) = pre::find(name) else {
            return Err(self.wrong(format!(
                "`tokenizer.ggml.pre` is `{name}`, a way to split text that h1 does not know; it knows {}",
                pre::names()
            )));
        };
        let merges = self.file.get_array_str("tokenizer.ggml.merges")?.unwrap_or_default();
        let mut pairs = Vec::with_capacity(merges.len());
        for (merge, number) in merges.iter().zip(1..) {
            // A token may itself begin with a space.
            let at = merge.char_indices().skip(1).find(|(_, character)| *character == ' ').map(|(at, _)| at);
            let pair = at.map(|at| json!([merge[..at], merge[at + 1..]]));
            pairs
                .push(pair.ok_or_else(|| self.wrong(format!("merge {number}: expected two tokens, found `{merge}`")))?);
        }
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
        });
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "normalizer": pre.normalizer(), "pre_tokenizer": pre.pre_tokenizer(),
            "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": pre.ignores_merges, "vocab": self.vocabulary()?, "merges": pairs,
            },
        });
        Ok((tokenizer, Rules { adds_bos: pre.adds_bos, ..Rules::default() }))
    }

    fn sentence_piece(&self) -> Result<(Value, Rules), TokenizerError> {
        let scores = self.file.get_array_f32("tokenizer.ggml.scores")?.unwrap_or_default();
        if scores.len() != self.tokens.len() {
            let (tokens, scores) = (self.tokens.len(), scores.len());
            return Err(self.wrong(format!("it has {tokens} tokens, but {scores} scores")));
        }
        if let Some(id) = scores.iter().position(|score| score.is_nan()) {
            return Err(self.wrong(format!("the score of token {id} is not a number")));
        }
        let prefix = self.file.get_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let space = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
        let mut normalizers = vec![space];
        let mut decoders = vec![
            json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        if prefix {
            normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        let rules = Rules { adds_bos: true, bos: Some(1), eos: Some(2), unknown: Some(0) };
        let unknown = self.file.get_u32("tokenizer.ggml.unknown_token_id")?.or(rules.unknown);
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "normalizer": { "type": "Sequence", "normalizers": normalizers },
            "pre_tokenizer": null,
            "decoder": { "type": "Sequence", "decoders": decoders },
            "model": {
                "type": "BPE", "dropout": null, "unk_token": unknown.and_then(|id| self.tokens.get(id as usize)),
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                "byte_fallback": true, "ignore_merges": false,
                "vocab": self.vocabulary()?, "merges": self.merges(&scores)?,
            },
        });
        Ok((tokenizer, rules))
    }

    /// SentencePiece joins the two neighbours that make the piece of the best score: every way to cut a piece in two
    /// pieces is a merge, the best piece's first.
    fn merges(&self, scores: &[f32]) -> Result<Vec<[&'a str; 2]>, TokenizerError> {
        let normal = |id: &usize| self.kinds[*id] == kind::NORMAL;
        let pieces: Vec<usize> = (0..self.tokens.len()).filter(normal).collect();
        let known: HashSet<&str> = pieces.iter().map(|id| self.tokens[*id]).collect();
        let mut merges = Vec::new();
        for id in pieces {
            let piece = self.tokens[id];
            if piece.len() > LONGEST_PIECE {
                return Err(
                    self.wrong(format!("token {id} has {} bytes; expected at most {LONGEST_PIECE}", piece.len()))
                );
            }
            for (at, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(at);
                if known.contains(left) && known.contains(right) {
                    merges.push((scores[id], left, right));
                }
            }
        }
        let length = |text: &str| text.chars().count();
        // Of one score, the longer left part first, as the hub's conversion orders them.
        merges.sort_by(|(a, left, right), (b, other_left, other_right)| {
            b.total_cmp(a).then(length(other_left).cmp(&length(left))).then(length(other_right).cmp(&length(right)))
        });
        Ok(merges.into_iter().map(|(_, left, right)| [left, right]).collect())
    }

    /// The tokens that are found in a text before it is split.
    fn added(&self) -> Value {
        let whole = |(id, token): (usize, &&str)| {
            let special = matches!(self.kinds[id], kind::CONTROL | kind::UNKNOWN);
            let added = (special || self.kinds[id] == kind::USER_DEFINED) && !token.is_empty();
            added.then(|| {
                json!({
                    "id": id, "content": token, "special": special,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                })
            })
        };
        self.tokens.iter().enumerate().filter_map(whole).collect()
    }

    fn special(&self, rules: Rules) -> Result<Special<'a>, TokenizerError> {
        let token = |name: &str, otherwise: Option<u32>| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let id = self.file.get_u32(&key)?.or(otherwise);
            let Some(id) = id else { return Ok(None) };
            match self.tokens.get(id as usize) {
                Some(token) => Ok(Some((id, *token))),
                None => Err(self.wrong(format!("`{key}` is {id}, but there are {} tokens", self.tokens.len()))),
            }
        };
        let adds = |name: &str, otherwise| {
            Ok::<_, TokenizerError>(
                self.file.get_bool(&format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(otherwise),
            )
        };
        Ok(Special {
            bos: token("bos", rules.bos)?,
            eos: token("eos", rules.eos)?,
            unknown: token("unknown", rules.unknown)?,
            padding: token("padding", None)?,
            adds_bos: adds("bos", rules.adds_bos)?,
            adds_eos: adds("eos", false)?,
        })
    }
}

/// The tokens that begin and end texts.
struct Special<'a> {
    bos: Option<(u32, &'a str)>,
    eos: Option<(u32, &'a str)>,
    unknown: Option<(u32, &'a str)>,
    padding: Option<(u32, &'a str)>,
    adds_bos: bool,
    adds_eos: bool,
}

impl Special<'_> {
    fn post_processor(&self) -> Value {
        let (bos, eos) = (self.bos.filter(|_| self.adds_bos), self.eos.filter(|_| self.adds_eos));
        if bos.is_none() && eos.is_none() {
            return Value::Null;
        }
        let special = |(_, token): (u32, &str)| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
        let text = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
        let around = |name| bos.map(special).into_iter().chain([text(name)]).chain(eos.map(special));
        let tokens: Map<String, Value> = bos
            .into_iter()
            .chain(eos)
            .map(|(id, token)| (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] })))
            .collect();
        json!({
            "type": "TemplateProcessing", "single": around("A").collect::<Vec<_>>(),
            "pair": around("A").chain(around("B")).collect::<Vec<_>>(), "special_tokens": tokens,
        })
    }

    fn config(&self, file: &GgufFile) -> Result<Value, TokenizerError> {
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "add_bos_token": self.adds_bos,
            "add_eos_token": self.adds_eos,
        });
        let named = [
            ("bos_token", self.bos),
            ("eos_token", self.eos),
            ("unk_token", self.unknown),
            ("pad_token", self.padding),
        ];
        for (name, token) in named {
            if let Some((_, token)) = token {
                config[name] = json!(token);
            }
        }
        if let Some(template) = file.get_str("tokenizer.chat_template")? {
            config["chat_template"] = json!(template);
        }
        Ok(config)
    }

    /// `generation_config.json`: every id that ends a turn.
    fn generation(&self, metadata: &Metadata<'_>) -> Result<Value, TokenizerError> {
        let mut ends: Vec<u32> = self.eos.map(|(id, _)| id).into_iter().collect();
        for name in ["eot", "eom"] {
            let id = metadata.file.get_u32(&format!("tokenizer.ggml.{name}_token_id"))?;
            ends.extend(id.filter(|id| !ends.contains(id) && (*id as usize) < metadata.tokens.len()));
        }
        let mut generation = json!({});
        if let Some((bos, _)) = self.bos {
            generation["bos_token_id"] = json!(bos);
        }
        if !ends.is_empty() {
            generation["eos_token_id"] = json!(ends);
        }
        Ok(generation)
    }
}

#[cfg(test)]
mod tests;

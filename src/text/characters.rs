//! A tokenizer with one token a character, in the files that the `tokenizers` and `transformers` libraries read.

use super::tokenizer::{CONFIG_FILE, TOKENIZER_FILE, TokenizerError};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// The special tokens, at ids 0 to 3: padding, beginning and end of a text, and any character outside the alphabet.
pub const SPECIAL_TOKENS: [&str; 4] = ["<pad>", "<s>", "</s>", "<unk>"];

/// The content of `tokenizer.json`: [`SPECIAL_TOKENS`], then the characters of `alphabet` in order, each once.
///
/// The model is a BPE without merges, so a text falls into its characters; `Fuse` joins them without spaces.
/// Encoding with special tokens puts `<s>` in front.
pub fn character_tokenizer(alphabet: &str) -> Value {
    let mut vocabulary = Map::new();
    let symbols = SPECIAL_TOKENS.iter().map(|token| token.to_string()).chain(alphabet.chars().map(String::from));
    for symbol in symbols {
        let next = vocabulary.len();
        vocabulary.entry(symbol).or_insert_with(|| json!(next));
    }
    let added: Vec<Value> = SPECIAL_TOKENS
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "special": true,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let bos = SPECIAL_TOKENS[1];
    let bos_piece = json!({ "SpecialToken": { "id": bos, "type_id": 0 } });
    let text_piece = |name: &str, type_id: u32| json!({ "Sequence": { "id": name, "type_id": type_id } });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_piece, text_piece("A", 0)],
            "pair": [bos_piece, text_piece("A", 0), text_piece("B", 1)],
            "special_tokens": { bos: { "id": bos, "ids": [1], "tokens": [bos] } },
        },
        "decoder": { "type": "Fuse" },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": SPECIAL_TOKENS[3],
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": [],
        },
    })
}

/// Writes `tokenizer.json` and `tokenizer_config.json` of [`character_tokenizer`] into an existing folder.
///
/// Each file appears whole or not at all.
pub fn write_character_tokenizer(folder: &Path, alphabet: &str) -> Result<(), TokenizerError> {
    let [pad, bos, eos, unk] = SPECIAL_TOKENS;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "clean_up_tokenization_spaces": false,
    });
    write_whole(folder, TOKENIZER_FILE, &character_tokenizer(alphabet))?;
    write_whole(folder, CONFIG_FILE, &config)
}

fn write_whole(folder: &Path, name: &str, value: &Value) -> Result<(), TokenizerError> {
    let path = folder.join(name);
    let partial = folder.join(format!("{name}.partial"));
    let write = || {
        let mut file = File::create(&partial)?;
        writeln!(file, "{value:#}")?;
        file.sync_all()?;
        std::fs::rename(&partial, &path)
    };
    write().map_err(|source| TokenizerError::Io { path: path.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::arithmetic::{self, ALPHABET, Kind, Split};
    use crate::text::tokenizer::Tokenizer;

    fn example() -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        write_character_tokenizer(folder.path(), ALPHABET).unwrap();
        Tokenizer::open(folder.path()).unwrap()
    }

    #[test]
    fn the_example_has_32_tokens_and_each_character_is_one() {
        let tokenizer = example();
        assert_eq!(tokenizer.vocabulary_size(), 32);
        assert_eq!(tokenizer.encode(ALPHABET, false).unwrap(), (4..32).collect::<Vec<u32>>());
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
    }

    #[test]
    fn a_problem_comes_back_as_it_was() {
        let tokenizer = example();
        for problem in arithmetic::generate(0, Split::Train, 200, &Kind::ALL, 1..=8).unwrap() {
            let text = problem.prompt + &problem.completion;
            let ids = tokenizer.encode(&text, true).unwrap();
            assert_eq!(ids.len(), text.len() + 1);
            assert!(!ids.contains(&3));
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
    }

    #[test]
    fn a_character_outside_the_alphabet_is_one_unk_and_a_character_twice_is_one_token() {
        assert_eq!(example().encode("1é漢2", false).unwrap(), [5, 3, 3, 6]);
        assert_eq!(character_tokenizer("aab")["model"]["vocab"].as_object().map(Map::len), Some(6));
    }
}

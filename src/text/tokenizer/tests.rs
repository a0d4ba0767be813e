use super::*;
use crate::text::characters::character_tokenizer;
use proptest::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;
use tempfile::TempDir;

fn folder(files: &[(&str, Value)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in files {
        std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    }
    folder
}

fn load(files: &[(&str, Value)]) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_folder(folder(files).path())
}

/// One token a byte, as the byte-level tokenizers of Llama 3 and Nemo have them before their merges, and one merge.
fn bytes() -> Tokenizer {
    let mut alphabet: Vec<String> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().map(String::from).collect();
    alphabet.sort();
    alphabet.push("ab".to_string());
    let vocabulary: BTreeMap<String, usize> =
        alphabet.into_iter().enumerate().map(|(id, symbol)| (symbol, id)).collect();
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0", "normalizer": null, "pre_tokenizer": byte_level, "post_processor": byte_level,
        "decoder": byte_level,
        "added_tokens": [{ "id": 257, "content": "<end>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false }],
        "model": { "type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]] },
    });
    load(&[(TOKENIZER_FILE, tokenizer)]).unwrap()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> (Vec<String>, String) {
    let mut stream = DecodeStream::default();
    let pieces = ids.iter().map(|id| stream.push(tokenizer, *id).unwrap()).collect();
    (pieces, stream.finish(tokenizer).unwrap())
}

proptest! {
    #[test]
    fn text_survives_encoding_and_streaming_and_no_piece_has_half_a_character(text in "[ab é漢🦀\u{301}\n]{0,24}") {
        let tokenizer = bytes();
        let ids = tokenizer.encode(&text, true).unwrap();
        prop_assert_eq!(&tokenizer.decode(&ids, true).unwrap(), &text);
        let (pieces, rest) = stream(&tokenizer, &ids);
        prop_assert_eq!(rest, "");
        prop_assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
        prop_assert_eq!(pieces.concat(), text);
    }

    #[test]
    fn a_stream_of_any_ids_gives_what_decoding_them_at_once_gives(ids in prop::collection::vec(0..300_u32, 0..40)) {
        let tokenizer = bytes();
        let (pieces, rest) = stream(&tokenizer, &ids);
        prop_assert_eq!(pieces.concat() + &rest, tokenizer.decode(&ids, true).unwrap());
    }
}

#[test]
fn special_tokens_are_added_and_left_out_on_request() {
    let tokenizer = load(&[(TOKENIZER_FILE, character_tokenizer("ab"))]).unwrap();
    assert_eq!(tokenizer.encode("ab", true).unwrap(), [1, 4, 5]);
    assert_eq!(tokenizer.encode("ab", false).unwrap(), [4, 5]);
    assert_eq!(tokenizer.decode(&[1, 4, 5, 2], true).unwrap(), "ab");
    assert_eq!(tokenizer.decode(&[1, 4, 5, 2], false).unwrap(), "<s>ab</s>");
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.id("<unk>")), (None, None, Some(3)));
}

#[test]
fn the_ends_of_a_text_come_from_every_configuration_the_tokenizers_first() {
    let tokenizer = load(&[
        (TOKENIZER_FILE, character_tokenizer("ab")),
        (CONFIG_FILE, json!({ "bos_token": "<s>", "eos_token": { "content": "</s>" } })),
        ("config.json", json!({ "bos_token_id": 7, "eos_token_id": [5, 2] })),
        ("generation_config.json", json!({ "eos_token_id": 4 })),
    ])
    .unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.adds_bos()), (Some(1), true));
    assert_eq!((tokenizer.eos(), tokenizer.ends()), (Some(2), &[2, 5, 4][..]));

    let config = json!({ "bos_token_id": 1, "eos_token_id": null });
    let tokenizer = load(&[(TOKENIZER_FILE, character_tokenizer("ab")), ("config.json", config)]).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.adds_bos(), tokenizer.eos()), (Some(1), true, None));
}

#[test]
fn truncation_and_padding_of_the_file_are_dropped() {
    let mut file = character_tokenizer("a");
    file["truncation"] = json!({ "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 });
    file["padding"] = json!({ "strategy": { "Fixed": 9 }, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>" });
    assert_eq!(load(&[(TOKENIZER_FILE, file)]).unwrap().encode("aaaa", true).unwrap(), [1, 4, 4, 4, 4]);
}

#[test]
fn what_is_wrong_in_a_folder_is_named() {
    let said = |files: &[(&str, Value)]| load(files).unwrap_err().to_string();
    let good = || (TOKENIZER_FILE, character_tokenizer("a"));
    for (files, words) in [
        (vec![], "no tokenizer.json in this folder"),
        (vec![(TOKENIZER_FILE, json!({ "model": 3 }))], "tokenizer.json: "),
        (
            vec![good(), (CONFIG_FILE, json!({ "eos_token": "</end>" }))],
            "`eos_token`: expected a token of tokenizer.json",
        ),
        (vec![good(), (CONFIG_FILE, json!({ "bos_token": 1 }))], "`bos_token`: expected a token or an object"),
        (
            vec![good(), ("config.json", json!({ "eos_token_id": [-1] }))],
            "`eos_token_id`: expected a token id or a list",
        ),
    ] {
        assert!(said(&files).contains(words), "{}", said(&files));
    }
    let folder = folder(&[good()]);
    std::fs::write(folder.path().join("config.json"), "{").unwrap();
    assert!(matches!(Tokenizer::from_folder(folder.path()), Err(TokenizerError::Format { .. })));
}

#[test]
fn a_copied_tokenizer_is_the_same() {
    let source = folder(&[(TOKENIZER_FILE, character_tokenizer("xyz")), (CONFIG_FILE, json!({ "eos_token": "</s>" }))]);
    let target = tempfile::tempdir().unwrap();
    copy_files(source.path(), target.path()).unwrap();
    let tokenizer = Tokenizer::from_folder(target.path()).unwrap();
    assert_eq!((tokenizer.encode("zyx", false).unwrap(), tokenizer.eos()), (vec![6, 5, 4], Some(2)));
    assert!(copy_files(source.path(), &target.path().join("absent")).is_err());
}

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
    Tokenizer::open(folder(files).path())
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
    assert!(matches!(Tokenizer::open(folder.path()), Err(TokenizerError::Format { .. })));
}

#[test]
fn a_written_tokenizer_is_the_same() {
    let template = "{{ bos_token }}{{ messages[0].content }}";
    let files = [
        (TOKENIZER_FILE, character_tokenizer("xyz")),
        (CONFIG_FILE, json!({ "bos_token": "<s>", "eos_token": "</s>", "chat_template": template })),
        ("generation_config.json", json!({ "eos_token_id": [2, 0] })),
    ];
    let source = load(&files).unwrap();
    let target = tempfile::tempdir().unwrap();
    source.write(target.path()).unwrap();
    let tokenizer = Tokenizer::open(target.path()).unwrap();
    assert_eq!(tokenizer.encode("zyx", false).unwrap(), [6, 5, 4]);
    assert_eq!((tokenizer.bos(), tokenizer.ends()), (Some(1), &[2, 0][..]));
    assert_eq!(tokenizer.identity(), source.identity());
    assert_ne!(load(&files[..1]).unwrap().identity(), source.identity());
    assert!(source.write(&target.path().join("absent")).is_err());
}

#[test]
fn the_template_comes_from_its_own_file_or_from_the_configuration() {
    let render = |tokenizer: &Tokenizer| {
        let messages = [crate::text::template::message("user", "hi")];
        let template = tokenizer.template().unwrap();
        template.render(&crate::text::template::Conversation {
            messages: &messages,
            tools: None,
            add_generation_prompt: false,
            clock: Default::default(),
        })
    };
    let config = |template: Value| (CONFIG_FILE, json!({ "eos_token": "</s>", "chat_template": template }));
    let folder = folder(&[(TOKENIZER_FILE, character_tokenizer("a")), config(json!("{{ eos_token }}"))]);
    assert_eq!(render(&Tokenizer::open(folder.path()).unwrap()).unwrap(), "</s>");
    std::fs::write(folder.path().join(TEMPLATE_FILE), "{{ messages[0]['content'] }}").unwrap();
    assert_eq!(render(&Tokenizer::open(folder.path()).unwrap()).unwrap(), "hi");

    let several = json!([{ "name": "tools", "template": "no" }, { "name": "default", "template": "yes" }]);
    let tokenizer = load(&[(TOKENIZER_FILE, character_tokenizer("a")), config(several)]).unwrap();
    assert_eq!(render(&tokenizer).unwrap(), "yes");
    for (template, words) in
        [(json!(3), "expected a template"), (json!([]), "`default`"), (json!("{% if %}"), "cannot be read")]
    {
        let error = load(&[(TOKENIZER_FILE, character_tokenizer("a")), config(template)]).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn bytes_that_are_no_text_survive_where_there_are_tokens_for_them() {
    let tokenizer = bytes();
    assert!(tokenizer.missing_bytes().is_empty());
    let all: Vec<u8> = (0..=255).chain(*b"ab<end>\xf0\x9f\x92").collect();
    let ids = tokenizer.encode_bytes(&all).unwrap();
    assert_eq!(tokenizer.decode_bytes(&ids).unwrap(), all);

    let characters = load(&[(TOKENIZER_FILE, character_tokenizer("ab"))]).unwrap();
    assert_eq!(characters.decode_bytes(&characters.encode_bytes(b"ab").unwrap()).unwrap(), b"ab");
    assert!(characters.encode_bytes(b"a\xff").unwrap_err().to_string().contains("the byte 0xff"));
}

#[test]
fn a_tokenizer_with_a_hole_is_named() {
    let model = |vocab: Value, merges: Value| {
        let model = json!({ "type": "BPE", "vocab": vocab, "merges": merges, "continuing_subword_prefix": "#" });
        Tokenizer::from_json(json!({ "version": "1.0", "model": model }).to_string().as_bytes())
    };
    assert!(model(json!({ "a": 0, "#b": 1, "ab": 7 }), json!([["a", "#b"]])).is_ok());
    for (vocab, merges, words) in [
        (json!({ "a": 0, "#b": 1 }), json!([["a", "#b"]]), "merge 1 of `a` and `#b`: `ab` is not in the vocabulary"),
        (json!({ "a": 0, "#b": 1, "ab": 2 }), json!(["a #b", "c #b"]), "merge 2 of `c` and `#b`: `c` is not"),
        (json!({ "a": 0, "b": 1 }), json!([["a", "b"]]), "`b` does not start with `#`"),
        (json!({ "a": 0 }), json!(["a"]), "expected two tokens"),
        (json!({ "a": 0 }), json!(3), "a list `merges`"),
        (json!([]), json!([]), "an object `vocab`"),
    ] {
        let error = model(vocab, merges).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    for text in ["", "[]", "{}", "{\"model\": 3}"] {
        assert!(Tokenizer::from_json(text.as_bytes()).is_err());
    }
}

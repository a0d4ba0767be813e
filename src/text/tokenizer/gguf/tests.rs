use super::super::Tokenizer;
use super::super::byte_level::ByteLevel;
use crate::text::template::{Conversation, message};
use proptest::prelude::*;
use tempfile::TempDir;

/// A GGUF file of metadata alone.
#[derive(Clone, Default)]
struct Gguf {
    count: u64,
    bytes: Vec<u8>,
}

impl Gguf {
    fn string(&mut self, text: &str) {
        self.bytes.extend((text.len() as u64).to_le_bytes());
        self.bytes.extend(text.as_bytes());
    }

    fn with(mut self, key: &str, kind: u32, value: impl FnOnce(&mut Self)) -> Self {
        self.count += 1;
        self.string(&format!("tokenizer.{key}"));
        self.bytes.extend(kind.to_le_bytes());
        value(&mut self);
        self
    }

    fn text(self, key: &str, text: &str) -> Self {
        self.with(key, 8, |file| file.string(text))
    }

    fn id(self, key: &str, id: u32) -> Self {
        self.with(key, 4, |file| file.bytes.extend(id.to_le_bytes()))
    }

    fn flag(self, key: &str, flag: bool) -> Self {
        self.with(key, 7, |file| file.bytes.push(u8::from(flag)))
    }

    fn list<T>(self, key: &str, kind: u32, list: &[T], add: impl Fn(&mut Self, &T)) -> Self {
        self.with(key, 9, |file| {
            file.bytes.extend(kind.to_le_bytes());
            file.bytes.extend((list.len() as u64).to_le_bytes());
            list.iter().for_each(|value| add(file, value));
        })
    }

    fn texts(self, key: &str, texts: &[&str]) -> Self {
        self.list(key, 8, texts, |file, text| file.string(text))
    }

    fn kinds(self, kinds: &[i32]) -> Self {
        self.list("ggml.token_type", 5, kinds, |file, kind| file.bytes.extend(kind.to_le_bytes()))
    }

    fn scores(self, scores: &[f32]) -> Self {
        self.list("ggml.scores", 6, scores, |file, score| file.bytes.extend(score.to_le_bytes()))
    }

    fn write(&self) -> (TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let header = [&b"GGUF"[..], &3_u32.to_le_bytes(), &0_u64.to_le_bytes(), &self.count.to_le_bytes()].concat();
        std::fs::write(&path, [header, self.bytes.clone(), vec![0; 64]].concat()).unwrap();
        (folder, path)
    }

    fn open(&self) -> Result<Tokenizer, super::TokenizerError> {
        let (_folder, path) = self.write();
        Tokenizer::open(&path)
    }

    fn error(&self) -> String {
        self.open().unwrap_err().to_string()
    }
}

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ m.content }}<end>{% endfor %}";

/// All bytes, two merges, `<s>` and `<end>`.
fn byte_level(pre: &str) -> Gguf {
    let level = ByteLevel::new();
    let mut tokens: Vec<String> = (0..=255).map(|byte| level.spell(&[byte])).collect();
    tokens.extend(["ab", "Ġab", "<s>", "<end>", "<tool>"].map(String::from));
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let mut kinds = vec![1; tokens.len()];
    kinds[258..].copy_from_slice(&[3, 3, 4]);
    Gguf::default()
        .text("ggml.model", "gpt2")
        .text("ggml.pre", pre)
        .texts("ggml.tokens", &tokens)
        .texts("ggml.merges", &["a b", "Ġ ab"])
        .kinds(&kinds)
        .id("ggml.bos_token_id", 258)
        .id("ggml.eos_token_id", 259)
        .text("chat_template", TEMPLATE)
}

#[test]
fn a_byte_level_tokenizer_has_its_merges_special_tokens_and_template() {
    let tokenizer = byte_level("smollm").open().unwrap();
    assert_eq!(tokenizer.encode("ab ab<end>", true).unwrap(), [256, 257, 259]);
    assert_eq!(tokenizer.encode("1ab", true).unwrap(), [u32::from(b'1'), 256]);
    assert_eq!(tokenizer.decode(&[256, 260, 259, 257], true).unwrap(), "ab<tool> ab");
    assert_eq!((tokenizer.bos(), tokenizer.ends(), tokenizer.adds_bos()), (Some(258), &[259][..], false));
    assert_eq!((tokenizer.vocabulary_size(), tokenizer.missing_bytes()), (261, vec![]));
    let messages = [message("user", "ab")];
    let conversation =
        Conversation { messages: &messages, tools: None, add_generation_prompt: true, clock: Default::default() };
    assert_eq!(tokenizer.template().unwrap().render(&conversation).unwrap(), "<s>ab<end>");
}

#[test]
fn a_text_is_composed_for_qwen2_alone() {
    let decomposed = "e\u{301}<s>\u{1100}\u{1161}";
    let spelled = |pre: &str| {
        let tokenizer = byte_level(pre).open().unwrap();
        tokenizer.decode(&tokenizer.encode(decomposed, true).unwrap(), false).unwrap()
    };
    assert_eq!(spelled("qwen2"), "\u{e9}<s>\u{ac00}");
    assert_eq!(spelled("gpt-2"), decomposed);
}

#[test]
fn bos_and_eos_are_added_as_the_file_says_and_else_as_its_kind_does() {
    let ids = |file: Gguf| file.open().unwrap().encode("ab", true).unwrap();
    assert_eq!(ids(byte_level("llama-bpe")), [258, 256]);
    assert_eq!(ids(byte_level("llama-bpe").flag("ggml.add_bos_token", false)), [256]);
    let both = byte_level("gpt-2").flag("ggml.add_bos_token", true).flag("ggml.add_eos_token", true);
    assert_eq!(ids(both), [258, 256, 259]);
    let ends = byte_level("gpt-2").id("ggml.eot_token_id", 260).open().unwrap();
    assert_eq!(ends.ends(), [259, 260]);
}

#[test]
fn what_is_written_is_the_same_tokenizer() {
    let (tokenizer, folder) = (byte_level("qwen2").open().unwrap(), tempfile::tempdir().unwrap());
    tokenizer.write(folder.path()).unwrap();
    let written = Tokenizer::open(folder.path()).unwrap();
    assert_eq!(written.identity(), tokenizer.identity());
    assert_eq!(written.encode(" ab<s>", true).unwrap(), [257, 258]);
}

#[test]
fn what_is_wrong_is_named() {
    let plain = || Gguf::default().text("ggml.model", "gpt2").texts("ggml.tokens", &["a", "b", "ab"]);
    assert!(plain().texts("ggml.merges", &["a b"]).open().is_ok());
    for (file, words) in [
        (Gguf::default(), "no `tokenizer.ggml.tokens`"),
        (Gguf::default().texts("ggml.tokens", &["a"]), "no `tokenizer.ggml.model`"),
        (Gguf::default().text("ggml.model", "bert").texts("ggml.tokens", &["a"]), "is `bert`; expected gpt2"),
        (byte_level("strange"), "`tokenizer.ggml.pre` is `strange`"),
        (plain().kinds(&[1]), "3 tokens, but 1 types"),
        (plain().texts("ggml.merges", &["ab"]), "merge 1: expected two tokens, found `ab`"),
        (plain().texts("ggml.merges", &["b a"]), "`ba` is not in the vocabulary"),
        (plain().id("ggml.eos_token_id", 9), "`tokenizer.ggml.eos_token_id` is 9, but there are 3 tokens"),
        (plain().text("chat_template", "{% if %}"), "the chat template cannot be read"),
        (
            Gguf::default().text("ggml.model", "gpt2").texts("ggml.tokens", &["a", "a"]),
            "the tokens 0 and 1 are both `a`",
        ),
        (Gguf::default().text("ggml.model", "llama").texts("ggml.tokens", &["a"]), "1 tokens, but 0 scores"),
        (sentence_piece().scores(&[f32::NAN; 265]), "the score of token 0"),
        (Gguf::default().id("ggml.model", 3).texts("ggml.tokens", &["a"]), "tokenizer.ggml.model"),
    ] {
        let error = file.error();
        assert!(error.contains(words) && !error.contains('\n'), "{error}");
    }
    let long = "a".repeat(600);
    let piece = Gguf::default().text("ggml.model", "llama").texts("ggml.tokens", &[&long]).scores(&[0.0]);
    assert!(piece.error().contains("600 bytes"));
}

/// `<unk>`, `<s>`, `</s>`, all bytes, and some pieces without their scores.
fn sentence_piece() -> Gguf {
    let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["\u{2581}", "a", "b", "ab", "ba", "\u{2581}ba"].map(String::from));
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let kinds: Vec<i32> = [2, 3, 3].into_iter().chain([6; 256]).chain([1; 6]).collect();
    Gguf::default().text("ggml.model", "llama").texts("ggml.tokens", &tokens).kinds(&kinds)
}

fn scores(ab: f32, ba: f32) -> Vec<f32> {
    [0.0; 262].into_iter().chain([ab, ba, -9.0]).collect()
}

#[test]
fn sentence_piece_joins_the_best_pieces_first_and_falls_back_to_bytes() {
    let (space, a, b, ab, ba, space_ba) = (259, 260, 261, 262, 263, 264);
    let ids = |file: &Gguf, text: &str| file.open().unwrap().encode(text, true).unwrap();
    let better_ab = sentence_piece().scores(&scores(-1.0, -2.0));
    assert_eq!(ids(&better_ab, "bab"), [1, space, b, ab]);
    let better_ba = sentence_piece().scores(&scores(-2.0, -1.0));
    assert_eq!(ids(&better_ba, "bab"), [1, space_ba, b]);
    assert_eq!(ids(&better_ba, "aba é"), [1, space, a, ba, space, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(ids(&better_ba, "a</s>a"), [1, space, a, 2, space, a]);
    let bare = better_ba.clone().flag("ggml.add_space_prefix", false).flag("ggml.add_bos_token", false);
    assert_eq!(ids(&bare, "aba"), [a, ba]);
}

proptest! {
    #[test]
    fn text_comes_back_from_sentence_piece(text in "[ab é🦀\n]{0,16}", prefix: bool) {
        let tokenizer = sentence_piece().scores(&scores(-1.0, -2.0)).flag("ggml.add_space_prefix", prefix).open().unwrap();
        let ids = tokenizer.encode(&text, true).unwrap();
        prop_assert_eq!(&tokenizer.decode(&ids, true).unwrap(), &text);
        let mut stream = super::super::DecodeStream::default();
        let mut streamed = String::new();
        for id in ids {
            streamed += &stream.push(&tokenizer, id).unwrap();
        }
        prop_assert_eq!(streamed + &stream.finish(&tokenizer).unwrap(), text);
    }

    #[test]
    fn bytes_come_back_from_a_byte_level_tokenizer(
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        pre in prop::sample::select(vec!["default", "gpt-2", "smollm", "llama-bpe", "megrez", "tekken", "falcon", "gpt-4o"]),
    ) {
        let tokenizer = byte_level(pre).open().unwrap();
        let ids = tokenizer.encode_bytes(&bytes).unwrap();
        prop_assert_eq!(tokenizer.decode_bytes(&ids).unwrap(), bytes);
    }
}

//! Real models on real text: tokens, likelihoods, greedy answers. Each test needs what it names and says so where that is not there; with the
//! variable CI set the data sets must be there.
//!
//! `H1_MODELS` is a folder with the files that `examples/fetch-models` fetches, and `tekken_240911.json` of
//! mistral-common 1.13.1. `tests/real/record.py` recorded what other implementations make of the models.

use std::path::{Path, PathBuf};
use std::process::Command;

use h1::text::dataset::read_records;
use h1::text::record::Record;
use h1::text::tokenizer::{DecodeStream, Tokenizer};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// GSM8K's two files.
fn gsm8k(split: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../shared/data/gsm8k/{split}.jsonl"));
    assert!(path.exists() || std::env::var_os("CI").is_none(), "{} is not there", path.display());
    found(path)
}

fn model(name: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("H1_MODELS") else {
        eprintln!("skipped: H1_MODELS does not name a folder with {name}");
        return None;
    };
    found(Path::new(&folder).join(name))
}

fn found(path: PathBuf) -> Option<PathBuf> {
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

fn pairs(path: &Path) -> impl Iterator<Item = String> {
    read_records(path).unwrap().into_iter().flat_map(|record| match record {
        Record::Pair { prompt, response, .. } => [prompt, response],
        other => panic!("{other:?}"),
    })
}

/// Tokens, and the SHA-256 of all ids as little-endian u32.
fn ids(tokenizer: &Tokenizer, path: &Path) -> (usize, String) {
    let (mut count, mut hash) = (0, Sha256::new());
    for text in pairs(path) {
        let ids = tokenizer.encode(&text, false).unwrap();
        count += ids.len();
        ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
    (count, hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Every text comes back, at once and as a stream; bytes come back where there are tokens for them.
fn round_trips(tokenizer: &Tokenizer) {
    let texts = ["", " ", "\n\n\n a  b\t", "I'VE 12345 \r\n\r\n  ²³ ½", "é漢🦀👩‍👩‍👧 fí", "def f(x):\n    return x // 2\n"];
    for text in texts {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        let mut stream = DecodeStream::default();
        let mut streamed: String = ids.iter().map(|id| stream.push(tokenizer, *id).unwrap()).collect();
        streamed += &stream.finish(tokenizer).unwrap();
        assert_eq!(streamed, text);
    }
    let missing = tokenizer.missing_bytes();
    let bytes: Vec<u8> = (0..=255).filter(|byte| !missing.contains(byte)).collect();
    for start in 0..bytes.len() {
        let bytes: Vec<u8> = bytes.iter().cycle().skip(start).step_by(1 + start % 7).take(40).copied().collect();
        let ids = tokenizer.encode_bytes(&bytes).unwrap();
        assert_eq!(tokenizer.decode_bytes(&ids).unwrap(), bytes);
    }
}

#[test]
fn smollm2s_ids_of_gsm8k_are_those_of_an_implementation_in_another_language() {
    let (Some(path), Some(train), Some(test)) =
        (model("SmolLM2-135M-Instruct.Q4_1.gguf"), gsm8k("train"), gsm8k("test"))
    else {
        return;
    };
    let tokenizer = Tokenizer::open(&path).unwrap();
    // Byte-level BPE written anew in Python from the file's own vocabulary and merges.
    let known = [
        (train, 1_381_220, "82b06275f333bfe9bace90656376c40e496beb5650f0ad58723aea3a193632be"),
        (test, 249_366, "6cafb6c6be1aa5ab97c20e6f5238ff779fc439d60ceb74f09ee817625b42f420"),
    ];
    for (path, count, hash) in known {
        assert_eq!(ids(&tokenizer, &path), (count, hash.to_owned()));
    }
    assert_eq!(
        tokenizer.encode("<|im_start|>user\nHello, it's 2024!<|im_end|>\n", true).unwrap(),
        [1, 4093, 198, 19556, 28, 357, 506, 216, 34, 32, 34, 36, 17, 2, 198]
    );
    assert_eq!(
        tokenizer.encode("fn main() {\n    println!(\"é漢🦀\");\n}\n\n\tx  y", true).unwrap(),
        [
            7853, 1085, 1000, 1662, 472, 1628, 34115, 17, 1470, 2756, 177, 137, 112, 10813, 116, 218, 21646, 198, 109,
            1116, 197, 104, 216, 329
        ]
    );
    assert_eq!((tokenizer.bos(), tokenizer.ends(), tokenizer.adds_bos()), (Some(1), &[2][..], false));
    assert_eq!(tokenizer.missing_bytes().len(), 21);
    round_trips(&tokenizer);

    let folder = tempfile::tempdir().unwrap();
    tokenizer.write(folder.path()).unwrap();
    assert_eq!(Tokenizer::open(folder.path()).unwrap().identity(), tokenizer.identity());
}

#[test]
fn qwens_tokenizer_gives_back_every_problem_and_every_byte() {
    let (Some(path), Some(test)) = (model("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"), gsm8k("test")) else { return };
    let tokenizer = Tokenizer::open(&path).unwrap();
    ids(&tokenizer, &test);
    assert!(tokenizer.missing_bytes().is_empty());
    round_trips(&tokenizer);
    // Its texts are composed before they are split.
    let composed = tokenizer.encode("fí", false).unwrap();
    assert_eq!(tokenizer.encode("fi\u{301}", false).unwrap(), composed);
}

#[test]
fn tekken_gives_back_every_problem_and_every_byte() {
    let (Some(path), Some(test)) = (model("tekken_240911.json"), gsm8k("test")) else { return };
    let tokenizer = Tokenizer::from_tekken(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!((tokenizer.vocabulary_size(), tokenizer.bos(), tokenizer.eos()), (131_072, Some(1), Some(2)));
    // By tiktoken.
    let known = (247_231, "5bba6cc18d0ef86728508121455821d5955090c64c252997bf6ab94e75362d75".to_owned());
    assert_eq!(ids(&tokenizer, &test), known);
    assert_eq!(
        tokenizer.encode("I'VE  12345 \r\n\r\n  ²³ ½ é漢🦀 camelCase HTTPServer", false).unwrap(),
        [
            1073, 1039, 16578, 1032, 1032, 1049, 1050, 1051, 1052, 1053, 1032, 1013, 1010, 1013, 1010, 1032, 1032,
            16077, 32168, 1032, 28504, 1782, 42576, 1162, 1240, 1159, 1166, 1128, 98537, 11139, 23733, 11473
        ]
    );
    assert!(tokenizer.missing_bytes().is_empty());
    round_trips(&tokenizer);
}

/// A file of this folder's own.
fn recorded(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real").join(name)
}

/// What the program says of a model on the processor, as JSON.
fn h1(verb: &str, model: &Path, arguments: &[&str]) -> Value {
    let cache = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_h1"));
    command.arg(verb).arg(model).args(["--json", "--backend", "cpu"]).args(arguments).env("H1_CACHE", cache.path());
    let ran = command.output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    serde_json::from_slice(&ran.stdout).unwrap()
}

/// Ids and greedy texts are those that were recorded token for token, mean negative log-likelihoods within 1e-4.
fn is_as_recorded(model_file: &str, records: &str) {
    let (Some(model), Some(test)) = (model(model_file), gsm8k("test")) else { return };
    let records: Value = serde_json::from_slice(&std::fs::read(recorded(records)).unwrap()).unwrap();
    let tokenizer = Tokenizer::open(&model).unwrap();
    let ids =
        |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect::<Vec<_>>();
    for chat in [false, true] {
        let asked: Vec<&Value> =
            records["greedy"].as_array().unwrap().iter().filter(|case| case["chat"] == chat).collect();
        let mut arguments = vec!["--max-new-tokens", "48"];
        arguments.extend(asked.iter().flat_map(|case| ["--prompt", case["prompt"].as_str().unwrap()]));
        arguments.extend(chat.then_some("--chat"));
        let answers = h1("generate", &model, &arguments);
        assert_eq!(answers.as_array().unwrap().len(), asked.len());
        for (case, answer) in asked.iter().zip(answers.as_array().unwrap()) {
            let prompt = answer["prompt"].as_str().unwrap();
            assert_eq!(tokenizer.encode(prompt, !chat).unwrap(), ids(&case["ids"]), "{prompt}");
            // The token that ends a turn is recorded, and no part of an answer.
            let mut expected = ids(&case["new"]);
            expected.pop_if(|last| tokenizer.ends().contains(last));
            assert_eq!(ids(&answer["tokens"]), expected, "{prompt}");
            assert_eq!(answer["text"], case["text"], "{prompt}");
        }
    }
    let scored = |file: &Path, limit: &str| {
        let scores = &h1("eval", &model, &["--data", file.to_str().unwrap(), "--limit", limit])[0]["scores"];
        (scores["tokens"].as_u64().unwrap(), scores["cross_entropy"].as_f64().unwrap())
    };
    let close = |(tokens, mean): (u64, f64), (count, expected): (u64, &Value), what: &str| {
        assert_eq!(tokens, count, "{what}");
        assert!((mean - expected.as_f64().unwrap()).abs() < 1e-4, "{what}: {mean}, not {expected}");
    };
    let answers = &records["answers"];
    let found = scored(&test, &answers["documents"].to_string());
    close(found, (answers["tokens"].as_u64().unwrap(), &answers["mean"]), "GSM8K's answers");
    for text in records["texts"].as_array().unwrap() {
        let name = text["name"].as_str().unwrap();
        // The first token is predicted by none.
        let count = text["ids"].as_u64().unwrap() - 1;
        close(scored(&recorded(name), "1"), (count, &text["mean"]), name);
    }
}

#[test]
fn smollm2s_ids_likelihoods_and_greedy_texts_are_those_of_transformers() {
    is_as_recorded("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2.json");
}

#[test]
fn qwens_ids_likelihoods_and_greedy_texts_are_those_of_transformers() {
    is_as_recorded("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.json");
}

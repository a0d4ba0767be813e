//! A tokenizer of any bytes: after a first byte that says which, a `tokenizer.json`, a `tekken.json`, or the metadata of a GGUF
//! file. What is read encodes, decodes and streams without a panic.
#![no_main]

use std::sync::LazyLock;

use h1::text::tokenizer::{DecodeStream, Tokenizer};
use libfuzzer_sys::fuzz_target;

static PATH: LazyLock<std::path::PathBuf> = LazyLock::new(|| h1_fuzz::folder().join("tokenizer.gguf"));
const TEXTS: [&str; 3] = ["", "ab a\u{e9}\u{1f980} 12\n<s>", "\u{2581}x  y"];

fuzz_target!(|data: &[u8]| {
    h1_fuzz::contain_panics();
    let Some((first, data)) = data.split_first() else { return };
    h1_fuzz::metered(data.len(), 4096, || {
        let tokenizer = match first % 3 {
            0 => Tokenizer::from_json(data),
            1 => Tokenizer::from_tekken(data),
            _ => {
                std::fs::write(&*PATH, data).expect("the input is written");
                Tokenizer::open(&PATH)
            }
        };
        let Ok(tokenizer) = tokenizer else { return };
        for text in TEXTS {
            let Ok(ids) = tokenizer.encode(text, true) else { continue };
            let _ = (tokenizer.decode(&ids, true), tokenizer.decode_bytes(&ids));
            let mut stream = DecodeStream::default();
            for id in ids {
                let _ = stream.push(&tokenizer, id);
            }
            let _ = stream.finish(&tokenizer);
        }
        let _ = (tokenizer.encode_bytes(b"\xff\x00a"), tokenizer.missing_bytes(), tokenizer.identity());
    });
});

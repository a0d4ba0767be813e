//! A chat template of any text on a conversation with a tool.
#![no_main]

use std::sync::LazyLock;

use h1::text::template::{ChatTemplate, Clock, Conversation, Message, message};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

static TURNS: LazyLock<Vec<Message>> = LazyLock::new(|| {
    vec![message("system", "be"), message("user", "hi?"), message("assistant", "yo"), message("user", "\u{e9} <b>")]
});
static TOOLS: LazyLock<Value> = LazyLock::new(|| json!([{ "name": "add", "parameters": { "a": 1, "b": [null, 2.5] } }]));

/// The largest value that a template may make; the fuel pays for no more.
const LARGEST: usize = 1 << 26;

fuzz_target!(|data: &[u8]| {
    let Ok(source) = std::str::from_utf8(data) else { return };
    h1_fuzz::metered(data.len() + LARGEST, 4, || {
        let Ok(template) = ChatTemplate::new(source, vec![("bos_token".to_owned(), "<s>".to_owned())]) else { return };
        for add_generation_prompt in [false, true] {
            let conversation =
                Conversation { messages: &TURNS, tools: Some(&TOOLS), add_generation_prompt, clock: Clock::Now };
            let _ = template.render(&conversation);
        }
    });
});

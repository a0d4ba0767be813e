use super::*;
use crate::text::arithmetic::ALPHABET;
use crate::text::characters::character_tokenizer;
use crate::text::characters::write_character_tokenizer;
use crate::text::template::message;
use crate::text::tokenizer::{CONFIG_FILE, TOKENIZER_FILE};
use serde_json::json;

fn pair(prompt: &str, response: &str) -> Record {
    Record::Pair { prompt: prompt.into(), between: "", response: response.into() }
}

fn characters() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    write_character_tokenizer(folder.path(), ALPHABET).unwrap();
    Tokenizer::open(folder.path()).unwrap()
}

/// Letters with a template; `</s>` ends a turn.
fn chatting(template: &str) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, value: Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    write(TOKENIZER_FILE, character_tokenizer("abcdefghijklmnopqrstuvwxyz:;?! \n"));
    write(CONFIG_FILE, json!({ "bos_token": "<s>", "eos_token": "</s>", "chat_template": template }));
    Tokenizer::open(folder.path()).unwrap()
}

const TURNS: &str = "<s>{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>;{% endfor %}{% if add_generation_prompt %}a:{% endif %}";

/// The text of a record, and the part of it that is learnt.
fn learnt(tokenizer: &Tokenizer, loss_on: LossOn, record: &Record) -> (String, String) {
    let encoded = Encoder::new(tokenizer, Render::Auto, loss_on).encode(record).unwrap();
    let counted = std::iter::zip(&encoded.ids, &encoded.counts).filter(|(_, counts)| **counts).map(|(id, _)| *id);
    let text = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
    (text(&encoded.ids), text(&counted.collect::<Vec<_>>()))
}

#[test]
fn the_response_and_the_end_are_learnt_and_the_prompt_is_not() {
    let tokenizer = characters();
    let encode = |record: &Record, loss_on| Encoder::new(&tokenizer, Render::Auto, loss_on).encode(record).unwrap();
    let first = encode(&pair("1+1=", "2"), LossOn::Response);
    assert_eq!(first.ids, [1, 5, 14, 5, 17, 6, 2]);
    assert_eq!(first.counts, [false, false, false, false, false, true, true]);
    let second = encode(&Record::Text("34".into()), LossOn::Response);
    assert_eq!((second.ids, second.counts), (vec![1, 7, 8, 2], vec![true; 4]));
    assert_eq!(encode(&pair("1+1=", "2"), LossOn::All).counts, [true; 7]);
    let asked = encode(&pair("1+1=", "2"), LossOn::Roles(vec!["user".into()]));
    assert_eq!(asked.counts, [false, true, true, true, true, false, false]);
}

/// A tokenizer of `a`, `b`, `c` and the merge `ab`, without bos or eos.
fn merging() -> Tokenizer {
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": { "type": "Fuse" },
        "model": { "type": "BPE", "vocab": { "a": 0, "b": 1, "c": 2, "ab": 3 }, "merges": [["a", "b"]] },
    });
    Tokenizer::from_json(tokenizer.to_string().as_bytes()).unwrap()
}

#[test]
fn the_ids_of_a_prompt_are_those_it_has_alone() {
    let tokenizer = merging();
    let encode = |prompt, response| {
        let Encoded { ids, counts } =
            Encoder::new(&tokenizer, Render::Auto, LossOn::Response).encode(&pair(prompt, response)).unwrap();
        (ids, counts.iter().filter(|counts| !**counts).count())
    };
    assert_eq!(encode("ca", "bc"), (vec![2, 0, 1, 2], 2));
    assert_eq!(encode("cab", "ab"), (vec![2, 3, 3], 2));
    assert_eq!(encode("", "ab"), (vec![3], 0));
}

#[test]
fn of_a_conversation_what_the_roles_say_is_learnt_with_the_token_that_ends_it() {
    let tokenizer = chatting(TURNS);
    let turns = [("system", "be"), ("user", "hi?"), ("assistant", "yo"), ("user", "why?"), ("assistant", "so!")];
    let messages = turns.map(|(role, content)| message(role, content)).to_vec();
    let record = Record::Messages { messages, tools: None };
    let whole = "<s>s:be</s>;u:hi?</s>;a:yo</s>;u:why?</s>;a:so!</s>;";
    for (loss_on, expected) in [
        (LossOn::Response, "yo</s>so!</s>"),
        (LossOn::All, whole),
        (LossOn::Roles(vec!["user".into()]), "u:hi?</s>u:why?</s>"),
        (LossOn::Roles(vec!["system".into(), "assistant".into()]), "<s>s:be</s>yo</s>so!</s>"),
    ] {
        assert_eq!(
            learnt(&tokenizer, loss_on.clone(), &record),
            (whole.to_owned(), expected.to_owned()),
            "{loss_on:?}"
        );
    }
}

#[test]
fn a_question_and_its_answer_are_two_turns_where_there_is_a_template() {
    let record = Record::Pair { prompt: "hi?".into(), between: "\n", response: "yo".into() };
    let tokenizer = chatting(TURNS);
    let expected = ("<s>u:hi?</s>;a:yo</s>;".to_owned(), "yo</s>".to_owned());
    assert_eq!(learnt(&tokenizer, LossOn::Response, &record), expected);
    let plain = Encoder::new(&tokenizer, Render::Plain, LossOn::Response).encode(&record).unwrap();
    assert_eq!(tokenizer.decode(&plain.ids, false).unwrap(), "<s>hi?\nyo</s>");

    let without = characters();
    let error = Encoder::new(&without, Render::Chat, LossOn::Response).encode(&record).unwrap_err();
    assert!(matches!(error, TokenizerError::NoTemplate));
}

#[test]
fn a_template_that_shortens_earlier_turns_or_ends_the_last_in_another_way_is_followed() {
    let last = "{% for m in messages %}{{ m.role[0] }}:{{ m.content if loop.last else m.content[:1] }};{% endfor %}{{ '</s>' if not add_generation_prompt }}{% if add_generation_prompt %}a:hm {% endif %}";
    let turns = [("user", "hi"), ("assistant", "yo"), ("user", "why"), ("assistant", "so")];
    let messages = turns.map(|(role, content)| message(role, content)).to_vec();
    let record = Record::Messages { messages, tools: None };
    let (text, learnt) = learnt(&chatting(last), LossOn::Response, &record);
    assert_eq!((&text[..], &learnt[..]), ("u:h;a:y;u:w;a:so;</s>", "yso;</s>"));
}

#[test]
fn what_a_template_says_only_in_the_last_question_is_not_learnt() {
    // As some templates put the system's words into the last question.
    let system = "{% for m in messages[1:] %}{{ ('u:' ~ (messages[0].content ~ '!' if loop.last or loop.revindex == 2 and messages[-1].role == 'assistant') ~ m.content ~ ';') if m.role == 'user' else m.content ~ '</s>' }}{% endfor %}";
    let turns = [("system", "be"), ("user", "hi"), ("assistant", "yo"), ("user", "why"), ("assistant", "so")];
    let messages = turns.map(|(role, content)| message(role, content)).to_vec();
    let record = Record::Messages { messages, tools: None };
    let (text, learnt) = learnt(&chatting(system), LossOn::Response, &record);
    assert_eq!((&text[..], &learnt[..]), ("u:hi;yo</s>u:be!why;so</s>", "yo</s>so</s>"));
}

#[test]
fn a_turn_that_cannot_be_found_is_named() {
    let silent = "{% for m in messages %}{{ m.role[0] }};{% endfor %}{% if add_generation_prompt %}a;{% endif %}";
    let messages = vec![message("user", "hi"), message("assistant", "yo")];
    let tokenizer = chatting(silent);
    let encoder = Encoder::new(&tokenizer, Render::Auto, LossOn::Response);
    let error = encoder.encode(&Record::Messages { messages, tools: None }).unwrap_err().to_string();
    assert!(error.contains("turn 2"), "{error}");
}

#[test]
fn which_tokens_count_is_read_from_a_word_or_a_list_of_roles() {
    #[derive(serde::Deserialize)]
    struct Data {
        loss_on: LossOn,
    }
    let read = |value: &str| toml::from_str::<Data>(&format!("loss_on = {value}")).map(|data| data.loss_on);
    assert_eq!(read("'all'").unwrap(), LossOn::All);
    assert_eq!(read("'response'").unwrap(), LossOn::Response);
    assert_eq!(read("['user', 'assistant']").unwrap(), LossOn::Roles(vec!["user".into(), "assistant".into()]));
    for wrong in ["'rsponse'", "[]", "[3]", "3"] {
        assert!(read(wrong).is_err(), "{wrong}");
    }
    assert!(read("'rsponse'").unwrap_err().to_string().contains("\"response\", \"all\" or a list of roles"));
}

#[test]
fn other_ways_to_encode_have_other_identities() {
    let (tokenizer, other) = (chatting(TURNS), chatting("{{ messages }}"));
    let identity = |tokenizer, render, loss_on| Encoder::new(tokenizer, render, loss_on).identity();
    let all = [
        identity(&tokenizer, Render::Auto, LossOn::Response),
        identity(&tokenizer, Render::Plain, LossOn::Response),
        identity(&tokenizer, Render::Auto, LossOn::All),
        identity(&tokenizer, Render::Auto, LossOn::Roles(vec!["user".into()])),
        identity(&other, Render::Auto, LossOn::Response),
    ];
    let different: std::collections::HashSet<_> = all.iter().collect();
    assert_eq!(different.len(), all.len());
    assert_eq!(identity(&chatting(TURNS), Render::Auto, LossOn::Response), all[0]);
}

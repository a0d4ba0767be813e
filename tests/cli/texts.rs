//! Chat templates, conversations and data sets through the program.

use std::fs;

use serde_json::{Value, json};

use super::world::{World, text};

/// A world whose hybrid says `u`, `a` and the end of a turn as tokens 21, 22 and 2.
fn chatting() -> World {
    let world = World::new();
    let [user, assistant, other] = [21, 22, 23].map(|id| text(&[id]));
    let template = format!(
        "{{% for m in messages %}}{{{{ {{'user': '{user}', 'assistant': '{assistant}'}}.get(m.role, '{other}') }}}}\
         {{{{ m.content }}}}</s>{{% endfor %}}{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    );
    world.write("hybrid/tokenizer_config.json", json!({ "chat_template": template }).to_string().as_bytes());
    world
}

fn prompts(results: &Value) -> Vec<&str> {
    results.as_array().unwrap().iter().map(|result| result["prompt"].as_str().unwrap()).collect()
}

#[test]
fn generate_answers_what_a_user_says_as_the_template_has_it() {
    let world = chatting();
    let (said, system) = (text(&[30, 31]), text(&[40]));
    let line = format!("generate hybrid --prompt {said} --max-new-tokens 3 --json");
    let chat = world.h1(&format!("{line} --chat --system {system}")).json();
    assert_eq!(prompts(&chat), [text(&[23, 40, 2, 21, 30, 31, 2, 22])]);
    assert_eq!(prompts(&world.h1(&line).json()), [&said[..]]);

    let messages = json!({ "messages": [{ "role": "user", "content": said }] });
    world.write("turns.json", messages.to_string().as_bytes());
    let answered = world.h1("generate hybrid --messages turns.json --max-new-tokens 3 --json").json();
    assert_eq!(prompts(&answered), [text(&[21, 30, 31, 2, 22])]);
    let shown = world.h1(&format!("generate hybrid --chat --prompt {said} --max-new-tokens 3")).good();
    assert_eq!(shown.trim_end(), world.h1(&format!("{line} --chat")).json()[0]["text"].as_str().unwrap());

    for (line, words) in [
        ("generate teacher --chat --prompt x", "the model has no chat template"),
        ("generate hybrid --messages nowhere.json", "cannot read nowhere.json"),
        ("generate hybrid --messages bad.json", "expected an object with a `role`"),
    ] {
        world.write("bad.json", b"[{}]");
        let ran = world.h1(line);
        assert_eq!(ran.code, Some(1), "{line}");
        assert!(ran.err.contains(words), "{}", ran.err);
    }
}

#[test]
fn eval_scores_what_the_assistant_says_in_whatever_form_it_comes() {
    let world = chatting();
    let (question, answer) = (text(&[30, 31]), text(&[50, 51, 52]));
    world.write("pair.jsonl", json!({ "question": question, "answer": answer }).to_string().as_bytes());
    let turns = json!([{ "role": "user", "content": question }, { "role": "assistant", "content": answer }]);
    world.write("turns.jsonl", json!({ "messages": turns }).to_string().as_bytes());
    let results = world.h1("eval hybrid --data pair.jsonl --data turns.jsonl --json").json();
    // Three tokens and the end of the turn.
    assert_eq!(results[0]["scores"]["tokens"], json!(4));
    assert_eq!(results[0]["scores"], results[1]["scores"]);
    let again = world.h1("eval hybrid --data pair.jsonl --json").json();
    assert_eq!(again[0]["scores"], results[0]["scores"]);
    let all = world.h1("eval hybrid --data turns.jsonl --json --prompts").json();
    assert_eq!(all[0]["scores"]["tokens"], json!(8));
    let refused = world.h1("eval teacher --data turns.jsonl");
    assert!(refused.err.contains("turns.jsonl:1: the model has no chat template"), "{}", refused.err);
}

#[test]
fn data_writes_problems_whose_halves_share_none_and_the_same_for_the_same_seed() {
    let world = World::new();
    let write = |name: &str, rest: &str| {
        world.h1(&format!("data arithmetic --out {name} --count 300 --fewest-digits 1 --most-digits 2 {rest}")).good();
        fs::read_to_string(world.path(name)).unwrap()
    };
    let prompts = |lines: &str| -> Vec<String> {
        let prompt = |line: &str| serde_json::from_str::<Value>(line).unwrap()["prompt"].as_str().unwrap().to_owned();
        lines.lines().map(prompt).collect()
    };
    let (train, test) = (write("train.jsonl", "--seed 1"), write("test.jsonl", "--seed 2 --split test"));
    assert_eq!((train.lines().count(), &train), (300, &write("again.jsonl", "--seed 1")));
    assert_ne!(train, write("other.jsonl", "--seed 3"));
    let train = prompts(&train);
    assert!(prompts(&test).iter().all(|prompt| !train.contains(prompt)));
    let sums = write("sums.jsonl", "--kinds add,mul");
    assert!(prompts(&sums).iter().all(|prompt| prompt.contains('+') || prompt.contains('*')));
    for (line, words) in [
        ("data arithmetic --out train.jsonl --count 1", "train.jsonl already exists"),
        ("data arithmetic --out nowhere/x.jsonl --count 1", "is not a folder"),
        ("data arithmetic --out x.jsonl --count 1 --most-digits 9", "expected a range within 1 to 8"),
    ] {
        let ran = world.h1(line);
        assert_eq!(ran.code, Some(1), "{line}");
        assert!(ran.err.contains(words), "{}", ran.err);
    }
    assert_eq!(world.h1("data arithmetic --out x.jsonl --count 1 --split half").code, Some(2));
}

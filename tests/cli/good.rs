//! What each verb gives for good input.

use std::fs;

use h1::checkpoint::{Checkpoint, TensorFile};
use serde_json::{Value, json};

use super::world::{World, goldens, text};

/// The largest difference of two tensors over the largest value of the expected one.
fn difference(expected: &[f32], found: &[f32]) -> f32 {
    assert_eq!(expected.len(), found.len());
    let largest = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    expected.iter().zip(found).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs())) / largest
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no number {key} in {value}"))
}

#[test]
fn every_verb_explains_itself() {
    let world = World::new();
    let help = world.h1("--help").good();
    let verbs: Vec<&str> = help
        .lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .map_while(|line| line.strip_prefix("  ").and_then(|line| line.split(' ').next()))
        .filter(|verb| *verb != "help")
        .collect();
    assert!(verbs.contains(&"generate"), "{help}");
    for verb in verbs {
        let help = world.h1(&format!("{verb} --help")).good();
        assert!(help.contains("Usage: h1"), "{help}");
    }
    assert!(world.h1("--version").good().starts_with("h1 "));
}

#[test]
fn inspect_says_what_a_model_is() {
    let world = World::new();
    let facts = world.h1("inspect hybrid --json --context 100").json();
    assert_eq!(facts["attention_layers"], json!([0, 2]));
    assert_eq!(facts["mamba_layers"], json!([1, 3]));
    assert_eq!(facts["parameters"], json!(132_048));
    assert_eq!((&facts["dtype"], &facts["tokenizer"]), (&json!("f32"), &json!(320)));
    // Two layers of keys and values 32 wide, two of states [32, 4] before the head repeat and [64, 8].
    assert_eq!(facts["cache_bytes"], json!(4 * 2 * (2 * 32 * 100 + 32 * 4 + 64 * 8)));
    let words = world.h1("inspect hybrid --values").good();
    assert!(words.contains("layers 1,3") && words.contains("AMAM, 4 layers") && words.contains("132048"), "{words}");
}

#[test]
fn verify_passes_on_the_goldens_and_fails_when_a_number_is_off() {
    let world = World::new();
    let report = world.h1(&format!("verify {} --json", goldens().display())).json();
    assert_eq!(report["passes"], json!(true));
    assert!(report["comparisons"].as_array().unwrap().len() > 100);

    fs::create_dir(world.path("off")).unwrap();
    for file in ["MANIFEST.json", "kl.json", "kl.safetensors"] {
        world.write(&format!("off/{file}"), &fs::read(goldens().join(file)).unwrap());
    }
    let table = world.h1("verify off").good();
    assert!(table.contains("kl.safetensors") && table.contains(", 0 over their tolerance"), "{table}");
    let mut bytes = fs::read(world.path("off/kl.safetensors")).unwrap();
    let last = bytes.len() - 4;
    let changed = f32::from_le_bytes(bytes[last..].try_into().unwrap()) + 1e3;
    bytes[last..].copy_from_slice(&changed.to_le_bytes());
    world.write("off/kl.safetensors", &bytes);
    let ran = world.h1("verify off");
    assert_eq!(ran.code, Some(1));
    assert!(ran.out.contains("FAILS"), "{}", ran.out);
}

#[test]
fn forward_gives_the_golden_logits_and_hidden_states() {
    let world = World::new();
    let io = goldens().join("hybrid/io.safetensors");
    world.h1(&format!("forward hybrid --tokens {} --out out.safetensors --hidden", io.display())).good();
    let (golden, found) = (TensorFile::open(&io).unwrap(), TensorFile::open(&world.path("out.safetensors")).unwrap());
    let names = ["logits", "hidden.0", "hidden.1", "hidden.2", "hidden.3", "hidden.4"];
    for name in names {
        let (expected, found) = (golden.tensor(name).unwrap(), found.tensor(name).unwrap());
        assert_eq!(expected.shape, found.shape);
        let off = difference(&expected.to_f32().unwrap().values, &found.to_f32().unwrap().values);
        assert!(off < 3e-5, "{name} is off by {off}");
    }
    assert_eq!(found.names().count(), names.len());
    world.h1("forward hybrid --tokens ids.safetensors --out short.safetensors").good();
    assert_eq!(TensorFile::open(&world.path("short.safetensors")).unwrap().names().collect::<Vec<_>>(), ["logits"]);
}

#[test]
fn eval_scores_each_file_and_finds_a_model_equal_to_itself() {
    let world = World::new();
    let results = world.h1("eval hybrid --data good.jsonl --data long.txt --teacher hybrid --json").json();
    for (result, documents) in results.as_array().unwrap().iter().zip([3, 1]) {
        let scores = &result["scores"];
        assert_eq!(scores["documents"], json!(documents));
        let (loss, perplexity) = (number(scores, "cross_entropy"), number(scores, "perplexity"));
        assert!((loss.exp() / perplexity - 1.0).abs() < 1e-9 && loss > 0.0);
        assert_eq!(number(&scores["teacher"], "agreement"), 1.0);
        assert!(number(&scores["teacher"], "reverse_kl").abs() < 1e-6);
    }
    // An answer's tokens and the end of the text count; with --prompts all but the first token of each text do.
    let tokens = |line: &str| world.h1(line).json()[0]["scores"]["tokens"].clone();
    assert_eq!(tokens("eval hybrid --data good.jsonl --json"), json!(3 + 4 + 2));
    assert_eq!(tokens("eval hybrid --data good.jsonl --json --prompts"), json!(5 + 4 + 41));
    assert_eq!(tokens("eval hybrid --data good.jsonl --json --limit 1"), json!(3));
    let table = world.h1("eval hybrid --data good.jsonl --teacher teacher").good();
    assert!(table.contains("KL to teacher") && table.contains("good.jsonl"), "{table}");
}

#[test]
fn generate_gives_the_golden_tokens_however_many_at_a_time() {
    let world = World::new();
    let golden = TensorFile::open(&goldens().join("hybrid/decode.safetensors")).unwrap();
    let ids = |name: &str| -> Vec<Vec<u32>> {
        let tensor = golden.tensor(name).unwrap().to_u32().unwrap();
        tensor.values.chunks(tensor.shape[1]).map(<[u32]>::to_vec).collect()
    };
    let (prompts, whole) = (ids("prompt_ids"), ids("token_ids"));
    let expected: Vec<Vec<u32>> = std::iter::zip(&prompts, &whole)
        .map(|(prompt, whole)| whole[prompt.len()..].iter().copied().take_while(|id| *id != 2).collect())
        .collect();
    assert!(expected[1].len() < expected[0].len(), "one of the texts is to end by its end token");
    let lines: Vec<String> = prompts.iter().map(|prompt| text(prompt)).collect();
    world.write("prompts.txt", lines.join("\n").as_bytes());
    for batch in [1, 2] {
        let line = format!("generate hybrid --prompts prompts.txt --max-new-tokens 24 --batch {batch} --json");
        let results = world.h1(&line).json();
        for (index, finish) in ["length", "end"].into_iter().enumerate() {
            assert_eq!(results[index]["tokens"], json!(expected[index]), "batch {batch}");
            assert_eq!(results[index]["text"], json!(text(&expected[index])));
            assert_eq!(results[index]["finish"], json!(finish));
        }
    }
    let streamed = world.h1(&format!("generate hybrid --prompt {} --max-new-tokens 24", lines[0])).good();
    assert_eq!(streamed, format!("{}{}\n", lines[0], text(&expected[0])));
}

#[test]
fn generate_draws_the_same_for_the_same_seed_alone() {
    let world = World::new();
    let draw =
        |seed| world.h1(&format!("generate hybrid --prompt 丧 --max-new-tokens 20 --temperature 2 --seed {seed}"));
    assert_eq!(draw(1).good(), draw(1).good());
    assert_ne!(draw(1).good(), draw(2).good());
}

#[test]
fn convert_writes_a_hybrid_that_the_other_verbs_take() {
    let world = World::new();
    let said = world.h1("convert teacher --out new --mamba 1,3 --d-state 8").good();
    assert!(said.contains("Mamba in 2 of 4 layers"), "{said}");
    let (new, teacher) =
        (Checkpoint::open(&world.path("new")).unwrap(), Checkpoint::open(&world.path("teacher")).unwrap());
    for name in
        ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    {
        assert_eq!(new.read_f32(name).unwrap(), teacher.read_f32(name).unwrap(), "{name}");
    }
    let facts = world.h1("inspect new --json").json();
    assert_eq!((&facts["mamba_layers"], &facts["tokenizer"]), (&json!([1, 3]), &json!(320)));
    world.h1("eval new --data good.jsonl --teacher teacher").good();
    world.h1("generate new --prompt 丧 --max-new-tokens 2").good();
    world.h1("convert new --out half --dtype bf16").good();
    assert_eq!(world.h1("inspect half --json").json()["dtype"], json!("bf16"));
}

#[test]
fn train_makes_a_model_from_a_shape_and_trains_it_further() {
    let world = World::new();
    let ran = world.h1("train train.toml --out run --json").json();
    assert_eq!(ran["steps"], json!(3));
    assert!(number(&ran["scores"], "cross_entropy") > 0.0);
    let facts = world.h1("inspect run/model --json --values").json();
    assert_eq!((&facts["layers"], &facts["tokenizer"]), (&json!(2), &json!(32)));
    assert!(world.h1("train train.toml --out run").err.contains("already holds a run"));
    let again = world.h1("train train.toml --out run --resume --json").json();
    assert_eq!(again["scores"], ran["scores"]);
    world.h1("train further.toml --out further").good();
    world.h1("eval further/model --data good.jsonl --teacher hybrid").good();
}

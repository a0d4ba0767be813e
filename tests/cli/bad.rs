//! Bad input of every kind: the status is 1, or 2 for a wrong command line; standard error says in one sentence what is
//! wrong with what; nothing is printed as a result, and nothing is left in the folder.

use super::world::World;

/// A command line, the status, and what the sentence must name.
type Case = (&'static str, i32, &'static str);

fn refused(cases: &[Case]) {
    let world = World::with_broken_things();
    let mut wrong = Vec::new();
    for (line, code, says) in cases {
        let before = world.listing();
        let ran = world.h1(line);
        let sentences = ran.err.lines().filter(|line| line.starts_with("error: ")).count();
        let kept = before == world.listing();
        let good = ran.code == Some(*code) && sentences == 1 && ran.err.contains(says) && ran.out.is_empty() && kept;
        if !good || ran.err.contains("panicked") || ran.err.len() > 600 {
            let left = if kept { "" } else { "\nfiles were left" };
            wrong.push(format!("h1 {line}\n{says:?} is not said:\n{:?} {}{}{left}", ran.code, ran.err, ran.out));
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases\n\n{}", wrong.len(), cases.len(), wrong.join("\n\n"));
}

/// What every verb that opens a model says of a broken one; `$` stands for the model.
fn refuses_broken_models(line: &str) {
    let models = [
        ("nowhere", "nowhere: no such folder"),
        ("file", "file: not a GGUF file"),
        ("empty", "it has no config.json"),
        ("lost", "lost: no weights"),
        ("cut", "cut/model.safetensors: "),
        ("garbled", "garbled/model.safetensors: "),
        ("shape", "gate_proj.weight has shape [96, 48], expected [97, 48]"),
        ("type", "gpt2"),
        ("key", "`num_attention_heads` is missing"),
        ("json", "json/config.json: not JSON"),
        ("heads", "`num_attention_heads` is 4"),
        ("huge", "`vocab_size` is 1152921504606846976"),
    ];
    let lines = models.map(|(model, says)| (&*line.replace('$', model).leak(), 1, says));
    refused(&lines);
}

#[test]
fn the_program_refuses_wrong_command_lines() {
    refused(&[
        ("frobnicate", 2, "unrecognized subcommand 'frobnicate'"),
        ("--frobnicate", 2, "unexpected argument '--frobnicate'"),
        ("inspect", 2, "<MODEL>"),
        ("inspect hybrid teacher", 2, "unexpected argument 'teacher'"),
        ("inspect hybrid --contxt 3", 2, "unexpected argument '--contxt'"),
    ]);
}

#[test]
fn inspect_refuses_broken_models() {
    refuses_broken_models("inspect $");
    refused(&[
        ("inspect nan --values", 1, "has NaN at index"),
        ("inspect hybrid --context -1", 2, "'-1'"),
        ("inspect hybrid --context many", 2, "invalid value 'many'"),
        ("inspect hybrid --context 99999999999999999999", 2, "--context"),
    ]);
}

#[test]
fn forward_refuses_bad_input() {
    refuses_broken_models("forward $ --tokens ids.safetensors --out out");
    refused(&[
        ("forward nan --tokens ids.safetensors --out out", 1, "has NaN at index"),
        ("forward hybrid --tokens nowhere --out out", 1, "cannot open nowhere: No such file"),
        ("forward hybrid --tokens hybrid --out out", 1, "hybrid: not a file"),
        ("forward hybrid --tokens file --out out", 1, "file: "),
        ("forward hybrid --tokens cut.safetensors --out out", 1, "cut.safetensors: "),
        ("forward hybrid --tokens short.safetensors --out out", 1, "short.safetensors: "),
        ("forward hybrid --tokens named.safetensors --out out", 1, "input_ids"),
        ("forward hybrid --tokens flat.safetensors --out out", 1, "input_ids has shape [2], expected [rows, length]"),
        ("forward hybrid --tokens none.safetensors --out out", 1, "input_ids holds no token"),
        ("forward hybrid --tokens floats.safetensors --out out", 1, "input_ids is stored as F32"),
        ("forward hybrid --tokens outside.safetensors --out out", 1, "token 320 at row 1 is outside the vocabulary"),
        ("forward hybrid --tokens negative.safetensors --out out", 1, "input_ids has -1 at index 1"),
        ("forward hybrid --tokens ids.safetensors --out file", 1, "file already exists"),
        ("forward hybrid --tokens ids.safetensors --out empty", 1, "empty already exists"),
        ("forward hybrid --tokens ids.safetensors --out no/out", 1, "no is not a folder"),
        ("forward hybrid --tokens ids.safetensors --out file/out", 1, "file is not a folder"),
        ("forward hybrid --tokens ids.safetensors --out out --backend cuda", 1, "backend cuda: "),
        ("forward hybrid --tokens ids.safetensors --out out --backend gpu", 2, "unknown backend 'gpu'"),
        ("forward hybrid --tokens ids.safetensors --out out --dtype f8", 2, "unknown dtype 'f8'"),
        ("forward hybrid --tokens ids.safetensors --out out --threads 0", 2, "--threads"),
        ("forward hybrid --out out", 2, "--tokens <FILE>"),
        ("forward hybrid --tokens ids.safetensors", 2, "--out <FILE>"),
    ]);
}

#[test]
fn eval_refuses_bad_input() {
    refuses_broken_models("eval $ --data good.jsonl");
    refuses_broken_models("eval hybrid --data good.jsonl --teacher $");
    refused(&[
        ("eval nan --data good.jsonl", 1, "has NaN at index"),
        ("eval mute --data good.jsonl", 1, "mute: no tokenizer.json"),
        ("eval many --data outside.txt", 1, "token 330 at row 0 is outside the vocabulary of 320"),
        ("eval hybrid --data nowhere.jsonl", 1, "nowhere.jsonl: No such file"),
        ("eval hybrid --data good.jsonl --data nowhere.txt", 1, "nowhere.txt: No such file"),
        ("eval hybrid --data empty", 1, "empty: expected .jsonl or .ndjson"),
        ("eval hybrid --data data.csv", 1, "data.csv: expected .jsonl or .ndjson"),
        ("eval hybrid --data empty.jsonl", 1, "empty.jsonl: the file holds no text"),
        ("eval hybrid --data empty.txt", 1, "empty.txt: the file holds no text"),
        ("eval hybrid --data binary.txt", 1, "binary.txt:1: expected UTF-8"),
        ("eval hybrid --data bad.jsonl", 1, "bad.jsonl:2: `text`: expected a string, found a number"),
        ("eval hybrid --data cut.jsonl", 1, "cut.jsonl:2: expected a JSON object"),
        ("eval hybrid --data keys.jsonl", 1, "keys.jsonl:1: expected the key `completion`"),
        ("eval hybrid --data good.jsonl --limit 0", 1, "the data set has no tokens"),
        ("eval hybrid --data good.jsonl --context 0", 2, "--context"),
        ("eval hybrid --data good.jsonl --context 1000000000000000", 1, "no memory for"),
        ("eval hybrid --data good.jsonl --context 18446744073709551615", 1, "too large"),
        ("eval hybrid --data good.jsonl --backend cuda", 1, "backend cuda: "),
        ("eval hybrid", 2, "--data <FILE>"),
    ]);
}

#[test]
fn generate_refuses_bad_input() {
    refuses_broken_models("generate $ --prompt 一");
    refused(&[
        ("generate nan --prompt 一", 1, "has NaN at index"),
        ("generate mute --prompt 一", 1, "mute: no tokenizer.json"),
        ("generate many --prompts outside.txt", 1, "prompt 1 has token 330, which is outside the vocabulary of 320"),
        ("generate hybrid", 1, "give --prompt TEXT, --prompts FILE or --messages FILE"),
        ("generate hybrid --prompt ''", 1, "prompt 1 has no tokens"),
        ("generate hybrid --prompts nowhere.txt", 1, "nowhere.txt: No such file"),
        ("generate hybrid --prompts binary.txt", 1, "binary.txt: stream did not contain valid UTF-8"),
        ("generate hybrid --prompts empty.txt", 1, "nothing to continue"),
        ("generate hybrid --prompt 一 --temperature -1", 1, "temperature -1 is not"),
        ("generate hybrid --prompt 一 --temperature NaN", 1, "temperature NaN is not"),
        ("generate hybrid --prompt 一 --temperature hot", 2, "--temperature"),
        ("generate hybrid --prompt 一 --max-new-tokens 0", 2, "--max-new-tokens"),
        ("generate hybrid --prompt 一 --max-new-tokens 100000000000000", 1, "too large a context"),
        ("generate hybrid --prompt 一 --max-new-tokens 18446744073709551615", 1, "too large a context"),
        ("generate hybrid --prompt 一 --batch 0", 2, "--batch"),
        ("generate hybrid --prompt 一 --seed x", 2, "--seed"),
    ]);
}

#[test]
fn verify_refuses_bad_input() {
    refused(&[
        ("verify nowhere", 1, "nowhere: no such folder"),
        ("verify file", 1, "file: not a folder"),
        ("verify empty", 1, "empty/MANIFEST.json: No such file"),
        ("verify", 2, "<FOLDER>"),
        ("verify empty --all --json", 2, "cannot be used with"),
        ("verify empty --backend cuda", 1, "backend cuda: "),
        ("verify empty --backend", 2, "--backend"),
    ]);
}

#[test]
fn convert_refuses_bad_input() {
    refuses_broken_models("convert $ --out out");
    refuses_broken_models("convert hybrid --out out --teacher $");
    refused(&[
        ("convert nan --out out", 1, "has NaN at index"),
        ("convert teacher --out hybrid", 1, "hybrid already exists"),
        ("convert teacher --out file/out --mamba 1", 1, "file is not a folder"),
        ("convert teacher --out out --mamba 4", 1, "layer 4"),
        ("convert teacher --out out --mamba one", 1, "one"),
        ("convert teacher --out out --mamba 3-1", 1, "3-1"),
        ("convert hybrid --out out --mamba 1", 1, "1"),
        ("convert teacher --out out --mamba 1 --init magic", 2, "magic"),
        ("convert teacher --out out --mamba 1 --d-state 0", 1, "d_state"),
        ("convert teacher --out out --mamba 1 --d-state 7", 1, "d_state"),
        ("convert teacher --out out --mamba 1 --d-conv 0", 1, "d_conv"),
        ("convert teacher --out out --mamba 1 --dt-rank 0", 1, "dt_rank"),
        ("convert teacher --out out --dtype f8", 2, "unknown dtype 'f8'"),
        ("convert teacher --out out --mamba 1 --init mil-fit", 1, "--data goes with"),
        ("convert teacher --out out --mamba 1 --data good.jsonl", 1, "--data goes with"),
        ("convert teacher --out out --mamba 1 --init mil-fit --data bad.jsonl --backend reference", 1, "bad.jsonl:2: "),
        ("convert teacher --out out --mamba 1 --init mil-fit --data good.jsonl --backend cuda", 1, "backend cuda: "),
        ("convert teacher", 2, "--out <DIR>"),
    ]);
}

#[test]
fn train_refuses_bad_input() {
    refused(&[
        ("train nowhere.toml --out run", 1, "cannot read nowhere.toml: No such file"),
        ("train hybrid --out run", 1, "cannot read hybrid: "),
        ("train file --out run", 1, "file:1: "),
        ("train train.toml --out hybrid", 1, "hybrid is not empty and holds no run"),
        ("train train.toml --out file", 1, "file: Not a directory"),
        ("train train.toml --out run --backend cuda", 1, "backend cuda: "),
        ("train train.toml --out run --set budget", 1, "--set budget: expected key.key=value"),
        ("train train.toml --out run --set budget.stops=3", 1, "unknown key `stops`"),
        ("train train.toml --out run --set budget.steps=0", 1, "at least one step"),
        ("train train.toml --out run --set budget.steps=-1", 1, "-1"),
        ("train train.toml --out run --set budget.tokens=100", 1, "either `steps` or `tokens`"),
        ("train train.toml --out run --set batch.rows=0", 1, "rows of a batch is 0"),
        ("train train.toml --out run --set batch.row_tokens=1000000000000", 1, "tokens"),
        ("train train.toml --out run --set model.shape.hidden_size=0", 1, "`hidden_size` is 0"),
        ("train train.toml --out run --set model.shape.num_key_value_heads=3", 1, "`num_attention_heads` is 2"),
        ("train train.toml --out run --set model.checkpoint=hybrid", 1, "either `checkpoint` or `shape`"),
        ("train train.toml --out run --set data.train=[\"good.jsonl\"]", 1, "either `arithmetic` or files"),
        ("train train.toml --out run --set data.arithmetic.digits=[6,4]", 1, "digits"),
        ("train train.toml --out run --set data.arithmetic.kinds=[\"div\"]", 1, "div"),
        ("train train.toml --out run --set optimizer.learning_rate=-1", 1, "optimizer.learning_rate is -1"),
        ("train train.toml --out run --set optimizer.learning_rate=nan", 1, "optimizer.learning_rate is NaN"),
        ("train further.toml --out run --set model.checkpoint=nowhere", 1, "nowhere: no such folder"),
        ("train further.toml --out run --set model.checkpoint=cut", 1, "cut/model.safetensors: "),
        ("train further.toml --out run --set model.checkpoint=./nan", 1, "has NaN at index"),
        ("train further.toml --out run --set data.train=[\"bad.jsonl\"]", 1, "bad.jsonl:2: "),
        ("train further.toml --out run --set data.train=[\"nowhere.jsonl\"]", 1, "nowhere.jsonl: No such file"),
        ("train further.toml --out run --set data.held_out=1", 1, "a validation share of 1"),
        ("train", 2, "<CONFIG>"),
    ]);
}

#[test]
fn distill_refuses_bad_input() {
    refused(&[
        ("distill nowhere.toml --out run", 1, "cannot read nowhere.toml: No such file"),
        ("distill file --out run", 1, "file:1: "),
        ("distill distill.toml --out file", 1, "file: Not a directory"),
        ("distill distill.toml --out hybrid", 1, "hybrid is not empty and holds no run"),
        ("distill distill.toml --out run --backend cuda", 1, "backend cuda: "),
        ("distill distill.toml --out run --set stages=[]", 1, "stages: expected at least one"),
        ("distill distill.toml --out run --set stages=[{mamba=9,tokens=1}]", 1, "stage 1: 9 Mamba layers"),
        ("distill distill.toml --out run --set stages=[{mamba=0,tokens=1}]", 1, "stage 1: 0 Mamba layers"),
        ("distill distill.toml --out run --set stages=[{mamba=1,steps=1}]", 1, "unknown key `steps`"),
        ("distill distill.toml --out run --set teacher.path=nowhere", 1, "nowhere: no such folder"),
        ("distill distill.toml --out run --set teacher.path=cut", 1, "cut/model.safetensors: "),
        ("distill distill.toml --out run --set teacher.pth=teacher", 1, "did you mean `path`?"),
        ("distill distill.toml --out run --set loss.temperature=0", 1, "loss.temperature: expected a number above 0"),
        ("distill distill.toml --out run --set loss.reverse_kl=0", 1, "loss: expected a weight above 0"),
        ("distill distill.toml --out run --set student.d_state=7", 1, "d_state (7)"),
        ("distill distill.toml --out run --set student.init=magic", 1, "unknown variant `magic`"),
        ("distill distill.toml --out run --set optimizer.learning_rate=nan", 1, "optimizer.learning_rate is NaN"),
        ("distill distill.toml --out run --set importance.mmr.steps=0", 1, "importance.mmr.steps: expected at least 1"),
        ("distill distill.toml --out run --set batch.rows=0", 1, "batch.rows: expected at least 1"),
        ("distill distill.toml --out run --set data.train=[\"bad.jsonl\"]", 1, "bad.jsonl:2: "),
        ("distill distill.toml --plan --set teacher.path=nowhere", 1, "nowhere: no such folder"),
        ("distill", 2, "<CONFIG>"),
    ]);
}

#[test]
fn importance_refuses_bad_input() {
    refuses_broken_models("importance $ --method loo --data good.jsonl --out out");
    refused(&[
        ("importance hybrid --method guess --data good.jsonl", 2, "unknown method 'guess'"),
        ("importance mute --method loo --data good.jsonl --out out", 1, "mute: no tokenizer.json"),
        ("importance hybrid --method loo --data nowhere.jsonl --out out", 1, "nowhere.jsonl: No such file"),
        ("importance hybrid --method loo --data bad.jsonl --out out", 1, "bad.jsonl:2: "),
        ("importance hybrid --method loo --data good.jsonl --out file", 1, "file already exists"),
        ("importance hybrid --method loo --data good.jsonl --out out --backend cuda", 1, "backend cuda: "),
        ("importance hybrid --method loo --data good.jsonl --out out --teacher nowhere", 1, "nowhere: no such folder"),
        ("importance teacher --method mmr --data good.jsonl --out out --learning-rate nan", 1, "learning_rate is NaN"),
        ("importance teacher --method mmr --data good.jsonl --out out --learning-rate -1", 1, "learning_rate is -1"),
        ("importance teacher --method mmr --data good.jsonl --out out --d-state 7", 1, "d_state (7)"),
        ("importance teacher --method mmr --data good.jsonl --out out --steps 0", 2, "--steps"),
        ("importance teacher --method loo --data good.jsonl --out out --tokens 0", 2, "--tokens"),
        ("importance teacher --method loo", 2, "--data <FILE>"),
    ]);
}

#[test]
fn bench_and_doctor_refuse_bad_input() {
    refuses_broken_models("bench throughput $");
    refused(&[
        ("bench train --shape huge", 2, "unknown shape 'huge'"),
        ("bench train --shape arithmetic --mamba 99", 1, "there is no layer 99"),
        ("bench train --tokens 0", 2, "--tokens"),
        ("bench train --shape arithmetic --tokens 99999999999999", 1, "no memory for"),
        ("bench train --steps 0", 2, "--steps"),
        ("bench throughput hybrid --shape arithmetic", 2, "cannot be used with"),
        ("bench throughput --shape arithmetic --batch 0", 2, "--batch"),
        ("bench throughput --shape arithmetic --batch 999999999", 1, "no memory for"),
        ("bench kernels --shape arithmetic --tokens 18446744073709551615", 1, "too large"),
        ("bench kernels --backend cuda", 1, "backend cuda: "),
        ("bench kernels --budget -1", 2, "-1"),
        ("doctor --threads 0", 2, "--threads"),
        ("doctor --fast", 2, "--fast"),
    ]);
}

/// A disk that takes no more: files may not grow past a block.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let world = World::new();
    let before = world.listing();
    for verb in [
        "forward hybrid --tokens ids.safetensors --out out --backend reference",
        "convert teacher --out out --mamba 1,2",
    ] {
        let ran = world.sh(&format!("trap '' XFSZ; ulimit -f 1; exec \"$H1\" {verb}"));
        assert_eq!(ran.code, Some(1), "{verb}: {}", ran.err);
        assert!(ran.err.starts_with("error: ") && ran.err.contains("cannot write"), "{verb}: {}", ran.err);
        assert_eq!(before, world.listing(), "{verb}");
    }
    #[cfg(target_os = "linux")]
    {
        let ran = world.sh("exec \"$H1\" inspect hybrid > /dev/full");
        assert_eq!((ran.code, ran.err.lines().count()), (Some(1), 1), "{}", ran.err);
        assert!(ran.err.contains("cannot write to standard output: No space left"), "{}", ran.err);
    }
}

#[cfg(unix)]
#[test]
fn a_reader_that_went_away_ends_the_program_quietly() {
    let ran = World::new().sh("\"$H1\" inspect hybrid --json | true");
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
}

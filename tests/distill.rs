//! The laws of a distillation, on a model small enough for the plain formulas.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use h1::backend::reference::Reference;
use h1::backend::{DType, Device};
use h1::checkpoint::{Checkpoint, SaveOptions, save_model};
use h1::distill::config::Config;
use h1::distill::plan::Plan;
use h1::distill::table::Summary;
use h1::distill::watch::{Event, Watcher};
use h1::distill::{Error, Setup, distill};
use h1::model::config::{BlockKind, Family, ModelConfig, Rope};
use h1::text::arithmetic::ALPHABET;
use h1::text::characters::write_character_tokenizer;
use h1::train::fresh;
use h1::train::session::WALL_CLOCK;
use h1::train::settings;

/// A teacher of four layers with the tokenizer of the arithmetic task; its weights are drawn large, so that it has
/// something to say.
fn write_teacher(folder: &Path) {
    let config = ModelConfig {
        family: Family::Mistral,
        vocab_size: 32,
        hidden_size: 16,
        intermediate_size: 24,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 8,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 1e4, scaling: None },
        sliding_window: None,
        attention_bias: false,
        tie_word_embeddings: false,
        max_position_embeddings: 256,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        initializer_range: 0.4,
        blocks: vec![BlockKind::Attention; 4],
        mamba: None,
        extra: serde_json::Map::new(),
    };
    let tokenizer = tempfile::tempdir().unwrap();
    write_character_tokenizer(tokenizer.path(), ALPHABET).unwrap();
    let device = Device::new(Reference::new());
    let model = fresh(&device, config, DType::F32, 3).unwrap();
    let options = SaveOptions { copy_from: Some(tokenizer.path()), ..SaveOptions::new(DType::F32) };
    save_model(folder, &model, &options).unwrap();
}

const CONFIG: &str = r#"
seed = 5

[teacher]
path = "teacher"

[data.arithmetic]
train = 60
test = 6
digits = [1, 2]
kinds = ["add", "vars"]

[batch]
row_tokens = 48
rows = 2
accumulate = 2

[student]
d_state = 4
init = "mil-fit"
fit_tokens = 256

[optimizer]
learning_rate = 3e-3
betas = [0.9, 0.98]
weight_decay = 0.0

[schedule]
warmup = 1
minimum = 0.1

[importance.loo]
tokens = 96

[importance.mmr]
steps = 2

[checkpoint]
every = 2

[evaluation]
context = 100

[[stages]]
mamba = 1
tokens = 576

[[stages]]
mamba = 3
tokens = 960
"#;

struct Case {
    folder: tempfile::TempDir,
}

impl Case {
    fn new(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_teacher(&folder.path().join("teacher"));
        fs::write(folder.path().join("case.toml"), config).unwrap();
        Case { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, out: &str, resume: bool, watcher: &mut dyn Watcher) -> Result<Option<Summary>, Error> {
        self.run_with(&[], out, resume, watcher)
    }

    fn run_with(
        &self,
        sets: &[&str],
        out: &str,
        resume: bool,
        watcher: &mut dyn Watcher,
    ) -> Result<Option<Summary>, Error> {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        let settings = settings::load::<Config>(&self.path("case.toml"), &sets)?;
        distill(
            Setup {
                config: &settings.values,
                text: &settings.text,
                base: self.folder.path(),
                folder: &self.path(out),
                resume,
                device: &Device::new(Reference::new()),
                dtype: DType::F32,
            },
            watcher,
        )
    }
}

/// Hears everything; asks to stop at the given step, counted over the run.
#[derive(Default)]
struct Ear {
    heard: Vec<String>,
    steps: usize,
    stop_at: Option<usize>,
}

impl Watcher for Ear {
    fn hear(&mut self, event: Event<'_>) {
        self.steps += usize::from(matches!(event, Event::Step { .. }));
        let text = match event {
            Event::Scored { name, .. } => format!("scored {name}"),
            Event::Ranking { stage, method, layers } => format!("ranking {stage} {} {layers}", method.name()),
            Event::Stage { stage, new, mamba, steps } => format!("stage {stage} {} {} {steps}", new.len(), mamba.len()),
            Event::Fitted(_) => "fitted".to_owned(),
            _ => return,
        };
        self.heard.push(text);
    }

    fn interrupted(&self) -> bool {
        self.stop_at.is_some_and(|step| self.steps >= step)
    }
}

/// Every file of a run that does not say how long something took, with its bytes.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(folder).unwrap().display().to_string();
            let bytes = fs::read(&path).unwrap();
            let bytes = match name.as_str() {
                "metrics.jsonl" => without_clock(&bytes),
                // Its metrics' length counts digits of times.
                _ if name.ends_with("state.json") => continue,
                _ => bytes,
            };
            files.insert(name, bytes);
        }
    }
    files
}

fn without_clock(metrics: &[u8]) -> Vec<u8> {
    let text = std::str::from_utf8(metrics).unwrap();
    let line = |line: &str| {
        let mut record: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
        WALL_CLOCK.iter().for_each(|key| drop(record.remove(*key)));
        serde_json::to_string(&record).unwrap() + "\n"
    };
    text.lines().map(line).collect::<String>().into_bytes()
}

fn assert_same(left: &Path, right: &Path) {
    let (left, right) = (contents(left), contents(right));
    assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>());
    for (name, bytes) in &left {
        assert!(bytes == &right[name], "{name} differs");
    }
}

#[test]
fn a_run_goes_from_the_teacher_through_every_stage_to_a_table() {
    let case = Case::new(CONFIG);
    let mut ear = Ear::default();
    let summary = case.run("run", false, &mut ear).unwrap().unwrap();
    assert_eq!(
        ear.heard,
        [
            "scored teacher",
            "ranking 1 LOO 4",
            "stage 1 1 1 3",
            "fitted",
            "scored stage-01",
            "ranking 2 MMR 3",
            "stage 2 2 3 5",
            "fitted",
            "fitted",
            "scored stage-02",
            "scored mil untrained",
            "scored mil-fit untrained",
        ]
    );
    let names: Vec<&str> = summary.rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["teacher", "mil untrained", "mil-fit untrained", "stage-01", "stage-02"]);
    let mamba: Vec<usize> = summary.rows.iter().map(|row| row.mamba.len()).collect();
    assert_eq!(mamba, [0, 3, 3, 1, 3]);
    assert_eq!(summary.rows[1].mamba, summary.rows[4].mamba);
    assert!(summary.rows[3].mamba.iter().all(|layer| summary.rows[4].mamba.contains(layer)));
    assert!(summary.rows[0].kl.unwrap().abs() < 1e-6);
    let kl: Vec<f64> = summary.rows.iter().map(|row| row.kl.unwrap()).collect();
    assert!(kl[4] < kl[2] && kl[2] < kl[1], "{kl:?}");
    // Keys and values of 100 tokens, 8 wide, for each attention layer; states of 16 channels of 4, and 4 taps of 8.
    let cache = |attention: u64| attention * 2 * 8 * 100 * 4 + (4 - attention) * 4 * (16 * 4 + 8 * 4);
    let found: Vec<u64> = summary.rows.iter().map(|row| row.cache_bytes).collect();
    assert_eq!(found, [4, 1, 1, 3, 1].map(cache));
    assert!(summary.rows[3].tokens > 0 && summary.rows[4].tokens > summary.rows[3].tokens);

    let run = case.path("run");
    for (stage, count) in [("01", 1), ("02", 3)] {
        let checkpoint = Checkpoint::open(&run.join("stages").join(stage)).unwrap();
        assert_eq!(checkpoint.config().family, Family::AprielH);
        assert_eq!(checkpoint.config().layers_of(BlockKind::Mamba).count(), count);
        assert!(checkpoint.path().join("tokenizer.json").exists());
    }
    for file in ["table.json", "table.md", "loss.svg", "rankings/01.svg", "rankings/02.svg", "fits/02.json"] {
        assert!(run.join(file).exists(), "{file}");
    }
}

#[test]
fn a_run_that_is_stopped_after_any_step_and_resumed_ends_in_the_same_bits() {
    let case = Case::new(CONFIG);
    case.run("whole", false, &mut Ear::default()).unwrap().unwrap();
    for stop in [1, 3, 6] {
        let out = format!("stopped-{stop}");
        let mut ear = Ear { stop_at: Some(stop), ..Ear::default() };
        assert!(case.run(&out, false, &mut ear).unwrap().is_none() || stop == 3);
        case.run(&out, true, &mut Ear::default()).unwrap().unwrap();
        assert_same(&case.path("whole"), &case.path(&out));
    }
}

#[test]
fn a_run_that_is_killed_at_any_moment_and_resumed_ends_in_the_same_bits() {
    let case = Case::new(CONFIG);
    let start = std::time::Instant::now();
    case.run("whole", false, &mut Ear::default()).unwrap().unwrap();
    let whole = start.elapsed();
    let mut kills = 0;
    for attempt in 0_u32.. {
        assert!(attempt < 40, "it never ends");
        let mut child = Command::new(env!("CARGO_BIN_EXE_h1"))
            .args(["distill", "case.toml", "--out", "killed", "--resume", "--backend", "reference"])
            .current_dir(case.folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The first moments are spread over a whole run; then it may finish.
        let moment = whole * (attempt * 37 % 100) / 100 / 2;
        if attempt < 12 {
            std::thread::sleep(moment.max(Duration::from_millis(20)));
            let _ = child.kill();
        }
        let status = child.wait().unwrap();
        if status.success() {
            break;
        }
        assert!(attempt < 12, "it failed by itself");
        kills += 1;
    }
    assert!(kills > 0, "it was never killed");
    assert_same(&case.path("whole"), &case.path("killed"));
}

#[test]
fn layers_that_are_listed_are_taken_and_mixers_alone_may_train() {
    let stages = r#"
[[stages]]
layers = "1,3"
tokens = 200
trained = "mixers"
"#;
    let case = Case::new(&(CONFIG.split("[[stages]]").next().unwrap().to_owned() + stages));
    let summary = case.run_with(&["student.init=random"], "run", false, &mut Ear::default()).unwrap().unwrap();
    assert_eq!(summary.rows.last().unwrap().mamba, [1, 3]);
    let (teacher, student) = (case.path("teacher"), case.path("run/stages/01"));
    let (teacher, student) = (Checkpoint::open(&teacher).unwrap(), Checkpoint::open(&student).unwrap());
    for spec in teacher.config().tensors() {
        if let Ok(tensor) = student.read_f32(&spec.name) {
            assert_eq!(tensor, teacher.read_f32(&spec.name).unwrap(), "{}", spec.name);
        }
    }
}

#[test]
fn a_run_is_not_resumed_with_another_configuration_nor_started_over() {
    let case = Case::new(CONFIG);
    case.run("run", false, &mut Ear { stop_at: Some(1), ..Ear::default() }).unwrap();
    let refusal =
        |sets: &[&str], resume| case.run_with(sets, "run", resume, &mut Ear::default()).unwrap_err().to_string();
    assert!(refusal(&[], false).contains("already holds a run"));
    assert!(refusal(&["seed=6"], true).contains("seed was 5, now 6"));
}

#[test]
fn what_is_wrong_with_a_configuration_is_said_in_one_sentence() {
    let case = Case::new(CONFIG);
    for (set, words) in [
        ("student.init=kaiming", "kaiming"),
        ("teacher.shape.vocab_size=3", "either `path` or `shape`"),
        ("loss.reverse_kl=0", "a weight above 0"),
        ("loss.reverse_kl=-1", "weights of 0 or more"),
        ("loss.temperature=0", "loss.temperature"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas"),
        ("batch.rows=0", "batch.rows"),
        ("importance.mmr.steps=0", "importance.mmr.steps"),
        ("evaluation.documents=0", "evaluation.documents"),
        ("stages=[]", "at least one"),
        ("stages=[{mamba=5, tokens=1}]", "at most 4"),
        ("stages=[{mamba=1, tokens=0}]", "stage 1: tokens"),
        ("stages=[{tokens=9}]", "either `mamba`"),
        ("stages=[{mamba=2, tokens=9}, {mamba=2, tokens=9}]", "stage 2: 2 Mamba layers"),
        ("stages=[{layers=\"7\", tokens=9}]", "no layer 7"),
        ("stages=[{mamba=1, tokens=9, warmup=-1}]", "invalid value"),
        ("student.d_state=3", "d_state"),
        ("data.arithmetic.test=0", "nothing is held out"),
        ("dtype=f64", "expected f32"),
        ("teacher.path=nowhere", "nowhere"),
        ("placement.max_runs=2", "did you mean `max_run`"),
    ] {
        let refusal = case.run_with(&[set], "refused", true, &mut Ear::default()).unwrap_err().to_string();
        assert!(refusal.contains(words), "{set}: {refusal}");
        let _ = fs::remove_dir_all(case.path("refused"));
    }
}

fn example(name: &str) -> Config {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name);
    settings::load::<Config>(&path, &[]).unwrap().values
}

#[test]
fn the_published_recipe_is_planned_from_its_sizes_alone() {
    let config = example("apriel-h1-15b.toml");
    config.check().unwrap();
    assert_eq!(config.dtype().unwrap(), Some(DType::Bf16));
    let plan = Plan::new(&config, Path::new("."), (DType::Bf16, DType::Bf16), 1e15).unwrap();
    assert_eq!(plan.teacher_parameters, 14_974_182_400);
    assert_eq!(plan.step_tokens, 1_048_576);
    let of = |of: fn(&h1::distill::plan::StagePlan) -> u64| plan.stages.iter().map(of).collect::<Vec<_>>();
    assert_eq!(of(|stage| stage.mamba as u64), [25, 27, 30, 34, 37, 40]);
    assert_eq!(of(|stage| stage.parameters)[2], 15_694_627_840);
    assert_eq!(of(|stage| stage.folder_bytes)[2], 2 * 15_694_627_840);
    // 137 B tokens, each stage rounded up to whole steps.
    assert!(plan.tokens.abs_diff(137_000_000_000) < 6 * plan.step_tokens, "{}", plan.tokens);
    // Ten FLOP a parameter and token with recompute, and attention over 16,384 tokens on top.
    for stage in &plan.stages {
        let floor = 10.0 * 14.3e9;
        assert!((floor..1.25 * floor).contains(&stage.flop_a_token), "{}", stage.flop_a_token);
    }
    let expected = plan.flop / (64.0 * 1e15) / 3600.0;
    assert!((plan.hours / expected - 1.0).abs() < 1e-9);
    let hybrid = &plan.stages[2];
    assert_eq!(hybrid.memory.gradients, 4 * 15_694_627_840);
    assert_eq!(hybrid.memory.moments, 8 * 15_694_627_840);
    assert_eq!(hybrid.memory.student, 6 * 15_694_627_840);
    // Keys and values of 8 heads of 128 follow the activations, states and weights do not.
    let wide = Plan::new(&config, Path::new("."), (DType::Bf16, DType::F32), 1e15).unwrap();
    let keys = 2 * 8 * 128 * 16384_u64;
    assert_eq!((plan.teacher_cache_bytes, wide.teacher_cache_bytes), (50 * 2 * keys, 50 * 4 * keys));
    assert_eq!(wide.stages[2].cache_bytes - hybrid.cache_bytes, 20 * 2 * keys);
    assert_eq!(wide.stages[2].memory.student, hybrid.memory.student);
    assert!(wide.stages[2].memory.activations > hybrid.memory.activations);
    let text = plan.text();
    assert!(["15.7 G", "64 devices", "37"].iter().all(|words| text.contains(words)), "{text}");
}

#[test]
fn the_bundled_example_makes_sense() {
    example("arithmetic.toml").check().unwrap();
}

/// Loss and gradient norm of the bundled example's first steps on a backend, with a fit before them.
fn first_steps(backend: &str) -> Result<Vec<[f64; 2]>, String> {
    let out = tempfile::tempdir().unwrap();
    let sets = [
        "stages=[{layers=\"2,5\",tokens=6144}]",
        "data.arithmetic.train=400",
        "data.arithmetic.test=8",
        "student.fit_tokens=1024",
    ];
    let output = Command::new(env!("CARGO_BIN_EXE_h1"))
        .arg("distill")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/arithmetic.toml"))
        .args(["--backend", backend, "--out"])
        .arg(out.path().join("run"))
        .args(sets.iter().flat_map(|set| ["--set", set]))
        .output()
        .unwrap();
    if !output.status.success() {
        return Err(String::from_utf8(output.stderr).unwrap());
    }
    let metrics = fs::read_to_string(out.path().join("run/metrics.jsonl")).unwrap();
    let step = |line: &str| {
        let step: serde_json::Value = serde_json::from_str(line).unwrap();
        ["loss", "gradient_norm"].map(|key| step[key].as_f64().unwrap())
    };
    Ok(metrics.lines().map(step).collect())
}

#[test]
fn the_first_steps_of_the_example_are_the_same_on_wgpu_and_cpu() {
    let found = match first_steps("wgpu") {
        Ok(found) => found,
        // A machine without an adapter says so; in CI that is a failure.
        Err(error) if error.contains("no adapter") && std::env::var_os("CI").is_none() => {
            println!("skipped: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let expected = first_steps("cpu").unwrap();
    assert_eq!((found.len(), expected.len()), (3, 3));
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        assert!((found / expected - 1.0).abs() < 1e-4, "{found} on wgpu, {expected} on cpu");
    }
}

#[test]
fn a_ranking_resumes_layer_by_layer_and_takes_no_other_settings() {
    let case = Case::new(CONFIG);
    let problems: String =
        (0..40).map(|i| format!("{{\"prompt\":\"{i}+1=\",\"completion\":\">{}\"}}\n", i + 1)).collect();
    fs::write(case.path("problems.jsonl"), problems).unwrap();
    let h1 = |arguments: &[&str]| {
        let data = ["importance", "teacher", "--data", "problems.jsonl", "--backend", "reference"];
        let output = Command::new(env!("CARGO_BIN_EXE_h1"))
            .args(data)
            .args(arguments)
            .current_dir(case.folder.path())
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let mmr = ["--method", "mmr", "--steps", "2", "--row-tokens", "32", "--d-state", "4", "--learning-rate", "1e-3"];
    let loo = ["--method", "loo", "--without", "mixer", "--measure", "reverse-kl"];
    for (out, arguments) in [("mmr", &mmr[..]), ("loo", &loo[..])] {
        let with = |more: &[&str]| h1(&[arguments, &["--out", out], more].concat());
        let (done, words) = with(&[]);
        assert!(done, "{words}");
        let ranking = || fs::read_to_string(case.path(out).join("ranking.json")).unwrap();
        let first = ranking();
        let value: serde_json::Value = serde_json::from_str(&first).unwrap();
        assert_eq!(value["order"].as_array().unwrap().len(), 4);
        assert!(value["scores"].as_array().unwrap().iter().all(|score| score.is_number()), "{first}");

        let (done, words) = with(&[]);
        assert!(!done && words.contains("--resume"), "{words}");
        fs::remove_file(case.path(out).join("ranking.json")).unwrap();
        fs::remove_file(case.path(out).join("layers/layer-002.json")).unwrap();
        let kept = fs::metadata(case.path(out).join("layers/layer-001.json")).unwrap().modified().unwrap();
        assert!(with(&["--resume"]).0);
        assert_eq!(ranking(), first);
        let later = fs::metadata(case.path(out).join("layers/layer-001.json")).unwrap().modified().unwrap();
        assert_eq!(kept, later, "layer 1 was scored again");
        let (done, words) = with(&["--resume", "--seed", "9"]);
        assert!(!done && words.contains("another ranking"), "{words}");
    }
}

//! A run that is killed at any moment and resumed ends in the same bits as one that was never interrupted.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use h1::report::metrics;
use h1::train::session::WALL_CLOCK;

const CONFIG: &str = r#"
seed = 3
[model.shape]
num_hidden_layers = 2
hidden_size = 16
intermediate_size = 24
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
[data.arithmetic]
train = 40
test = 6
digits = [1, 2]
[batch]
row_tokens = 64
rows = 2
accumulate = 2
[budget]
steps = 14
[optimizer]
learning_rate = 1e-2
weight_decay = 0.1
[schedule]
warmup = 3
[evaluation]
every = 5
[checkpoint]
every = 2
keep = 2
"#;

/// What a run leaves: the model, the masters and moments, the state, the metrics without the clock.
#[derive(PartialEq)]
struct Left {
    files: Vec<(String, Vec<u8>)>,
    metrics: Vec<metrics::Record>,
}

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_h1"));
    let out = folder.join("run");
    command.arg("train").arg(folder.join("tiny.toml")).arg("--out").arg(out).args(arguments);
    command.args(["--backend", "cpu", "--resume"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn new_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tiny.toml"), CONFIG).unwrap();
    folder
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn finish(folder: &Path, arguments: &[&str]) -> Left {
    let output = command(folder, arguments).output().unwrap();
    assert!(output.status.success(), "{}", words(&output));
    let run = folder.join("run");
    let read = |name: &str| (name.to_owned(), std::fs::read(run.join(name)).unwrap());
    let files = [
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.json",
        "checkpoints/step-14/model.safetensors",
        "checkpoints/step-14/training.safetensors",
        "checkpoints/step-12/training.safetensors",
    ];
    let mut metrics = metrics::read(&run.join("metrics.jsonl")).unwrap();
    for record in &mut metrics {
        WALL_CLOCK.iter().for_each(|key| drop(record.remove(*key)));
    }
    assert_eq!(metrics.len(), 14 + 3);
    assert_eq!(std::fs::read_dir(run.join("checkpoints")).unwrap().count(), 2);
    Left { files: files.map(read).into(), metrics }
}

fn assert_same(a: &Left, b: &Left) {
    assert_eq!(a.metrics, b.metrics);
    for ((name, a), (_, b)) in a.files.iter().zip(&b.files) {
        assert!(a == b, "{name} differs");
    }
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_run_killed_at_random_moments_ends_in_the_same_bits() {
    let whole = new_folder();
    let start = std::time::Instant::now();
    let expected = finish(whole.path(), &[]);
    let seconds = start.elapsed().as_secs_f64();
    let killed = new_folder();
    // The clock and the scheduler are random enough: where a kill falls differs from run to run.
    for share in [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6] {
        let child = command(killed.path(), &[]).spawn().unwrap();
        std::thread::sleep(Duration::from_secs_f64(seconds * share));
        kill(child);
    }
    assert_same(&finish(killed.path(), &[]), &expected);
    assert_same(&finish(killed.path(), &[]), &expected);
}

/// Waits until the run has a checkpoint, so that what happens next happens in its midst.
fn under_way(folder: &Path) -> Child {
    let mut child = command(folder, &["--set", "budget.steps=100000"]).spawn().unwrap();
    let checkpoints = folder.join("run/checkpoints");
    let begun = || {
        std::fs::read_dir(&checkpoints).is_ok_and(|mut entries| {
            entries.any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("step-")))
        })
    };
    while !begun() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before its first checkpoint");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_after_a_step_with_a_checkpoint_and_says_how_to_go_on() {
    let folder = new_folder();
    let child = under_way(folder.path());
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    let output = child.wait_with_output().unwrap();
    let words = words(&output);
    assert_eq!(output.status.code(), Some(130), "{words}");
    let step = words.split("stopped after step ").nth(1).and_then(|rest| rest.split(';').next()).unwrap();
    assert!(words.contains("--resume"));
    assert!(folder.path().join(format!("run/checkpoints/step-{step}/state.json")).exists(), "{words}");
    let metrics = metrics::read(&folder.path().join("run/metrics.jsonl")).unwrap();
    assert_eq!(metrics.last().unwrap()["step"].as_u64(), step.parse().ok());
}

#[test]
fn a_run_is_not_shared_nor_started_again_nor_resumed_with_another_configuration() {
    let folder = new_folder();
    let child = under_way(folder.path());
    let second = command(folder.path(), &["--set", "budget.steps=100000"]).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(words(&second).contains("in use by another process"), "{}", words(&second));
    kill(child);
    let other = command(folder.path(), &[]).output().unwrap();
    assert!(words(&other).contains("budget.steps was 100000, now 14"), "{}", words(&other));
    let mut again = Command::new(env!("CARGO_BIN_EXE_h1"));
    again.arg("train").arg(folder.path().join("tiny.toml")).arg("--out").arg(folder.path().join("run"));
    let again = again.args(["--backend", "cpu"]).output().unwrap();
    assert!(words(&again).contains("already holds a run"), "{}", words(&again));
}

/// Files may not grow beyond what a first checkpoint needs less a bit: the system refuses as on a full disk.
#[cfg(unix)]
#[test]
fn a_disk_that_is_full_ends_a_run_in_one_sentence_and_what_was_there_stays() {
    let folder = new_folder();
    kill(under_way(folder.path()));
    let checkpoints = || {
        let entries = std::fs::read_dir(folder.path().join("run/checkpoints")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.starts_with("step-"));
        names.sort();
        names
    };
    let before = checkpoints();
    let run = command(folder.path(), &["--set", "budget.steps=100000"]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$@\"", "sh"]).arg(run.get_program()).args(run.get_args());
    let output = limited.output().unwrap();
    let words = words(&output);
    assert_eq!(output.status.code(), Some(1), "{words}");
    let error = words.lines().last().unwrap();
    assert!(error.starts_with("error: the checkpoint of step") && error.contains("is still there"), "{words}");
    assert_eq!(checkpoints(), before);
}

//! A folder with models and data, whole and broken, and the program run in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// The backend of every verb that computes, unless a line names one.
const BACKEND: &str = " --backend reference";
const COMPUTING: [&str; 5] = ["eval", "forward", "generate", "train", "verify"];

/// A training of a new model that takes no time.
const TRAIN: &str = "
[model.shape]
num_hidden_layers = 2
hidden_size = 8
intermediate_size = 8
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 4
[data.arithmetic]
train = 40
test = 4
digits = [1, 2]
[batch]
row_tokens = 64
rows = 2
[budget]
steps = 3
";

/// One of a model that is there.
const FURTHER: &str = "
[model]
checkpoint = 'hybrid'
[data]
train = ['good.jsonl']
[batch]
row_tokens = 64
rows = 1
[budget]
steps = 1
";

/// A distillation of the model that is there.
const DISTILL: &str = "
[teacher]
path = 'teacher'
[data]
train = ['good.jsonl']
held_out = 0.5
[batch]
row_tokens = 64
rows = 1
[[stages]]
mamba = 1
tokens = 64
";

/// Where the golden numbers lie.
pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// A temporary folder in which the program runs, and one for its caches.
pub struct World(tempfile::TempDir, tempfile::TempDir);

/// How a run of the program ended.
pub struct Ran {
    /// The line that was run.
    pub line: String,
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// Standard output of a run that went well.
    pub fn good(self) -> String {
        assert_eq!(self.code, Some(0), "h1 {}\n{}", self.line, self.err);
        self.out
    }

    /// Standard output of a run that went well, as JSON.
    pub fn json(self) -> Value {
        let line = self.line.clone();
        let out = self.good();
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("h1 {line}: {error} in {out}"))
    }
}

impl World {
    /// The models `hybrid` and `teacher` with a tokenizer of one character a token.
    pub fn new() -> Self {
        let world = World(tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, golden) in [("hybrid", "hybrid"), ("teacher", "teacher-mistral")] {
            world.model(name, &goldens().join(golden));
            world.write(&format!("{name}/tokenizer.json"), tokenizer(320).to_string().as_bytes());
        }
        let problem = |prompt: &[u32], answer: &[u32]| json!({"prompt": text(prompt), "completion": text(answer)});
        let lines = [problem(&[20, 30, 40], &[50, 60]), problem(&[300], &[7, 8, 9]), problem(&[5; 40], &[6])];
        world.write("good.jsonl", lines.map(|line| format!("{line}\n")).concat().as_bytes());
        world.write("train.toml", TRAIN.as_bytes());
        world.write("further.toml", FURTHER.as_bytes());
        world.write("distill.toml", DISTILL.as_bytes());
        world.write("long.txt", text(&(4..320).collect::<Vec<_>>()).as_bytes());
        world.ids("ids.safetensors", "input_ids", &[2, 5], &[4, 5, 6, 7, 8, 319, 318, 317, 316, 315]);
        world
    }

    /// The same and everything that a verb may be given by mistake.
    pub fn with_broken_things() -> Self {
        let world = World::new();
        for name in ["cut", "nan", "shape", "type", "key", "json", "heads", "huge", "mute", "many", "garbled", "lost"] {
            world.model(name, &world.path("hybrid"));
        }
        let weights = fs::read(world.path("hybrid/model.safetensors")).unwrap();
        world.write("cut/model.safetensors", &weights[..weights.len() / 2]);
        let mut bytes = weights.clone();
        bytes.truncate(weights.len() - 4);
        bytes.extend(f32::NAN.to_le_bytes());
        world.write("nan/model.safetensors", &bytes);
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        world.write("garbled/model.safetensors", &bytes);
        fs::remove_file(world.path("lost/model.safetensors")).unwrap();
        world.write("json/config.json", b"{");
        world.configure("shape", |config| config["intermediate_size"] = json!(97));
        world.configure("type", |config| config["model_type"] = json!("gpt2"));
        world.configure("heads", |config| config["num_key_value_heads"] = json!(3));
        world.configure("huge", |config| config["vocab_size"] = json!(1_u64 << 60));
        world.configure("key", |config| {
            config.as_object_mut().unwrap().remove("num_attention_heads");
        });
        fs::remove_file(world.path("mute/tokenizer.json")).unwrap();
        world.write("many/tokenizer.json", tokenizer(400).to_string().as_bytes());
        fs::create_dir(world.path("empty")).unwrap();

        world.write("file", b"a file");
        world.write("bad.jsonl", b"{\"text\": \"one\"}\n{\"text\": 2}\n");
        world.write("cut.jsonl", b"{\"text\": \"one\"}\n{\"text\": \"tw");
        world.write("keys.jsonl", b"{\"prompt\": \"one\"}\n");
        world.write("empty.jsonl", b"\n\n");
        world.write("empty.txt", b"");
        world.write("binary.txt", &[0x61, 0xff, 0xfe]);
        world.write("data.csv", b"a,b\n");
        world.write("outside.txt", text(&[330, 4]).as_bytes());
        world.ids("outside.safetensors", "input_ids", &[1, 2], &[4, 320]);
        world.ids("negative.safetensors", "input_ids", &[1, 2], &[4, -1]);
        world.ids("flat.safetensors", "input_ids", &[2], &[4, 5]);
        world.ids("none.safetensors", "input_ids", &[0, 5], &[]);
        world.ids("named.safetensors", "ids", &[1, 2], &[4, 5]);
        let whole = fs::read(world.path("ids.safetensors")).unwrap();
        world.write("cut.safetensors", &whole[..whole.len() - 8]);
        world.write("short.safetensors", b"1234");
        let floats = TensorView::new(Dtype::F32, vec![1, 1], &[0; 4]).unwrap();
        world.write("floats.safetensors", &safetensors::serialize([("input_ids", floats)], None).unwrap());
        world
    }

    /// The path of something in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file.
    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Copies a model's files.
    pub fn model(&self, name: &str, from: &Path) {
        fs::create_dir(self.path(name)).unwrap();
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            if from.join(file).exists() {
                self.write(&format!("{name}/{file}"), &fs::read(from.join(file)).unwrap());
            }
        }
    }

    /// Changes a model's configuration.
    pub fn configure(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let path = self.path(name).join("config.json");
        let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        fs::write(path, config.to_string()).unwrap();
    }

    /// Writes a safetensors file with one tensor of token ids.
    pub fn ids(&self, file: &str, name: &str, shape: &[usize], ids: &[i64]) {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let tensor = TensorView::new(Dtype::I64, shape.to_vec(), &bytes).unwrap();
        self.write(file, &safetensors::serialize([(name, tensor)], None).unwrap());
    }

    /// Runs `h1` with the words of `line`; `''` is a word of no letters.
    pub fn h1(&self, line: &str) -> Ran {
        let verb = line.split(' ').next().unwrap_or_default();
        let add = COMPUTING.contains(&verb) && !line.contains("--backend");
        let line = format!("{line}{}", if add { BACKEND } else { "" });
        let words = line.split_whitespace().map(|word| if word == "''" { "" } else { word });
        let mut command = Command::new(env!("CARGO_BIN_EXE_h1"));
        self.run(command.args(words), line.clone())
    }

    /// Runs a line of the shell in which `$H1` is the program.
    #[cfg(unix)]
    pub fn sh(&self, line: &str) -> Ran {
        let mut command = Command::new("sh");
        self.run(command.args(["-c", line]).env("H1", env!("CARGO_BIN_EXE_h1")), line.to_owned())
    }

    fn run(&self, command: &mut Command, line: String) -> Ran {
        let command = command.current_dir(self.0.path()).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
        command.env("H1_CACHE", self.1.path());
        let Output { status, stdout, stderr } = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ran { line, code: status.code(), out: text(stdout), err: text(stderr) }
    }

    /// Every file and folder with its size.
    pub fn listing(&self) -> BTreeMap<PathBuf, u64> {
        let mut listing = BTreeMap::new();
        let mut folders = vec![self.0.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                listing.insert(path.clone(), fs::metadata(&path).unwrap().len());
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        listing
    }
}

/// The character that is token `id`, 4 or more.
fn character(id: u32) -> char {
    char::from_u32(0x4e00 + id).unwrap()
}

/// The text of tokens, `</s>` for 2.
pub fn text(ids: &[u32]) -> String {
    ids.iter().map(|id| if *id == 2 { "</s>".to_owned() } else { character(*id).to_string() }).collect()
}

/// A tokenizer of one character a token that adds nothing around a text.
fn tokenizer(vocabulary: u32) -> Value {
    let alphabet: String = (4..vocabulary).map(character).collect();
    let mut tokenizer = h1::text::characters::character_tokenizer(&alphabet);
    tokenizer["post_processor"] = Value::Null;
    tokenizer
}

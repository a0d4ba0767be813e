//! Weights of any bytes beside a sound configuration: as a safetensors file, or, after a first byte that is odd, as the index of
//! one.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use h1::checkpoint::{Checkpoint, TensorFile};
use libfuzzer_sys::fuzz_target;

const CONFIG: &str = r#"{"model_type": "qwen2", "vocab_size": 3, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": true}"#;

struct Folders {
    whole: PathBuf,
    sharded: PathBuf,
}

static FOLDERS: LazyLock<Folders> = LazyLock::new(|| {
    let folders = Folders { whole: h1_fuzz::folder().join("whole"), sharded: h1_fuzz::folder().join("sharded") };
    for folder in [&folders.whole, &folders.sharded] {
        std::fs::create_dir_all(folder).expect("a folder");
        std::fs::write(folder.join("config.json"), CONFIG).expect("a configuration");
    }
    std::fs::write(folders.sharded.join("a.safetensors"), [&2u64.to_le_bytes()[..], b"{}"].concat()).expect("a shard");
    folders
});

fuzz_target!(|data: &[u8]| {
    let Some((first, data)) = data.split_first() else { return };
    let (folder, name) = match first % 2 {
        0 => (&FOLDERS.whole, "model.safetensors"),
        _ => (&FOLDERS.sharded, "model.safetensors.index.json"),
    };
    let path = folder.join(name);
    std::fs::write(&path, data).expect("the input is written");
    h1_fuzz::metered(data.len(), 128, || {
        if let Ok(file) = TensorFile::open(&path) {
            for name in file.names() {
                let tensor = file.tensor(name).expect("a tensor that is listed");
                let _ = (tensor.to_f32(), tensor.to_u32(), tensor.check_finite());
            }
        }
        if let Ok(checkpoint) = Checkpoint::open(folder) {
            for spec in checkpoint.config().tensors() {
                checkpoint.read_f32(&spec.name).expect("a tensor of a checkpoint that was opened");
            }
        }
    });
});

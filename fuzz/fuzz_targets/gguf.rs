//! A GGUF file of any bytes: its metadata, its tensors, its model.
#![no_main]

use std::sync::LazyLock;

use h1::checkpoint::Checkpoint;
use h1::checkpoint::gguf::GgufFile;
use libfuzzer_sys::fuzz_target;

static PATH: LazyLock<std::path::PathBuf> = LazyLock::new(|| h1_fuzz::folder().join("model.gguf"));

fuzz_target!(|data: &[u8]| {
    std::fs::write(&*PATH, data).expect("the input is written");
    h1_fuzz::metered(data.len(), 64, || {
        let Ok(file) = GgufFile::open(&PATH) else { return };
        for key in file.keys() {
            let _ = (file.get_str(key), file.get_u64(key), file.get_u32(key), file.get_f64(key), file.get_bool(key));
            let _ = file.get_array_str(key);
            let _ = file.get_array_f32(key);
            let _ = file.get_array_i32(key);
        }
        for name in file.tensors().names() {
            let _ = file.tensors().tensor(name).expect("a tensor that is listed").to_f32();
        }
        if let Ok(checkpoint) = Checkpoint::open(&PATH) {
            for spec in checkpoint.config().tensors() {
                checkpoint.read_f32(&spec.name).expect("a tensor of a checkpoint that was opened");
            }
        }
    });
});

//! Files of models that are cut, lie about their sizes, or were made to do harm: each is refused in a sentence that names the file,
//! and none takes more memory than a small multiple of its size.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use h1::checkpoint::gguf::GgufFile;
use h1::checkpoint::{Checkpoint, TensorFile, read_config};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Counts the bytes that this thread holds, and the most that it held.
struct Meter;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that ends frees what it held when its counters are gone.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: it only counts; the memory is the system's.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as asked of the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as asked of the caller.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static METER: Meter = Meter;

/// What `work` gives, and the most bytes that it held beyond what was held before.
fn metered<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    MOST.set(before);
    let result = work();
    (result, (MOST.get() - before) as usize)
}

/// Memory beside that for the file: a message, the buffers of a reader.
const ALWAYS: usize = 64 << 10;

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// Opens a file of these bytes by every way that there is, and holds its memory against its size; the first error.
fn open_gguf(bytes: &[u8]) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    let (result, most) = metered(|| {
        GgufFile::open(&path).map_err(|error| error.to_string())?;
        let checkpoint = Checkpoint::open(&path).map_err(|error| error.to_string())?;
        for spec in checkpoint.config().tensors() {
            checkpoint.read_f32(&spec.name).map_err(|error| error.to_string())?;
        }
        Ok(())
    });
    assert!(most <= 32 * bytes.len() + ALWAYS, "{most} bytes for a file of {}", bytes.len());
    if let Err(error) = &result {
        let error: &String = error;
        assert!(error.contains("model.gguf: ") && error.lines().count() == 1, "{error}");
    }
    result
}

fn refusal(bytes: &[u8]) -> String {
    open_gguf(bytes).expect_err("refused")
}

/// A GGUF file, piece by piece.
#[derive(Clone)]
struct Gguf {
    version: u32,
    values: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: usize,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn value(key: &str, kind: u32, bytes: &[u8]) -> Vec<u8> {
    [&text(key)[..], &kind.to_le_bytes(), bytes].concat()
}

fn tensor(name: &str, sizes: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let sizes: Vec<u8> =
        [(sizes.len() as u32).to_le_bytes().to_vec(), sizes.iter().flat_map(|n| n.to_le_bytes()).collect()].concat();
    [&text(name)[..], &sizes, &kind.to_le_bytes(), &offset.to_le_bytes()].concat()
}

impl Gguf {
    fn new() -> Self {
        Gguf { version: 3, values: Vec::new(), tensors: Vec::new(), data: 0 }
    }

    fn value(mut self, key: &str, kind: u32, bytes: &[u8]) -> Self {
        self.values.push(value(key, kind, bytes));
        self
    }

    fn tensor(mut self, name: &str, sizes: &[u64], kind: u32, offset: u64) -> Self {
        self.tensors.push(tensor(name, sizes, kind, offset));
        self
    }

    fn data(mut self, bytes: usize) -> Self {
        self.data = bytes;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        self.with_counts(self.tensors.len() as u64, self.values.len() as u64)
    }

    fn with_counts(&self, tensors: u64, values: u64) -> Vec<u8> {
        let mut bytes =
            [&b"GGUF"[..], &self.version.to_le_bytes(), &tensors.to_le_bytes(), &values.to_le_bytes()].concat();
        self.values.iter().chain(&self.tensors).for_each(|part| bytes.extend(part));
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.resize(bytes.len() + self.data, 1);
        bytes
    }
}

#[test]
fn a_gguf_cut_anywhere_is_refused() {
    for name in ["gguf/llama.gguf", "gguf/qwen2.gguf"] {
        let whole = fs::read(tests().join(name)).unwrap();
        open_gguf(&whole).unwrap();
        // Every place of the header, and hundreds among the values.
        let places = (4..2048).chain((2048..whole.len()).step_by(97)).chain([whole.len() - 32]);
        for length in places.filter(|length| *length < whole.len()) {
            let error = refusal(&whole[..length]);
            assert!(error.contains("cut") || error.contains("more than the rest"), "cut to {length} bytes: {error}");
        }
    }
}

#[test]
fn a_gguf_that_is_none_or_of_another_version_or_machine_is_refused() {
    assert!(refusal(b"GGML\x03\0\0\0").contains("not a GGUF file"));
    assert!(refusal(&fs::read(tests().join("gguf/qwen2/model.safetensors")).unwrap()).contains("not a GGUF file"));
    for (version, words) in [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")] {
        assert!(refusal(&Gguf { version, ..Gguf::new() }.bytes()).contains(words));
    }
}

#[test]
fn a_gguf_that_claims_more_than_it_has_is_refused_before_memory_is_taken() {
    for huge in [u64::MAX, u64::MAX / 24, 1 << 40, 1 << 32, 10_000] {
        assert!(refusal(&Gguf::new().with_counts(huge, 0)).contains("tensors, more than the rest"));
        assert!(refusal(&Gguf::new().with_counts(0, huge)).contains("metadata values, more than the rest"));
        assert!(refusal(&Gguf::new().value("k", 8, &huge.to_le_bytes()).bytes()).contains("metadata k: "));
        for kind in [0u32, 4, 8, 12] {
            let array = [&kind.to_le_bytes()[..], &huge.to_le_bytes()].concat();
            assert!(refusal(&Gguf::new().value("k", 9, &array).bytes()).contains("metadata k: "));
        }
        // Ten gigabytes and more of values in a file of a few hundred bytes.
        let claims = Gguf::new().tensor("t", &[huge], 0, 0).data(100).bytes();
        assert!(refusal(&claims).contains("tensor t"));
        assert!(refusal(&Gguf::new().tensor("t", &[huge, huge, huge, huge], 0, 0).bytes()).contains("tensor t"));
        assert!(refusal(&Gguf::new().tensor("t", &[8], 0, huge & !31).data(100).bytes()).contains("tensor t"));
        let named = Gguf { tensors: vec![huge.to_le_bytes().to_vec()], ..Gguf::new() };
        assert!(refusal(&named.data(64).bytes()).contains("list of tensors"));
    }
    let empty_but_huge = Gguf::new().tensor("t", &[0, u64::MAX, u64::MAX], 0, 0).bytes();
    assert!(refusal(&empty_but_huge).contains("too large"));
}

#[test]
fn tensors_that_overlap_are_misplaced_or_of_unknown_types_are_refused_by_name() {
    let pair = |offset: u64| Gguf::new().tensor("a", &[16], 0, 0).tensor("b", &[16], 0, offset).data(128).bytes();
    assert!(refusal(&pair(32)).contains("tensor b overlaps tensor a"));
    assert!(refusal(&pair(0)).contains("overlaps"));
    assert!(refusal(&pair(63)).contains("tensor b starts at 63"));
    assert!(refusal(&pair(96)).contains("tensor b takes 64 bytes"));
    let twice = Gguf::new().tensor("a", &[0], 0, 0).tensor("a", &[0], 0, 0).bytes();
    assert!(refusal(&twice).contains("tensor a is there twice"));
    for (kind, name) in [(10, "Q2_K"), (23, "IQ4_XS"), (4, "number 4"), (u32::MAX, "number 4294967295")] {
        let error = refusal(&Gguf::new().tensor("a", &[256], kind, 0).data(512).bytes());
        assert!(error.contains("tensor a") && error.contains(name), "{error}");
    }
    let odd = Gguf::new().tensor("a", &[48, 2], 2, 0).data(512).bytes();
    assert!(refusal(&odd).contains("blocks of 32 values, but a row has 48"));
    assert!(refusal(&Gguf::new().tensor("a", &[1, 1, 1, 1, 1], 0, 0).data(64).bytes()).contains("5 sizes"));
}

#[test]
fn metadata_at_odds_with_itself_is_refused_by_its_key() {
    let one = 1u64.to_le_bytes();
    assert!(
        refusal(&Gguf::new().value("k", 10, &one).value("k", 10, &one).bytes()).contains("metadata k is there twice")
    );
    assert!(refusal(&Gguf::new().value("k", 13, &one).bytes()).contains("no value type 13"));
    let nested = [&9u32.to_le_bytes()[..], &one].concat();
    assert!(refusal(&Gguf::new().value("k", 9, &nested).bytes()).contains("array of arrays"));
    for alignment in [0u32, 3, 48, 1 << 20, u32::MAX] {
        let error = refusal(&Gguf::new().value("general.alignment", 4, &alignment.to_le_bytes()).bytes());
        assert!(error.contains("general.alignment"), "{error}");
    }
    assert!(refusal(&Gguf::new().value("general.alignment", 8, &text("32")).bytes()).contains("general.alignment"));
    assert!(refusal(&Gguf::new().value("", 4, &[1; 4]).bytes()).contains("a name has 0 bytes"));
    assert!(
        refusal(
            &Gguf { values: vec![[&text("")[..0], &2u64.to_le_bytes(), &[0xff, 0xfe]].concat()], ..Gguf::new() }
                .data(64)
                .bytes()
        )
        .contains("UTF-8")
    );
}

/// The metadata of a model with one of its values changed.
fn model(changed: &str, kind: u32, bytes: &[u8]) -> Gguf {
    let f32s = |value: f32| value.to_le_bytes().to_vec();
    let values: [(&str, u32, Vec<u8>); 9] = [
        ("general.architecture", 8, text("llama")),
        ("llama.block_count", 4, 1u32.to_le_bytes().to_vec()),
        ("llama.context_length", 4, 64u32.to_le_bytes().to_vec()),
        ("llama.embedding_length", 4, 32u32.to_le_bytes().to_vec()),
        ("llama.feed_forward_length", 4, 32u32.to_le_bytes().to_vec()),
        ("llama.attention.head_count", 4, 4u32.to_le_bytes().to_vec()),
        ("llama.attention.head_count_kv", 4, 2u32.to_le_bytes().to_vec()),
        ("llama.attention.layer_norm_rms_epsilon", 6, f32s(1e-5)),
        ("llama.rope.freq_base", 6, f32s(1e4)),
    ];
    let mut file = Gguf::new();
    for (key, old_kind, old) in &values {
        file = if *key == changed { file.value(key, kind, bytes) } else { file.value(key, *old_kind, old) };
    }
    if values.iter().all(|(key, ..)| *key != changed) {
        file = file.value(changed, kind, bytes);
    }
    file.tensor("token_embd.weight", &[32, 8], 0, 0).data(1024)
}

#[test]
fn a_model_that_makes_no_sense_is_refused_by_what_is_wrong_with_it() {
    let words = |changed: &str, kind: u32, bytes: &[u8]| refusal(&model(changed, kind, bytes).bytes());
    let number = |value: u32| value.to_le_bytes();
    assert!(words("none", 4, &number(1)).contains("tensor model.layers.0.input_layernorm.weight is missing"));
    assert!(words("general.architecture", 8, &text("mamba")).contains("llama, mistral or qwen2"));
    assert!(words("llama.block_count", 4, &number(u32::MAX)).contains("llama.block_count"));
    assert!(words("llama.block_count", 4, &number(16_384)).contains("is missing"));
    assert!(words("llama.embedding_length", 4, &number(0)).contains("hidden_size"));
    assert!(words("llama.embedding_length", 10, &u64::MAX.to_le_bytes()).contains("hidden_size"));
    assert!(words("llama.attention.head_count", 4, &number(0)).contains("num_attention_heads"));
    assert!(words("llama.attention.head_count", 8, &text("4")).contains("llama.attention.head_count is a string"));
    assert!(words("llama.attention.head_count_kv", 4, &number(3)).contains("num_key_value_heads"));
    assert!(words("llama.attention.layer_norm_rms_epsilon", 6, &f32::NAN.to_le_bytes()).contains("rms_norm_eps"));
    assert!(words("llama.expert_count", 4, &number(8)).contains("mixture of experts"));
    assert!(words("llama.rope.dimension_count", 4, &number(4)).contains("llama.rope.dimension_count"));
    assert!(words("llama.rope.scaling.type", 8, &text("yarn")).contains("yarn"));
    let with_factors = model("none", 4, &number(1)).tensor("rope_freqs.weight", &[3], 0, 1024).data(1036);
    assert!(refusal(&with_factors.bytes()).contains("rope_freqs.weight"));
}

/// Opens a folder of these files; the error, and the memory that it took held against the files.
fn open_folder(files: &[(&str, &[u8])]) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    let (result, most) = metered(|| Checkpoint::open(folder.path()).map(|_| ()).map_err(|error| error.to_string()));
    let size: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(most <= 64 * size + ALWAYS, "{most} bytes for files of {size}");
    if let Err(error) = &result {
        let named = files.iter().any(|(name, _)| error.contains(name));
        assert!(named && error.lines().count() == 1, "{error}");
    }
    result
}

#[test]
fn a_folder_with_a_file_cut_anywhere_is_refused() {
    let read = |name: &str| fs::read(tests().join("gguf/qwen2").join(name)).unwrap();
    let (config, weights) = (read("config.json"), read("model.safetensors"));
    open_folder(&[("config.json", &config), ("model.safetensors", &weights)]).unwrap();
    for length in (0..weights.len()).step_by(weights.len() / 200) {
        open_folder(&[("config.json", &config), ("model.safetensors", &weights[..length])]).expect_err("cut");
    }
    for length in 0..config.len() - 1 {
        open_folder(&[("config.json", &config[..length]), ("model.safetensors", &weights)]).expect_err("cut");
    }
    let index = json!({"weight_map": {"model.norm.weight": "a.safetensors"}}).to_string();
    for length in 0..index.len() {
        open_folder(&[("config.json", &config), ("model.safetensors.index.json", &index.as_bytes()[..length])])
            .expect_err("cut");
    }
}

#[test]
fn a_configuration_that_claims_much_takes_no_memory_for_it() {
    let text = fs::read_to_string(tests().join("gguf/qwen2/config.json")).unwrap();
    let weights = fs::read(tests().join("gguf/qwen2/model.safetensors")).unwrap();
    for (key, huge) in [
        ("num_hidden_layers", 16_384u64),
        ("num_hidden_layers", u64::MAX),
        ("vocab_size", 1 << 28),
        ("hidden_size", 1 << 24),
        ("head_dim", 1 << 20),
        ("intermediate_size", u64::MAX),
    ] {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config[key] = json!(huge);
        let config = config.to_string();
        open_folder(&[("config.json", config.as_bytes()), ("model.safetensors", &weights)]).expect_err("refused");
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), &config).unwrap();
        let (_, most) = metered(|| read_config(folder.path()).is_ok());
        assert!(most < ALWAYS, "{key} = {huge}: {most} bytes");
    }
}

#[test]
fn ten_gigabytes_claimed_in_a_safetensors_header_take_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    for (length, header) in [
        (10_000_000_000, String::new()),
        (
            0,
            json!({"a": {"dtype": "F32", "shape": [2_500_000_000u64], "data_offsets": [0, 10_000_000_000u64]}})
                .to_string(),
        ),
    ] {
        let length = if length == 0 { header.len() as u64 } else { length };
        fs::write(&path, [&length.to_le_bytes()[..], header.as_bytes(), &[0; 64]].concat()).unwrap();
        let (result, most) = metered(|| TensorFile::open(&path));
        let error = result.unwrap_err().to_string();
        assert!(error.contains("x.safetensors: ") && most < ALWAYS, "{error}: {most} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn bytes_changed_at_random_make_no_gguf_panic_or_take_much_memory(
        changes in prop::collection::vec((0usize..1700, any::<u8>()), 1..4), file in 0usize..2,
    ) {
        let mut bytes = fs::read(tests().join(["gguf/llama.gguf", "gguf/qwen2.gguf"][file])).unwrap();
        changes.iter().for_each(|(at, byte)| bytes[*at] = *byte);
        let _ = open_gguf(&bytes);
    }
}

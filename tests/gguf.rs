//! GGUF files and Qwen2, held to independent implementations; `tests/gguf/make.py` made the files.

use std::path::{Path, PathBuf};
use std::process::Command;

use h1::backend::ops::{LossWeights, Scaling};
use h1::backend::select::{self, Name};
use h1::backend::{DType, Device, Segments};
use h1::checkpoint::{Checkpoint, SaveOptions, Storage, StoredTensor, TensorFile, save};
use h1::hybrid::{Conversion, Init, LayerSet, MixerShape};
use h1::model::config::{BlockKind, Family, ModelConfig, Rope, RopeScaling};
use h1::model::{Activations, Cache, FinalNorm, Gradients, Keep, Logits, LossHead, LossKind, Model, Targets};
use h1::text::characters::write_character_tokenizer;
use proptest::prelude::*;

const QUANTISED: [Storage; 8] = [
    Storage::Q4_0,
    Storage::Q4_1,
    Storage::Q5_0,
    Storage::Q5_1,
    Storage::Q8_0,
    Storage::Q4_K,
    Storage::Q5_K,
    Storage::Q6_K,
];

fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf").join(name)
}

fn devices() -> [Device; 2] {
    [Name::Reference, Name::Cpu].map(|name| select::open(name, None).unwrap())
}

fn values(file: &TensorFile, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap().to_f32().unwrap().values
}

/// The largest difference, as a share of the largest value.
fn difference(expected: &[f32], found: &[f32]) -> f32 {
    assert_eq!(expected.len(), found.len());
    let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
    let difference = expected.iter().zip(found).map(|(a, b)| (a - b).abs());
    difference.fold(0f32, |most, value| if value > most || value.is_nan() { value } else { most }) / largest
}

/// Logits of each row of `ids`, `[rows, length, vocabulary]`.
fn logits(model: &Model, ids: &[u32], length: usize) -> Vec<f32> {
    let mut activations = Activations::new(model, Keep::Nothing, ids.len(), ids.len()).unwrap();
    let segments = Segments::documents(vec![length; ids.len() / length]).unwrap();
    model.forward(&mut activations, ids, &segments, None, None).unwrap();
    head(model, &activations, ids.len())
}

fn head(model: &Model, activations: &Activations, rows: usize) -> Vec<f32> {
    let all: Vec<u32> = (0..rows as u32).collect();
    let (norm, logits) = (FinalNorm::new(model, rows).unwrap(), Logits::new(model, rows).unwrap());
    let normed = norm.forward(model, activations.output().unwrap(), &all).unwrap();
    model.device().read(logits.forward(model, normed).unwrap()).unwrap().wait().unwrap()
}

fn block(storage: Storage, bytes: &[u8], shape: &[usize], heads: Option<usize>) -> Vec<f32> {
    let tensor = StoredTensor { path: Path::new("blocks"), name: storage.name(), storage, shape, bytes, heads };
    tensor.to_f32().unwrap().values
}

#[test]
fn quantised_blocks_hold_the_values_that_the_published_package_reads() {
    let file = TensorFile::open(&here("blocks.safetensors")).unwrap();
    for storage in QUANTISED {
        let bytes = file.tensor(&format!("{}.bytes", storage.name())).unwrap().bytes;
        let found = block(storage, bytes, &[512], None);
        assert_eq!(found, values(&file, &format!("{}.values", storage.name())), "{}", storage.name());
    }
}

#[test]
fn logits_are_those_of_transformers_for_each_architecture_from_gguf_and_from_a_folder() {
    let models = [
        ("llama.gguf", "llama.io"),
        ("mistral.gguf", "mistral.io"),
        ("qwen2.gguf", "qwen2.io"),
        ("k-quants.gguf", "k-quants.io"),
        ("qwen2", "qwen2/io"),
    ];
    for (model, io) in models.map(|(model, io)| (here(model), io)) {
        let io = TensorFile::open(&here(&format!("{io}.safetensors"))).unwrap();
        let ids = io.tensor("input_ids").unwrap().to_u32().unwrap();
        for device in devices() {
            let model = Checkpoint::open(&model).unwrap().load(&device, DType::F32).unwrap();
            let error = difference(&values(&io, "logits"), &logits(&model, &ids.values, ids.shape[1]));
            assert!(error < 2e-6, "{io:?}: {error}");
        }
    }
}

#[test]
fn a_gguf_says_the_same_of_a_model_as_a_config_json() {
    let llama = Checkpoint::open(&here("llama.gguf")).unwrap();
    let config = llama.config();
    assert_eq!((config.family, config.tie_word_embeddings, config.head_dim), (Family::Llama, true, 8));
    assert!(matches!(&config.rope.scaling, Some(RopeScaling::Llama3(scaling)) if scaling.factor == 8.0));
    assert_eq!((config.bos_token_id, &config.eos_token_ids[..]), (Some(1), &[2][..]));
    let mistral = Checkpoint::open(&here("mistral.gguf")).unwrap();
    assert_eq!((mistral.config().family, mistral.config().sliding_window), (Family::Mistral, Some(8)));
    let qwen2 = Checkpoint::open(&here("qwen2.gguf")).unwrap();
    let folder = Checkpoint::open(&here("qwen2")).unwrap();
    let same = ModelConfig {
        tie_word_embeddings: true,
        extra: folder.config().extra.clone(),
        initializer_range: folder.config().initializer_range,
        rms_norm_eps: folder.config().rms_norm_eps,
        ..qwen2.config().clone()
    };
    assert_eq!(&same, folder.config());
    assert!((qwen2.config().rms_norm_eps / folder.config().rms_norm_eps - 1.0).abs() < 1e-6);
}

#[test]
fn the_small_models_cover_every_type() {
    let files = ["llama.gguf", "qwen2.gguf", "k-quants.gguf"].map(|name| Checkpoint::open(&here(name)).unwrap());
    let stored: Vec<Storage> =
        files.iter().flat_map(|file| file.storages().unwrap()).map(|(storage, _)| storage).collect();
    for storage in [&QUANTISED[..], &[Storage::F32, Storage::F16, Storage::Bf16]].concat() {
        assert!(stored.contains(&storage), "{}", storage.name());
    }
}

#[test]
fn factors_of_rope_that_are_no_llama_3s_are_taken_as_they_are() {
    let plain = Checkpoint::open(&here("llama.gguf")).unwrap().config().clone();
    let unscaled = ModelConfig { rope: Rope { scaling: None, ..plain.rope.clone() }, ..plain.clone() }.inv_freq();
    let mut bytes = std::fs::read(here("llama.gguf")).unwrap();
    let of = |factors: [f32; 4]| factors.iter().flat_map(|factor| factor.to_le_bytes()).collect::<Vec<u8>>();
    // The file keeps those of Llama 3 that are 1, 1, something between, 8.
    let place = bytes.windows(8).position(|part| *part == of([1.0, 1.0, 0.0, 0.0])[..8]).unwrap();
    let own = [1.0, 2.0, 3.0, 4.5];
    bytes[place..place + 16].copy_from_slice(&of(own));
    let above = tempfile::tempdir().unwrap();
    let (path, out) = (above.path().join("own.gguf"), above.path().join("folder"));
    std::fs::write(&path, bytes).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.config().rope.scaling, Some(RopeScaling::Factors(own.map(f64::from).to_vec())));
    for ((scaled, plain), factor) in checkpoint.config().inv_freq().iter().zip(unscaled).zip(own) {
        assert!((scaled * factor / plain - 1.0).abs() < 1e-6);
    }
    let options = SaveOptions::new(DType::F32);
    save(&out, checkpoint.config(), &options, |spec| Ok(checkpoint.read_f32(&spec.name)?.values.into())).unwrap();
    assert_eq!(Checkpoint::open(&out).unwrap().config().inv_freq(), checkpoint.config().inv_freq());
}

#[test]
fn gradients_of_qwen2_are_those_of_torch() {
    let io = TensorFile::open(&here("qwen2/io.safetensors")).unwrap();
    let ids = io.tensor("input_ids").unwrap().to_u32().unwrap();
    let (length, tokens) = (ids.shape[1], ids.values.len());
    let rows: Vec<u32> = (0..tokens as u32).filter(|row| !(*row as usize + 1).is_multiple_of(length)).collect();
    let labels: Vec<u32> = rows.iter().map(|row| ids.values[*row as usize + 1]).collect();
    let weights = vec![1.0 / rows.len() as f32; rows.len()];
    let kind = LossKind {
        weights: LossWeights { reverse_kl: 0.0, forward_kl: 0.0, cross_entropy: 1.0 },
        scaling: Scaling::default(),
    };
    for device in devices() {
        let model = Checkpoint::open(&here("qwen2")).unwrap().load(&device, DType::F32).unwrap();
        for keep in [Keep::Inputs, Keep::Everything] {
            let mut activations = Activations::new(&model, keep, tokens, 2).unwrap();
            let gradients = Gradients::new(&device, model.weights().table(), |_| true).unwrap();
            let head = LossHead::new(&model, None, rows.len(), false).unwrap();
            let segments = Segments::documents([length, length]).unwrap();
            model.forward(&mut activations, &ids.values, &segments, None, None).unwrap();
            let targets = Targets { rows: &rows, labels: &labels, weights: &weights };
            let into = Some((&gradients, activations.doutput().unwrap()));
            head.run(&model, activations.output().unwrap(), &targets, None, kind, into).unwrap();
            model.backward(&activations, &gradients).unwrap();
            for (id, parameter) in gradients.space().table().iter() {
                let expected = values(&io, &format!("gradient.{}", parameter.spec.name));
                let error = difference(&expected, &gradients.space().read(&device, id).unwrap());
                assert!(error < 2e-5, "{}: {error}", parameter.spec.name);
            }
        }
    }
}

#[test]
fn qwen2_decodes_to_the_bits_of_its_prefill() {
    let device = select::open(Name::Cpu, None).unwrap();
    let model = Checkpoint::open(&here("qwen2.gguf")).unwrap().load(&device, DType::F32).unwrap();
    let ids: Vec<u32> = (0..20).map(|i| i * 7 % 48).collect();
    let whole = logits(&model, &ids, ids.len());
    let mut cache = Cache::new(&model, 1, ids.len(), ids.len()).unwrap();
    let mut activations = Activations::new(&model, Keep::Nothing, 1, 1).unwrap();
    for (past, id) in ids.iter().enumerate() {
        let mut segments = Segments::default();
        segments.push(1, past, 0).unwrap();
        model.forward(&mut activations, &[*id], &segments, Some(&mut cache), None).unwrap();
        assert_eq!(head(&model, &activations, 1), whole[past * 48..][..48], "token {past}");
    }
}

#[test]
fn mil_takes_the_biases_of_qwen2_and_starts_the_others_at_zero() {
    let teacher = Checkpoint::open(&here("qwen2")).unwrap();
    let shape = MixerShape { d_state: Some(8), ..MixerShape::default() };
    let layers: LayerSet = [1].into_iter().collect();
    let conversion = |init| Conversion::new(teacher.config(), teacher.config(), &layers, (init, shape, 3)).unwrap();
    let of = |name: &str| teacher.read_f32(&format!("model.layers.1.self_attn.{name}")).unwrap().values;
    for init in Init::ALL {
        let conversion = conversion(init);
        let config = conversion.config();
        assert!(config.attention_bias && config.mamba.as_ref().unwrap().bias);
        let tensor = |name: &str| {
            let tensors = config.tensors();
            let spec = tensors.iter().find(|spec| spec.name == format!("model.layers.1.mixer.{name}")).unwrap();
            let read =
                |name: &str| -> Result<_, h1::hybrid::HybridError> { Ok(teacher.read_f32(name).unwrap().values) };
            conversion.tensor(spec, read).unwrap()
        };
        // The state is as wide as a head: aligned and plain conversion are the same.
        let expected = match init {
            Init::Random => vec![0.0; 2 * (32 + 16)],
            _ => [vec![0.0; 32], of("v_proj.bias"), of("k_proj.bias"), of("q_proj.bias")].concat(),
        };
        assert_eq!(tensor("in_proj.bias"), expected, "{init}");
        assert_eq!((tensor("dt_in_proj.bias"), tensor("out_proj.bias")), (vec![0.0; 2], vec![0.0; 32]), "{init}");
    }
}

#[test]
fn a_converted_qwen2_is_written_and_read_with_all_its_biases() {
    let above = tempfile::tempdir().unwrap();
    let out = above.path().join("hybrid");
    let converted = Command::new(env!("CARGO_BIN_EXE_h1"))
        .args([
            "convert",
            here("qwen2").to_str().unwrap(),
            "--mamba",
            "0",
            "--d-state",
            "4",
            "--out",
            out.to_str().unwrap(),
        ])
        .output()
        .unwrap();
    assert!(converted.status.success(), "{}", String::from_utf8_lossy(&converted.stderr));
    let hybrid = Checkpoint::open(&out).unwrap();
    assert_eq!(hybrid.config().blocks, [BlockKind::Mamba, BlockKind::Attention]);
    let teacher = Checkpoint::open(&here("qwen2")).unwrap();
    let kept = "model.layers.1.self_attn.q_proj.bias";
    assert_eq!(hybrid.read_f32(kept).unwrap(), teacher.read_f32(kept).unwrap());
    assert_eq!(hybrid.read_f32("model.layers.0.mixer.in_proj.bias").unwrap().shape, [96]);
}

#[test]
fn a_gguf_converts_to_a_folder_of_the_same_values() {
    for name in ["llama.gguf", "qwen2.gguf", "k-quants.gguf"] {
        let above = tempfile::tempdir().unwrap();
        let out = above.path().join("folder");
        let converted = Command::new(env!("CARGO_BIN_EXE_h1"))
            .args(["convert", here(name).to_str().unwrap(), "--out", out.to_str().unwrap()])
            .output()
            .unwrap();
        assert!(converted.status.success(), "{}", String::from_utf8_lossy(&converted.stderr));
        let (file, folder) = (Checkpoint::open(&here(name)).unwrap(), Checkpoint::open(&out).unwrap());
        for spec in file.config().tensors() {
            assert_eq!(file.read_f32(&spec.name).unwrap(), folder.read_f32(&spec.name).unwrap(), "{}", spec.name);
        }
        assert_eq!(folder.config().inv_freq(), file.config().inv_freq());
    }
}

proptest! {
    #[test]
    fn a_part_of_a_tensor_is_that_part_of_the_whole_whatever_its_blocks_and_the_order_of_its_rows(
        at in 0usize..8, heads in prop::sample::select(vec![None, Some(1), Some(2), Some(4)]),
        (first, length) in (0usize..2048, 0usize..2048),
    ) {
        let (storage, shape) = (QUANTISED[at], [8, 256]);
        let file = TensorFile::open(&here("blocks.safetensors")).unwrap();
        let bytes = file.tensor(&format!("{}.bytes", storage.name())).unwrap().bytes.repeat(4);
        let tensor = StoredTensor { path: Path::new("blocks"), name: "blocks", storage, shape: &shape, bytes: &bytes, heads };
        let length = length.min(2048 - first);
        let mut part = vec![f32::NAN; length];
        tensor.decode(first, &mut part).unwrap();
        prop_assert_eq!(&part[..], &tensor.to_f32().unwrap().values[first..first + length]);
        prop_assert!(tensor.decode(2048 - length, &mut vec![0.0; length + 1]).is_err());
    }
}

/// A folder with the Qwen2, which is given a tokenizer of one letter a token, and sentences.
fn schoolroom() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let teacher = folder.path().join("teacher");
    std::fs::create_dir(&teacher).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(here("qwen2").join(file), teacher.join(file)).unwrap();
    }
    // Beside the four special tokens as many as its vocabulary has.
    write_character_tokenizer(&teacher, "abcdefghijklmnopqrstuvwxyz 0123456789.,?!:;-").unwrap();
    let line = |i: usize| format!("{{\"prompt\": \"what is {i}?\", \"completion\": \" {} and {}.\"}}\n", i * 7, i % 9);
    std::fs::write(folder.path().join("lines.jsonl"), (0..60).map(line).collect::<String>()).unwrap();
    folder
}

const SCHOOL: &str = "
[data]
train = ['lines.jsonl']
held_out = 0.2
[batch]
row_tokens = 64
rows = 2
[optimizer]
learning_rate = 2e-3
[schedule]
warmup = 2
";

fn h1(folder: &Path, line: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_h1"));
    let ran = command.args(line.split(' ')).current_dir(folder).env("H1_CACHE", folder.join("cache")).output().unwrap();
    assert!(ran.status.success(), "h1 {line}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

#[test]
fn a_qwen2_is_distilled_and_trained_with_its_biases() {
    let room = schoolroom();
    let stages = "[teacher]\npath = 'teacher'\n[student]\nd_state = 8\ninit = 'mil-fit'\nfit_tokens = 256\n[importance.loo]\n\
        tokens = 256\n[evaluation]\nbefore = true\n[[stages]]\nmamba = 1\ntokens = 3840\n";
    std::fs::write(room.path().join("distill.toml"), format!("{SCHOOL}{stages}")).unwrap();
    let further = "[model]\ncheckpoint = 'run/stages/01'\n[budget]\nsteps = 3\n";
    std::fs::write(room.path().join("train.toml"), format!("{SCHOOL}{further}")).unwrap();
    h1(room.path(), "distill distill.toml --out run --backend cpu");
    let table: serde_json::Value =
        serde_json::from_slice(&std::fs::read(room.path().join("run/table.json")).unwrap()).unwrap();
    let kl = |name: &str| {
        let rows = table["rows"].as_array().unwrap();
        rows.iter().find(|row| row["name"] == name).unwrap()["kl"].as_f64().unwrap()
    };
    assert!(kl("stage-01") < kl("stage-01 before"), "{table}");
    h1(room.path(), "train train.toml --out trained --backend cpu");
    let [teacher, distilled, trained] =
        ["teacher", "run/stages/01", "trained/model"].map(|name| Checkpoint::open(&room.path().join(name)).unwrap());
    let mamba = distilled.config().layers_of(BlockKind::Mamba).next().unwrap();
    let moved = |name: &str, from: &Checkpoint, to: &Checkpoint| {
        assert_ne!(from.read_f32(name).unwrap().values, to.read_f32(name).unwrap().values, "{name}");
    };
    for part in ["q", "k", "v"] {
        let name = format!("model.layers.{}.self_attn.{part}_proj.bias", 1 - mamba);
        // A key's bias turns the scores of a query by nearly the same: its gradient is small, but not 0 under RoPE.
        moved(&name, &teacher, &distilled);
        moved(&name, &distilled, &trained);
    }
    moved(&format!("model.layers.{mamba}.mixer.in_proj.bias"), &distilled, &trained);
    let words = h1(room.path(), "inspect trained/model");
    assert!(words.contains("no published class loads it"), "{words}");
}

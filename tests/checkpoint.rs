//! Checkpoint folders: the golden ones, what is written and read back, and what is wrong with broken ones.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use h1::backend::DType;
use h1::checkpoint::{
    Checkpoint, CheckpointError, NewTensor, SaveOptions, Tensor, TensorFile, read_config, save, write_tensors,
};
use h1::model::config::{BlockKind, ModelConfig};
use proptest::prelude::*;
use serde_json::{Value, json};

const FOLDERS: [&str; 4] = ["teacher-mistral", "teacher-llama3-tied", "hybrid", "mil-student"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

type Tensors = HashMap<String, Tensor>;

fn tensors(checkpoint: &Checkpoint) -> Tensors {
    let names = checkpoint.config().tensors().into_iter().map(|spec| spec.name);
    names.map(|name| (name.clone(), checkpoint.read_f32(&name).unwrap())).collect()
}

fn save_tensors(
    path: &Path,
    config: &ModelConfig,
    options: &SaveOptions<'_>,
    tensors: &Tensors,
) -> Result<(), CheckpointError> {
    save(path, config, options, |spec| Ok(Cow::Borrowed(&tensors[&spec.name].values)))
}

/// A copy of the golden hybrid, with its file changed by `change`.
fn broken(change: impl FnOnce(&Path)) -> CheckpointError {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::write(folder.path().join(name), fs::read(golden("hybrid").join(name)).unwrap()).unwrap();
    }
    change(folder.path());
    Checkpoint::open(folder.path()).expect_err("broken")
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(&path, config.to_string()).unwrap();
}

/// Writes the golden hybrid's tensors again, changed by `edit`, without any check.
fn edit_tensors(folder: &Path, edit: impl FnOnce(&mut Vec<(String, Tensor)>)) {
    let checkpoint = Checkpoint::open(&golden("hybrid")).unwrap();
    let mut list: Vec<(String, Tensor)> = tensors(&checkpoint).into_iter().collect();
    edit(&mut list);
    write_list(&folder.join("model.safetensors"), &list);
}

fn write_list(path: &Path, list: &[(String, Tensor)]) {
    let new: Vec<NewTensor> = list
        .iter()
        .map(|(name, tensor)| NewTensor { name: name.clone(), shape: tensor.shape.clone(), dtype: DType::F32 })
        .collect();
    write_tensors(path, &new, |at| Ok(Cow::Borrowed(&list[at].1.values))).unwrap();
}

#[test]
fn every_golden_folder_opens_and_is_finite() {
    for name in FOLDERS {
        let checkpoint = Checkpoint::open(&golden(name)).unwrap();
        checkpoint.check_finite().unwrap();
        assert_eq!(checkpoint.dtype(), DType::F32);
        let file = TensorFile::open(&golden(name).join("model.safetensors")).unwrap();
        assert_eq!(file.names().count(), checkpoint.config().tensors().len());
    }
}

#[test]
fn the_scaled_frequencies_are_the_golden_ones() {
    let config = read_config(&golden("teacher-llama3-tied")).unwrap();
    let io = TensorFile::open(&golden("teacher-llama3-tied/io.safetensors")).unwrap();
    assert_eq!(config.inv_freq(), io.tensor("rope_inv_freq").unwrap().to_f32().unwrap().values);
}

#[test]
fn whole_numbers_read_as_u32_and_not_as_f32() {
    let io = TensorFile::open(&golden("teacher-mistral/io.safetensors")).unwrap();
    let ids = io.tensor("input_ids").unwrap();
    let read = ids.to_u32().unwrap();
    assert_eq!(read.shape, [2, 19]);
    assert!(read.values.iter().all(|id| *id < 320));
    assert!(matches!(ids.to_f32(), Err(CheckpointError::Storage { .. })));
    assert!(matches!(io.tensor("logits").unwrap().to_u32(), Err(CheckpointError::Storage { .. })));
    assert!(matches!(io.tensor("nothing"), Err(CheckpointError::Missing { .. })));
}

#[test]
fn a_part_of_a_tensor_is_that_part_of_the_whole() {
    let checkpoint = Checkpoint::open(&golden("hybrid")).unwrap();
    let stored = checkpoint.stored("lm_head.weight").unwrap();
    let mut part = [0.0; 100];
    stored.decode(1000, &mut part).unwrap();
    assert_eq!(part[..], stored.to_f32().unwrap().values[1000..1100]);
    assert!(stored.decode(stored.len() - 99, &mut part).is_err());
    assert!(stored.decode(usize::MAX, &mut part).is_err());
}

#[test]
fn a_saved_folder_reads_back_the_same_whole_and_in_shards() {
    for name in FOLDERS {
        let checkpoint = Checkpoint::open(&golden(name)).unwrap();
        let values = tensors(&checkpoint);
        for max_shard_bytes in [usize::MAX, 70_000, 1] {
            let above = tempfile::tempdir().unwrap();
            let path = above.path().join("new");
            let options = SaveOptions { max_shard_bytes, ..SaveOptions::new(DType::F32) };
            save_tensors(&path, checkpoint.config(), &options, &values).unwrap();
            let read = Checkpoint::open(&path).unwrap();
            assert_eq!(tensors(&read), values);
            assert_eq!(read.config().tensors(), checkpoint.config().tensors());
            assert_eq!(path.join("model.safetensors").exists(), max_shard_bytes == usize::MAX);
            let index = fs::read_to_string(path.join("model.safetensors.index.json"));
            if let Ok(index) = index {
                let index: Value = serde_json::from_str(&index).unwrap();
                assert_eq!(index["metadata"]["total_size"], json!(4 * checkpoint.config().parameter_count()));
            }
        }
    }
}

#[test]
fn a_saved_file_is_read_by_the_published_crate_as_torchs_own() {
    let checkpoint = Checkpoint::open(&golden("teacher-llama3-tied")).unwrap();
    let above = tempfile::tempdir().unwrap();
    let path = above.path().join("new");
    let values = tensors(&checkpoint);
    save_tensors(&path, checkpoint.config(), &SaveOptions::new(DType::Bf16), &values).unwrap();
    let bytes = fs::read(path.join("model.safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), values.len());
    assert!(
        file.iter().all(|(name, view)| view.shape() == values[name].shape && view.dtype() == safetensors::Dtype::BF16)
    );
    let generation: Value =
        serde_json::from_str(&fs::read_to_string(path.join("generation_config.json")).unwrap()).unwrap();
    assert_eq!((&generation["bos_token_id"], &generation["eos_token_id"]), (&json!(1), &json!(2)));
}

#[test]
fn half_precision_reads_back_as_what_it_was_rounded_to() {
    let checkpoint = Checkpoint::open(&golden("hybrid")).unwrap();
    let values = tensors(&checkpoint);
    let above = tempfile::tempdir().unwrap();
    for (dtype, round) in [
        (DType::Bf16, (|value| half::bf16::from_f32(value).to_f32()) as fn(f32) -> f32),
        (DType::F16, |value| half::f16::from_f32(value).to_f32()),
        (DType::F64, |value| value),
    ] {
        let path = above.path().join(dtype.to_string());
        save_tensors(&path, checkpoint.config(), &SaveOptions::new(dtype), &values).unwrap();
        let read = Checkpoint::open(&path).unwrap();
        assert_eq!(read.dtype(), dtype);
        for (name, tensor) in tensors(&read) {
            assert!(tensor.values.iter().zip(&values[&name].values).all(|(read, value)| *read == round(*value)));
        }
    }
}

#[test]
fn tokenizer_files_are_copied_and_may_be_written_to() {
    let above = tempfile::tempdir().unwrap();
    let source = above.path().join("source");
    fs::create_dir(&source).unwrap();
    for name in ["tokenizer.json", "chat_template.jinja", "generation_config.json", "secrets.txt", "modeling.py"] {
        fs::write(source.join(name), name).unwrap();
        let mut permissions = fs::metadata(source.join(name)).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(source.join(name), permissions).unwrap();
    }
    let checkpoint = Checkpoint::open(&golden("hybrid")).unwrap();
    let values = tensors(&checkpoint);
    let options = SaveOptions { copy_from: Some(&source), ..SaveOptions::new(DType::F32) };
    let path = above.path().join("new");
    save_tensors(&path, checkpoint.config(), &options, &values).unwrap();
    for name in ["tokenizer.json", "chat_template.jinja", "generation_config.json"] {
        assert_eq!(fs::read_to_string(path.join(name)).unwrap(), name);
        assert!(!fs::metadata(path.join(name)).unwrap().permissions().readonly());
    }
    assert!(!path.join("secrets.txt").exists() && !path.join("modeling.py").exists());
    let mut with_code = checkpoint.config().clone();
    with_code.extra.insert("auto_map".to_owned(), json!({"AutoConfig": "modeling.Config"}));
    let path = above.path().join("with-code");
    save_tensors(&path, &with_code, &options, &values).unwrap();
    assert!(path.join("modeling.py").exists());
}

#[test]
fn a_save_that_fails_leaves_nothing_and_an_existing_folder_is_kept() {
    let checkpoint = Checkpoint::open(&golden("hybrid")).unwrap();
    let mut values = tensors(&checkpoint);
    let above = tempfile::tempdir().unwrap();
    let path = above.path().join("new");
    let failed = save(&path, checkpoint.config(), &SaveOptions::new(DType::F32), |spec| match spec.layer {
        Some(2) => Err("the device was lost".into()),
        _ => Ok(Cow::Borrowed(&values[&spec.name].values[..])),
    });
    assert_eq!(failed.unwrap_err().to_string(), "tensor model.layers.2.input_layernorm.weight: the device was lost");
    let short = save(&path, checkpoint.config(), &SaveOptions::new(DType::F32), |_| Ok(Cow::Owned(vec![0.0; 7])));
    assert!(matches!(short, Err(CheckpointError::Length { expected: 15360, found: 7, .. })));
    values.get_mut("model.norm.weight").unwrap().values[5] = 1e6;
    let large = save_tensors(&path, checkpoint.config(), &SaveOptions::new(DType::F16), &values);
    assert_eq!(
        large.unwrap_err().to_string(),
        "tensor model.norm.weight has 1000000 at index 5, which f16 cannot hold"
    );
    assert_eq!(fs::read_dir(above.path()).unwrap().count(), 0);

    fs::create_dir(&path).unwrap();
    fs::write(path.join("mine"), "1").unwrap();
    let exists = save_tensors(&path, checkpoint.config(), &SaveOptions::new(DType::F32), &values);
    assert_eq!(exists.unwrap_err().to_string(), format!("{} already exists", path.display()));
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
}

#[test]
fn dt_rank_is_that_of_the_tensors() {
    let checkpoint = Checkpoint::open(&golden("hybrid")).unwrap();
    let mut config = checkpoint.config().clone();
    config.mamba.as_mut().unwrap().dt_rank = 5;
    let above = tempfile::tempdir().unwrap();
    let path = above.path().join("new");
    let zeros = |spec: &h1::model::tensors::TensorSpec| Ok(Cow::Owned(vec![0.0; spec.len()]));
    save(&path, &config, &SaveOptions::new(DType::F32), zeros).unwrap();
    for rank in [json!("auto"), json!(7)] {
        edit_config(&path, |config| config["ssm_cfg"]["dt_rank"] = rank);
        assert_eq!(Checkpoint::open(&path).unwrap().config(), &config);
    }
}

#[test]
fn mixers_of_the_older_spelling_are_the_same_mixers() {
    let checkpoint = Checkpoint::open(&golden("hybrid")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden("hybrid/config.json"), folder.path().join("config.json")).unwrap();
    edit_tensors(folder.path(), |list| {
        for layer in [1, 3] {
            let dt = format!("model.layers.{layer}.mixer.dt_in_proj.weight");
            let dt = list.remove(list.iter().position(|(name, _)| *name == dt).unwrap()).1;
            let in_proj = format!("model.layers.{layer}.mixer.in_proj.weight");
            let in_proj = &mut list.iter_mut().find(|(name, _)| *name == in_proj).unwrap().1;
            in_proj.shape[0] += dt.shape[0];
            in_proj.values.extend(dt.values);
        }
        list.iter_mut().for_each(|(name, _)| *name = name.replace(".mixer.", ".mamba."));
    });
    assert_eq!(tensors(&Checkpoint::open(folder.path()).unwrap()), tensors(&checkpoint));
}

#[test]
fn a_block_switched_off_and_old_rotary_buffers_do_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden("hybrid/config.json"), folder.path().join("config.json")).unwrap();
    edit_config(folder.path(), |config| config["hybrid_block_layout"] = json!(["t", "m2", "i", "m2"]));
    edit_tensors(folder.path(), |list| {
        let buffer = Tensor { shape: vec![8], values: vec![0.0; 8] };
        list.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), buffer));
    });
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.config().blocks[2], BlockKind::Identity);
}

#[test]
fn a_tied_model_may_bring_its_head_if_it_is_the_embedding() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden("teacher-llama3-tied/config.json"), folder.path().join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&golden("teacher-llama3-tied")).unwrap();
    let mut list: Vec<(String, Tensor)> = tensors(&checkpoint).into_iter().collect();
    let head = checkpoint.read_f32("model.embed_tokens.weight").unwrap();
    list.push(("lm_head.weight".to_owned(), head));
    write_list(&folder.path().join("model.safetensors"), &list);
    Checkpoint::open(folder.path()).unwrap();
    list.last_mut().unwrap().1.values[3] += 1.0;
    write_list(&folder.path().join("model.safetensors"), &list);
    assert!(Checkpoint::open(folder.path()).unwrap_err().to_string().contains("tie_word_embeddings"));
}

#[test]
fn what_is_wrong_is_said_with_file_and_tensor() {
    type Change = fn(&Path);
    let cases: [(&str, Change); 8] = [
        ("model.safetensors: tensor lm_head.weight is missing", |folder| {
            edit_tensors(folder, |list| list.retain(|(name, _)| name != "lm_head.weight"))
        }),
        ("config.json: `hidden_size` is 0, expected 1 to 16777216", |folder| {
            edit_config(folder, |config| config["hidden_size"] = json!(0))
        }),
        (
            "model.safetensors: tensor model.layers.0.mlp.gate_proj.weight has shape [96, 48], expected [97, 48]",
            |folder| edit_config(folder, |config| config["intermediate_size"] = json!(97)),
        ),
        (
            "model.safetensors: tensor model.layers.1.mixer.bogus is not one of this configuration (and 1 more)",
            |folder| {
                edit_tensors(folder, |list| {
                    let extra = Tensor { shape: vec![1], values: vec![0.0] };
                    list.push(("model.layers.1.mixer.bogus".to_owned(), extra.clone()));
                    list.push(("zzz".to_owned(), extra));
                });
            },
        ),
        ("not a safetensors file", |folder| {
            fs::write(folder.join("model.safetensors"), "version https://git-lfs").unwrap()
        }),
        ("no config.json", |folder| fs::remove_file(folder.join("config.json")).unwrap()),
        ("no weights", |folder| fs::remove_file(folder.join("model.safetensors")).unwrap()),
        ("not JSON", |folder| fs::write(folder.join("config.json"), "{\"model_type\": ").unwrap()),
    ];
    for (sentence, change) in cases {
        let error = broken(change).to_string();
        assert!(error.contains(sentence), "{error}");
    }
    assert!(Checkpoint::open(Path::new("/nowhere")).unwrap_err().to_string().contains("no such folder"));
    assert!(Checkpoint::open(&golden("hybrid/config.json")).unwrap_err().to_string().contains("not a GGUF file"));
}

#[test]
fn whole_numbers_are_no_weights_and_nan_is_found_when_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden("hybrid/config.json"), folder.path().join("config.json")).unwrap();
    edit_tensors(folder.path(), |list| {
        let tensor = list.iter_mut().find(|(name, _)| name == "model.layers.3.mixer.A_log").unwrap();
        tensor.1.values[77] = f32::NAN;
    });
    let error = Checkpoint::open(folder.path()).unwrap().check_finite().unwrap_err().to_string();
    assert!(error.contains("tensor model.layers.3.mixer.A_log has NaN at index 77"), "{error}");
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(3).position(|text| text == b"F32").unwrap();
    bytes[at..at + 3].copy_from_slice(b"I32");
    fs::write(&path, bytes).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("is stored as I32, expected floating-point numbers"), "{error}");
}

#[test]
fn an_index_that_lies_is_refused() {
    let checkpoint = Checkpoint::open(&golden("hybrid")).unwrap();
    let above = tempfile::tempdir().unwrap();
    let path = above.path().join("new");
    let options = SaveOptions { max_shard_bytes: 100_000, ..SaveOptions::new(DType::F32) };
    save_tensors(&path, checkpoint.config(), &options, &tensors(&checkpoint)).unwrap();
    let index = path.join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    let refused = |text: String| {
        fs::write(&index, text).unwrap();
        Checkpoint::open(&path).unwrap_err().to_string()
    };
    assert!(refused(text.replace("model-00002-of", "../model-00002-of")).contains("expected the name of a file"));
    assert!(refused(text.replace("model-00002-of", "model-00009-of")).contains("cannot open"));
    assert!(refused(text.replace("model-00002-of", "model-00001-of")).contains("should be in"));
    assert!(refused(text.replace("weight_map", "weights")).contains("weight_map"));
    assert!(refused("[".to_owned()).contains("not JSON"));
    let [first, second] = ["model-00001-of-", "model-00002-of-"].map(|prefix| {
        let names = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path());
        names.into_iter().find(|path| path.to_string_lossy().contains(prefix)).unwrap()
    });
    fs::copy(first, second).unwrap();
    assert!(refused(text).contains("should be in"));
}

#[test]
fn a_file_cut_at_a_hundred_places_is_refused() {
    let whole = fs::read(golden("hybrid/model.safetensors")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden("hybrid/config.json"), folder.path().join("config.json")).unwrap();
    for part in 0..100 {
        fs::write(folder.path().join("model.safetensors"), &whole[..whole.len() * part / 100]).unwrap();
        assert!(Checkpoint::open(folder.path()).is_err());
    }
}

proptest! {
    #[test]
    fn changed_bytes_give_an_error_or_a_readable_checkpoint(
        changes in prop::collection::vec((0usize..4500, any::<u8>()), 1..4),
        config_changes in prop::collection::vec((0usize..1000, any::<u8>()), 0..2),
    ) {
        let folder = tempfile::tempdir().unwrap();
        for (name, changes) in [("model.safetensors", changes), ("config.json", config_changes)] {
            let mut bytes = fs::read(golden("hybrid").join(name)).unwrap();
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
            for spec in checkpoint.config().tensors() {
                prop_assert_eq!(checkpoint.read_f32(&spec.name).unwrap().shape, spec.shape);
            }
        }
    }
}

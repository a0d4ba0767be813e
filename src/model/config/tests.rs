use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::backend::DType;
use crate::model::tensors::Role;

const MISTRAL: &str = include_str!("../../../tests/goldens/teacher-mistral/config.json");
const LLAMA: &str = include_str!("../../../tests/goldens/teacher-llama3-tied/config.json");
const HYBRID: &str = include_str!("../../../tests/goldens/hybrid/config.json");
const HYBRID_HUB: &str = include_str!("../../../tests/goldens/hybrid/config.apriel_h.json");

fn parse(document: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_json(&document.to_string())
}

/// The document with these keys put in; `Value::Null` is a null, not a removal.
fn with(text: &str, changes: &[(&str, Value)]) -> Value {
    let mut document: Value = serde_json::from_str(text).unwrap();
    for (key, value) in changes {
        document[*key] = value.clone();
    }
    document
}

fn without(text: &str, keys: &[&str]) -> Value {
    let mut document: Value = serde_json::from_str(text).unwrap();
    for key in keys {
        document.as_object_mut().unwrap().remove(*key).unwrap();
    }
    document
}

fn refusal(document: &Value) -> String {
    parse(document).expect_err("refused").to_string()
}

/// The published 15B teacher (contract: Mistral-Nemo's sizes at 50 layers) with Mamba mixers in the first `mamba` layers.
fn fifteen_b(mamba: usize, dt_rank: Value) -> ModelConfig {
    let layout: Vec<&str> = (0..50).map(|layer| if layer < mamba { "m2" } else { "t" }).collect();
    parse(&json!({
        "model_type": "apriel_h", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 14336,
        "num_hidden_layers": 50, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": null, "hybrid_block_layout": layout,
        "ssm_cfg": {"d_state": 16, "d_inner": 4096, "d_xb": 1024, "dt_rank": dt_rank},
    }))
    .unwrap()
}

#[test]
fn parameters_of_the_15b_teacher_and_hybrids_are_the_published_ones() {
    assert_eq!(fifteen_b(0, json!("auto")).parameter_count(), 14_974_182_400);
    assert_eq!(fifteen_b(30, json!("auto")).parameter_count(), 15_694_627_840);
    assert_eq!(fifteen_b(30, json!(16)).parameter_count(), 15_610_577_920);
    let mixer = |config: &ModelConfig, layer| {
        let tensors = config.tensors();
        tensors.iter().filter(|tensor| tensor.mixer && tensor.layer == Some(layer)).map(|tensor| tensor.len()).sum()
    };
    let sizes: [usize; 3] = [
        mixer(&fifteen_b(1, json!("auto")), 0),
        mixer(&fifteen_b(1, json!(16)), 0),
        mixer(&fifteen_b(1, json!("auto")), 1),
    ];
    assert_eq!(sizes, [76_443_648, 73_641_984, 52_428_800]);
}

#[test]
fn both_spellings_of_the_hybrid_are_the_same_model() {
    let config = ModelConfig::from_json(HYBRID).unwrap();
    assert_eq!(config, ModelConfig::from_json(HYBRID_HUB).unwrap());
    let older = with(HYBRID, &[("model_type", json!("apriel_ssm_thinker_hybrid"))]);
    assert_eq!(config, parse(&older).unwrap());
    assert_eq!(config.layers_of(BlockKind::Mamba).collect::<Vec<_>>(), [1, 3]);
    let mamba = config.mamba.unwrap();
    assert_eq!((mamba.dt_rank, mamba.c_heads(), mamba.xb_heads(), mamba.repeat()), (3, 8, 4, 2));
}

#[test]
fn a_missing_layout_is_the_default_of_its_class_and_one_string_is_for_all_layers() {
    let absent = |model_type: &str| {
        let mut document = without(HYBRID, &["hybrid_block_layout"]);
        document["model_type"] = json!(model_type);
        parse(&document).unwrap().blocks
    };
    assert_eq!(absent("apriel_h"), [BlockKind::Mamba; 4]);
    assert_eq!(absent("apriel_hybrid_ssm"), [BlockKind::Attention; 4]);
    assert_eq!(absent("apriel_ssm_thinker_hybrid"), [BlockKind::Attention; 4]);
    let one = with(HYBRID, &[("hybrid_block_layout", json!(["i"]))]);
    assert_eq!(parse(&one).unwrap().blocks, [BlockKind::Identity; 4]);
}

#[test]
fn missing_keys_have_the_defaults_of_their_class() {
    let optional = ["rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings", "bos_token_id"];
    let mut mistral = without(MISTRAL, &optional);
    let mut llama = without(LLAMA, &optional);
    for document in [&mut mistral, &mut llama] {
        for key in ["eos_token_id", "num_key_value_heads", "head_dim", "initializer_range", "torch_dtype"] {
            document.as_object_mut().unwrap().remove(key);
        }
    }
    mistral.as_object_mut().unwrap().remove("sliding_window");
    mistral["num_attention_heads"] = json!(16);
    mistral["hidden_size"] = json!(64);
    let mistral = parse(&mistral).unwrap();
    assert_eq!((mistral.rms_norm_eps, mistral.rope.theta, mistral.initializer_range), (1e-6, 10000.0, 0.02));
    assert_eq!((mistral.bos_token_id, &mistral.eos_token_ids[..]), (Some(1), &[2][..]));
    assert!(!mistral.tie_word_embeddings);
    assert_eq!(mistral.max_position_embeddings, 131072);
    assert_eq!((mistral.num_key_value_heads, mistral.head_dim, mistral.sliding_window), (8, 4, Some(4096)));
}

#[test]
fn llama_defaults_differ_from_mistrals() {
    let mut document = without(LLAMA, &["max_position_embeddings", "num_key_value_heads", "head_dim"]);
    document["sliding_window"] = json!(3);
    let llama = parse(&document).unwrap();
    assert_eq!((llama.max_position_embeddings, llama.num_key_value_heads, llama.head_dim), (2048, 6, 8));
    assert_eq!(llama.sliding_window, None);
}

#[test]
fn ssm_keys_that_are_missing_or_null_have_the_published_defaults() {
    let mut document = with(HYBRID, &[("hidden_size", json!(4096)), ("num_attention_heads", json!(4))]);
    document["ssm_cfg"] = json!({});
    let mamba = parse(&document).unwrap().mamba.unwrap();
    assert_eq!(mamba, MambaConfig::new(64, 4096, 4096, 256));
    document["ssm_cfg"] = json!({"d_inner": null, "d_xb": null, "expand": 2, "dt_rank": 5, "dt_init": "constant"});
    let mamba = parse(&document).unwrap().mamba.unwrap();
    let expected = MambaConfig { dt_init: DtInit::Constant, ..MambaConfig::new(64, 8192, 4096, 5) };
    assert_eq!(mamba, expected);
}

#[test]
fn sizes_need_not_be_powers_of_two() {
    let ssm = json!({"d_state": 6, "d_inner": 72, "d_xb": 24, "d_conv": 3, "dt_rank": 5});
    let config = parse(&with(HYBRID, &[("ssm_cfg", ssm)])).unwrap();
    let shape = |part: &str| {
        let tensors = config.tensors();
        tensors.into_iter().find(|tensor| tensor.name == format!("model.layers.1.mixer.{part}")).unwrap().shape
    };
    assert_eq!(shape("in_proj.weight"), [192, 48]);
    assert_eq!(shape("dt_in_proj.weight"), [5, 48]);
    assert_eq!(shape("dt_proj.weight"), [72, 5]);
    assert_eq!(shape("conv1d.weight"), [72, 1, 3]);
    assert_eq!(shape("A_log"), [72, 6]);
    assert_eq!(shape("out_proj.weight"), [48, 72]);
}

#[test]
fn llama3_scaling_reads_alike_in_old_and_new_spellings() {
    let config = ModelConfig::from_json(LLAMA).unwrap();
    assert!(config.rope.scaling.is_some());
    let document = with(LLAMA, &[]);
    let mut parameters = document["rope_scaling"].clone();
    parameters["rope_theta"] = document["rope_theta"].clone();
    let mut newer = without(LLAMA, &["rope_scaling", "rope_theta"]);
    newer["rope_parameters"] = parameters;
    assert_eq!(parse(&newer).unwrap(), config);
    let mut older = document.clone();
    let scaling = older["rope_scaling"].as_object_mut().unwrap();
    let kind = scaling.remove("rope_type").unwrap();
    scaling.insert("type".to_owned(), kind);
    assert_eq!(parse(&older).unwrap(), config);
    let plain = with(MISTRAL, &[("rope_scaling", Value::Null)]);
    let default = with(MISTRAL, &[("rope_parameters", json!({"rope_type": "default", "rope_theta": 1e6}))]);
    assert_eq!(parse(&plain).unwrap(), parse(&default).unwrap());
}

#[test]
fn what_h1_does_not_compute_is_refused_by_key_and_value() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0});
    let layout = json!(["t", "m2d", "t", "t"]);
    for (text, key, value) in [
        (MISTRAL, "model_type", json!("gpt2")),
        (MISTRAL, "hidden_act", json!("gelu")),
        (LLAMA, "attention_bias", json!(true)),
        (LLAMA, "mlp_bias", json!(true)),
        (LLAMA, "partial_rotary_factor", json!(0.5)),
        (MISTRAL, "quantization_config", json!({"bits": 4})),
        (MISTRAL, "rope_scaling", yarn),
        (HYBRID, "hybrid_block_layout", layout),
    ] {
        let refused = refusal(&with(text, &[(key, value.clone())]));
        assert!(refused.contains(key) && refused.contains("supports"), "{refused}");
    }
    assert!(
        refusal(&with(HYBRID, &[("hybrid_block_layout", json!(["t", "m2d", "t", "t"]))])).contains("[1]` is \"m2d\"")
    );
}

#[test]
fn sizes_that_make_no_sense_are_refused_by_key_and_value() {
    for (text, key, value) in [
        (MISTRAL, "hidden_size", json!(0)),
        (MISTRAL, "hidden_size", json!(-48)),
        (MISTRAL, "hidden_size", json!(48.5)),
        (MISTRAL, "hidden_size", json!("48")),
        (MISTRAL, "hidden_size", json!(u64::MAX)),
        (MISTRAL, "vocab_size", json!(1_u64 << 40)),
        (MISTRAL, "num_hidden_layers", json!(1_u64 << 60)),
        (MISTRAL, "num_attention_heads", json!(0)),
        (MISTRAL, "num_attention_heads", json!(3)),
        (MISTRAL, "num_key_value_heads", json!(0)),
        (MISTRAL, "head_dim", json!(15)),
        (MISTRAL, "head_dim", json!(1_u64 << 40)),
        (MISTRAL, "sliding_window", json!(0)),
        (MISTRAL, "rms_norm_eps", json!(-1.0)),
        (MISTRAL, "rope_theta", json!(0.0)),
        (MISTRAL, "eos_token_id", json!([2, -1])),
        (MISTRAL, "tie_word_embeddings", json!("yes")),
        (HYBRID, "hybrid_block_layout", json!(["t", "m2"])),
        (HYBRID, "hybrid_block_layout", json!("t")),
        (HYBRID, "ssm_cfg", json!([])),
    ] {
        let refused = refusal(&with(text, &[(key, value)]));
        assert!(refused.contains(key) && refused.contains("expected"), "{key}: {refused}");
    }
    for (key, value) in [
        ("d_state", json!(7)),
        ("d_state", json!(0)),
        ("d_inner", json!(65)),
        ("d_inner", json!(1e30)),
        ("d_xb", json!(48)),
        ("d_conv", json!(0)),
        ("dt_rank", json!("half")),
        ("dt_rank", json!(0)),
        ("dt_min", json!(0.2)),
        ("dt_init", json!("zeros")),
    ] {
        let mut document = with(HYBRID, &[]);
        document["ssm_cfg"][key] = value;
        let refused = refusal(&document);
        assert!(refused.contains("`ssm_cfg.") && refused.contains("expected"), "{key}: {refused}");
    }
    assert!(refusal(&without(MISTRAL, &["vocab_size"])).contains("`vocab_size` is missing"));
    assert!(refusal(&json!([])).contains("an object"));
    assert!(ModelConfig::from_json("{").unwrap_err().to_string().starts_with("not JSON"));
}

#[test]
fn a_plain_model_keeps_its_class_and_a_hybrid_is_written_for_the_published_class() {
    let mut llama = ModelConfig::from_json(LLAMA).unwrap();
    let plain = llama.to_json(DType::Bf16);
    assert_eq!((&plain["model_type"], &plain["torch_dtype"]), (&json!("llama"), &json!("bfloat16")));
    assert_eq!(ModelConfig::from_value(plain).unwrap(), llama);

    llama.blocks[1] = BlockKind::Mamba;
    llama.mamba = Some(MambaConfig::new(6, 48, 16 * 3, 3));
    let hybrid = llama.to_json(DType::F32);
    assert_eq!(hybrid["model_type"], "apriel_h");
    assert_eq!(hybrid["architectures"], json!(["AprielHForCausalLM"]));
    assert_eq!(hybrid["hybrid_block_layout"], json!(["t", "m2"]));
    assert_eq!((&hybrid["ssm_cfg"]["n_qk_heads"], &hybrid["ssm_cfg"]["activation"]), (&json!(8), &json!("silu")));
    assert_eq!(hybrid["ssm_cfg"].as_object().unwrap().len(), 19);
    let read = ModelConfig::from_value(hybrid).unwrap();
    assert_eq!(read, ModelConfig { family: Family::AprielH, ..llama });
    assert!(read.tie_word_embeddings && read.rope.scaling.is_some());
}

#[test]
fn keys_that_h1_does_not_know_stay_and_stale_ones_go() {
    let mut document = with(HYBRID, &[("my_key", json!({"a": [1]})), ("transformers_version", json!("4.53.2"))]);
    document["ssm_cfg"]["another"] = json!(7);
    document["layer_types"] = json!(["full_attention"]);
    let config = parse(&document).unwrap();
    let written = config.to_json(DType::F32);
    assert_eq!(written["my_key"], document["my_key"]);
    assert_eq!(written["ssm_cfg"]["another"], 7);
    assert_eq!(written["transformers_version"], "4.53.2");
    assert_eq!(written.get("layer_types"), None);
    assert_eq!(ModelConfig::from_value(written).unwrap(), config);
}

#[test]
fn norms_biases_d_and_a_log_are_not_decayed() {
    let train: Value = serde_json::from_str(include_str!("../../../tests/goldens/train-all/train.json")).unwrap();
    let listed: Vec<&str> = train["no_decay_tensors"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    let tensors = ModelConfig::from_json(HYBRID).unwrap().tensors();
    let mut free: Vec<&str> = tensors.iter().filter(|tensor| !tensor.decayed).map(|tensor| &tensor.name[..]).collect();
    let mut expected = listed.clone();
    expected.sort_unstable();
    free.sort_unstable();
    assert_eq!(free, expected);
    assert!(tensors.iter().all(|tensor| (tensor.shape.len() == 1) == (tensor.role == Role::Vector)));
}

/// The keys of the 0.5B of Qwen2.5, as published.
fn qwen2() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768,
        "tie_word_embeddings": true, "use_cache": true, "use_sliding_window": false, "vocab_size": 151936,
    })
}

#[test]
fn a_qwen2_has_biases_on_queries_keys_and_values_and_no_window() {
    let config = parse(&qwen2()).unwrap();
    assert_eq!((config.family, config.attention_bias, config.sliding_window), (Family::Qwen2, true, None));
    // Published: 0.49 B, 0.36 B without the embedding.
    assert_eq!(config.parameter_count(), 494_032_768);
    let biases =
        config.tensors().into_iter().filter(|tensor| tensor.layer == Some(7) && tensor.name.ends_with(".bias"));
    assert_eq!(biases.map(|tensor| tensor.len()).collect::<Vec<_>>(), [896, 128, 128]);
    let written = config.to_json(DType::Bf16);
    assert_eq!(
        (&written["architectures"][0], &written["use_sliding_window"]),
        (&json!("Qwen2ForCausalLM"), &json!(false))
    );
    let mut windowed = qwen2();
    windowed["use_sliding_window"] = json!(true);
    assert!(refusal(&windowed).contains("use_sliding_window"));
}

prop_compose! {
    fn ssm()(d_state in 1usize..9, xb_heads in 1usize..5, repeat in 1usize..4, d_conv in 1usize..6, dt_rank in 1usize..9,
             flags in any::<[bool; 5]>()) -> MambaConfig {
        MambaConfig {
            d_conv,
            dt_init: if flags[0] { DtInit::Random } else { DtInit::Constant },
            conv_bias: flags[1],
            bias: flags[2],
            dt_proj_bias: flags[3],
            repeat_kv_before_conv: flags[4],
            ..MambaConfig::new(d_state, d_state * xb_heads * repeat, d_state * xb_heads, dt_rank)
        }
    }
}

prop_compose! {
    fn config()(
        family in prop::sample::select(vec![Family::Mistral, Family::Llama, Family::Qwen2, Family::AprielH]),
        sizes in prop::array::uniform4(1usize..100),
        (kv_heads, group, half_head) in (1usize..5, 1usize..5, 1usize..9),
        eps in 1e-9f64..1e-2, theta in 1.0f64..1e7,
        scaling in prop::option::of((1.0f64..32.0, 0.5f64..2.0, 2.5f64..8.0, 1usize..10000)),
        window in prop::option::of(1usize..1000),
        (tied, bias) in any::<(bool, bool)>(), kind in 0usize..3,
        (bos, eos) in (prop::option::of(0u32..99), prop::collection::vec(0u32..99, 0..4)),
        kinds in prop::collection::vec(0usize..3, 1..7),
        mamba in ssm(),
    ) -> ModelConfig {
        let all = [BlockKind::Attention, BlockKind::Mamba, BlockKind::Identity];
        let kinds = kinds.into_iter().map(|kind| if family == Family::AprielH { all[kind] } else { all[0] });
        let blocks: Vec<BlockKind> = kinds.collect();
        ModelConfig {
            family,
            vocab_size: sizes[0], hidden_size: sizes[1], intermediate_size: sizes[2], max_position_embeddings: sizes[3],
            num_attention_heads: kv_heads * group, num_key_value_heads: kv_heads, head_dim: 2 * half_head,
            rms_norm_eps: eps,
            rope: Rope { theta, scaling: scaling.map(|(factor, low, high, context)| match kind {
                0 => RopeScaling::Linear(factor),
                1 => RopeScaling::Factors((0..half_head).map(|j| 1.0 + factor * j as f64).collect()),
                _ => RopeScaling::Llama3(Llama3Scaling {
                    factor, low_freq_factor: low, high_freq_factor: high, original_max_position_embeddings: context,
                }),
            }) },
            sliding_window: window.filter(|_| !matches!(family, Family::Llama | Family::Qwen2)),
            attention_bias: family == Family::Qwen2 || family == Family::AprielH && bias,
            tie_word_embeddings: tied,
            bos_token_id: bos, eos_token_ids: eos, initializer_range: 0.02,
            mamba: blocks.contains(&BlockKind::Mamba).then_some(mamba),
            blocks,
            extra: [("pad_token_id".to_owned(), json!(sizes[0]))].into_iter().collect(),
        }
    }
}

proptest! {
    #[test]
    fn a_written_configuration_reads_back_the_same(config in config(), dtype in prop::sample::select(vec![DType::F32, DType::Bf16])) {
        config.validate().unwrap();
        let text = serde_json::to_string_pretty(&config.to_json(dtype)).unwrap();
        prop_assert_eq!(ModelConfig::from_json(&text).unwrap(), config);
    }

    #[test]
    fn names_are_unique_and_shapes_sum_to_the_count(config in config()) {
        let tensors = config.tensors();
        let names: std::collections::HashSet<&str> = tensors.iter().map(|tensor| &tensor.name[..]).collect();
        prop_assert_eq!(names.len(), tensors.len());
        let sum: usize = tensors.iter().map(|tensor| tensor.len()).sum();
        prop_assert_eq!(sum as u64, config.parameter_count());
    }

    #[test]
    fn unscaled_frequencies_fall_from_one_and_scaled_ones_are_never_higher(config in config()) {
        let plain = ModelConfig { rope: Rope { scaling: None, ..config.rope.clone() }, ..config.clone() }.inv_freq();
        prop_assert_eq!(plain[0], 1.0);
        prop_assert_eq!(plain.len(), config.head_dim / 2);
        prop_assert!(plain.windows(2).all(|pair| pair[1] <= pair[0]));
        prop_assert!(config.inv_freq().iter().zip(&plain).all(|(scaled, plain)| *scaled <= plain * 1.000001));
    }

    #[test]
    fn no_value_of_a_key_makes_the_reader_panic(at in 0usize..40, value in prop::sample::select(vec![
        json!(null), json!(0), json!(-1), json!(1.5), json!(u64::MAX), json!(1e308), json!("x"), json!([]), json!({}), json!(true),
    ])) {
        for text in [MISTRAL, LLAMA, HYBRID] {
            let mut document = with(text, &[]);
            let top: Vec<String> = document.as_object().unwrap().keys().cloned().collect();
            document[&top[at % top.len()]] = value.clone();
            let _ = parse(&document);
            let mut document = with(text, &[]);
            if let Some(ssm) = document["ssm_cfg"].as_object_mut() {
                let keys: Vec<String> = ssm.keys().cloned().collect();
                ssm[&keys[at % keys.len()]] = value.clone();
                let _ = parse(&document);
            }
        }
    }
}

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rand::RngExt;
use safetensors::SafeTensors;

use super::*;
use crate::backend::ops::{LossWeights, Scaling};
use crate::backend::reference::Reference;
use crate::backend::{DType, Device, Segments};
use crate::model::config::{BlockKind, DtInit, Family, ModelConfig};
use crate::model::tensors::{TensorSpec, layer_tensor};
use crate::model::{Activations, FinalNorm, Keep, LossHead, LossKind, Model, Targets};
use crate::random;

type Tensors = HashMap<String, Vec<f32>>;

fn golden(folder: &str) -> (ModelConfig, Tensors) {
    let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests/goldens", folder].iter().collect();
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    (ModelConfig::from_json(&text).unwrap(), read(&folder.join("model.safetensors")))
}

fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    file.tensors().into_iter().map(|(name, tensor)| (name, values(tensor.data()))).collect()
}

fn reader(tensors: &Tensors) -> impl Fn(&str) -> Result<Vec<f32>, HybridError> {
    |name| Ok(tensors.get(name).cloned().unwrap_or_default())
}

/// The tensors of a whole hybrid.
fn convert(conversion: &Conversion, teacher: &Tensors, student: &Tensors) -> Tensors {
    let values = |spec: &TensorSpec| match conversion.is_new(spec) {
        true => conversion.tensor(spec, reader(teacher)).unwrap(),
        false => student[&spec.name].clone(),
    };
    conversion.config().tensors().iter().map(|spec| (spec.name.clone(), values(spec))).collect()
}

fn layers(list: &[usize]) -> LayerSet {
    list.iter().copied().collect()
}

fn shape(d_state: usize) -> MixerShape {
    MixerShape { d_state: Some(d_state), ..MixerShape::default() }
}

#[test]
fn mil_copies_what_the_golden_copies_and_draws_the_rest_within_its_range() {
    let (config, teacher) = golden("teacher-mistral");
    let (student_config, student) = golden("mil-student");
    let conversion = Conversion::new(&config, &config, &layers(&[1, 3]), (Init::Mil, shape(8), 5)).unwrap();
    assert_eq!(conversion.config().mamba, student_config.mamba);
    assert_eq!(conversion.config().blocks, student_config.blocks);
    assert_eq!(conversion.config().family, Family::AprielH);

    let ours = convert(&conversion, &teacher, &teacher);
    let mut names: Vec<&String> = ours.keys().collect();
    names.sort();
    let mut expected: Vec<&String> = student.keys().collect();
    expected.sort();
    assert_eq!(names, expected);
    let (hidden, z) = (config.hidden_size, config.query_width() * config.hidden_size);
    let within = |values: &[f32], low: f64, high: f64| {
        let (low, high) = (low as f32, high as f32);
        assert!(values.iter().all(|v| (low..=high).contains(v)), "{values:?} not in {low}..={high}");
        let spread = values.iter().fold((f32::MAX, f32::MIN), |(a, b), v| (a.min(*v), b.max(*v)));
        assert!(spread.1 - spread.0 > 0.5 * (high - low), "{spread:?} fills less than half of {low}..={high}");
    };
    for (name, values) in &ours {
        let golden = &student[name];
        assert_eq!(values.len(), golden.len(), "{name}");
        let part = name.split_once("mixer.").map_or("", |(_, part)| part);
        let linear = (hidden as f64).sqrt().recip();
        match part {
            "in_proj.weight" => {
                within(&values[..z], -linear, linear);
                assert_eq!(values[z..], golden[z..], "{name}");
            }
            "dt_in_proj.weight" => within(values, -linear, linear),
            "dt_proj.weight" => within(values, -(3_f64.sqrt().recip()), 3_f64.sqrt().recip()),
            "dt_proj.bias" => within(values, mixer::inverse_softplus(0.001), mixer::inverse_softplus(0.1)),
            "conv1d.weight" | "conv1d.bias" => within(values, -0.5, 0.5),
            "A_log" => assert!(values.iter().zip(golden).all(|(a, b)| (a - b).abs() <= 1e-6), "{name}"),
            _ => assert_eq!(values, golden, "{name}"),
        }
    }
}

#[test]
fn fresh_numbers_do_not_depend_on_which_other_layers_are_new() {
    let (config, teacher) = golden("teacher-mistral");
    let mixer_of_3 = |new: &[usize], seed| {
        let conversion = Conversion::new(&config, &config, &layers(new), (Init::Mil, shape(8), seed)).unwrap();
        let all = convert(&conversion, &teacher, &teacher);
        let mut of_3: Vec<_> = all.into_iter().filter(|(name, _)| name.contains("layers.3.mixer")).collect();
        of_3.sort_by(|a, b| a.0.cmp(&b.0));
        of_3
    };
    assert_eq!(mixer_of_3(&[3], 1), mixer_of_3(&[0, 1, 3], 1));
    assert_ne!(mixer_of_3(&[3], 1), mixer_of_3(&[3], 2));
}

#[test]
fn a_second_conversion_keeps_trained_mixers_and_takes_new_ones_from_the_original_teacher() {
    let (config, teacher) = golden("teacher-mistral");
    let first = Conversion::new(&config, &config, &layers(&[1]), (Init::Mil, shape(8), 0)).unwrap();
    let mut student = convert(&first, &teacher, &teacher);
    for values in student.values_mut() {
        values.iter_mut().for_each(|value| *value += 1.0);
    }
    let second =
        Conversion::new(&config, first.config(), &layers(&[3]), (Init::Mil, MixerShape::default(), 0)).unwrap();
    assert_eq!(second.config().layers_of(BlockKind::Mamba).collect::<Vec<_>>(), [1, 3]);
    let hybrid = convert(&second, &teacher, &student);
    let fresh = convert(
        &Conversion::new(&config, &config, &layers(&[1, 3]), (Init::Mil, shape(8), 0)).unwrap(),
        &teacher,
        &teacher,
    );
    for (name, values) in &hybrid {
        let source = if name.contains("layers.3.mixer") { &fresh } else { &student };
        assert_eq!(values, &source[name], "{name}");
    }
}

/// A teacher's shape with heads of `head_dim`.
fn teacher_of(heads: usize, kv_heads: usize, head_dim: usize) -> ModelConfig {
    let (mut config, _) = golden("teacher-mistral");
    (config.num_attention_heads, config.num_key_value_heads, config.head_dim) = (heads, kv_heads, head_dim);
    config
}

fn random_tensors(config: &ModelConfig, seed: u64) -> Tensors {
    let values = |spec: &TensorSpec| {
        let mut stream = random::stream(seed, &spec.name);
        (0..spec.len()).map(|_| stream.random::<f32>() - 0.5).collect()
    };
    config.tensors().iter().map(|spec| (spec.name.clone(), values(spec))).collect()
}

#[test]
fn any_d_state_that_divides_the_widths_will_do_and_no_other() {
    let config = teacher_of(6, 2, 12);
    let teacher = random_tensors(&config, 0);
    let of = |d_state, dt_rank| {
        let shape = MixerShape { d_state: Some(d_state), dt_rank: Some(dt_rank), d_conv: Some(3) };
        Conversion::new(&config, &config, &layers(&[0]), (Init::Mil, shape, 0))
    };
    for (d_state, dt_rank) in [(1, 1), (3, 5), (6, 7), (12, 2), (24, 1)] {
        let conversion = of(d_state, dt_rank).unwrap();
        let tensors = convert(&conversion, &teacher, &teacher);
        let specs = conversion.config().tensors();
        assert!(specs.iter().all(|spec| tensors[&spec.name].len() == spec.len()));
        assert_eq!(tensors["model.layers.0.mixer.A_log"][d_state - 1], (d_state as f32).ln());
    }
    let refusal = of(5, 1).unwrap_err().to_string();
    assert!(refusal.contains("d_inner") && refusal.contains('5'), "{refusal}");
}

#[test]
fn a_layer_that_cannot_be_converted_is_named() {
    let (config, _) = golden("teacher-mistral");
    let refusal = |student: &ModelConfig, layer: usize| {
        let options = (Init::Mil, shape(8), 0);
        Conversion::new(&config, student, &layers(&[layer]), options).unwrap_err().to_string()
    };
    let (student, _) = golden("mil-student");
    assert!(refusal(&config, 4).contains("no layer 4"));
    assert!(refusal(&student, 1).contains("layer 1 of the student is a Mamba block already"));
    let mut other = config.clone();
    other.hidden_size = 64;
    assert!(refusal(&other, 0).contains("hidden_size"));
    let wrong = (Init::Mil, shape(4), 0);
    let refusal = Conversion::new(&config, &student, &layers(&[0]), wrong).unwrap_err().to_string();
    assert!(refusal.contains("d_state 4"), "{refusal}");
    let refusal = Conversion::new(&config, &config, &layers(&[0]), (Init::MilAligned, shape(32), 0)).unwrap_err();
    assert!(refusal.to_string().contains("head_dim 16"), "{refusal}");
}

#[test]
fn aligned_slices_of_queries_meet_the_keys_and_values_of_their_own_head() {
    let config = teacher_of(6, 2, 12);
    let mut teacher = random_tensors(&config, 0);
    let hidden = config.hidden_size;
    // Each row of Q, K, V (and each column of O) says which head and which place in it it is of.
    let label = |channel: usize| (channel / 12 * 100 + channel % 12) as f32;
    for (part, channels) in [("q_proj", 72), ("k_proj", 24), ("v_proj", 24)] {
        let rows = (0..channels).flat_map(|row| vec![label(row); hidden]).collect();
        teacher.insert(layer_tensor(0, &format!("self_attn.{part}.weight")), rows);
    }
    let columns = (0..hidden).flat_map(|_| (0..72).map(label)).collect();
    teacher.insert(layer_tensor(0, "self_attn.o_proj.weight"), columns);
    for d_state in [1, 2, 3, 4, 6, 12] {
        let conversion = Conversion::new(&config, &config, &layers(&[0]), (Init::MilAligned, shape(d_state), 0));
        let conversion = conversion.unwrap();
        let tensors = convert(&conversion, &teacher, &teacher);
        let rows: Vec<f32> =
            tensors[&layer_tensor(0, "mixer.in_proj.weight")].iter().copied().step_by(hidden).collect();
        let (x, rest) = rows[72..].split_at(24);
        let (b, c) = rest.split_at(24);
        let out = &tensors[&layer_tensor(0, "mixer.out_proj.weight")][..72];
        let repeat = conversion.config().mamba.as_ref().unwrap().repeat();
        let mut seen = c.to_vec();
        for (channel, query) in c.iter().enumerate() {
            let (head, place) = (channel / d_state, channel % d_state);
            let paired = head / repeat * d_state + place;
            // Query head j of 6 uses kv head j / 3; the place within the head is the same.
            let (query_head, within) = ((query / 100.0) as usize, query % 100.0);
            assert_eq!(b[paired], (query_head / 3 * 100) as f32 + within, "d_state {d_state}, channel {channel}");
            assert_eq!(x[paired], b[paired]);
            assert_eq!(out[channel], *query);
        }
        seen.sort_by(f32::total_cmp);
        assert_eq!(seen, (0..72).map(label).collect::<Vec<_>>(), "every query once");
    }
}

#[test]
fn aligned_is_mil_itself_where_a_state_is_a_head() {
    let (config, teacher) = golden("teacher-mistral");
    let of = |init| {
        let conversion = Conversion::new(&config, &config, &layers(&[0, 2]), (init, shape(16), 3)).unwrap();
        convert(&conversion, &teacher, &teacher)
    };
    assert_eq!(of(Init::Mil), of(Init::MilAligned));
    assert_ne!(of(Init::Mil), of(Init::Random));
}

#[test]
fn a_constant_dt_projection_is_constant_and_a_bias_that_attention_lacks_is_zero() {
    let (config, teacher) = golden("teacher-mistral");
    let (mut student, _) = golden("mil-student");
    let mamba = student.mamba.as_mut().unwrap();
    (mamba.dt_init, mamba.dt_scale, mamba.bias) = (DtInit::Constant, 2.0, true);
    let conversion = Conversion::new(&config, &student, &layers(&[0]), (Init::Mil, shape(8), 0)).unwrap();
    let of = |part: &str| {
        let name = layer_tensor(0, part);
        let specs = conversion.config().tensors();
        let spec = specs.iter().find(|spec| spec.name == name).unwrap();
        conversion.tensor(spec, reader(&teacher)).unwrap()
    };
    assert!(of("mixer.dt_proj.weight").iter().all(|w| *w == (2.0 / 3_f64.sqrt()) as f32));
    assert_eq!(of("mixer.in_proj.bias"), [0.0; 192]);
    assert_eq!(of("mixer.out_proj.bias"), [0.0; 48]);
}

#[test]
fn a_tensor_of_the_wrong_size_is_an_error_that_names_it() {
    let (config, mut teacher) = golden("teacher-mistral");
    teacher.insert(layer_tensor(1, "self_attn.k_proj.weight"), vec![0.0; 3]);
    let conversion = Conversion::new(&config, &config, &layers(&[1]), (Init::Mil, shape(8), 0)).unwrap();
    let specs = conversion.config().tensors();
    let spec = specs.iter().find(|spec| spec.name.ends_with("1.mixer.in_proj.weight")).unwrap();
    let refusal = conversion.tensor(spec, reader(&teacher)).unwrap_err().to_string();
    assert!(refusal.contains("layers.1.self_attn.k_proj.weight has 3 values, expected 1536"), "{refusal}");
}

fn load(device: &Device, config: &ModelConfig, tensors: &Tensors) -> Model {
    let model = Model::new(device, config.clone(), DType::F32).unwrap();
    for (id, parameter) in model.weights().table().iter() {
        model.weights().write(device, id, &tensors[&parameter.spec.name]).unwrap();
    }
    model
}

fn batch(lengths: &[usize], vocabulary: u32, seed: u64) -> FitBatch {
    let mut stream = random::stream(seed, "tokens");
    let ids = (0..lengths.iter().sum()).map(|_| stream.random_range(0..vocabulary)).collect();
    FitBatch { ids, segments: Segments::documents(lengths.iter().copied()).unwrap() }
}

/// Mean reverse KL of `student` to `teacher`.
fn kl(student: &Model, teacher: &Model, batch: &FitBatch) -> f32 {
    let device = student.device();
    let n = batch.ids.len();
    let rows: Vec<u32> = (0..n as u32).collect();
    let (labels, weights) = (vec![u32::MAX; n], vec![1.0 / n as f32; n]);
    let output = |model: &Model| {
        let count = batch.segments.list().len();
        let mut activations = Activations::new(model, Keep::Nothing, n, count).unwrap();
        model.forward(&mut activations, &batch.ids, &batch.segments, None, None).unwrap();
        activations
    };
    let (students, teachers) = (output(student), output(teacher));
    let norm = FinalNorm::new(teacher, n).unwrap();
    let normed = norm.forward(teacher, teachers.output().unwrap(), &rows).unwrap();
    let head = LossHead::new(student, Some(teacher), n, false).unwrap();
    head.clear(device).unwrap();
    let targets = Targets { rows: &rows, labels: &labels, weights: &weights };
    let weights = LossWeights { reverse_kl: 1.0, forward_kl: 0.0, cross_entropy: 0.0 };
    let kind = LossKind { weights, scaling: Scaling::default() };
    head.run(student, students.output().unwrap(), &targets, Some((teacher, normed)), kind, None).unwrap();
    device.read(head.totals()).unwrap().wait().unwrap()[0]
}

#[test]
fn a_fit_lowers_the_kl_on_other_tokens_and_says_what_it_explains() {
    let device = Device::new(Reference::new());
    let (config, tensors) = golden("teacher-mistral");
    let teacher = load(&device, &config, &tensors);
    let new = layers(&[1, 2]);
    let conversion = Conversion::new(&config, &config, &new, (Init::MilFit, shape(8), 0)).unwrap();
    let student = load(&device, conversion.config(), &convert(&conversion, &tensors, &tensors));
    let held_out = batch(&[40, 24], 320, 9);
    let before = kl(&student, &teacher, &held_out);

    let batches: Vec<FitBatch> = (1..=12).map(|seed| batch(&[64, 0, 90, 46], 320, seed)).collect();
    let mut heard = Vec::new();
    let options = FitOptions::default();
    let fits = fit(&student, &teacher, &new, (&batches, &options), |fit| heard.push(fit.clone())).unwrap();
    let after = kl(&student, &teacher, &held_out);
    assert!(after < 0.95 * before, "{before} -> {after}");
    assert_eq!(fits, heard);
    assert_eq!(fits.iter().map(|fit| fit.layer).collect::<Vec<_>>(), [1, 2]);
    for fit in &fits {
        assert_eq!(fit.tried.len(), DT_RANGES.len());
        assert!(fit.tried.iter().all(|share| share.explained <= fit.kept.explained));
        assert!((0.05..1.0).contains(&fit.kept.explained), "{fit:?}");
    }
    // Nothing but dt and the output projection of the new layers moved.
    let original = convert(&conversion, &tensors, &tensors);
    for (id, parameter) in student.weights().table().iter() {
        let name = &parameter.spec.name;
        let fitted =
            conversion.is_new(&parameter.spec) && (name.ends_with("out_proj.weight") || name.ends_with("dt_proj.bias"));
        assert_eq!(student.weights().read(&device, id).unwrap() != original[name], fitted, "{name}");
    }
}

#[test]
fn a_share_explained_is_that_of_the_output_itself() {
    let device = Device::new(Reference::new());
    let (config, tensors) = golden("teacher-mistral");
    let teacher = load(&device, &config, &tensors);
    let new = layers(&[0]);
    let conversion = Conversion::new(&config, &config, &new, (Init::MilFit, shape(8), 0)).unwrap();
    let student = load(&device, conversion.config(), &convert(&conversion, &tensors, &tensors));
    let batches = [batch(&[50, 70], 320, 1), batch(&[80], 320, 2)];
    let fits = fit(&student, &teacher, &new, (&batches, &FitOptions::default()), |_| ()).unwrap();
    let (mut rest, mut energy) = (0.0, 0.0);
    for batch in &batches {
        let rows = || device.alloc(DType::F32, batch.ids.len(), config.hidden_size).unwrap();
        let (stream, out, target) = (rows(), rows(), rows());
        let mut students = crate::model::Probe::new(&student, batch.ids.len(), 2).unwrap();
        let mut teachers = crate::model::Probe::new(&teacher, batch.ids.len(), 2).unwrap();
        students.begin(&batch.segments).unwrap();
        teachers.begin(&batch.segments).unwrap();
        students.embed(&batch.ids, stream.view()).unwrap();
        let (normed, _) = students.mix(0, stream.view()).unwrap();
        teachers.mixer(0, normed, target.view()).unwrap();
        students.mixer(0, normed, out.view()).unwrap();
        let read = |view| device.read(view).unwrap().wait().unwrap();
        for (y, t) in read(out.view()).into_iter().zip(read(target.view())) {
            rest += f64::from(t - y).powi(2);
            energy += f64::from(t).powi(2);
        }
    }
    let explained = 1.0 - rest / energy;
    assert!((explained - fits[0].kept.explained).abs() < 1e-4, "{explained} {:?}", fits[0].kept);
}

#[test]
fn a_fit_without_tokens_or_with_an_impossible_range_is_refused() {
    let device = Device::new(Reference::new());
    let (config, tensors) = golden("teacher-mistral");
    let (hybrid, weights) = golden("mil-student");
    let (teacher, student) = (load(&device, &config, &tensors), load(&device, &hybrid, &weights));
    let refusal = |new: &[usize], batches: &[FitBatch], ranges: &[(f64, f64)]| {
        let options = FitOptions { ranges: ranges.to_vec(), ..FitOptions::default() };
        fit(&student, &teacher, &layers(new), (batches, &options), |_| ()).unwrap_err().to_string()
    };
    let some = [batch(&[8], 320, 0)];
    assert!(refusal(&[1], &[], &DT_RANGES).contains("tokens"));
    assert!(refusal(&[1], &some, &[]).contains("range"));
    assert!(refusal(&[1], &some, &[(0.0, 1.0)]).contains("0.0"));
    assert!(refusal(&[0], &some, &DT_RANGES).contains("layer 0"));
}

proptest! {
    #[test]
    fn softplus_undoes_its_inverse(dt in 1e-7_f64..20.0) {
        let b = mixer::inverse_softplus(dt);
        prop_assert!((b.exp().ln_1p() / dt - 1.0).abs() < 1e-9);
    }
}

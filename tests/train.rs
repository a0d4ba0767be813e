//! The laws of a training step, on every backend that can train.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use h1::backend::cuda::emulated::{self, Emulation};
use h1::backend::ops::{LossWeights, Scale, Scaling};
use h1::backend::reference::Reference;
use h1::backend::select::{self, Name};
use h1::backend::{self, DType, Device, Segments, View, cpu};
use h1::model::config::ModelConfig;
use h1::model::decoder::Model;
use h1::model::head::LossKind;
use h1::model::parameters::Space;
use h1::model::{Activations, FinalNorm, Gradients, Keep, LossHead, Targets};
use h1::text::packing::{Batch, NO_LABEL, Segment};
use h1::train::group::Group;
use h1::train::optimizer::{AdamWOptions, Kept, Trained};
use h1::train::teacher::Teacher;
use h1::train::trainer::{Divisor, Room, StepReport, TrainerOptions};
use h1::train::{Error, Trainer};
use safetensors::SafeTensors;
use serde_json::Value;

const ROOM: Room = Room { tokens: 32, segments: 2 };

fn devices() -> Vec<Device> {
    vec![Device::new(Reference::new()), cpu::device(None).unwrap()]
}

/// A device that records.
fn emulated_card() -> Device {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated");
    emulated::device(Emulation { folder, order: 0, capability: (9, 0), sanitize: false, rough: false }).unwrap()
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

fn bytes_of(file: &str) -> Vec<u8> {
    std::fs::read(goldens().join(file)).unwrap()
}

fn floats(file: &str) -> HashMap<String, Vec<f32>> {
    let bytes = bytes_of(file);
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let values = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect();
    tensors.tensors().into_iter().map(|(name, tensor)| (name, values(tensor.data()))).collect()
}

fn model(device: &Device, folder: &str, dtype: DType) -> Model {
    let config = std::fs::read_to_string(goldens().join(folder).join("config.json")).unwrap();
    let model = Model::new(device, ModelConfig::from_json(&config).unwrap(), dtype).unwrap();
    for (name, values) in floats(&format!("{folder}/model.safetensors")) {
        let id = model.weights().table().find(&name).unwrap();
        model.weights().write(device, id, &values).unwrap();
    }
    model
}

fn json(file: &str) -> Value {
    serde_json::from_slice(&bytes_of(file)).unwrap()
}

/// The three batches of a folder of goldens: two rows of 16 tokens, of which those under the mask count.
fn batches(folder: &str) -> Vec<Batch> {
    let bytes = bytes_of(&format!("{folder}/batches.safetensors"));
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = tensors.tensor("input_ids").unwrap().data().as_chunks().0;
    let mask = tensors.tensor("loss_mask").unwrap().data();
    let batch = |(ids, mask): (&[[u8; 8]], &[u8])| Batch {
        ids: ids.iter().map(|id| i64::from_le_bytes(*id) as u32).collect(),
        labels: vec![NO_LABEL; 32],
        counted: mask.iter().map(|counts| *counts == 1).collect(),
        segments: (0..2).map(|row| Segment { start: row * 16, len: 16, document: row }).collect(),
    };
    ids.chunks(32).zip(mask.chunks(32)).map(batch).collect()
}

/// The two rows of a batch as batches of their own.
fn rows(batch: &Batch) -> Vec<Batch> {
    let row = |segment: &Segment| {
        let range = segment.start..segment.start + segment.len;
        Batch {
            ids: batch.ids[range.clone()].to_vec(),
            labels: batch.labels[range.clone()].to_vec(),
            counted: batch.counted[range].to_vec(),
            segments: vec![Segment { start: 0, ..*segment }],
        }
    };
    batch.segments.iter().map(row).collect()
}

fn options(trained: Trained) -> TrainerOptions {
    TrainerOptions {
        trained,
        optimizer: AdamWOptions { betas: [0.9, 0.95], weight_decay: 0.1, ..AdamWOptions::default() },
        loss: LossKind {
            weights: LossWeights { reverse_kl: 1.0, forward_kl: 0.0, cross_entropy: 0.0 },
            scaling: Scaling::default(),
        },
        divisor: Divisor::Counted,
        recompute: false,
        patience: 2,
    }
}

fn trainer(device: &Device, options: TrainerOptions) -> Trainer {
    let teacher = Teacher::live(Arc::new(model(device, "teacher-mistral", DType::F32)));
    Trainer::new(model(device, "mil-student", DType::F32), Some(teacher), options, ROOM).unwrap()
}

fn read(space: &Space, device: &Device) -> Vec<(String, Vec<f32>)> {
    space.table().iter().map(|(id, p)| (p.spec.name.clone(), space.read(device, id).unwrap())).collect()
}

fn weights(trainer: &Trainer) -> Vec<(String, Vec<f32>)> {
    read(trainer.model().weights(), trainer.device())
}

/// Steps over the golden batches, and their reports.
fn run(trainer: &mut Trainer, batches: &[Vec<Batch>]) -> Vec<StepReport> {
    let mut reports = Vec::new();
    for (batches, rate) in batches.iter().zip([0.0005, 0.001, 0.0008]) {
        reports.extend(trainer.step(batches, rate).unwrap());
    }
    reports.extend(trainer.finish().unwrap());
    reports
}

fn whole(folder: &str) -> Vec<Vec<Batch>> {
    batches(folder).into_iter().map(|batch| vec![batch]).collect()
}

fn close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "{what}: {worst} is over {tolerance}");
}

#[test]
fn three_steps_of_all_tensors_and_of_the_mixers_are_the_goldens() {
    for device in devices() {
        for (folder, trained) in [("train-all", Trained::All), ("train-mixers", Trained::Mixers)] {
            let expected = json(&format!("{folder}/train.json"));
            let mut trainer = trainer(&device, options(trained));
            let reports = run(&mut trainer, &whole(folder));
            assert_eq!(reports.len(), 3);
            for (at, report) in reports.iter().enumerate() {
                let loss = expected["losses"][at].as_f64().unwrap();
                let norm = expected["global_grad_norm_before_clip"][at].as_f64().unwrap();
                assert!((report.loss - loss).abs() < 4e-6, "{folder} loss {at}: {} for {loss}", report.loss);
                assert!((report.gradient_norm - norm).abs() < 5e-6, "{folder} norm {at}: {}", report.gradient_norm);
            }
            let after = floats(&format!("{folder}/params_after_3.safetensors"));
            let untouched = floats("mil-student/model.safetensors");
            for (name, values) in weights(&trainer) {
                match after.get(&name) {
                    Some(expected) => close(&values, expected, 5e-4, &name),
                    None => assert_eq!(values, untouched[&name], "{name} was not to be trained"),
                }
            }
        }
    }
}

/// Weights, activations and their gradients in 16 bits, masters, sums and losses in f32.
#[test]
fn steps_in_bf16_on_a_card_are_near_the_goldens() {
    let dtypes = (DType::Bf16, DType::Bf16);
    steps_in_16_bits_are_near_the_goldens(&emulated_card(), dtypes);
}

/// Weights in 16 bits, and activations of a forward pass alone; f32 where there are gradients.
#[test]
fn steps_in_f16_on_wgpu_are_near_the_goldens() {
    match select::open(Name::Wgpu, None) {
        Ok(device) => steps_in_16_bits_are_near_the_goldens(&device, (DType::F16, DType::F32)),
        Err(error) if std::env::var_os("CI").is_none() => println!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    }
}

fn steps_in_16_bits_are_near_the_goldens(device: &Device, (dtype, gradients): (DType, DType)) {
    let [teacher, student] = ["teacher-mistral", "mil-student"].map(|folder| model(device, folder, dtype));
    assert_eq!((student.activations(), student.gradients()), (dtype, gradients));
    let teacher = Teacher::live(Arc::new(teacher));
    let mut trainer = Trainer::new(student, Some(teacher), options(Trained::All), ROOM).unwrap();
    let reports = run(&mut trainer, &whole("train-all"));
    let expected = json("train-all/train.json");
    for (at, report) in reports.iter().enumerate() {
        let near = |found: f64, key: &str| {
            let golden = expected[key][at].as_f64().unwrap();
            assert!((found / golden - 1.0).abs() < 0.05, "{key} {at}: {found} for {golden}");
        };
        near(report.loss, "losses");
        near(report.gradient_norm, "global_grad_norm_before_clip");
    }
}

/// The batches one after the other as one.
fn joined(batches: &[Batch]) -> Batch {
    let mut all = Batch::default();
    for batch in batches {
        let start = all.tokens();
        all.segments.extend(batch.segments.iter().map(|segment| Segment { start: start + segment.start, ..*segment }));
        all.ids.extend(&batch.ids);
        all.labels.extend(&batch.labels);
        all.counted.extend(&batch.counted);
    }
    all
}

/// Of two shapes by turns, the second of more segments than planned.
#[test]
fn steps_that_are_recorded_give_the_bits_of_steps_that_are_not() {
    let (device, batches) = (emulated_card(), batches("train-all"));
    let (small, large) = (|at: usize| batches[at].clone(), joined(&batches));
    let steps = [
        vec![small(0)],
        vec![small(1)],
        vec![small(2)],
        vec![large.clone()],
        vec![small(0), large.clone()],
        vec![large, small(1)],
        vec![small(2)],
    ];
    let runs = [true, false].map(|recorded| {
        let [teacher, student] = ["teacher-mistral", "mil-student"].map(|folder| model(&device, folder, DType::Bf16));
        let (teacher, room) = (Teacher::live(Arc::new(teacher)), Room { tokens: 96, segments: 2 });
        // Scratch for more than comes, as scratch made anew begins recordings again too.
        device.reserve(&student.config().largest(256, 16)).unwrap();
        let mut trainer = Trainer::new(student, Some(teacher), options(Trained::All), room).unwrap();
        if !recorded {
            trainer.time_parts();
        }
        let before = device.launches();
        let mut reports: Vec<_> = steps.iter().filter_map(|batches| trainer.step(batches, 1e-3).unwrap()).collect();
        reports.extend(trainer.finish().unwrap());
        (device.launches() - before, reports, weights(&trainer))
    });
    let [recorded, called] = &runs;
    assert_eq!(recorded.1, called.1);
    assert!(recorded.2 == called.2, "weights differ");
    // Of the nine micro-batches six: each shape is called, then recorded; the first one twice, as its memory is made anew.
    assert!(4 * recorded.0 < 3 * called.0, "{} launches, {} without recordings", recorded.0, called.0);
}

#[test]
fn gradients_of_the_first_step_are_the_goldens() {
    // The card fills a batch up to the room, and its rows with such as do not count.
    for (device, tokens) in devices().into_iter().map(|device| (device, 32)).chain([(emulated_card(), 50)]) {
        let teacher = Teacher::live(Arc::new(model(&device, "teacher-mistral", DType::F32)));
        let student = model(&device, "mil-student", DType::F32);
        let room = Room { tokens, ..ROOM };
        let mut trainer = Trainer::new(student, Some(teacher), options(Trained::All), room).unwrap();
        trainer.step(&batches("train-all")[..1], 0.0).unwrap();
        let gradients: HashMap<_, _> = read(trainer.gradients().space(), &device).into_iter().collect();
        for (name, expected) in floats("train-all/grads_step1.safetensors") {
            close(&gradients[&name], &expected, 2e-6, &name);
        }
    }
}

#[test]
fn rows_of_weight_0_add_nothing_to_losses_and_gradients() {
    let batch = &batches("train-all")[0];
    let all: Vec<u32> = (0..32).collect();
    let counts = |row: &u32| batch.counted[*row as usize];
    let segments = Segments::documents([16, 16]).unwrap();
    let kind = LossKind {
        weights: LossWeights { reverse_kl: 0.5, forward_kl: 0.25, cross_entropy: 0.125 },
        scaling: Scaling::default(),
    };
    for device in devices().into_iter().chain([emulated_card()]) {
        let [teacher, student] = ["teacher-mistral", "mil-student"].map(|folder| model(&device, folder, DType::F32));
        let memory = |model| Activations::new(model, Keep::Everything, 32, 2).unwrap();
        let (mut teachers, mut students) = (memory(&teacher), memory(&student));
        teacher.forward(&mut teachers, &batch.ids, &segments, None, None).unwrap();
        student.forward(&mut students, &batch.ids, &segments, None, None).unwrap();
        let (norm, head) = (FinalNorm::new(&teacher, 32), LossHead::new(&student, Some(&teacher), 32, false));
        let (norm, head) = (norm.unwrap(), head.unwrap());
        let [with, without] = [true, false].map(|with| {
            let rows: Vec<u32> = all.iter().copied().filter(|row| with || counts(row)).collect();
            let labels: Vec<u32> = rows.iter().map(|row| if counts(row) { row % 5 } else { NO_LABEL }).collect();
            let weights: Vec<f32> = rows.iter().map(|row| if counts(row) { 0.1 } else { 0.0 }).collect();
            let targets = Targets { rows: &rows, labels: &labels, weights: &weights };
            let gradients = Gradients::new(&device, student.weights().table(), |_| true).unwrap();
            let normed = norm.forward(&teacher, teachers.output().unwrap(), &rows).unwrap();
            let (stream, dstream) = (students.output().unwrap(), students.doutput().unwrap());
            head.clear(&device).unwrap();
            let into = Some((&gradients, dstream));
            head.run(&student, stream, &targets, Some((&teacher, normed)), kind, into).unwrap();
            student.backward(&students, &gradients).unwrap();
            let totals = device.read(head.totals()).unwrap().wait().unwrap();
            (rows.len(), totals, read(gradients.space(), &device))
        });
        assert!(with.0 > without.0 && without.1.iter().all(|total| *total != 0.0));
        assert_eq!(with.1, without.1);
        assert!(with.2 == without.2, "gradients differ on {}", device.info().name);
    }
}

#[test]
fn accumulated_batches_are_one_large_batch() {
    for device in devices() {
        let mut large = trainer(&device, options(Trained::All));
        let mut small = trainer(&device, options(Trained::All));
        let reports = run(&mut large, &whole("train-all"));
        let accumulated = run(&mut small, &batches("train-all").iter().map(rows).collect::<Vec<_>>());
        for (a, b) in reports.iter().zip(&accumulated) {
            assert!((a.loss - b.loss).abs() < 1e-6 && (a.gradient_norm - b.gradient_norm).abs() < 1e-5, "{a:?} {b:?}");
            assert_eq!((a.tokens, a.counted), (b.tokens, b.counted));
        }
        for ((name, a), (_, b)) in weights(&large).iter().zip(&weights(&small)) {
            close(a, b, 5e-4, name);
        }
    }
}

/// Two members that have the same batches: a sum is twice what one of them has.
struct Twins;

impl Group for Twins {
    fn sum(&self, device: &Device, buffer: View) -> backend::Result<()> {
        device.scale(&Scale { factor: 2.0, x: buffer })
    }

    fn broadcast(&self, _device: &Device, _buffer: View) -> backend::Result<()> {
        Ok(())
    }

    fn count(&self, number: usize) -> backend::Result<usize> {
        Ok(2 * number)
    }
}

#[test]
fn two_members_with_the_same_batches_make_the_update_of_one() {
    for device in devices() {
        let [mut alone, mut twin] = [(); 2].map(|()| trainer(&device, options(Trained::All)));
        twin.join(Twins).unwrap();
        let reports = [&mut alone, &mut twin].map(|trainer| run(trainer, &whole("train-all")));
        for (one, two) in reports[0].iter().zip(&reports[1]) {
            assert_eq!((2 * one.tokens, 2 * one.counted), (two.tokens, two.counted));
            assert_eq!((one.loss, one.gradient_norm), (two.loss, two.gradient_norm));
        }
        // Halves and doubles are exact.
        assert!(weights(&alone) == weights(&twin));
    }
}

#[test]
fn a_block_computed_again_or_kept_gives_the_same_bits_and_so_does_a_second_run() {
    for device in devices() {
        let mut runs = [false, true, false].map(|recompute| {
            let mut trainer = trainer(&device, TrainerOptions { recompute, ..options(Trained::All) });
            (run(&mut trainer, &whole("train-all")), weights(&trainer))
        });
        let first = std::mem::take(&mut runs[0]);
        assert!(runs[1..].iter().all(|run| *run == first));
    }
}

#[test]
fn a_teacher_that_remembers_gives_the_bits_of_one_that_runs() {
    for device in devices() {
        let folder = tempfile::tempdir().unwrap();
        let twice: Vec<Vec<Batch>> = batches("train-all")[..1].iter().map(|batch| vec![batch.clone(); 2]).collect();
        let twice = [twice.clone(), twice].concat();
        let counted = batches("train-all")[0].counted_tokens() as u64;
        let teacher = || Arc::new(model(&device, "teacher-mistral", DType::F32));
        let student = || model(&device, "mil-student", DType::F32);
        let remembering = Teacher::remembering(teacher(), folder.path(), counted).unwrap();
        let live = Teacher::live(teacher());
        let mut runs = [live, remembering].map(|teacher| {
            let mut trainer = Trainer::new(student(), Some(teacher), options(Trained::All), ROOM).unwrap();
            let first = trainer.step(&twice[0], 1e-3).unwrap();
            let launches = device.launches();
            let second = trainer.step(&twice[1], 1e-3).unwrap();
            (device.launches() - launches, (first, second, trainer.finish().unwrap(), weights(&trainer)))
        });
        let (remembered, live) = (std::mem::take(&mut runs[1]), std::mem::take(&mut runs[0]));
        assert!(remembered.0 < live.0, "a remembered batch still runs the teacher");
        assert_eq!(remembered.1, live.1);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_teacher_is_refused_where_the_disk_is_too_small_for_it() {
    let teacher = Arc::new(model(&devices()[0], "teacher-mistral", DType::F32));
    let folder = tempfile::tempdir().unwrap();
    let error = Teacher::remembering(teacher, folder.path(), 1 << 50).unwrap_err();
    assert!(matches!(error, Error::DiskTooSmall { needed, .. } if needed == (1 << 50) * 48 * 4), "{error}");
}

#[test]
fn a_steady_step_makes_no_buffer_and_launches_a_number_of_ops_that_holds() {
    for device in devices() {
        let mut trainer = trainer(&device, options(Trained::All));
        let batches = batches("train-all");
        let before = device.launches();
        trainer.step(&batches[..1], 1e-3).unwrap();
        let (first, made) = (device.launches() - before, device.allocations());
        trainer.step(&batches[..1], 1e-3).unwrap();
        assert_eq!(device.launches() - before, 2 * first);
        assert_eq!(device.allocations(), made);
        assert_eq!(first, 185, "launches of a step");
    }
}

#[test]
fn a_batch_of_more_segments_than_planned_is_the_same_step() {
    for device in devices() {
        let batch = &batches("train-all")[..1];
        let mut planned = trainer(&device, options(Trained::All));
        let teacher = Teacher::live(Arc::new(model(&device, "teacher-mistral", DType::F32)));
        let room = Room { segments: 1, ..ROOM };
        let student = model(&device, "mil-student", DType::F32);
        let mut grown = Trainer::new(student, Some(teacher), options(Trained::All), room).unwrap();
        for trainer in [&mut planned, &mut grown] {
            trainer.step(batch, 1e-3).unwrap();
        }
        assert_eq!(planned.finish().unwrap(), grown.finish().unwrap());
        assert_eq!(weights(&planned), weights(&grown));
        let larger =
            Batch { ids: vec![0; 33], labels: vec![NO_LABEL; 33], counted: vec![true; 33], ..Batch::default() };
        assert!(grown.step(&[larger], 1e-3).is_err());
    }
}

#[test]
fn an_update_that_is_not_finite_is_left_out_and_the_second_in_a_row_ends_the_run() {
    for device in devices() {
        let mut trainer = trainer(&device, options(Trained::All));
        let id = trainer.model().weights().table().find("model.norm.weight").unwrap();
        trainer.model().weights().write(&device, id, &[f32::NAN; 48]).unwrap();
        let before = format!("{:?}", weights(&trainer));
        let batch = &batches("train-all")[..1];
        assert!(trainer.step(batch, 1e-3).unwrap().is_none());
        assert!(!trainer.step(batch, 1e-3).unwrap().unwrap().finite());
        assert!(matches!(trainer.finish(), Err(Error::Diverged { step: 2, in_a_row: 2 })));
        assert_eq!(format!("{:?}", weights(&trainer)), before);
        for kept in [Kept::Moment1, Kept::Moment2] {
            let moment = trainer.optimizer().kept(trainer.model().weights(), id, kept).unwrap().unwrap();
            assert_eq!(device.read(moment).unwrap().wait().unwrap(), [0.0; 48]);
        }
    }
}

#[test]
fn weights_in_less_than_f32_follow_masters_in_f32() {
    for device in devices() {
        let teacher = Teacher::live(Arc::new(model(&device, "teacher-mistral", DType::F32)));
        let student = model(&device, "mil-student", DType::Bf16);
        let mut trainer = Trainer::new(student, Some(teacher), options(Trained::All), ROOM).unwrap();
        run(&mut trainer, &whole("train-all"));
        let (model, optimizer) = (trainer.model(), trainer.optimizer());
        let name = "model.layers.1.mixer.in_proj.weight";
        let id = model.weights().table().find(name).unwrap();
        let master = optimizer.kept(model.weights(), id, Kept::Master).unwrap().unwrap();
        let master = device.read(master).unwrap().wait().unwrap();
        let stored = model.weights().read(&device, id).unwrap();
        assert!(master.iter().zip(&stored).all(|(m, s)| half::bf16::from_f32(*m).to_f32() == *s));
        assert!(master != stored);
        close(&master, &floats("train-all/params_after_3.safetensors")[name], 4e-3, name);
        let norm = model.weights().table().find("model.norm.weight").unwrap();
        assert!(optimizer.kept(model.weights(), norm, Kept::Master).unwrap().is_none());
    }
}

#[test]
fn dividing_by_all_tokens_scales_the_gradient_and_not_the_loss() {
    for device in devices() {
        let batch = &batches("train-all")[..1];
        let [counted, all] = [Divisor::Counted, Divisor::All].map(|divisor| {
            let mut trainer = trainer(&device, TrainerOptions { divisor, ..options(Trained::All) });
            trainer.step(batch, 1e-3).unwrap();
            trainer.finish().unwrap().unwrap()
        });
        assert!((counted.loss - all.loss).abs() < 1e-6);
        let share = batch[0].counted_tokens() as f64 / 32.0;
        assert!(share < 1.0 && (all.gradient_norm - share * counted.gradient_norm).abs() < 1e-5);
    }
}

#[test]
fn a_kl_without_a_teacher_is_refused() {
    let device = &devices()[0];
    let student = model(device, "mil-student", DType::F32);
    assert!(matches!(Trainer::new(student, None, options(Trained::All), ROOM), Err(Error::Configuration(_))));
}

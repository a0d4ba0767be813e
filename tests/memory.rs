//! The memory of a card, on one that is not there: what a run takes is planned before it, and a step takes none.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use h1::backend::cuda::driver::Limits;
use h1::backend::cuda::dry::{self, Counters};
use h1::backend::ops::{Fill, LossWeights, Scaling};
use h1::backend::{DType, Device, Error, Largest, View, cuda};
use h1::bench;
use h1::bench::shapes::{Shape, hybrid};
use h1::bench::throughput::{self, Load};
use h1::bench::train::Step;
use h1::checkpoint::{Checkpoint, SaveOptions, save_model};
use h1::distill::config::Config;
use h1::distill::ground::Ground;
use h1::distill::importance::{Measure, Method};
use h1::distill::watch::{Event, Watcher};
use h1::distill::{Setup, distill};
use h1::eval::{self, Evaluator, Scores};
use h1::generate::{Generator, Limits as Room, Request};
use h1::model::config::{BlockKind, ModelConfig};
use h1::model::{LossKind, Model};
use h1::text::arithmetic::ALPHABET;
use h1::text::characters::write_character_tokenizer;
use h1::text::documents::Documents;
use h1::text::packing::{Batch, NO_LABEL, Segment};
use h1::train::job::{self, Job};
use h1::train::optimizer::{AdamWOptions, Trained};
use h1::train::teacher::Teacher;
use h1::train::trainer::{self, Divisor, StepReport, Trainer, TrainerOptions};
use h1::train::{fresh, settings};

/// The sizes of an H100.
fn limits() -> Limits {
    Limits {
        name: "dry card".into(),
        capability: (9, 0),
        multiprocessors: 132,
        shared_bytes: 232_448,
        memory_bytes: 80 << 30,
        launch_ns: 0,
    }
}

fn card() -> (Device, Counters) {
    dry::device(&limits())
}

/// What a run took at most lies within what it planned, which is not much more.
fn planned(counters: &Counters) {
    let (planned, taken) = (counters.planned_bytes(), counters.peak_bytes());
    println!("{planned} bytes planned, {taken} taken");
    assert!(taken <= planned && planned <= taken + taken / 50, "{planned} bytes planned, {taken} taken");
}

fn options(recompute: bool) -> TrainerOptions {
    TrainerOptions {
        trained: Trained::All,
        optimizer: AdamWOptions::default(),
        loss: LossKind {
            weights: LossWeights { reverse_kl: 1.0, forward_kl: 0.0, cross_entropy: 1.0 },
            scaling: Scaling::default(),
        },
        divisor: Divisor::Counted,
        recompute,
        patience: 1,
    }
}

/// Documents of one length side by side.
fn batch(documents: usize, len: usize) -> Batch {
    let segment = |document| Segment { start: document * len, len, document };
    Batch {
        ids: vec![0; documents * len],
        labels: vec![NO_LABEL; documents * len],
        counted: (0..documents * len).map(|at| at % 3 > 0).collect(),
        segments: (0..documents).map(segment).collect(),
    }
}

/// Shapes, with some of their layers turned into Mamba, and how their weights are stored.
fn models() -> impl Iterator<Item = (ModelConfig, DType)> {
    let shapes = [(Shape::Arithmetic, 2), (Shape::SmolLm2, 15), (Shape::Apriel, 25)];
    let shapes = shapes.map(|(shape, mamba)| hybrid(&shape.config(), mamba).unwrap());
    let other = ModelConfig { attention_bias: true, sliding_window: Some(100), ..shapes[0].clone() };
    shapes
        .into_iter()
        .chain([other])
        .flat_map(|shape| [DType::F32, DType::Bf16, DType::F16].map(|dtype| (shape.clone(), dtype)))
}

#[test]
fn a_step_of_training_takes_no_memory() {
    for (shape, dtype) in models() {
        for recompute in [false, true] {
            let (device, counters) = card();
            let teacher = ModelConfig { blocks: vec![BlockKind::Attention; shape.blocks.len()], ..shape.clone() };
            let [student, teacher] = [&shape, &teacher].map(|shape| Model::new(&device, shape.clone(), dtype).unwrap());
            let (teacher, room) = (Teacher::live(Arc::new(teacher)), trainer::Room { tokens: 4096, segments: 64 });
            let mut trainer = Trainer::new(student, Some(teacher), options(recompute), room).unwrap();
            let made = counters.allocations();
            for batches in [[batch(1, 4096), batch(64, 64)], [batch(3, 100), batch(1, 1)]] {
                // Launched, recorded, and launched again from then on.
                for _ in 0..4 {
                    trainer.step(&batches, 1e-3).unwrap();
                }
            }
            assert_eq!(counters.allocations(), made, "{} layers, {dtype}, recompute {recompute}", shape.blocks.len());
        }
    }
}

#[test]
fn generation_takes_no_memory_once_it_has_begun() {
    for (shape, dtype) in models() {
        let (device, counters) = card();
        let model = Model::new(&device, shape.clone(), dtype).unwrap();
        let mut generator = Generator::new(&model, Room { sequences: 24, context: 8192, call: 512 }).unwrap();
        let made = counters.allocations();
        let lengths = [1, 2, 600, 8000].into_iter().cycle();
        let request = |len| Request { prompt: vec![5; len], past: 0, max_new_tokens: 40, temperature: 0.5, seed: 1 };
        generator.run(&lengths.map(request).take(30).collect::<Vec<_>>(), &[], |_, _| true).unwrap();
        assert_eq!(counters.allocations(), made, "{} layers, {dtype}", shape.blocks.len());
    }
}

struct Deaf;

impl Watcher for Deaf {
    fn hear(&mut self, _: Event<'_>) {}
}

impl job::Watcher for Deaf {
    fn interrupted(&self) -> bool {
        false
    }

    fn compiled(&mut self, _: usize, _: usize) {}

    fn stepped(&mut self, _: &StepReport, _: f64) {}

    fn evaluated(&mut self, _: u64, _: &Scores) {}
}

/// A folder with a configuration.
fn folder(config: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("case.toml");
    std::fs::write(&path, config).unwrap();
    (folder, path)
}

#[test]
fn training_takes_what_it_planned() {
    let (folder, path) = folder(
        r#"
        [model.shape]
        num_hidden_layers = 2
        hidden_size = 64
        intermediate_size = 128
        num_attention_heads = 2
        num_key_value_heads = 1
        head_dim = 32
        [data.arithmetic]
        train = 40
        test = 6
        digits = [1, 2]
        [batch]
        row_tokens = 64
        rows = 2
        [budget]
        steps = 6
        [evaluation]
        every = 2
        [checkpoint]
        every = 3
        "#,
    );
    for dtype in [DType::F32, DType::Bf16] {
        let (device, counters) = card();
        let run = folder.path().join(dtype.to_string());
        let settings = settings::load(&path, &[]).unwrap();
        let out: (&Path, &Path) = (folder.path(), &run);
        Job::open(settings, out, false, (&device, dtype), &mut |_| {}).unwrap().run(&mut Deaf).unwrap();
        planned(&counters);
    }
}

#[test]
fn distillation_takes_what_it_planned() {
    let (folder, path) = folder(
        r#"
        [teacher]
        path = "teacher"
        [data.arithmetic]
        train = 60
        test = 6
        digits = [1, 2]
        [batch]
        row_tokens = 64
        rows = 2
        [student]
        d_state = 16
        [importance.mmr]
        steps = 2
        [evaluation]
        context = 100
        [[stages]]
        mamba = 1
        tokens = 576
        [[stages]]
        mamba = 3
        tokens = 960
        "#,
    );
    let (device, _) = card();
    let shape = ModelConfig { blocks: vec![BlockKind::Attention; 4], ..Shape::Arithmetic.config() };
    write_character_tokenizer(folder.path(), ALPHABET).unwrap();
    let options = SaveOptions { copy_from: Some(folder.path()), ..SaveOptions::new(DType::F32) };
    save_model(&folder.path().join("teacher"), &fresh(&device, shape, DType::F32, 3).unwrap(), &options).unwrap();
    for dtype in [DType::F32, DType::Bf16] {
        let (device, counters) = card();
        let settings = settings::load::<Config>(&path, &[]).unwrap();
        let setup = Setup {
            config: &settings.values,
            text: &settings.text,
            base: folder.path(),
            folder: &folder.path().join(dtype.to_string()),
            resume: false,
            device: &device,
            dtype,
        };
        distill(setup, &mut Deaf).unwrap();
        planned(&counters);
    }
}

/// Documents of some tokens of the arithmetic task, all but the first of which count.
fn documents(count: usize) -> Arc<Documents> {
    let mut documents = Documents::default();
    for document in 0..count {
        let ids: Vec<u32> = (0..6 + document as u32 % 7).collect();
        documents.push(&ids, &ids.iter().map(|at| *at > 0).collect::<Vec<_>>());
    }
    documents.into()
}

#[test]
fn evaluation_takes_what_it_planned() {
    for dtype in [DType::F32, DType::Bf16] {
        for taught in [false, true] {
            let ((device, counters), shape) = (card(), Shape::Arithmetic.config());
            let teacher = taught.then_some(&shape);
            eval::plan((&device, dtype), (&shape, teacher), 512).unwrap();
            let make = |shape: &ModelConfig| Model::new(&device, shape.clone(), dtype).unwrap();
            let (model, teacher) = (make(&shape), teacher.map(make));
            let mut evaluator = Evaluator::new(&model, teacher.as_ref(), 512).unwrap();
            evaluator.run(&documents(200), None, |_| ()).unwrap();
            planned(&counters);
        }
    }
}

#[test]
fn a_ranking_takes_what_it_planned() {
    let (folder, train) = (tempfile::tempdir().unwrap(), documents(300));
    let shape = ModelConfig { blocks: vec![BlockKind::Attention; 3], ..Shape::Arithmetic.config() };
    let model = folder.path().join("model");
    let saved = fresh(&card().0, shape.clone(), DType::F32, 3).unwrap();
    save_model(&model, &saved, &SaveOptions::new(DType::F32)).unwrap();
    let mut config = Config::default();
    config.student.d_state = Some(16);
    config.importance.mmr.steps = 3;
    config.importance.loo.measure = Measure::ReverseKl;
    for method in [Method::Loo, Method::Mmr] {
        let (device, counters) = card();
        let open = || Checkpoint::open(&model).unwrap();
        Ground::plan_ranking(&config, method, (&device, DType::Bf16), (&shape, &shape), &train).unwrap();
        let ground = Ground::new(&config, (&device, DType::Bf16), open(), Arc::clone(&train)).unwrap();
        ground.rank(method, &open(), &folder.path().join(method.name()), &mut Deaf).unwrap();
        planned(&counters);
    }
}

#[test]
fn benches_take_what_they_planned() {
    let named = |name: &str| Limits { name: name.into(), ..limits() };
    let (config, dtype) = (Shape::Arithmetic.config(), DType::Bf16);
    let (device, counters) = dry::device(&named("NVIDIA H100 80GB HBM3"));
    let step = Step { mamba: 2, tokens: 300, recompute: false, steps: 2, threads: 1, dtype };
    bench::train::measure(&device, &config, step, || ()).unwrap();
    planned(&counters);

    let (device, counters) = dry::device(&limits());
    let load = |batch| Load { past: 100, prompt: 30, new_tokens: 5, batch, call: 64, repeats: 2 };
    let (shape, loads) = (hybrid(&config, 2).unwrap(), [1, 5].map(load));
    throughput::plan((&device, dtype), &shape, &loads).unwrap();
    let model = Model::new(&device, shape, dtype).unwrap();
    let whose = bench::yardstick::Whose::Card;
    let limits = bench::yardstick::Limits { whose, threads: 0, gemm_gflops: 1.0, copy_gbytes: 1.0, read_gbytes: 1.0 };
    for load in loads {
        throughput::measure(&model, load, &limits).unwrap();
    }
    planned(&counters);
}

#[test]
fn what_fails_in_a_plan_is_not_planned() {
    let (device, counters) = card();
    let failed = device.plan(|device| {
        let _buffer = device.alloc(DType::F32, 10, 10)?;
        device.alloc(DType::F64, 1, 1).map(drop)
    });
    assert!(matches!(failed, Err(Error::Unsupported { .. })), "{failed:?}");
    assert_eq!((counters.planned_bytes(), counters.allocations()), (0, 0));
    // Nor is a foreign buffer taken for one of the device's own.
    let own = device.alloc(DType::F32, 10, 10).unwrap();
    let read = device.plan(|device| device.read(own.view()).map(drop));
    assert!(matches!(read, Err(Error::Foreign { .. })), "{read:?}");
}

/// On the card of this machine; where there is none the test says so, unless `H1_REQUIRE_CUDA` is set.
#[test]
fn a_card_gives_what_it_has_and_says_what_it_has_not() {
    let device = match cuda::device() {
        Ok(device) => device,
        Err(why) if std::env::var_os("H1_REQUIRE_CUDA").is_none() => return println!("skipped: {why}"),
        Err(why) => panic!("{why}"),
    };
    let rows = |gibibytes: usize| gibibytes << 18;
    let alloc = |device: &Device, gibibytes| device.alloc(DType::F32, rows(gibibytes), 1 << 10);
    let ones = |view: View| device.fill(&Fill { value: 1.0, out: view });
    let value = |view: View| device.read(view.row_range(0, 1).unwrap()).unwrap().wait().unwrap()[0];
    for gibibytes in [2, 4, 3, 4] {
        let refused = device.plan(|device| alloc(device, 100_000).map(drop));
        println!("{}", refused.unwrap_err());
        device.plan(|device| alloc(device, gibibytes).map(drop)).unwrap();
        // The second does not fit the plan. What was freed is 0 when it comes again, and so are the last rows.
        for _ in 0..3 {
            let buffers = [alloc(&device, gibibytes), alloc(&device, 1)].map(Result::unwrap);
            for buffer in &buffers {
                let (view, last) = (buffer.view(), buffer.view().row_range(buffer.view().rows - 1, 1).unwrap());
                assert_eq!([value(view), value(last)], [0.0, 0.0]);
                ones(view).unwrap();
                assert_eq!([value(view), value(last)], [1.0, 1.0]);
            }
        }
    }
    // All that the card has, in parts; then the same as one, once the parts are free.
    let kept = alloc(&device, 1).unwrap();
    ones(kept.view()).unwrap();
    let mut parts = Vec::new();
    let refused = loop {
        match alloc(&device, 4) {
            Ok(part) => parts.push(part),
            Err(refused) => break refused,
        }
    };
    println!("{refused}, after {} parts", parts.len());
    assert!(matches!(refused, Error::OutOfMemory { .. }), "{refused}");
    let all = 4 * parts.len();
    drop(parts);
    device.plan(|device| alloc(device, all).map(drop)).unwrap();
    assert_eq!([value(kept.view()), value(alloc(&device, all).unwrap().view())], [1.0, 0.0]);
}

#[test]
fn a_recording_begins_again_when_its_scratch_is_another_one_at_its_address() {
    let (device, _) = card();
    let (recording, mut calls) = (device.recording(), 0);
    let of = |tokens| Largest { tokens, width: 1 << 10, ..Largest::default() };
    let mut run = |reserved: &[usize]| {
        let reserved = reserved.iter().map(|&tokens| device.reserve(&of(tokens)).is_ok()).collect::<Vec<_>>();
        recording
            .run(|| {
                calls += 1;
                Ok(())
            })
            .unwrap();
        (calls, reserved)
    };
    assert_eq!([run(&[1 << 16]), run(&[]), run(&[1])], [(1, vec![true]), (2, vec![]), (2, vec![true])]);
    // The scratch went for one that there is no room for: the next is smaller, and lies where it was.
    assert_eq!(run(&[1 << 58, 1 << 12]), (3, vec![false, true]));
    assert_eq!([run(&[]), run(&[])], [(4, vec![]), (4, vec![])]);
}

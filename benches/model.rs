//! The `m2` mixer of SmolLM2's sizes on one thread, and a decode step of SmolLM2 with half of its layers Mamba, on the
//! `cpu` backend with random weights: `cargo bench`.

use std::hint::black_box;
use std::num::NonZeroUsize;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use h1::backend::select::{self, Name};
use h1::backend::{DType, Segments};
use h1::bench::shapes::{Shape, random_model, two_layers};
use h1::model::{Activations, Cache, FinalNorm, Gradients, Keep, Logits, Probe, Rows};

const TOKENS: usize = 512;
const PAST: usize = 64;

fn m2_layer(criterion: &mut Criterion) {
    let device = select::open(Name::Cpu, NonZeroUsize::new(1)).unwrap();
    let model = random_model(&device, &two_layers(&Shape::SmolLm2.config()), 1, DType::F32).unwrap();
    let mut probe = Probe::with_backward(&model, TOKENS, 1).unwrap();
    probe.begin(&Segments::documents([TOKENS]).unwrap()).unwrap();
    let gradients = Gradients::new(&device, model.weights().table(), |_| true).unwrap();
    let hidden = model.config().hidden_size;
    let [x, out, dx] = [(); 3].map(|()| Rows::new(&device, DType::F32, TOKENS, hidden).unwrap());
    let (x, out, dx) = (x.whole(), out.whole(), dx.whole());
    let values: Vec<f32> = (0..TOKENS * hidden).map(|i| (i * 7919 % 1000) as f32 / 500.0 - 1.0).collect();
    device.write(h1::backend::HostSlice::F32(&values), x).unwrap();

    let mut group = criterion.benchmark_group("m2 layer, 512 tokens, 1 thread");
    group.throughput(Throughput::Elements(TOKENS as u64)).sample_size(20);
    group.bench_function("forward", |bencher| bencher.iter(|| probe.mixer(1, x, out).unwrap()));
    group.bench_function("forward and backward", |bencher| {
        bencher.iter(|| {
            probe.mixer(1, x, out).unwrap();
            probe.mixer_backward(1, &gradients, (x, out), dx).unwrap();
        });
    });
    group.finish();
}

fn decode_step(criterion: &mut Criterion) {
    let device = select::open(Name::Cpu, None).unwrap();
    let config = Shape::SmolLm2.config();
    let model = random_model(&device, &config, config.num_hidden_layers() / 2, DType::F32).unwrap();
    let mut activations = Activations::new(&model, Keep::Nothing, PAST, 1).unwrap();
    let mut cache = Cache::new(&model, 1, PAST + 1, PAST + 1).unwrap();
    let (norm, head) = (FinalNorm::new(&model, 1).unwrap(), Logits::new(&model, 1).unwrap());
    let segment = |len, past| {
        let mut segments = Segments::default();
        segments.push(len, past, 0).unwrap();
        segments
    };
    model.forward(&mut activations, &[5; PAST], &segment(PAST, 0), Some(&mut cache), None).unwrap();
    let one = segment(1, PAST);

    let mut group = criterion.benchmark_group("SmolLM2-135M, 15 of 30 layers Mamba, all threads");
    group.throughput(Throughput::Elements(1)).sample_size(20);
    group.bench_function("decode step", |bencher| {
        bencher.iter(|| {
            model.forward(&mut activations, &[7], &one, Some(&mut cache), None).unwrap();
            let normed = norm.forward(&model, activations.output().unwrap(), &[0]).unwrap();
            black_box(head.forward(&model, normed).unwrap());
        });
    });
    group.finish();
}

criterion_group!(benches, m2_layer, decode_step);
criterion_main!(benches);

//! The kernels of the CPU backend. Rates are FLOP/s, or bytes/s where memory bounds them.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use h1::backend::cpu::attention::{AttentionInputs, Keys, attention};
use h1::backend::cpu::attention_backward::{AttentionGradient, AttentionGradients, attention_backward};
use h1::backend::cpu::matrix::{Rows, RowsMut};
use h1::backend::cpu::segment::Segment;
use h1::backend::cpu::simd::Simd;
use h1::backend::ops::AttentionShape;

/// Values that look random, within ±1.
fn values(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// SmolLM2-135M's heads, and those of a 15B teacher.
const SHAPES: [(&str, AttentionShape); 2] = [
    ("9 heads of 64", AttentionShape { heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, window: None }),
    ("32 heads of 128", AttentionShape { heads: 32, kv_heads: 8, head_dim: 128, scale: 0.088, window: None }),
];

fn bench_attention(c: &mut Criterion) {
    let simd = Simd::detect();
    let mut group = c.benchmark_group("attention");
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    for (name, shape) in SHAPES {
        for (len, past) in [(512, 0), (1, 512), (1, 16_383)] {
            let segments = [Segment { start: 0, len: len as u32, past: past as u32, slot: 0, keys: 0 }];
            let (q_cols, kv_cols, keys) = (shape.q_cols(), shape.kv_cols(), past + len);
            let [q, mut out, dout] = [(); 3].map(|()| values(len * q_cols));
            let [k, v, mut dk, mut dv] = [(); 4].map(|()| values(keys * kv_cols));
            let (mut lse, mut dq) = (vec![0.0; len * shape.heads], vec![0.0; len * q_cols]);
            let (k, v) = (Rows::dense(&k, keys, kv_cols), Rows::dense(&v, keys, kv_cols));
            let q = Rows::dense(&q, len, q_cols);
            let pairs: usize = (past + 1..=past + len).sum();
            let product = (2 * pairs * q_cols) as u64;
            let inputs = AttentionInputs { shape, q, keys: Keys::Rows { k, v }, segments: &segments };

            let decoding = len == 1;
            group.throughput(if decoding {
                Throughput::Bytes((2 * 4 * keys * kv_cols) as u64)
            } else {
                Throughput::Elements(2 * product)
            });
            group.bench_function(format!("forward, {name}, {len} after {past}"), |b| {
                let to = RowsMut::dense(&mut out, len, q_cols);
                let lse = RowsMut::dense(&mut lse, len, shape.heads);
                b.iter(|| attention(simd, &inputs, &to, Some(&lse)));
            });
            if decoding {
                continue;
            }
            group.throughput(Throughput::Elements(5 * product));
            group.bench_function(format!("backward, {name}, {len} after {past}"), |b| {
                let gradient = AttentionGradient {
                    shape,
                    q,
                    k,
                    v,
                    segments: &segments,
                    out: Rows::dense(&out, len, q_cols),
                    lse: Rows::dense(&lse, len, shape.heads),
                    dout: Rows::dense(&dout, len, q_cols),
                };
                let to = AttentionGradients {
                    dq: &RowsMut::dense(&mut dq, len, q_cols),
                    dk: &RowsMut::dense(&mut dk, keys, kv_cols),
                    dv: &RowsMut::dense(&mut dv, keys, kv_cols),
                };
                b.iter(|| attention_backward(simd, &gradient, &to));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, bench_attention);
criterion_main!(benches);

//! Every backend against the reference: one list of op cases ([`h1::backend::cases`]), and the laws of a device.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::Path;

use h1::backend::cpu::{self, simd::Simd};
use h1::backend::cuda::source::ModuleKey;
use h1::backend::cuda::{self, emulated, variants};
use h1::backend::ops::{
    Conv1d, ConvScan, ConvShape, Linear, LinearSwiglu, PageWrite, RmsNorm, Rope, RopePageWrite, ScanInputs,
    SelectiveScan, Swiglu,
};
use h1::backend::{
    DType, Device, Error, HostSlice, Largest, Order, Out, Segments, View, cases, padded_rows, reference::Reference,
    wgpu,
};

/// Sizes that each case is run at: fewer where the CPU stands in for a card, and fewer still where it is watched.
fn rounds(device: &Device) -> u64 {
    match device.info().device.starts_with(emulated::NAME) {
        true if std::env::var_os(SANITIZE).is_some() => 2,
        true => 8,
        false if std::env::var_os(SUBGROUPS).is_some() => FEW,
        false => 24,
    }
}

fn every_op_agrees_with_the_reference(device: &Device) {
    println!("on {}", device.info().device);
    every_op_agrees(device, rounds(device));
}

fn every_op_agrees(device: &Device, rounds: u64) {
    let mut failures = Vec::new();
    for case in cases::CASES {
        let runs: Result<Vec<f64>, _> = (0..rounds)
            .map(|seed| case.run(device, seed).map_err(|failure| format!("{} (seed {seed}): {failure}", case.name)))
            .collect();
        match runs {
            Ok(shares) => println!("{:44} {:.3} of the tolerance", case.name, shares.into_iter().fold(0.0, f64::max)),
            Err(failure) => failures.push(failure),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn arguments_that_lie_elsewhere_are_errors(device: &Device) {
    let rounds = cases::CASES.iter().flat_map(|case| (0..3).map(move |seed| (case, seed)));
    let accepted = rounds.filter_map(|(case, seed)| {
        case.misuse(device, seed).err().map(|failure| format!("{} (seed {seed}): {failure}", case.name))
    });
    let accepted: Vec<_> = accepted.collect();
    assert!(accepted.is_empty(), "{}", accepted.join("\n"));
}

fn wrong_shapes_and_kinds_name_the_op_and_the_argument(device: &Device) {
    let [x, out] = [(4, 8), (4, 8)].map(|(rows, cols)| device.alloc(DType::F32, rows, cols).unwrap());
    let flat = device.alloc(DType::F32, 1, 32 * 8).unwrap();
    let ids = device.alloc(DType::U32, 1, 8).unwrap();
    let rows = flat.view().matrix(0, 1, 8, Order::Rows).unwrap();
    let weight = |outputs| flat.view().matrix(0, outputs, 8, Order::Weight).unwrap();
    let linear = |x: View, weight, bias, out| {
        device.linear(&Linear { x, weight, bias, out: Out::assign(out) }).unwrap_err().to_string()
    };
    let (x, out) = (x.view(), out.view());
    assert_eq!(linear(x, weight(9), None, out), "linear: out is [4, 8], expected [4, 9]");
    assert_eq!(linear(x.col_range(0, 7).unwrap(), weight(8), None, out), "linear: x is [4, 7], expected [4, 8]");
    assert!(linear(x, rows, None, out).starts_with("linear: weight is f32, expected a weight"));
    assert!(linear(x, weight(8), Some(ids.view()), out).starts_with("linear: bias is u32, expected rows of floats"));
    let norm = RmsNorm { x, weight: rows.col_range(0, 7).unwrap(), eps: 1e-5, out, inv_rms: None };
    assert_eq!(device.rms_norm(&norm).unwrap_err().to_string(), "rms_norm: weight is [1, 7], expected [1, 8]");
}

fn an_output_that_overlaps_an_argument_is_an_error(device: &Device) {
    let both = device.alloc(DType::F32, 8, 8).unwrap();
    let gate = device.alloc(DType::F32, 4, 8).unwrap();
    let (up, out) = (both.rows(4).unwrap(), both.view().row_range(4, 4).unwrap());
    let swiglu = device.swiglu(&Swiglu { gate: gate.view(), up, out });
    assert_eq!(swiglu.unwrap_err().to_string(), "swiglu: the output out overlaps up");
}

/// Ops of two: what the second reads must be what the first writes, and nothing that it changes besides.
#[test]
fn ops_that_do_not_follow_each_other_are_errors() {
    let device = Device::new(Reference::new());
    let matrix = |rows, cols| device.alloc(DType::F32, rows, cols).unwrap();
    let (x, other, weight, gated) = (matrix(2, 24), matrix(2, 24), matrix(1, 32 * 24), matrix(2, 8));
    let columns = |first, cols| x.view().col_range(first, cols).unwrap();

    let weight = weight.view().matrix(0, 24, 24, Order::Weight).unwrap();
    let linear = Linear { x: other.view(), weight, bias: None, out: Out::assign(x.view()) };
    let swiglu = Swiglu { gate: columns(0, 8), up: columns(8, 8), out: gated.view() };
    let gate = |linear, swiglu| device.linear_swiglu(&LinearSwiglu { linear, swiglu, keeps: false });

    let mut buffer = device.alloc_segments(1, 2).unwrap();
    let mut sequence = Segments::default();
    sequence.push(2, 0, 0).unwrap();
    let segments = buffer.write(&device, &sequence).unwrap();
    let (inv_freq, pages) = (matrix(1, 4), device.alloc(DType::U32, 1, 1).unwrap());
    let all = [matrix(2, 8), matrix(2, 8)];
    let rotate = |keys, values| {
        let (inv_freq, positions) = (inv_freq.view(), segments.positions);
        let rope = Rope { x: columns(0, 16), head_dim: 8, positions, inv_freq, inverse: false };
        let out = [all[0].view(), all[1].view()];
        let write = PageWrite { rows: [keys, values], segments, pages: pages.view(), page_size: 2, out };
        device.rope_page_write(&RopePageWrite { rope, write })
    };

    let [u, not_u, delta, out] = [(); 4].map(|()| matrix(2, 1));
    let (projected, one) = (matrix(2, 3), matrix(1, 1));
    let convolve = |scanned: View| {
        let shape = ConvShape { channels_in: 1, head: 1, repeat: 1, width: 1, repeat_first: true };
        let (projected, weight, out_of_conv) = (projected.view(), one.view(), u.view());
        let (bias, state_in, state_out) = (None, None, None);
        let conv = Conv1d { shape, projected, x_col: 2, weight, bias, segments, state_in, state_out, out: out_of_conv };
        let inputs = ScanInputs {
            u: scanned,
            delta: delta.view(),
            a: weight,
            projected,
            b_col: 0,
            c_col: 1,
            z_col: None,
            groups_b: 1,
            groups_c: 1,
            d: None,
            delta_bias: None,
            softplus: true,
            segments,
            state_in: None,
        };
        let scan = SelectiveScan { inputs, state_out: None, saved: None, out: out.view() };
        device.conv_scan(&ConvScan { conv, scan, keeps: false })
    };

    gate(linear, swiglu).unwrap();
    rotate(columns(8, 8), columns(16, 8)).unwrap();
    convolve(u.view()).unwrap();
    let elsewhere = Swiglu { up: other.view().col_range(0, 8).unwrap(), ..swiglu };
    let wrong = [
        (gate(linear, elsewhere), "gate and up are no columns"),
        (gate(Linear { out: Out::add(x.view()), ..linear }, swiglu), "a product that replaces"),
        (rotate(columns(0, 8), columns(16, 8)), "not the last heads"),
        (rotate(columns(8, 8), columns(4, 8)), "neither behind what is rotated"),
        (convolve(not_u.view()), "u is not what the convolution writes"),
    ];
    let said = |(result, words): &(Result<(), Error>, &str)| {
        result.as_ref().is_err_and(|error| error.to_string().contains(words))
    };
    let accepted: Vec<_> = wrong.iter().filter(|case| !said(case)).collect();
    assert!(accepted.is_empty(), "{accepted:?}");
}

fn memory_that_is_not_there_is_an_error(device: &Device) {
    for rows in [1 << 20, 1 << 40, usize::MAX] {
        let alloc = device.alloc(DType::F32, rows, 1 << 30);
        assert!(matches!(alloc, Err(Error::OutOfMemory { .. } | Error::Size { .. })), "{alloc:?}");
    }
    let buffer = device.alloc(DType::F32, 2, 3).unwrap();
    assert!(device.write(HostSlice::F32(&[0.0; 5]), buffer.view()).is_err());
    assert!(device.write(HostSlice::U32(&[0; 6]), buffer.view()).is_err());
    assert!(buffer.rows(3).is_err());
    let view = buffer.view();
    drop(buffer);
    assert!(matches!(device.read(view).err(), Some(Error::Memory { .. })));
    let mut segments = device.alloc_segments(2, 5).unwrap();
    assert!(segments.write(device, &Segments::documents([1, 1, 1]).unwrap()).is_err());
    assert!(segments.write(device, &Segments::documents([3, 3]).unwrap()).is_err());
}

/// Other values each time, sums that go on, scratch made anew in between, and ops that fail once.
fn a_recording_does_what_its_ops_do(device: &Device) {
    let [gate, up, product, recorded, called] = [(); 5].map(|()| device.alloc(DType::F32, 8, 8).unwrap());
    let weight = device.alloc(DType::F32, 1, padded_rows(8) * 8).unwrap();
    let weight = weight.view().matrix(0, 8, 8, Order::Weight).unwrap();
    let ops = |out: View| {
        device.swiglu(&Swiglu { gate: gate.view(), up: up.view(), out: product.view() })?;
        device.linear(&Linear { x: product.view(), weight, bias: None, out: Out { view: out, add: true } })
    };
    let recording = device.recording();
    for round in 0..7 {
        for (k, view) in [(3, gate.view()), (5, up.view()), (11, weight)] {
            let values: Vec<f32> = (0..64).map(|i| ((i * k + round) % 13) as f32 / 4.0 - 1.5).collect();
            device.write(HostSlice::F32(&values), view).unwrap();
        }
        match round {
            1 | 4 => {
                let other = device.recording();
                let fails = || device.swiglu(&Swiglu { gate: gate.view(), up: up.view(), out: gate.view() });
                assert!((0..3).all(|_| other.run(fails).is_err()));
            }
            3 => device.reserve(&Largest { tokens: 1 << 14, width: 1 << 8, ..Largest::default() }).unwrap(),
            _ => {}
        }
        recording.run(|| ops(recorded.view())).unwrap();
        ops(called.view()).unwrap();
        let [recorded, called] = [&recorded, &called].map(|sums| device.read(sums.view()).unwrap().wait().unwrap());
        assert!(recorded == called && recorded.iter().any(|sum| *sum != 0.0), "round {round}");
    }
}

/// The card of this machine. Where there is none the tests on it say so and pass, unless `H1_REQUIRE_CUDA` is set.
fn card() -> Option<Device> {
    match cuda::device() {
        Ok(device) => Some(device),
        Err(why) if std::env::var_os("H1_REQUIRE_CUDA").is_none() => {
            println!("skipped: {why}");
            None
        }
        Err(why) => panic!("{why}"),
    }
}

/// The kernels of the CUDA backend on the CPU as on an H100, the threads of a block in one of several orders.
fn emulated_card(order: u32) -> Device {
    emulated::device(emulation((9, 0), order)).unwrap()
}

fn emulation(capability: (u32, u32), order: u32) -> emulated::Emulation {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated");
    emulated::Emulation { folder, order, capability, sanitize: std::env::var_os(SANITIZE).is_some(), rough: false }
}

/// Set in a process that was started with the sanitizers' libraries.
const SANITIZE: &str = "H1_EMULATE_SANITIZED";

/// The device of the WGSL backend; `None`, said in words, where there is no adapter. In CI that is a failure.
fn wgpu_device() -> Option<Device> {
    match wgpu::device() {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("CI").is_none() => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The suite of a backend: a line a backend, which opens it, or skips it with `None`.
macro_rules! differential {
    ($($backend:ident: $open:expr;)*) => {$(
        mod $backend {
            use super::*;

            differential!(@laws $open;
                every_op_agrees_with_the_reference
                arguments_that_lie_elsewhere_are_errors
                wrong_shapes_and_kinds_name_the_op_and_the_argument
                an_output_that_overlaps_an_argument_is_an_error
                memory_that_is_not_there_is_an_error
                a_recording_does_what_its_ops_do
            );
        }
    )*};
    (@laws $open:expr; $($law:ident)*) => {$(
        #[test]
        fn $law() {
            if let Some(device) = $open {
                super::$law(&device);
            }
        }
    )*};
}

differential! {
    on_reference: Some(Device::new(Reference::new()));
    on_cpu: Some(cpu::device(NonZeroUsize::new(2)).unwrap());
    on_cuda: card();
    on_cuda_emulated: Some(emulated_card(0));
    on_wgpu: wgpu_device();
}

/// The device of the WGSL backend kept from some of what its adapter has, and the numbers of what is handed to it.
fn wgpu_with(options: wgpu::Options) -> Option<(Device, wgpu::Counters)> {
    wgpu_device()?;
    Some(wgpu::device_with(&options).unwrap())
}

/// Set in a process whose software Vulkan driver has subgroups of a size of ours, and the sizes that each case has there.
const SUBGROUPS: &str = "H1_SUBGROUPS";
const FEW: u64 = 5;

#[test]
#[cfg(target_os = "linux")]
fn subgroups_may_have_any_size_on_wgpu() {
    let Some(device) = wgpu_device() else { return };
    if !device.info().device.starts_with("llvmpipe") {
        return println!("skipped: {} has the subgroups that it has", device.info().device);
    }
    for (bits, lanes) in [("128", 4), ("256", 8), ("512", 16)] {
        let run = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "on_wgpu::every_op_agrees_with_the_reference", "--nocapture"])
            .env("LP_NATIVE_VECTOR_WIDTH", bits)
            .env(SUBGROUPS, "")
            .output()
            .unwrap();
        let [out, error] = [run.stdout, run.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        let of_that_size = out.contains(&format!("subgroups of {lanes},"));
        assert!(run.status.success() && of_that_size && out.contains("1 passed"), "{bits} bits: {out}\n{error}");
    }
}

#[test]
fn every_op_needs_no_subgroups_on_wgpu() {
    let Some((device, _)) = wgpu_with(wgpu::Options { subgroups: false, ..Default::default() }) else { return };
    assert!(device.info().device.contains("no subgroups"));
    every_op_agrees(&device, FEW);
}

#[test]
fn matrices_over_the_limits_of_bindings_and_buffers_are_split_on_wgpu() {
    let Some((whole, whole_counters)) = wgpu_with(wgpu::Options::default()) else { return };
    let split = |binding, buffer| wgpu_with(wgpu::Options { binding, buffer, ..Default::default() });
    // A binding shows a few rows of a matrix; of a mixer's, one head or channel of all rows.
    let (Some(rows), Some(columns)) = (split(8 << 10, 12 << 10), split(60_000, 70_000)) else { return };
    let (Some(channels), Some(long)) = (split(24_000, 30_000), split(300_000, 350_000)) else { return };
    let mixers = ["attention", "conv1d", "selective_scan", "conv_scan"];
    let mut failures = Vec::new();
    for case in cases::CASES {
        let mixer = mixers.iter().any(|name| case.name.starts_with(name));
        let ((split, split_counters), seeds) = match mixer {
            true if case.name.starts_with("conv1d") => (&channels, 40),
            true if case.name.contains("of a long sequence") => (&long, 8),
            true => (&columns, 40),
            false => (&rows, 16),
        };
        let mut dispatched = |device: &Device, counters: &wgpu::Counters, seed| {
            let before = counters.dispatches();
            match case.run(device, seed) {
                // A head's keys are one binding, and so is the pool of its pages.
                Err(cases::Failure::Backend(Error::Unsupported { .. })) if case.name.starts_with("attention") => {}
                Err(failure) => failures.push(format!("{} (seed {seed}): {failure}", case.name)),
                Ok(_) => {}
            }
            counters.dispatches() - before
        };
        let more = |seed| dispatched(split, split_counters, seed) > dispatched(&whole, &whole_counters, seed);
        let more = (0..seeds).map(more).filter(|more| *more).count();
        println!("{:44} {more} of {seeds} in more dispatches", case.name);
        if more == 0 && !["linear of one row", "clip_factor"].contains(&case.name) {
            failures.push(format!("{} was never split", case.name));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn cpu_gives_the_same_bits_on_any_number_of_threads_and_any_instruction_set() {
    let one = cpu::device(NonZeroUsize::new(1)).unwrap();
    let others = Simd::all().into_iter().flat_map(|simd| [2, 3].map(|threads| (simd, NonZeroUsize::new(threads))));
    for (simd, threads) in others {
        let other = cpu::device_with(threads, simd).unwrap();
        for case in cases::CASES {
            for seed in 0..4 {
                if let Err(failure) = case.same_bits(&other, &one, seed) {
                    panic!("{} (seed {seed}) on {}: {failure}", case.name, other.info().device);
                }
            }
        }
    }
}

#[test]
fn kernels_give_the_same_bits_in_any_order_of_their_threads() {
    let ascending = emulated_card(0);
    for order in [1, 2] {
        let other = emulated_card(order);
        for case in cases::CASES {
            for seed in 0..2 {
                if let Err(failure) = case.same_bits(&other, &ascending, seed) {
                    panic!("{} (seed {seed}) in order {order}: {failure}", case.name);
                }
            }
        }
    }
}

/// The macros that choose between ways to do the same; the others are types and sizes.
const WAYS: [&str; 7] = ["BACK", "CUT", "KEYS_A_SLOT", "M_TILES", "PACK", "VECTOR", "WARPS"];

/// The kernels of a module, each with the way it goes.
fn ways(module: &ModuleKey) -> impl Iterator<Item = String> {
    let chosen = module.numbers().filter(|(name, _)| WAYS.contains(name));
    let way: String = chosen.map(|(name, number)| format!(" {name}={number}")).collect();
    let file = module.source.name;
    module.source.kernels().map(move |kernel| format!("{kernel} of {file}{way}"))
}

/// An H100 and the card before it, which has other kernels of attention, both with rough exponentials: between them the cases
/// launch every kernel of every file, in every way that the host side may ask for.
#[test]
fn cases_launch_every_kernel_and_agree_with_the_reference() {
    let (mut all, mut launched) = (BTreeSet::new(), BTreeSet::new());
    for (capability, only) in [((9, 0), ""), ((8, 0), "attention")] {
        let emulation = emulated::Emulation { rough: true, ..emulation(capability, 2) };
        let (device, kernels) = emulated::watched_device(emulation).unwrap();
        for case in cases::CASES.iter().chain([&cases::MANY_WIDE_ROWS]).filter(|case| case.name.starts_with(only)) {
            for seed in 0..rounds(&device) {
                if let Err(failure) = case.run(&device, seed) {
                    panic!("{} (seed {seed}) on {capability:?}: {failure}", case.name);
                }
            }
        }
        all.extend(variants::all(capability).iter().flat_map(ways));
        for kernel in kernels.kernels() {
            launched.extend(ways(&kernel.module).filter(|way| way.starts_with(&format!("{} of ", kernel.entry))));
        }
    }
    let missing: Vec<_> = all.difference(&launched).map(String::as_str).collect();
    assert!(missing.is_empty(), "no case launched\n{}", missing.join("\n"));
}

#[test]
fn a_norm_of_rows_that_no_block_holds_agrees_with_the_reference_on_cuda() {
    for device in [Some(emulated_card(0)), card()].into_iter().flatten() {
        for seed in 0..3 {
            if let Err(failure) = cases::MANY_WIDE_ROWS.run(&device, seed) {
                panic!("{} on {} (seed {seed}): {failure}", cases::MANY_WIDE_ROWS.name, device.info().device);
            }
        }
    }
}

/// The emulated suite once more in a process with the sanitizers of addresses and of undefined behaviour.
#[test]
#[cfg(target_os = "linux")]
fn kernels_touch_only_what_is_theirs() {
    use std::process::Command;
    let library = |name: &str| {
        let found = Command::new("g++").arg(format!("-print-file-name={name}")).output().unwrap();
        String::from_utf8(found.stdout).unwrap().trim().to_owned()
    };
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["on_cuda_emulated::", "--test-threads", "1"])
        .env("LD_PRELOAD", format!("{}:{}", library("libasan.so"), library("libubsan.so")))
        .env("ASAN_OPTIONS", "detect_leaks=0:allocator_may_return_null=1")
        .env(SANITIZE, "1")
        .output()
        .unwrap();
    let [out, error] = [run.stdout, run.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(run.status.success() && out.contains("test result: ok. 6 passed"), "{out}\n{error}");
}

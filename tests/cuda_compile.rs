//! Every kernel of the CUDA backend, in every variant that the host side may ask for, compiled for cards without having one.
//!
//! NVRTC is enough. Where it is not installed the test says so and passes, unless `CI` is set; `.ci/cuda-tools` installs it.

use std::collections::HashMap;

use h1::backend::cuda::compiler::{self, Compiled};
use h1::backend::cuda::source::{self, HEADERS, ModuleKey, Value};
use h1::backend::cuda::variants;

fn compiler_is_there() -> bool {
    match compiler::version() {
        Ok((major, minor)) => println!("NVRTC {major}.{minor}"),
        Err(why) if std::env::var_os("CI").is_none() => {
            println!("skipped: {why}");
            return false;
        }
        Err(why) => panic!("{why}; .ci/cuda-tools installs it"),
    }
    true
}

fn compile(module: &ModuleKey, architecture: &str) -> Result<Compiled, String> {
    let headers = HEADERS.map(|header| (header.name, header.text));
    compiler::compile(&module.text(), &headers, architecture)
}

/// What is wrong with a module on an architecture; on the one that h1 is made for, spills are, and products of warpgroups
/// that the compiler lets wait for each other.
fn faults(module: &ModuleKey, architecture: &str) -> Option<String> {
    let log = match compile(module, architecture) {
        Ok(compiled) => compiled.log,
        Err(log) => return Some(format!("{module} for {architecture}: {log}")),
    };
    let spills = log.lines().filter(|line| line.contains("spill stores"));
    let spilling = spills.filter(|line| !line.contains(" 0 bytes spill stores, 0 bytes spill loads")).count();
    let warned = log.contains("warning");
    let slow = architecture == "sm_90a" && (spilling > 0 || log.contains("are serialized"));
    (slow || warned || !log.contains("spill stores")).then(|| format!("{module} for {architecture}: {log}"))
}

fn every_variant_compiles(capability: (u32, u32)) {
    if !compiler_is_there() {
        return;
    }
    let (all, architecture) = (variants::all(capability), compiler::architecture(capability));
    let faults: Vec<String> = all.iter().filter_map(|module| faults(module, &architecture)).collect();
    println!("{} modules for {architecture}", all.len());
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_variant_compiles_for_an_h100_and_none_spills() {
    every_variant_compiles((9, 0));
}

#[test]
fn every_variant_compiles_for_an_a100() {
    every_variant_compiles((8, 0));
}

/// How many instructions of each opcode (the low 12 bits of its 16 bytes) a kernel of a cubin has: what lies in the ELF
/// section `.text.KERNEL`.
fn opcodes(cubin: &[u8], kernel: &str) -> HashMap<u16, usize> {
    let number = |at: usize, bytes: usize| {
        cubin[at..at + bytes].iter().rev().fold(0, |number, &byte| number << 8 | usize::from(byte))
    };
    let (headers, size, count, names) = (number(0x28, 8), number(0x3a, 2), number(0x3c, 2), number(0x3e, 2));
    let header = |section: usize| headers + section * size;
    let names = number(header(names) + 0x18, 8);
    let is_kernel = |section: usize| {
        let name = &cubin[names + number(header(section), 4)..];
        name.starts_with(format!(".text.{kernel}\0").as_bytes())
    };
    let section = (0..count).find(|&section| is_kernel(section)).unwrap_or_else(|| panic!("no {kernel}"));
    let (start, bytes) = (number(header(section) + 0x18, 8), number(header(section) + 0x20, 8));
    let mut counts = HashMap::new();
    for at in (start..start + bytes).step_by(16) {
        *counts.entry(number(at, 2) as u16 & 0xfff).or_default() += 1;
    }
    counts
}

/// HMMA; HGMMA with its first factor in shared memory and in registers; UTMALDG, a copy of a box.
const MATRIX: u16 = 0x23c;
const WARPGROUP: [u16; 2] = [0x9f0, 0xdf0];
const BOX: u16 = 0x5b4;

#[test]
fn matrix_kernels_use_the_tensor_cores_and_the_copy_engine() {
    if !compiler_is_there() {
        return;
    }
    let number = |name, value| (name, Value::Number(value));
    for of in ["bf16", "f16"] {
        for head_dim in [64, 128] {
            let defines = [("T_X", Value::Type(of)), number("HEAD_DIM", head_dim)];
            let kernels = |source, defines: &[_], kernels: &[&str]| {
                let cubin = compile(&ModuleKey::new(source, defines), "sm_90a").unwrap().cubin;
                kernels.iter().map(|kernel| opcodes(&cubin, kernel)).collect::<Vec<_>>()
            };
            let mut on_h100 = Vec::new();
            for keys in if head_dim == 64 { &[128][..] } else { &[80, 64] } {
                let more = [&defines[..], &[number("KEYS_A_SLOT", *keys)]].concat();
                on_h100.extend(kernels(&source::ATTENTION_WGMMA, &more, &["attention_wgmma"]));
            }
            let gradients = ["attention_dq_wgmma", "attention_dkv_wgmma"];
            on_h100.extend(kernels(&source::ATTENTION_BACKWARD_WGMMA, &defines, &gradients));
            for counts in &on_h100 {
                let has = |opcode: &u16| counts.get(opcode).is_some_and(|&count| count > 0);
                assert!(WARPGROUP.iter().all(has) && has(&BOX) && !has(&MATRIX), "{of} {head_dim}: {counts:x?}");
            }
            let more = [&defines[..], &[number("WARPS", 4), number("M_TILES", 2)]].concat();
            let counts = &kernels(&source::ATTENTION_MMA, &more, &["attention_mma"])[0];
            assert!(counts[&MATRIX] > 0 && !counts.contains_key(&WARPGROUP[0]));
        }
    }
}

#[test]
fn a_text_that_is_wrong_is_an_error_with_the_compilers_words() {
    if compiler_is_there() {
        let error = compiler::compile("__global__ void f() { wrong; }", &[], "sm_90a").unwrap_err();
        assert!(error.contains("wrong"), "{error}");
    }
}

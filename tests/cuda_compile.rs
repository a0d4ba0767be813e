//! Every kernel of the CUDA backend, in every variant that the host side may ask for, compiled for cards without having one.
//!
//! NVRTC is enough. Where it is not installed the test says so and passes, unless `CI` is set; `.ci/cuda-tools` installs it.

use h1::backend::cuda::compiler::{self, Compiled};
use h1::backend::cuda::source::{HEADERS, ModuleKey};
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

/// What is wrong with a module on an architecture; on the one that h1 is made for, spills are.
fn faults(module: &ModuleKey, architecture: &str) -> Option<String> {
    let log = match compile(module, architecture) {
        Ok(compiled) => compiled.log,
        Err(log) => return Some(format!("{module} for {architecture}: {log}")),
    };
    let spills = log.lines().filter(|line| line.contains("spill stores"));
    let spilling = spills.filter(|line| !line.contains(" 0 bytes spill stores, 0 bytes spill loads")).count();
    let warned = log.contains("warning");
    let spilling = architecture == "sm_90a" && spilling > 0;
    (spilling || warned || !log.contains("spill stores")).then(|| format!("{module} for {architecture}: {log}"))
}

fn every_variant_compiles(architecture: &str) {
    if !compiler_is_there() {
        return;
    }
    let all = variants::all();
    let faults: Vec<String> = all.iter().filter_map(|module| faults(module, architecture)).collect();
    println!("{} modules for {architecture}", all.len());
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_variant_compiles_for_an_h100_and_none_spills() {
    every_variant_compiles("sm_90a");
}

#[test]
fn every_variant_compiles_for_an_a100() {
    every_variant_compiles("sm_80");
}

#[test]
fn a_text_that_is_wrong_is_an_error_with_the_compilers_words() {
    if compiler_is_there() {
        let error = compiler::compile("__global__ void f() { wrong; }", &[], "sm_90a").unwrap_err();
        assert!(error.contains("wrong"), "{error}");
    }
}

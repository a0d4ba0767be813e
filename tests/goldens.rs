//! Every backend is held to the golden numbers of the published PyTorch models.

use std::path::Path;

use h1::backend::select::{self, Name};

fn goldens_hold_on(backend: Name) {
    let device = match select::open(backend, None) {
        Ok(device) => device,
        // A machine without an adapter says so; in CI that is a failure.
        Err(error) if backend == Name::Wgpu && std::env::var_os("CI").is_none() => {
            println!("skipped: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let report = h1::verify::verify(&folder, &device, |_| {}).unwrap();
    for (worst, count) in report.worst() {
        println!("{:40} {count:4} {:40} {:.1e} of {:.1e}", worst.file, worst.tensor, worst.error, worst.tolerance);
    }
    let failed: Vec<_> = report.comparisons().iter().filter(|c| !c.passes()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn goldens_hold_on_reference() {
    goldens_hold_on(Name::Reference);
}

#[test]
fn goldens_hold_on_cpu() {
    goldens_hold_on(Name::Cpu);
}

#[test]
fn goldens_hold_on_wgpu() {
    goldens_hold_on(Name::Wgpu);
}

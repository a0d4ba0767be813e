//! Every backend against the reference: one list of op cases ([`h1::backend::cases`]), and the laws of a device.

use h1::backend::{Device, cases, reference::Reference};

/// Sizes that each case is run at.
const ROUNDS: u64 = 24;

fn every_op_agrees_with_the_reference(device: &Device) {
    let mut failures = Vec::new();
    for case in cases::CASES {
        let runs: Result<Vec<f64>, _> = (0..ROUNDS)
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

/// The suite of a backend: a line a backend.
macro_rules! differential {
    ($($backend:ident: $open:expr;)*) => {$(
        mod $backend {
            use super::*;

            #[test]
            fn every_op_agrees_with_the_reference() {
                super::every_op_agrees_with_the_reference(&$open);
            }

            #[test]
            fn arguments_that_lie_elsewhere_are_errors() {
                super::arguments_that_lie_elsewhere_are_errors(&$open);
            }
        }
    )*};
}

differential! {
    reference: Device::new(Reference::new());
}

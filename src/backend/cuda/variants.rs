//! Every module that the host side may ask for, so that a machine without a card can compile them all.

use super::mixers;
use super::source::{self, ModuleKey, Source, Value};

/// The storage types of weights and activations.
const TYPES: [Value; 3] = [Value::Type("float"), Value::Type("bf16"), Value::Type("f16")];

/// Values that `gemv.cu` reads at a time.
pub(super) const VECTORS: [u32; 4] = [8, 4, 2, 1];

/// A file with each of its types any of the storage types.
pub(super) fn typed(source: &'static Source, names: &[&'static str]) -> Vec<ModuleKey> {
    let mut all = vec![Vec::new()];
    for &name in names {
        let longer = |defines: &Vec<_>| TYPES.map(|of| [&defines[..], &[(name, of)]].concat());
        all = all.iter().flat_map(longer).collect();
    }
    all.into_iter().map(|defines| ModuleKey::new(source, &defines)).collect()
}

fn gemv() -> impl Iterator<Item = ModuleKey> {
    let wide = |module: &ModuleKey| module.text().contains("T_X float") || module.text().contains("T_W float");
    typed(&source::GEMV, &["T_X", "T_W", "T_OUT"]).into_iter().flat_map(move |module| {
        let fitting = VECTORS.into_iter().filter(|&vector| vector <= if wide(&module) { 4 } else { 8 });
        fitting.map(|vector| module.with(("VECTOR", Value::Number(vector)))).collect::<Vec<_>>()
    })
}

/// All of them, on a card of an architecture.
pub fn all(capability: (u32, u32)) -> Vec<ModuleKey> {
    let mut all: Vec<ModuleKey> = gemv().collect();
    let files: [(&Source, &[&[&str]]); 13] = [
        (&source::EMBED, &[&["T_X"]]),
        (&source::RMS_NORM, &[&["T_X", "T_W", "T_OUT"]]),
        (&source::COLUMNS, &[&[], &["T_X"]]),
        (&source::SWIGLU, &[&["T_X"]]),
        (&source::ROPE, &[&["T_X"]]),
        (&source::PAGE_WRITE, &[&["T_X", "T_OUT"]]),
        (&source::ROPE_PAGE_WRITE, &[&["T_X", "T_OUT"]]),
        (&source::NEG_EXP, &[&[], &["T_X"]]),
        (&source::HEAD_LOSS, &[&["T_OUT"]]),
        (&source::CHOOSE, &[&["T_X"]]),
        (&source::ROWS, &[&["T_X", "T_OUT"]]),
        (&source::MEMORY, &[&[], &["T_OUT"], &["T_X", "T_OUT"]]),
        (&source::OPTIMISER, &[&[], &["T_OUT"]]),
    ];
    for (source, kinds) in files {
        all.extend(kinds.iter().flat_map(|names| typed(source, names)));
    }
    all.extend(mixers::variants(capability));
    all
}

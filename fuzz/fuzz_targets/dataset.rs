//! A data set of any bytes: after a first byte that says which, JSON lines, a table, or a text.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use h1::text::dataset::read_records;
use libfuzzer_sys::fuzz_target;

static PATHS: LazyLock<[PathBuf; 3]> =
    LazyLock::new(|| ["data.jsonl", "data.parquet", "data.txt"].map(|name| h1_fuzz::folder().join(name)));

fuzz_target!(|data: &[u8]| {
    h1_fuzz::contain_panics();
    let Some((first, data)) = data.split_first() else { return };
    let path = &PATHS[usize::from(first % 3)];
    std::fs::write(path, data).expect("the input is written");
    h1_fuzz::metered(data.len(), 4096, || {
        if let Ok(records) = read_records(path) {
            assert!(!records.is_empty());
            records.iter().for_each(|record| drop(record.content()));
        }
    });
});

//! The header of a safetensors file: eight bytes with the length of a JSON object, the object, then the values.
//!
//! Source of the format: the README of huggingface/safetensors.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::storage::Storage;

/// Bytes of the header's length.
const LENGTH_BYTES: usize = 8;
/// No longer header is read, as in the reference implementation.
const LONGEST_HEADER: u64 = 100_000_000;

/// Where a tensor lies in its file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) storage: Storage,
    pub(super) shape: Vec<usize>,
    pub(super) start: usize,
    pub(super) end: usize,
}

/// A tensor as the header spells it.
#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

type Parsed<T> = std::result::Result<T, String>;

/// The tensors of a whole file; the error is what is wrong with it.
pub(super) fn parse(file: &[u8]) -> Parsed<HashMap<String, Entry>> {
    let (length, rest) = file
        .split_first_chunk::<LENGTH_BYTES>()
        .ok_or_else(|| format!("{} bytes are too few for a safetensors file", file.len()))?;
    let length = u64::from_le_bytes(*length);
    if length > LONGEST_HEADER {
        return Err(format!("a header of {length} bytes is more than {LONGEST_HEADER}: not a safetensors file"));
    }
    let header = rest
        .get(..length as usize)
        .ok_or_else(|| format!("the header has {length} bytes, but only {} follow: the file is cut", rest.len()))?;
    let header: Map<String, Value> =
        serde_json::from_slice(header).map_err(|error| format!("the header is not a JSON object: {error}"))?;
    let values = LENGTH_BYTES + length as usize;
    let mut tensors = HashMap::with_capacity(header.len());
    for (name, entry) in header {
        if name == "__metadata__" {
            let words: Result<HashMap<String, String>, _> = serde_json::from_value(entry);
            words.map_err(|error| format!("`__metadata__` does not map words to words: {error}"))?;
        } else {
            let entry = Entry::parse(entry, values, file.len()).map_err(|what| format!("tensor {name}: {what}"))?;
            tensors.insert(name, entry);
        }
    }
    cover(&tensors, values, file.len())?;
    Ok(tensors)
}

impl Entry {
    /// `values` is where offset 0 lies, `end` where the file ends.
    fn parse(entry: Value, values: usize, end: usize) -> Parsed<Self> {
        let entry: HeaderEntry =
            serde_json::from_value(entry).map_err(|error| format!("its header entry is wrong: {error}"))?;
        let storage = Storage::PLAIN.into_iter().find(|storage| storage.name() == entry.dtype);
        let storage = storage.ok_or_else(|| format!("h1 does not read dtype {:?}", entry.dtype))?;
        let size = entry.shape.iter().try_fold(storage.block_bytes(), |size, dim| size.checked_mul(*dim));
        let size = size.ok_or_else(|| format!("shape {:?} is too large", entry.shape))?;
        let (first, last) = entry.data_offsets;
        if last.checked_sub(first) != Some(size) {
            let name = storage.name();
            return Err(format!("{name} of shape {:?} takes {size} bytes, not {first}..{last}", entry.shape));
        }
        match values.checked_add(last) {
            Some(last) if last <= end => Ok(Entry { storage, shape: entry.shape, start: values + first, end: last }),
            _ => Err(format!("it ends at {last}, past the {} bytes of values: the file is cut", end - values)),
        }
    }
}

/// Checks that the tensors lie one after the other from `start` to `end`.
fn cover(tensors: &HashMap<String, Entry>, start: usize, end: usize) -> Parsed<()> {
    let mut sorted: Vec<(&String, &Entry)> = tensors.iter().collect();
    sorted.sort_by_key(|(name, entry)| (entry.start, entry.end, *name));
    let mut at = start;
    for (name, entry) in sorted {
        if entry.start != at {
            let what = if entry.start < at { "overlaps the tensor" } else { "leaves a gap to what lies" };
            return Err(format!("tensor {name} {what} before it"));
        }
        at = entry.end;
    }
    if at == end { Ok(()) } else { Err(format!("{} bytes after the last tensor belong to none", end - at)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn file(header: &Value, values: usize) -> Vec<u8> {
        let header = header.to_string();
        let length = (header.len() as u64).to_le_bytes();
        [&length, header.as_bytes(), &vec![1; values]].concat()
    }

    fn sound() -> Vec<u8> {
        let header = json!({
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [0, 12]},
            "f": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]},
            "i": {"dtype": "I64", "shape": [], "data_offsets": [20, 28]},
            "none": {"dtype": "U8", "shape": [4, 0], "data_offsets": [28, 28]},
        });
        file(&header, 28)
    }

    fn refusal(header: Value, values: usize) -> String {
        parse(&file(&header, values)).expect_err("refused")
    }

    #[test]
    fn a_sound_file_parses_to_its_tensors() {
        let tensors = parse(&sound()).unwrap();
        assert_eq!(tensors.len(), 4);
        let b = &tensors["b"];
        assert_eq!((b.storage, &b.shape[..], b.end - b.start), (Storage::Bf16, &[3, 2][..], 12));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = sound();
        for length in 0..whole.len() {
            assert!(parse(&whole[..length]).is_err(), "cut to {length} bytes");
        }
    }

    #[test]
    fn a_huge_header_is_refused_before_it_is_read() {
        for length in [u64::MAX, u64::MAX - 7, 1 << 40, LONGEST_HEADER, 200] {
            let mut bytes = sound();
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            assert!(parse(&bytes).unwrap_err().contains("header"));
        }
    }

    #[test]
    fn ranges_that_overlap_leave_a_gap_or_end_early_are_refused_by_name() {
        let u8s =
            |first: usize, last: usize| json!({"dtype": "U8", "shape": [last - first], "data_offsets": [first, last]});
        assert!(refusal(json!({"a": u8s(0, 4), "b": u8s(3, 6)}), 6).contains("tensor b overlaps"));
        assert!(refusal(json!({"a": u8s(0, 4), "b": u8s(5, 6)}), 6).contains("tensor b leaves a gap"));
        assert!(refusal(json!({"a": u8s(0, 4)}), 6).contains("2 bytes after the last"));
        assert!(refusal(json!({"a": u8s(0, 4)}), 3).contains("tensor a: it ends at 4"));
    }

    #[test]
    fn an_entry_at_odds_with_itself_is_refused_by_name() {
        let entry = |dtype: &str, shape: Value, offsets: Value| json!({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}});
        let huge = 1u64 << 62;
        for header in [
            entry("F8", json!([4]), json!([0, 4])),
            entry("F32", json!([2]), json!([0, 4])),
            entry("F32", json!([huge, huge]), json!([0, 4])),
            entry("U8", json!([4]), json!([4, 0])),
            entry("U8", json!([-4]), json!([0, 4])),
            entry("U8", json!([u64::MAX]), json!([0, u64::MAX])),
            json!({"a": 3}),
        ] {
            assert!(refusal(header, 4).starts_with("tensor a: "));
        }
    }

    /// The judge: the published crate.
    fn accepted(bytes: &[u8]) -> bool {
        safetensors::SafeTensors::deserialize(bytes).is_ok()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_changed_byte_is_judged_as_the_published_reader_judges_it(at in 0usize..320, byte in any::<u8>()) {
            let mut bytes = sound();
            let at = at % bytes.len();
            bytes[at] = byte;
            prop_assert_eq!(parse(&bytes).is_ok(), accepted(&bytes));
        }

        #[test]
        fn whatever_the_header_says_an_accepted_tensor_lies_in_the_file(
            entries in prop::collection::vec((
                prop::sample::select(vec!["U8", "BF16", "F32", "I64"]),
                prop::collection::vec(prop::sample::select(vec![0, 1, 2, 3, 1usize << 31, usize::MAX]), 0..4),
                prop::array::uniform2(prop::sample::select(vec![0, 1, 2, 4, 8, 12, 16, 1usize << 61, usize::MAX])),
            ), 0..3),
            values in 0usize..20,
        ) {
            let entry = |(dtype, shape, offsets)| json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            let header = entries.into_iter().enumerate().map(|(at, parts)| (at.to_string(), entry(parts))).collect();
            let bytes = file(&Value::Object(header), values);
            if let Ok(tensors) = parse(&bytes) {
                prop_assert!(tensors.values().all(|entry| entry.end <= bytes.len()));
                let size: usize = tensors.values().map(|entry| entry.end - entry.start).sum();
                prop_assert_eq!(size, values);
            }
        }
    }
}

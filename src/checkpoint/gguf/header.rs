//! The header of a GGUF file: metadata, and where each tensor lies.

use std::collections::HashMap;

use super::cursor::{Cursor, Parsed};
use super::value::{Number, Stored, number};
use crate::checkpoint::header::Entry;
use crate::checkpoint::storage::Storage;

const MAGIC: [u8; 4] = *b"GGUF";
/// The key that says where tensors may start, and what holds without it.
const ALIGNMENT: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
/// Most sizes of a tensor.
const MOST_DIMENSIONS: u32 = 4;
/// Fewest bytes of a metadata value (a key of a byte, a type, a value of a byte) and of a tensor's entry (a name of a byte, the
/// number of sizes, a type, an offset).
const LEAST_METADATA: usize = 8 + 1 + 4 + 1;
const LEAST_TENSOR: usize = 8 + 1 + 4 + 4 + 8;

type Contents = (HashMap<String, Stored>, HashMap<String, Entry>);

/// The metadata and the tensors of a whole file; the error is what is wrong with it.
pub(super) fn parse(file: &[u8]) -> Parsed<Contents> {
    if !file.starts_with(&MAGIC) {
        return Err("not a GGUF file, which begins with GGUF".to_owned());
    }
    let mut cursor = Cursor::new(file);
    cursor.skip(MAGIC.len() as u64, 1)?;
    match cursor.u32()? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => {
            return Err("a GGUF file of a big-endian machine, which h1 does not read".to_owned());
        }
        version => return Err(format!("GGUF version {version}: h1 reads versions 2 and 3")),
    }
    let tensors = cursor.count("tensors", LEAST_TENSOR)?;
    let values = cursor.count("metadata values", LEAST_METADATA)?;
    let mut metadata = HashMap::new();
    for _ in 0..values {
        let key = cursor.name().map_err(|what| format!("metadata: {what}"))?;
        let value = Stored::parse(&mut cursor).map_err(|what| format!("metadata {key}: {what}"))?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(format!("metadata {key} is there twice"));
        }
    }
    let alignment = alignment(file, &metadata)?;
    let mut list = Vec::new();
    for _ in 0..tensors {
        let name = cursor.name().map_err(|what| format!("the list of tensors: {what}"))?;
        let tensor = tensor(&mut cursor).map_err(|what| format!("tensor {name}: {what}"))?;
        list.push((name, tensor));
    }
    let entries = place(list, cursor.at().next_multiple_of(alignment), (alignment, file.len()))?;
    Ok((metadata, entries))
}

fn alignment(file: &[u8], metadata: &HashMap<String, Stored>) -> Parsed<usize> {
    let Some(stored) = metadata.get(ALIGNMENT) else { return Ok(DEFAULT_ALIGNMENT) };
    let value = number(stored.kind, &file[stored.range.clone()]).filter(|_| stored.count.is_none());
    match value {
        // A page is the most that any writer asks for; a larger one would only make the next multiple overflow.
        Some(Number::Whole(value @ 1..=65_536)) if value & (value - 1) == 0 => Ok(value as usize),
        _ => Err(format!("metadata {ALIGNMENT}: expected a power of two, 1 to 65536")),
    }
}

/// A tensor as the header spells it.
struct Listed {
    storage: Storage,
    /// Outermost first.
    shape: Vec<usize>,
    bytes: usize,
    /// From the start of the values.
    offset: u64,
}

fn tensor(cursor: &mut Cursor<'_>) -> Parsed<Listed> {
    let dimensions = cursor.u32()?;
    if dimensions > MOST_DIMENSIONS {
        return Err(format!("it has {dimensions} sizes, expected at most {MOST_DIMENSIONS}"));
    }
    let mut shape = (0..dimensions).map(|_| cursor.u64()).collect::<Parsed<Vec<u64>>>()?;
    shape.reverse();
    let id = cursor.u32()?;
    let storage = storage(id).ok_or_else(|| {
        format!(
            "its type is {}; h1 reads F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K",
            ggml_name(id)
        )
    })?;
    let too_large = || format!("its sizes {shape:?} are too large");
    let sizes = shape.iter().map(|size| usize::try_from(*size).map_err(|_| too_large()));
    let shape = sizes.collect::<Parsed<Vec<usize>>>()?;
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(storage.block_len()) {
        let (name, block) = (storage.name(), storage.block_len());
        return Err(format!("{name} holds blocks of {block} values, but a row has {row}"));
    }
    let blocks = shape.iter().rev().skip(1).try_fold(row / storage.block_len(), |n, size| n.checked_mul(*size));
    let bytes = blocks.and_then(|blocks| blocks.checked_mul(storage.block_bytes())).ok_or_else(too_large)?;
    // Their product fits when the bytes do, unless a size is 0.
    shape.iter().try_fold(1usize, |n, size| n.checked_mul(*size)).ok_or_else(too_large)?;
    Ok(Listed { storage, shape, bytes, offset: cursor.u64()? })
}

/// Gives the tensors their ranges, and holds these against the file and against each other.
fn place(list: Vec<(&str, Listed)>, start: usize, (alignment, end): (usize, usize)) -> Parsed<HashMap<String, Entry>> {
    let mut placed = Vec::with_capacity(list.len());
    for (name, Listed { storage, shape, bytes, offset }) in list {
        let first = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(start));
        let last = first.and_then(|first| first.checked_add(bytes));
        match (first, last) {
            (Some(first), Some(last)) if last <= end => {
                if !offset.is_multiple_of(alignment as u64) {
                    return Err(format!("tensor {name} starts at {offset}, which is no multiple of {alignment}"));
                }
                placed.push((name, Entry { storage, shape, start: first, end: last }));
            }
            _ => {
                let held = end.saturating_sub(start);
                return Err(format!(
                    "tensor {name} takes {bytes} bytes from {offset} on, past the {held} bytes of values: the file is cut"
                ));
            }
        }
    }
    placed.sort_by_key(|(name, entry)| (entry.start, entry.end, *name));
    for pair in placed.windows(2) {
        if let [(before, earlier), (name, later)] = pair
            && later.start < earlier.end
        {
            return Err(format!("tensor {name} overlaps tensor {before}"));
        }
    }
    let mut entries = HashMap::with_capacity(placed.len());
    for (name, entry) in placed {
        if entries.insert(name.to_owned(), entry).is_some() {
            return Err(format!("tensor {name} is there twice"));
        }
    }
    Ok(entries)
}

/// The storage of a GGML type.
fn storage(id: u32) -> Option<Storage> {
    Some(match id {
        0 => Storage::F32,
        1 => Storage::F16,
        2 => Storage::Q4_0,
        3 => Storage::Q4_1,
        6 => Storage::Q5_0,
        7 => Storage::Q5_1,
        8 => Storage::Q8_0,
        12 => Storage::Q4_K,
        13 => Storage::Q5_K,
        14 => Storage::Q6_K,
        28 => Storage::F64,
        30 => Storage::Bf16,
        _ => return None,
    })
}

/// The name of a GGML type that h1 does not read, for the error.
fn ggml_name(id: u32) -> String {
    let name = match id {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("the unknown number {id}"),
    };
    name.to_owned()
}

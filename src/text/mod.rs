//! Tokenizer, data sets, packing into segments.

pub mod arithmetic;
pub mod cache;
pub mod characters;
pub mod dataset;
pub mod documents;
pub mod encode;
pub mod packing;
pub mod record;
pub mod template;
pub mod tokenizer;

use sha2::{Digest, Sha256};

/// A number of `text` that is the same on every machine: the first eight bytes of its SHA-256, little-endian.
///
/// `purpose` keeps two uses of the same text apart, so that one split says nothing about another.
fn text_hash(purpose: &str, text: &[u8]) -> u64 {
    let mut hash = Sha256::new();
    hash.update(purpose.as_bytes());
    hash.update([0]);
    hash.update(text);
    let digest = hash.finalize();
    digest.iter().take(8).rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

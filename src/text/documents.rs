//! Tokenised texts, one after the other, in memory or in a file that is mapped into it.

use super::encode::{Encoded, Encoder};
use super::record::Record;
use super::tokenizer::TokenizerError;
use memmap2::Mmap;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::ops::Range;
use std::sync::Arc;

/// Tokenised texts.
#[derive(Clone, Debug, Default)]
pub struct Documents {
    store: Arc<Store>,
    /// How many of the store's documents are taken.
    len: usize,
}

/// One text of [`Documents`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document<'a> {
    /// The ids.
    pub ids: &'a [u32],
    /// Whether each token is to be learnt: the logits before it count.
    pub counts: &'a [bool],
}

#[derive(Debug)]
enum Store {
    Owned(Owned),
    Mapped(Mapped),
}

#[derive(Clone, Debug, Default)]
struct Owned {
    ids: Vec<u32>,
    counts: Vec<bool>,
    ends: Vec<u64>,
}

/// Where the three lists lie in a map.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) map: Mmap,
    pub(super) ids: Range<usize>,
    pub(super) ends: Range<usize>,
    pub(super) counts: Range<usize>,
}

impl Default for Store {
    fn default() -> Self {
        Store::Owned(Owned::default())
    }
}

impl Store {
    fn ids(&self) -> &[u32] {
        match self {
            Store::Owned(owned) => &owned.ids,
            Store::Mapped(mapped) => slice(mapped.map.get(mapped.ids.clone())),
        }
    }

    fn ends(&self) -> &[u64] {
        match self {
            Store::Owned(owned) => &owned.ends,
            Store::Mapped(mapped) => slice(mapped.map.get(mapped.ends.clone())),
        }
    }

    fn counts(&self, range: Range<usize>) -> Option<&[bool]> {
        match self {
            Store::Owned(owned) => owned.counts.get(range),
            Store::Mapped(mapped) => {
                bytemuck::checked::try_cast_slice(mapped.map.get(mapped.counts.clone())?.get(range)?).ok()
            }
        }
    }
}

fn slice<T: bytemuck::AnyBitPattern>(bytes: Option<&[u8]>) -> &[T] {
    bytes.and_then(|bytes| bytemuck::try_cast_slice(bytes).ok()).unwrap_or_default()
}

impl Documents {
    /// The documents of `records`, in their order.
    ///
    /// # Errors
    /// When one cannot be turned into tokens.
    pub fn encode(records: &[Record], encoder: &Encoder<'_>) -> Result<Documents, TokenizerError> {
        let encoded: Vec<Encoded> =
            records.par_iter().map(|record| encoder.encode(record)).collect::<Result<_, _>>()?;
        let mut documents = Documents::default();
        encoded.iter().for_each(|document| documents.push(&document.ids, &document.counts));
        Ok(documents)
    }

    pub(super) fn of_map(mapped: Mapped) -> Documents {
        let store = Store::Mapped(mapped);
        Documents { len: store.ends().len(), store: Arc::new(store) }
    }

    /// Appends a document; `counts` says of each token whether it is to be learnt.
    pub fn push(&mut self, ids: &[u32], counts: &[bool]) {
        let mut owned = match Arc::get_mut(&mut self.store) {
            Some(Store::Owned(owned)) if owned.ends.len() == self.len => std::mem::take(owned),
            _ => self.owned(),
        };
        owned.ids.extend_from_slice(ids);
        owned.counts.extend(counts.iter().copied().chain(std::iter::repeat(false)).take(ids.len()));
        owned.ends.push(owned.ids.len() as u64);
        self.len += 1;
        self.store = Arc::new(Store::Owned(owned));
    }

    fn owned(&self) -> Owned {
        let tokens = self.tokens();
        Owned {
            ids: self.store.ids()[..tokens].to_vec(),
            counts: self.store.counts(0..tokens).unwrap_or_default().to_vec(),
            ends: self.store.ends()[..self.len].to_vec(),
        }
    }

    /// The first `count` of these documents, or all of them.
    pub fn first(&self, count: usize) -> Documents {
        Documents { store: Arc::clone(&self.store), len: count.min(self.len) }
    }

    /// The number of documents.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no document.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number of tokens of all documents.
    pub fn tokens(&self) -> usize {
        self.start(self.len)
    }

    /// Where the document at `index` starts.
    fn start(&self, index: usize) -> usize {
        index.checked_sub(1).and_then(|before| self.store.ends().get(before)).map_or(0, |end| *end as usize)
    }

    /// The document at `index`, if there are so many.
    pub fn get(&self, index: usize) -> Option<Document<'_>> {
        let range = (index < self.len).then(|| self.start(index)..self.start(index + 1))?;
        Some(Document { ids: self.store.ids().get(range.clone())?, counts: self.store.counts(range)? })
    }

    /// Sixteen hexadecimal digits that tell these documents from others: the start of a SHA-256 over everything in
    /// them.
    pub fn fingerprint(&self) -> String {
        let mut hash = Fingerprint::default();
        for document in (0..self.len).filter_map(|index| self.get(index)) {
            hash.add(document.ids, document.counts);
        }
        hash.finish().iter().take(8).fold(String::new(), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

impl PartialEq for Documents {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && (0..self.len).all(|index| self.get(index) == other.get(index))
    }
}

/// The hash of documents as they come.
#[derive(Default)]
pub(super) struct Fingerprint {
    ids: Sha256,
    counts: Sha256,
    ends: Sha256,
    tokens: u64,
}

impl Fingerprint {
    pub(super) fn add(&mut self, ids: &[u32], counts: &[bool]) {
        self.tokens += ids.len() as u64;
        match cfg!(target_endian = "little") {
            true => self.ids.update(bytemuck::cast_slice(ids)),
            false => ids.iter().for_each(|id| self.ids.update(id.to_le_bytes())),
        }
        self.counts.update(bytemuck::cast_slice(counts));
        self.ends.update(self.tokens.to_le_bytes());
    }

    pub(super) fn finish(self) -> [u8; 32] {
        let parts = [self.ids, self.counts, self.ends].map(Sha256::finalize);
        parts.iter().fold(Sha256::new(), |hash, part| hash.chain_update(part)).finalize().into()
    }
}

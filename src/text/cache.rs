//! Tokenised once: documents in files that are mapped into memory, named by what they were made of.
//!
//! ```text
//! bytes 0..8        "h1tokens"
//!       8..40       the key: a SHA-256 over the texts, the tokenizer, and how they were turned into tokens
//!       40..56      documents, tokens; u64
//!       56..88      SHA-256 of what follows
//!       128..       ids, u32 [tokens]; from a multiple of 8 on, ends, u64 [documents]; counts, u8 [tokens]
//! ```
//!
//! Numbers are little-endian, and what lies between is zero. A file appears whole or not at all; one that is cut off or changed is made again.

use super::dataset::{self, DatasetError, Format, Row};
use super::documents::{Documents, Fingerprint, Mapped};
use super::encode::{Encoded, Encoder};
use super::tokenizer::TokenizerError;
use memmap2::Mmap;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

const MAGIC: &[u8; 8] = b"h1tokens";
/// Raised when other tokens are made of the same texts.
const VERSION: u32 = 1;
const HEADER: usize = 128;
/// Rows are tokenised together until they have so many bytes.
const BATCH_BYTES: u64 = 1 << 20;

/// Why documents could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A data set could not be read.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// A row could not be turned into tokens.
    #[error("{}:{row}: {source}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The row's number, from 1.
        row: usize,
        /// Why not.
        source: TokenizerError,
    },
    /// The tokens could not be kept.
    #[error("cannot {action} {}: {source}", path.display())]
    Cache {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file became another one meanwhile.
    #[error("{}: the file was changed while it was read", .0.display())]
    Changed(PathBuf),
}

/// The folder where tokens are kept.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

/// How far the reading of a data set is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Those done.
    pub done: u64,
    /// All of them.
    pub all: u64,
}

impl Cache {
    /// The usual folder: `$H1_CACHE`, or `h1` in the user's folder of caches; without either, or where it cannot be
    /// written to, a folder of the system for what nobody keeps.
    pub fn usual() -> Cache {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let base = variable("H1_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|folder| folder.join("h1")))
            .or_else(|| variable("LOCALAPPDATA").map(|folder| folder.join("h1")))
            .or_else(|| variable("HOME").map(|folder| folder.join(".cache/h1")));
        let tokens = base.map(|base| base.join("tokens"));
        let usable = |folder: &PathBuf| fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder)).is_ok();
        Cache { folder: tokens.filter(usable).unwrap_or_else(|| std::env::temp_dir().join("h1-tokens")) }
    }

    /// This folder.
    pub fn at(folder: &Path) -> Cache {
        Cache { folder: folder.to_path_buf() }
    }

    /// The documents of the files `paths` in their order, and of those the `share` that is held out.
    ///
    /// # Errors
    /// When a file cannot be read, a row cannot be turned into tokens, or they cannot be kept.
    pub fn documents(
        &self,
        paths: &[PathBuf],
        share: f64,
        encoder: &Encoder<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<[Documents; 2], LoadError> {
        let key = key(paths, share, encoder)?;
        let names = ["train", "held-out"].map(|side| self.folder.join(format!("{}-{side}.bin", hex(&key[..16]))));
        if let [Some(train), Some(held_out)] = names.each_ref().map(|path| open(path, &key)) {
            return Ok([train, held_out]);
        }
        let failed = |action, path: &Path| {
            let path = path.to_path_buf();
            move |source| LoadError::Cache { action, path, source }
        };
        fs::create_dir_all(&self.folder).map_err(failed("create", &self.folder))?;
        let new = || Writer::new(&self.folder).map_err(failed("write to", &self.folder));
        let mut writers = [new()?, new()?];
        let all = paths.iter().map(|path| fs::metadata(path).map_or(0, |file| file.len())).sum();
        let mut progress = Progress { done: 0, all }.told(progress);
        for path in paths {
            let mut batch = Batch { path, share, encoder, rows: Vec::new(), bytes: 0, writers: &mut writers };
            dataset::read(path, |row| {
                if let Some(bytes) = batch.add(row)? {
                    progress(bytes);
                }
                Ok::<_, LoadError>(())
            })?;
            progress(batch.flush()?);
        }
        if self::key(paths, share, encoder)? != key {
            return Err(LoadError::Changed(paths[0].clone()));
        }
        let kept = std::iter::zip(writers, &names).map(|(writer, path)| {
            writer.finish(path, &key).map_err(failed("write", path))?;
            open(path, &key).ok_or_else(|| LoadError::Changed(path.clone()))
        });
        let mut kept = kept.collect::<Result<Vec<_>, _>>()?.into_iter();
        Ok(std::array::from_fn(|_| kept.next().unwrap_or_default()))
    }
}

impl Progress {
    /// Tells of more bytes.
    fn told(mut self, progress: &mut dyn FnMut(Progress)) -> impl FnMut(u64) {
        move |bytes| {
            self.done += bytes;
            progress(self);
        }
    }
}

/// Rows on their way to tokens.
struct Batch<'a> {
    path: &'a Path,
    share: f64,
    encoder: &'a Encoder<'a>,
    rows: Vec<Row>,
    bytes: u64,
    writers: &'a mut [Writer; 2],
}

impl Batch<'_> {
    /// Takes a row; says how many bytes were done, when some were.
    fn add(&mut self, row: Row) -> Result<Option<u64>, LoadError> {
        self.bytes += row.bytes;
        self.rows.push(row);
        if self.bytes < BATCH_BYTES {
            return Ok(None);
        }
        self.flush().map(Some)
    }

    /// Tokenises the rows on all cores and writes them in their order.
    fn flush(&mut self) -> Result<u64, LoadError> {
        let Batch { path, share, encoder, .. } = *self;
        let encode = |row: &Row| -> Result<(usize, Encoded), LoadError> {
            let side = usize::from(dataset::held_out(&row.record, share)?);
            let wrong = |source| LoadError::Row { path: path.to_path_buf(), row: row.number, source };
            Ok((side, encoder.encode(&row.record).map_err(wrong)?))
        };
        let encoded: Vec<_> = self.rows.par_iter().map(encode).collect::<Result<_, _>>()?;
        for (side, document) in encoded {
            let writer = &mut self.writers[side];
            let path = writer.ids.get_ref().path().to_path_buf();
            writer.push(&document).map_err(|source| LoadError::Cache { action: "write", path, source })?;
        }
        self.rows.clear();
        Ok(std::mem::take(&mut self.bytes))
    }
}

/// What tells these documents from all others.
fn key(paths: &[PathBuf], share: f64, encoder: &Encoder<'_>) -> Result<[u8; 32], LoadError> {
    let mut hash = Sha256::new();
    hash.update(VERSION.to_le_bytes());
    hash.update(share.to_bits().to_le_bytes());
    hash.update(encoder.identity());
    for path in paths {
        let format = Format::of(path)?;
        let read = || {
            let (mut file, mut content, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; 1 << 16]);
            loop {
                match file.read(&mut buffer)? {
                    0 => return Ok(content.finalize()),
                    count => content.update(&buffer[..count]),
                }
            }
        };
        hash.update(read().map_err(|source| DatasetError::Io { path: path.clone(), source })?);
        hash.update([format as u8]);
    }
    Ok(hash.finalize().into())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A file under way: ids where they will lie, counts beside it.
struct Writer {
    ids: BufWriter<NamedTempFile>,
    counts: BufWriter<File>,
    ends: Vec<u64>,
    tokens: u64,
    fingerprint: Fingerprint,
}

impl Writer {
    fn new(folder: &Path) -> io::Result<Writer> {
        let mut ids = BufWriter::new(NamedTempFile::new_in(folder)?);
        ids.write_all(&[0; HEADER])?;
        let counts = BufWriter::new(tempfile::tempfile_in(folder)?);
        Ok(Writer { ids, counts, ends: Vec::new(), tokens: 0, fingerprint: Fingerprint::default() })
    }

    fn push(&mut self, document: &Encoded) -> io::Result<()> {
        document.ids.iter().try_for_each(|id| self.ids.write_all(&id.to_le_bytes()))?;
        self.counts.write_all(bytemuck::cast_slice(&document.counts))?;
        self.tokens += document.ids.len() as u64;
        self.ends.push(self.tokens);
        self.fingerprint.add(&document.ids, &document.counts);
        Ok(())
    }

    /// Gives the file its name when all of it is on the disk.
    fn finish(mut self, path: &Path, key: &[u8; 32]) -> io::Result<()> {
        self.ids.write_all(&[0; 8][..padding(self.tokens as usize)])?;
        self.ends.iter().try_for_each(|end| self.ids.write_all(&end.to_le_bytes()))?;
        let mut counts = self.counts.into_inner()?;
        counts.seek(SeekFrom::Start(0))?;
        io::copy(&mut counts, &mut self.ids)?;
        let mut file = self.ids.into_inner()?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(MAGIC)?;
        file.write_all(key)?;
        file.write_all(&(self.ends.len() as u64).to_le_bytes())?;
        file.write_all(&self.tokens.to_le_bytes())?;
        file.write_all(&self.fingerprint.finish())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    }
}

/// Bytes between so many ids and what is aligned to eight bytes.
fn padding(tokens: usize) -> usize {
    4 * (tokens % 2)
}

/// The documents in a file of this key; none where it is not there, cut off or changed.
fn open(path: &Path, key: &[u8; 32]) -> Option<Documents> {
    let file = File::open(path).ok()?;
    // SAFETY: whoever writes such a file gives it its name when it is whole, and nobody changes it afterwards.
    let map = unsafe { Mmap::map(&file) }.ok()?;
    let number = |at: usize| usize::try_from(u64::from_le_bytes(map.get(at..at + 8)?.try_into().ok()?)).ok();
    let (documents, tokens) = (number(40)?, number(48)?);
    let ids = HEADER..tokens.checked_mul(4)?.checked_add(HEADER)?;
    let start = ids.end.checked_add(padding(tokens))?;
    let ends = start..documents.checked_mul(8)?.checked_add(start)?;
    let counts = ends.end..ends.end.checked_add(tokens)?;
    if map.get(..8)? != MAGIC || map.get(8..40)? != key || counts.end != map.len() {
        return None;
    }
    if [88..HEADER, ids.end..ends.start].into_iter().any(|gap| map[gap].iter().any(|byte| *byte != 0)) {
        return None;
    }
    let stored: [u8; 32] = map.get(56..88)?.try_into().ok()?;
    let kept = Documents::of_map(Mapped { map, ids, ends, counts });
    let mut fingerprint = Fingerprint::default();
    for index in 0..documents {
        let document = kept.get(index)?;
        fingerprint.add(document.ids, document.counts);
    }
    (kept.tokens() == tokens && fingerprint.finish() == stored && cfg!(target_endian = "little")).then_some(kept)
}

#[cfg(test)]
mod tests;

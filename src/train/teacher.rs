//! The teacher's part of a distillation step: its normed hidden states of the rows that count, computed now or read back.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use super::error::{Error, Result};
use crate::backend::{self, Buffer, HostSlice, Segments, View};
use crate::model::decoder::{Activations, Keep, Model};
use crate::model::head::FinalNorm;

/// A teacher with the memory for its forward pass.
#[derive(Debug)]
pub struct Teacher {
    model: Arc<Model>,
    memory: Option<(Activations, FinalNorm)>,
    remembered: Option<Remembered>,
}

impl Teacher {
    /// A teacher that runs at every step.
    pub fn live(model: Arc<Model>) -> Self {
        Teacher { model, memory: None, remembered: None }
    }

    /// A teacher that runs once for each batch: its outputs for up to `rows` rows of the head are kept in a file without a
    /// name in `folder`, and batches that come again read them there. The bits are the same as without.
    ///
    /// # Errors
    /// When the disk has no room for [`Self::bytes`] of them, or the system refuses.
    pub fn remembering(model: Arc<Model>, folder: &Path, rows: u64) -> Result<Self> {
        let remembered = Remembered::new(folder, model.config().hidden_size, rows)?;
        Ok(Teacher { remembered: Some(remembered), ..Self::live(model) })
    }

    /// Bytes on the disk of the outputs for `rows` rows of a teacher.
    pub fn bytes(model: &Model, rows: u64) -> u64 {
        rows * model.config().hidden_size as u64 * 4
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Makes the memory for calls of up to `tokens` rows in up to `segments` segments.
    pub(super) fn reserve(&mut self, tokens: usize, segments: usize) -> Result<()> {
        self.memory = None;
        let activations = Activations::new(&self.model, Keep::Nothing, tokens, segments)?;
        self.memory = Some((activations, FinalNorm::new(&self.model, tokens)?));
        if let Some(remembered) = &mut self.remembered {
            let hidden = self.model.config().hidden_size;
            remembered.upload = Some(self.model.device().alloc(self.model.activations(), tokens, hidden)?);
        }
        Ok(())
    }

    /// Writes what its outputs for the rows `chosen` are computed from, for [`Self::launch`] to compute them; a teacher
    /// that remembers gives them now, from the disk or on their way to it.
    pub(super) fn prepare(&mut self, ids: &[u32], segments: &Segments, chosen: &[u32]) -> Result<Option<View>> {
        let device = self.model.device();
        let key = self.remembered.as_ref().map(|_| key(ids, segments, chosen));
        if let (Some(remembered), Some(key)) = (&self.remembered, &key)
            && let Some(values) = remembered.find(key)
            && let Some(upload) = &remembered.upload
        {
            let view = upload.rows(chosen.len())?;
            device.write(HostSlice::F32(values), view)?;
            return Ok(Some(view));
        }
        if let Some((activations, norm)) = &mut self.memory {
            self.model.prepare(activations, ids, segments, None)?;
            norm.choose(device, chosen)?;
        }
        let Some(key) = key else { return Ok(None) };
        let view = self.launch(chosen.len())?;
        if let Some(remembered) = &mut self.remembered
            && remembered.has_room(view.len())
        {
            remembered.keep(key, &self.model.device().read(view)?.wait()?)?;
        }
        Ok(Some(view))
    }

    /// The normed hidden states of the `n` rows chosen last, `[n, hidden]` as its activations are: launches alone.
    pub(super) fn launch(&self, n: usize) -> backend::Result<View> {
        let Some((activations, norm)) = &self.memory else {
            return Err(backend::Error::Argument { op: "teacher", what: "it has no memory to run in".into() });
        };
        self.model.launch(activations, None, None)?;
        norm.launch(&self.model, activations.output()?, n)
    }
}

/// What tells a batch from every other.
type Key = [u8; 32];

fn key(ids: &[u32], segments: &Segments, chosen: &[u32]) -> Key {
    let mut hash = Sha256::new();
    for part in [ids, chosen] {
        hash.update((part.len() as u64).to_le_bytes());
        part.iter().for_each(|value| hash.update(value.to_le_bytes()));
    }
    segments.list().iter().for_each(|segment| hash.update(segment.len.to_le_bytes()));
    hash.finalize().into()
}

/// Outputs on the disk, one batch after the other.
#[derive(Debug)]
struct Remembered {
    file: File,
    map: Mmap,
    folder: PathBuf,
    /// First value and number of values of each batch.
    places: HashMap<Key, (usize, usize)>,
    used: usize,
    upload: Option<Buffer>,
}

impl Remembered {
    fn new(folder: &Path, hidden: usize, rows: u64) -> Result<Self> {
        let needed = rows * hidden as u64 * 4;
        let available = available_bytes(folder)?;
        if needed > available {
            let (what, path) = ("the teacher's outputs", folder.to_owned());
            return Err(Error::DiskTooSmall { what, needed, available, path });
        }
        let file = tempfile::tempfile_in(folder).map_err(Error::io("create a file in", folder))?;
        file.set_len(needed.max(1)).map_err(Error::io("make room in", folder))?;
        // SAFETY: the file has no name, so that nobody else can cut or change it, and its length is never changed again.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map a file in", folder))?;
        Ok(Remembered { file, map, folder: folder.to_owned(), places: HashMap::new(), used: 0, upload: None })
    }

    fn find(&self, key: &Key) -> Option<&[f32]> {
        let (first, count) = *self.places.get(key)?;
        bytemuck::try_cast_slice(self.map.get(first * 4..(first + count) * 4)?).ok()
    }

    fn has_room(&self, values: usize) -> bool {
        (self.used + values) * 4 <= self.map.len()
    }

    /// Written through the file, not the map, so that a full disk is an error and not a signal.
    fn keep(&mut self, key: Key, values: &[f32]) -> Result<()> {
        let write = |file: &mut File| {
            file.seek(SeekFrom::Start(self.used as u64 * 4))?;
            file.write_all(bytemuck::cast_slice(values))
        };
        write(&mut self.file).map_err(Error::io("keep the teacher's outputs in", &self.folder))?;
        self.places.insert(key, (self.used, values.len()));
        self.used += values.len();
        Ok(())
    }
}

/// Bytes that the disk of `folder` has left for this user.
///
/// # Errors
/// When the system does not say.
#[cfg(unix)]
pub fn available_bytes(folder: &Path) -> Result<u64> {
    let of = |error: rustix::io::Errno| Error::io("ask for the free space of", folder)(error.into());
    let disk = rustix::fs::statvfs(folder).map_err(of)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Bytes that the disk of `folder` has left: not asked for on this system, where a full disk shows when it is written to.
#[cfg(not(unix))]
pub fn available_bytes(_folder: &Path) -> Result<u64> {
    Ok(u64::MAX)
}

//! Files and folders that appear under their name whole or not at all, also when the program or the machine stops.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::{CheckpointError, Result};

/// A folder that is filled under another name beside its own; [`NewFolder::finish`] gives it its own. Dropped before
/// that, it is gone.
#[derive(Debug)]
pub struct NewFolder {
    partial: PathBuf,
    target: PathBuf,
}

impl NewFolder {
    /// Starts the folder `target`, and makes the folders above it.
    ///
    /// # Errors
    /// When `target` is already there, or the system refuses.
    pub fn create(target: &Path) -> Result<Self> {
        refuse_existing(target)?;
        let parent = parent(target);
        fs::create_dir_all(parent).map_err(CheckpointError::io("create", parent))?;
        let partial = beside(target, |path| fs::create_dir(path))?.1;
        Ok(NewFolder { partial, target: target.to_owned() })
    }

    /// Where to put its files meanwhile.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Waits until all that is in it is on the disk, then gives it its name.
    ///
    /// # Errors
    /// When the name has been taken meanwhile, or the system refuses. Nothing that was there before is lost.
    pub fn finish(self) -> Result<()> {
        sync_folder(&self.partial)?;
        refuse_existing(&self.target)?;
        fs::rename(&self.partial, &self.target).map_err(CheckpointError::io("create", &self.target))?;
        sync(parent(&self.target))
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        // After a finish it is not there any more; otherwise what is left over harms nobody.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

/// Writes the file `path` by `write`: it appears under its name, in place of what had the name before, only when all of
/// it is on the disk.
///
/// # Errors
/// When `write` fails or the system refuses; what was there before stays.
pub fn write_file(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let (mut file, partial) = beside(path, |path| File::create_new(path))?;
    let written = write(&mut file)
        .and_then(|()| file.sync_all().map_err(CheckpointError::io("write", path)))
        .and_then(|()| fs::rename(&partial, path).map_err(CheckpointError::io("create", path)));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written.and_then(|()| sync(parent(path)))
}

/// [`write_file`] of bytes that are there already.
pub(super) fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_file(path, |file| file.write_all(bytes).map_err(CheckpointError::io("write", path)))
}

fn refuse_existing(target: &Path) -> Result<()> {
    match fs::symlink_metadata(target) {
        Ok(_) => Err(CheckpointError::Exists { path: target.to_owned() }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(source) => Err(CheckpointError::io("look at", target)(source)),
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Creates something under an unused name in the folder of `target`.
fn beside<T>(target: &Path, create: impl Fn(&Path) -> std::io::Result<T>) -> Result<(T, PathBuf)> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let Some(name) = target.file_name() else {
        return Err(CheckpointError::malformed(target, "not a name for something new"));
    };
    loop {
        let mut partial = std::ffi::OsString::from(".");
        partial.push(name);
        partial.push(format!(".partial-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let partial = parent(target).join(partial);
        match create(&partial) {
            Ok(created) => return Ok((created, partial)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(source) => return Err(CheckpointError::io("create", &partial)(source)),
        }
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(CheckpointError::io("read", folder))? {
        let path = entry.map_err(CheckpointError::io("read", folder))?.path();
        if path.is_dir() { sync_folder(&path)? } else { sync(&path)? }
    }
    sync(folder)
}

/// Waits until a file, or a folder's list of names, is on the disk.
#[cfg(unix)]
fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(CheckpointError::io("write", path))
}

/// Elsewhere a folder cannot be opened, nor a file be synced through a handle that only reads; the system's own order
/// of writes has to do.
#[cfg(not(unix))]
fn sync(_path: &Path) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn failure() -> CheckpointError {
        CheckpointError::malformed(Path::new("x"), "told to fail")
    }

    #[test]
    fn a_file_whose_writer_fails_leaves_the_old_one_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        write_bytes(&path, b"old").unwrap();
        let half = |file: &mut File| file.write_all(b"ne").map_err(|_| failure()).and(Err(failure()));
        assert!(write_file(&path, half).is_err());
        assert_eq!((fs::read(&path).unwrap(), names(folder.path())), (b"old".to_vec(), vec!["state.json".to_owned()]));
        write_bytes(&path, b"new").unwrap();
        assert_eq!((fs::read(&path).unwrap(), names(folder.path())), (b"new".to_vec(), vec!["state.json".to_owned()]));
    }

    #[test]
    fn a_folder_appears_when_it_is_finished_and_not_before() {
        let above = tempfile::tempdir().unwrap();
        let target = above.path().join("a/b");
        let folder = NewFolder::create(&target).unwrap();
        fs::create_dir(folder.path().join("inner")).unwrap();
        write_bytes(&folder.path().join("inner/file"), b"1").unwrap();
        assert!(!target.exists());
        folder.finish().unwrap();
        assert_eq!(fs::read(target.join("inner/file")).unwrap(), b"1");
        assert_eq!(names(&above.path().join("a")), ["b"]);
    }

    #[test]
    fn a_folder_that_is_not_finished_leaves_nothing() {
        let above = tempfile::tempdir().unwrap();
        let folder = NewFolder::create(&above.path().join("b")).unwrap();
        write_bytes(&folder.path().join("file"), b"1").unwrap();
        drop(folder);
        assert!(names(above.path()).is_empty());
    }

    #[test]
    fn what_has_the_name_already_is_kept() {
        let above = tempfile::tempdir().unwrap();
        let target = above.path().join("b");
        let folder = NewFolder::create(&target).unwrap();
        write_bytes(&target, b"mine").unwrap();
        assert!(matches!(NewFolder::create(&target), Err(CheckpointError::Exists { .. })));
        assert!(matches!(folder.finish(), Err(CheckpointError::Exists { .. })));
        assert_eq!((fs::read(&target).unwrap(), names(above.path())), (b"mine".to_vec(), vec!["b".to_owned()]));
    }
}

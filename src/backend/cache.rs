//! What was compiled, kept for the next run: files in the user's cache folder, each beside the hash of its bytes.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

const HASH: usize = 32;

/// A folder of entries by name. Without one, or where it cannot be written, nothing is kept.
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// The folder `h1/KIND` of the user's cache.
    pub fn of_user(kind: &str) -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder =
            set("XDG_CACHE_HOME").filter(|path| path.is_absolute()).or_else(|| Some(set("HOME")?.join(".cache")));
        Cache { folder: folder.map(|folder| folder.join("h1").join(kind)) }
    }

    /// A folder of its own.
    pub fn at(folder: &Path) -> Self {
        Cache { folder: Some(folder.into()) }
    }

    /// The name of what was made from some texts.
    pub fn name(parts: &[&str]) -> String {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// An entry, if it is there and whole.
    pub fn get(&self, name: &str) -> Option<Vec<u8>> {
        let bytes = std::fs::read(self.folder.as_ref()?.join(name)).ok()?;
        let (hash, value) = bytes.split_at_checked(HASH)?;
        (Sha256::digest(value).as_slice() == hash).then(|| value.to_vec())
    }

    /// Keeps an entry, whole or not at all. A cache that cannot be written costs time alone, so that is no error.
    pub fn put(&self, name: &str, value: &[u8]) {
        if let Some(folder) = &self.folder {
            let _kept = Self::write(folder, name, value);
        }
    }

    fn write(folder: &Path, name: &str, value: &[u8]) -> std::io::Result<()> {
        use std::io::Write;
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&Sha256::digest(value))?;
        file.write_all(value)?;
        file.persist(folder.join(name))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_that_was_damaged_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        assert_eq!(cache.get("a"), None);
        cache.put("a", b"text");
        assert_eq!(cache.get("a").as_deref(), Some(&b"text"[..]));
        let path = folder.path().join("a");
        let mut bytes = std::fs::read(&path).unwrap();
        for damaged in [bytes.len() - 1, 0, 10] {
            std::fs::write(&path, &bytes[..damaged]).unwrap();
            assert_eq!(cache.get("a"), None);
        }
        bytes[40 - HASH] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(cache.get("a"), None);
        cache.put("a", b"new");
        assert_eq!(cache.get("a").as_deref(), Some(&b"new"[..]));
    }

    #[test]
    fn names_tell_texts_apart() {
        assert_ne!(Cache::name(&["ab", "c"]), Cache::name(&["a", "bc"]));
        assert_eq!(Cache::name(&["ab", "c"]), Cache::name(&["ab", "c"]));
    }
}

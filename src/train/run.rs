//! The folder of a run: one process at a time, checkpoints that appear whole or not at all, metrics that follow them.
//!
//! ```text
//! RUN/config.toml              the configuration as given
//! RUN/metrics.jsonl            a line a step
//! RUN/checkpoints/step-N/      a Hugging Face folder, training*.safetensors and state.json
//! RUN/lock                     held while a process works on the run
//! ```

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::settings;
use crate::checkpoint::{NewFolder, write_file};
use crate::report::metrics::MetricsWriter;

const CONFIG: &str = "config.toml";
const METRICS: &str = "metrics.jsonl";
const CHECKPOINTS: &str = "checkpoints";
const STATE: &str = "state.json";
const LOCK: &str = "lock";
/// What a checkpoint's folder is called before its step.
const STEP: &str = "step-";

/// A run that this process holds.
#[derive(Debug)]
pub struct Run {
    folder: PathBuf,
    /// Open as long as the run is held; the system lets go of it however the process ends.
    _lock: File,
    metrics: MetricsWriter,
    keep: usize,
    /// Whether the folder was made by this process.
    fresh: bool,
}

/// The latest complete checkpoint of a run.
#[derive(Debug)]
pub struct Saved<S> {
    /// Its folder.
    pub folder: PathBuf,
    /// The step that it was written after.
    pub step: u64,
    /// What the run was in.
    pub state: S,
}

/// `state.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile<S> {
    /// Length of `metrics.jsonl` at the checkpoint: what a later kill left behind it is cut off.
    metrics_bytes: u64,
    state: S,
}

impl Run {
    /// Opens the run in `folder` with a configuration: starts it where there is none, and otherwise, if `resume`, goes
    /// on after its latest complete checkpoint (`None`: from the start). What was written after that is removed. The
    /// last `keep` checkpoints are kept.
    ///
    /// # Errors
    /// When another process holds the run, there is one but `resume` is false, it was started with another
    /// configuration, the folder holds something else, or the system refuses. A run without a step is none: it may
    /// start again with another configuration.
    pub fn open<S: DeserializeOwned>(
        folder: &Path,
        config: &str,
        resume: bool,
        keep: usize,
    ) -> Result<(Run, Option<Saved<S>>)> {
        let fresh = !folder.exists();
        if !fresh && !folder.join(LOCK).exists() && !names(folder)?.is_empty() {
            return Err(Error::NoRun { path: folder.to_owned() });
        }
        let checkpoints = folder.join(CHECKPOINTS);
        fs::create_dir_all(&checkpoints).map_err(Error::io("create", &checkpoints))?;
        let lock = lock(folder)?;
        sweep(folder)?;
        let path = folder.join(CONFIG);
        let begun = !steps(&checkpoints)?.is_empty()
            || fs::metadata(folder.join(METRICS)).is_ok_and(|metrics| metrics.len() > 0);
        match fs::read_to_string(&path) {
            Ok(_) if !begun => write_text(&path, config)?,
            Ok(_) if !resume => return Err(Error::Exists { path: folder.to_owned() }),
            Ok(text) => {
                if let Some(difference) = settings::difference(&text, config) {
                    return Err(Error::OtherConfiguration { path: folder.to_owned(), difference });
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => write_text(&path, config)?,
            Err(source) => return Err(Error::io("read", &path)(source)),
        }
        let keep = keep.max(1);
        // A process that was killed after it had saved left one too many.
        remove_old(&checkpoints, keep)?;
        let (saved, bytes) = match steps(&checkpoints)?.pop() {
            None => (None, 0),
            Some(step) => {
                let folder = checkpoint(&checkpoints, step);
                let path = folder.join(STATE);
                let text = fs::read(&path).map_err(Error::io("read", &path))?;
                let StateFile { metrics_bytes, state } =
                    serde_json::from_slice(&text).map_err(|error| Error::malformed(&path, error))?;
                (Some(Saved { folder, step, state }), metrics_bytes)
            }
        };
        let metrics = MetricsWriter::resume_at(&folder.join(METRICS), bytes)?;
        Ok((Run { folder: folder.to_owned(), _lock: lock, metrics, keep, fresh }, saved))
    }

    /// Removes the run, if it was this process that started it: for one that cannot take a step.
    pub fn abandon(self) {
        if self.fresh {
            // What is left over is no run, and harms nobody.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where its numbers go.
    pub fn metrics(&mut self) -> &mut MetricsWriter {
        &mut self.metrics
    }

    /// The file of its numbers.
    pub fn metrics_path(&self) -> PathBuf {
        self.folder.join(METRICS)
    }

    /// Writes the checkpoint of `step`: `write` fills its folder, `state` is what the run is in. It is on the disk, and
    /// so are the metrics before it, when this returns; then older ones go.
    ///
    /// # Errors
    /// When it cannot be written; the earlier ones are still there then.
    pub fn save<S: Serialize>(&mut self, step: u64, state: &S, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let checkpoints = self.folder.join(CHECKPOINTS);
        self.write_checkpoint(&checkpoints, step, state, write).map_err(|source| {
            let latest = steps(&checkpoints).ok().and_then(|mut steps| steps.pop());
            Error::NotSaved { step, latest, source: Box::new(source) }
        })?;
        remove_old(&checkpoints, self.keep)
    }

    fn write_checkpoint<S: Serialize>(
        &mut self,
        checkpoints: &Path,
        step: u64,
        state: &S,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let new = NewFolder::create(&checkpoint(checkpoints, step))?;
        write(new.path())?;
        let path = new.path().join(STATE);
        let state = StateFile { metrics_bytes: self.metrics.length()?, state };
        let text = serde_json::to_string_pretty(&state).map_err(|error| Error::malformed(&path, error))?;
        fs::write(&path, text + "\n").map_err(Error::io("write", &path))?;
        self.metrics.sync()?;
        Ok(new.finish()?)
    }

    /// Writes the folder `name` of the run whole or not at all, if it is not there yet.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn publish(&self, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let path = self.folder.join(name);
        if !path.exists() {
            let new = NewFolder::create(&path)?;
            write(new.path())?;
            new.finish()?;
        }
        Ok(path)
    }
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let file = File::options().create(true).append(true).open(&path).map_err(Error::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { path: folder.to_owned() }),
        Err(TryLockError::Error(source)) => Err(Error::io("lock", &path)(source)),
    }
}

fn checkpoint(checkpoints: &Path, step: u64) -> PathBuf {
    checkpoints.join(format!("{STEP}{step}"))
}

/// The steps of the checkpoints that are there, ascending.
fn steps(checkpoints: &Path) -> Result<Vec<u64>> {
    let mut steps = Vec::new();
    for name in names(checkpoints)? {
        steps.extend(name.strip_prefix(STEP).and_then(|step| step.parse::<u64>().ok()));
    }
    steps.sort_unstable();
    Ok(steps)
}

/// Removes all checkpoints but the last `keep`.
fn remove_old(checkpoints: &Path, keep: usize) -> Result<()> {
    let mut old = steps(checkpoints)?;
    old.truncate(old.len().saturating_sub(keep));
    for step in old {
        // Renamed first: a folder under a checkpoint's name is always whole.
        let (path, doomed) = (checkpoint(checkpoints, step), checkpoints.join(format!(".{STEP}{step}.removed")));
        fs::rename(&path, &doomed).map_err(Error::io("remove", &path))?;
        fs::remove_dir_all(&doomed).map_err(Error::io("remove", &doomed))?;
    }
    Ok(())
}

/// Removes what a killed process left half-written or half-removed, here and in the folders below.
fn sweep(folder: &Path) -> Result<()> {
    for name in names(folder)? {
        let path = folder.join(&name);
        if name.starts_with('.') && (name.contains(".partial-") || name.ends_with(".removed")) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io("remove", &path))?;
        } else if path.is_dir() && !path.is_symlink() {
            sweep(&path)?;
        }
    }
    Ok(())
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let name = |entry: std::io::Result<fs::DirEntry>| entry.map(|entry| entry.file_name().into_string().ok());
    Ok(entries
        .map(name)
        .collect::<std::io::Result<Vec<_>>>()
        .map_err(Error::io("read", folder))?
        .into_iter()
        .flatten()
        .collect())
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    let write = |file: &mut File| {
        file.write_all(text.as_bytes()).map_err(|source| crate::checkpoint::CheckpointError::Io {
            action: "write",
            path: path.to_owned(),
            source,
        })
    };
    Ok(write_file(path, write)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CONFIG_TEXT: &str = "seed = 1\n[a]\nb = 2\n";

    fn open(folder: &Path, resume: bool) -> Result<(Run, Option<Saved<u64>>)> {
        Run::open(folder, CONFIG_TEXT, resume, 2)
    }

    fn save(run: &mut Run, step: u64) -> Result<()> {
        run.metrics().write(step, &json!({ "loss": 1.0 })).unwrap();
        run.save(step, &(step * 10), |folder| {
            fs::write(folder.join("weights"), "w").map_err(Error::io("write", folder))
        })
    }

    #[test]
    fn a_run_goes_on_after_its_latest_complete_checkpoint_and_forgets_what_came_later() {
        let folder = tempfile::tempdir().unwrap();
        let (mut run, saved) = open(folder.path(), false).unwrap();
        assert!(saved.is_none());
        (1..=3).for_each(|step| save(&mut run, step).unwrap());
        let whole = fs::read(run.metrics_path()).unwrap();
        run.metrics().write(3, &json!({ "event": "later" })).unwrap();
        drop(run);
        let checkpoints = folder.path().join(CHECKPOINTS);
        fs::create_dir(checkpoints.join(".step-4.partial-1-2")).unwrap();
        fs::create_dir(checkpoints.join(".step-1.removed")).unwrap();
        fs::create_dir(checkpoints.join("step-1")).unwrap();
        let (run, saved) = open(folder.path(), true).unwrap();
        let saved = saved.unwrap();
        assert_eq!((saved.step, saved.state, saved.folder), (3, 30, checkpoints.join("step-3")));
        assert_eq!(fs::read(run.metrics_path()).unwrap(), whole);
        let mut left = names(&checkpoints).unwrap();
        left.sort();
        assert_eq!(left, ["step-2", "step-3"]);
    }

    #[test]
    fn a_checkpoint_that_fails_leaves_the_earlier_one_and_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let (mut run, _) = open(folder.path(), false).unwrap();
        save(&mut run, 1).unwrap();
        let full = |path: &Path| Err(Error::io("write", path)(std::io::ErrorKind::StorageFull.into()));
        let error = run.save(2, &20, full).unwrap_err();
        assert!(error.to_string().contains("step 2 could not be written (that of step 1 is still there)"), "{error}");
        drop(run);
        assert_eq!(open(folder.path(), true).unwrap().1.unwrap().step, 1);
        assert_eq!(names(&folder.path().join(CHECKPOINTS)).unwrap(), ["step-1"]);
    }

    #[test]
    fn a_run_is_held_by_one_process_and_not_started_twice_nor_with_another_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let (run, _) = open(folder.path(), true).unwrap();
        assert!(matches!(open(folder.path(), true), Err(Error::Locked { .. })));
        drop(run);
        let (mut run, _) = open(folder.path(), false).unwrap();
        run.metrics().write(1, &json!({ "loss": 1.0 })).unwrap();
        drop(run);
        assert!(matches!(open(folder.path(), false), Err(Error::Exists { .. })));
        let other = Run::open::<u64>(folder.path(), "seed = 1\n[a]\nb = 3\n", true, 1).unwrap_err();
        assert!(other.to_string().ends_with("a.b was 2, now 3"), "{other}");
    }

    #[test]
    fn a_folder_with_something_else_in_it_becomes_no_run_and_an_abandoned_run_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let new = folder.path().join("new");
        open(&new, false).unwrap().0.abandon();
        assert!(!new.exists());
        let (run, _) = open(&new, false).unwrap();
        drop(run);
        open(&new, false).unwrap().0.abandon();
        assert!(new.exists());
        assert!(matches!(open(folder.path(), true), Err(Error::NoRun { .. })));
        assert_eq!(names(folder.path()).unwrap(), ["new"]);
    }

    #[test]
    fn what_is_published_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let (run, _) = open(folder.path(), false).unwrap();
        let publish = |text: &'static str| {
            run.publish("model", |path| fs::write(path.join("file"), text).map_err(Error::io("write", path))).unwrap()
        };
        let path = publish("first");
        assert_eq!(publish("second"), path);
        assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "first");
    }
}

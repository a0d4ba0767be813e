//! Models by their name on a hub: `hub:ORG/NAME`, downloaded once into the cache that the ordinary clients share.
//!
//! The client is the crate `hf-hub`: it names the cache's files, sends the token, and goes on with a half-written file. What is
//! around it here makes that hold: a cut connection is tried again from where it broke, a half-written file that the client
//! cannot go on with is put right, and a file counts only when its length, and its sha256 where the hub names one, are right.
//! The client waits for ever for a hub that says nothing: it asks on a thread of its own, which is left when nothing comes.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use super::error::{CheckpointError, Result};
use super::folder::{INDEX, WEIGHTS, read_index};
use super::save::COPIED;

const SCHEME: &str = "hub:";
const ENDPOINT: &str = "https://huggingface.co";
/// How often a file is asked for without a byte of it coming before it is given up.
const TRIES: u32 = 5;
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// How long a hub may say nothing.
const SILENCE: Duration = Duration::from_secs(60);

/// The folder or GGUF file that MODEL stands for: itself, from `base` on if it is relative, or the downloaded copy of
/// `hub:ORG/NAME`, with `/FILE.gguf` for a GGUF file in it and `@REVISION` for another branch, tag or commit than main.
///
/// The environment says where the hub is (`HF_ENDPOINT`) and the cache (`HF_HOME`), and may have a token (`HF_TOKEN`). A model that is whole in the cache is not
/// asked for again.
///
/// # Errors
/// When the name cannot be read, the hub cannot be reached or does not have the model, or the disk refuses.
pub fn locate(base: &Path, model: &Path) -> Result<PathBuf> {
    match model.to_str().and_then(|text| text.strip_prefix(SCHEME)) {
        Some(_) => Hub::from_env().fetch(&model.to_string_lossy()),
        None => Ok(base.join(model)),
    }
}

/// A hub and the cache of what comes from it.
#[derive(Debug)]
pub struct Hub {
    endpoint: String,
    cache: Cache,
    token: Option<String>,
    silence: Duration,
}

/// Why nothing came.
enum Failure {
    Error(ApiError),
    /// No byte for as long as a hub may say nothing.
    Silence,
    /// The client gave up on what the hub said.
    Nonsense,
}

/// A model on a hub.
#[derive(Clone, Debug, PartialEq)]
struct Name {
    /// As it was given, for errors.
    text: String,
    repository: String,
    /// A GGUF file in it.
    file: Option<String>,
    revision: String,
}

impl Name {
    fn parse(text: &str) -> Option<Self> {
        let name = text.strip_prefix(SCHEME)?;
        let (path, revision) = name.split_once('@').unwrap_or((name, "main"));
        let mut parts = path.splitn(3, '/');
        let (organisation, name, file) = (parts.next()?, parts.next()?, parts.next());
        let file_is_gguf = file.is_none_or(|file| file.ends_with(".gguf") && file.split('/').all(is_plain));
        let sound = is_plain(organisation) && is_plain(name) && revision.split('/').all(is_plain) && file_is_gguf;
        sound.then(|| Name {
            text: text.to_owned(),
            repository: format!("{organisation}/{name}"),
            file: file.map(str::to_owned),
            revision: revision.to_owned(),
        })
    }

    fn error(&self, what: impl Into<String>) -> CheckpointError {
        CheckpointError::Hub { model: self.text.clone(), what: what.into() }
    }
}

/// Whether a text can be part of a path in the cache without leading out of it.
fn is_plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    part.chars().all(allowed) && !part.trim_matches('.').is_empty()
}

impl Hub {
    /// The hub and the cache that the environment names.
    pub fn from_env() -> Self {
        let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| ENDPOINT.to_owned());
        let (endpoint, cache) = (endpoint.trim_end_matches('/').to_owned(), Cache::from_env());
        let token = std::env::var("HF_TOKEN").ok().or(cache.token());
        Hub { endpoint, token, cache, silence: SILENCE }
    }

    /// The hub at an address, without a token, and the cache in a folder.
    pub fn new(endpoint: &str, cache: &Path) -> Self {
        Hub { endpoint: endpoint.to_owned(), cache: Cache::new(cache.to_owned()), token: None, silence: SILENCE }
    }

    /// The same, given up when it says nothing for so long.
    pub fn silent_at_most(self, silence: Duration) -> Self {
        Hub { silence, ..self }
    }

    /// The folder or GGUF file of a model by its name, downloaded as far as it is not in the cache.
    ///
    /// # Errors
    /// As [`locate`].
    pub fn fetch(&self, model: &str) -> Result<PathBuf> {
        let name = Name::parse(model).ok_or_else(|| CheckpointError::Hub {
            model: model.to_owned(),
            what: "expected hub:ORG/NAME, then /FILE.gguf for a file in it, then @REVISION for a revision".to_owned(),
        })?;
        let repo = |revision: &str| Repo::with_revision(name.repository.clone(), RepoType::Model, revision.to_owned());
        if let Some(path) = self.cached(&name, repo(&name.revision)) {
            return Ok(path);
        }
        let api = ApiBuilder::from_cache(self.cache.clone()).with_endpoint(self.endpoint.clone());
        let api = api.with_token(self.token.clone()).build().map_err(|error| name.error(error.to_string()))?;
        let remote = api.repo(repo(&name.revision));
        let info = self.patiently(&name, move || remote.info(), || 0)?;
        // One commit for all files, whatever happens to the branch meanwhile.
        if !is_plain(&info.sha) {
            return Err(name.error(format!("the hub names no commit, but {:?}", info.sha)));
        }
        let there: Vec<&str> = info.siblings.iter().map(|file| &file.rfilename[..]).collect();
        let commit = repo(&info.sha);
        let folder = self.cache.repo(commit.clone()).pointer_path(&info.sha);
        let download = |file: &str| self.download((&name, &api), &commit, file);
        match &name.file {
            Some(file) if there.contains(&&file[..]) => download(file)?,
            Some(file) => return Err(name.error(format!("there is no file {file} in it"))),
            None => {
                let weights = if there.contains(&WEIGHTS) { WEIGHTS } else { INDEX };
                for needed in ["config.json", weights] {
                    if !there.contains(&needed) {
                        return Err(name.error(format!("there is no {needed} in it{}", ggufs(&there))));
                    }
                    download(needed)?;
                }
                let beside = |file: &&&str| COPIED.contains(*file) || file.ends_with(".py") && is_plain(file);
                for file in there.iter().filter(beside) {
                    download(file)?;
                }
                if weights == INDEX {
                    for shard in shards(&folder)? {
                        download(&shard)?;
                    }
                }
            }
        }
        // Last, so that a branch in the cache is a whole model.
        self.cache.repo(repo(&name.revision)).create_ref(&info.sha).map_err(CheckpointError::io("write", &folder))?;
        Ok(name.file.map_or(folder.clone(), |file| folder.join(file)))
    }

    /// The folder or file in the cache, if all of it is there.
    fn cached(&self, name: &Name, repo: Repo) -> Option<PathBuf> {
        let cache = self.cache.repo(repo);
        if let Some(file) = &name.file {
            return cache.get(file);
        }
        let folder = cache.get("config.json")?.parent()?.to_owned();
        let whole = || shards(&folder).is_ok_and(|shards| shards.iter().all(|shard| folder.join(shard).exists()));
        (folder.join(WEIGHTS).exists() || whole()).then_some(folder)
    }

    /// One file of a commit into the cache.
    fn download(&self, (name, api): (&Name, &Api), commit: &Repo, file: &str) -> Result<()> {
        let (remote, cache) = (Arc::new(api.repo(commit.clone())), self.cache.repo(commit.clone()));
        if cache.pointer_path(commit.revision()).join(file).exists() {
            return Ok(());
        }
        let io = |path: &Path| CheckpointError::io("write", path);
        let (asked, url) = (api.clone(), remote.url(file));
        let found = self.patiently(name, move || asked.metadata(&url), || 0)?;
        if !is_plain(found.etag()) || found.commit_hash() != commit.revision() {
            return Err(name.error(format!("the hub's answer for {file} is of another commit, or names it in no way")));
        }
        let blob = cache.blob_path(found.etag());
        let part = blob.with_extension("part");
        let length = || fs::metadata(&part).map_or(0, |part| part.len());
        let size = found.size() as u64;
        if length() >= size && part.exists() {
            // The client asks for what comes after the last byte, which no server has: let the last byte come again. A file that
            // is too long is of no use.
            let keep = if length() == size { size.saturating_sub(1) } else { 0 };
            File::options().write(true).open(&part).and_then(|part| part.set_len(keep)).map_err(io(&part))?;
        }
        let wanted = file.to_owned();
        let path = self.patiently(
            name,
            move || remote.download_with_progress(&wanted, ProgressBar::new(0)),
            || if blob.exists() { u64::MAX } else { length() },
        )?;
        check(&blob, size, found.etag()).map_err(io(&blob))?.map_err(|what| {
            // Neither may stay: what is in the cache is taken for whole.
            let _ = (fs::remove_file(&path), fs::remove_file(&blob));
            name.error(format!("{file}: {what}: it was thrown away, try again"))
        })
    }

    /// Asks again, after a while, when a connection breaks, as long as bytes come: `there` says how many did so far.
    fn patiently<T: Send + 'static>(
        &self,
        name: &Name,
        ask: impl Fn() -> std::result::Result<T, ApiError> + Send + Sync + 'static,
        there: impl Fn() -> u64,
    ) -> Result<T> {
        let (ask, mut failures, mut before) = (Arc::new(ask), 0, there());
        loop {
            let failure = match self.once(Arc::clone(&ask), &there) {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            let now = there();
            failures = if now > before { 1 } else { failures + 1 };
            before = now;
            if failures >= TRIES || !is_passing(&failure) {
                return Err(name.error(self.words(&failure)));
            }
            std::thread::sleep(FIRST_WAIT * 2u32.pow(failures - 1));
        }
    }

    /// Asks once, as long as bytes come.
    fn once<T: Send + 'static>(
        &self,
        ask: Arc<impl Fn() -> std::result::Result<T, ApiError> + Send + Sync + 'static>,
        there: impl Fn() -> u64,
    ) -> std::result::Result<T, Failure> {
        let (answer, answered) = mpsc::channel();
        // Whoever listened may be gone.
        std::thread::spawn(move || drop(answer.send(ask())));
        let mut before = there();
        loop {
            match answered.recv_timeout(self.silence) {
                Ok(answer) => return answer.map_err(Failure::Error),
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Nonsense),
                Err(RecvTimeoutError::Timeout) => {
                    let now = there();
                    if now <= before {
                        return Err(Failure::Silence);
                    }
                    before = now;
                }
            }
        }
    }

    /// What went wrong, in a sentence.
    fn words(&self, failure: &Failure) -> String {
        let (endpoint, silence) = (&self.endpoint, self.silence.as_secs_f32());
        let error = match failure {
            Failure::Error(error) => error,
            Failure::Silence => {
                return format!(
                    "{endpoint} has said nothing for {silence} seconds: the same command goes on from here"
                );
            }
            Failure::Nonsense => return format!("{endpoint} answers as no hub does"),
        };
        match error {
            ApiError::RequestError(error) => match **error {
                ureq::Error::StatusCode(404) => format!("{endpoint} has no such model, revision or file"),
                ureq::Error::StatusCode(401 | 403) => format!(
                    "{endpoint} does not show this model to everyone: it is not there, or it takes a token with access to it"
                ),
                ureq::Error::StatusCode(status) => format!("{endpoint} answers with status {status}"),
                _ => format!(
                    "{endpoint} cannot be reached ({error}): give a folder or a GGUF file, or name another hub in HF_ENDPOINT"
                ),
            },
            // It started from the beginning where it was asked to go on.
            ApiError::InvalidResume => {
                format!("{endpoint} sent more bytes than a file has: it is thrown away, try again")
            }
            error => format!("{endpoint}: {error}"),
        }
    }
}

/// Whether it may go well the next time.
fn is_passing(failure: &Failure) -> bool {
    // The thread that waits still has the lock of its file.
    let Failure::Error(error) = failure else { return false };
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => status >= 500 || status == 429,
            ureq::Error::HostNotFound | ureq::Error::BadUri(_) => false,
            _ => true,
        },
        // The connection, or the disk: a second look tells.
        ApiError::IoError(_) => true,
        _ => false,
    }
}

/// Holds a file against its length, and against its sha256 where the etag is one. The inner error says what is wrong.
fn check(path: &Path, size: u64, etag: &str) -> io::Result<std::result::Result<(), String>> {
    let mut file = File::open(path)?;
    let found = file.metadata()?.len();
    if found != size {
        return Ok(Err(format!("{found} bytes came, not {size}")));
    }
    if etag.len() != 64 {
        return Ok(Ok(()));
    }
    let (mut hash, mut block) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut block)? {
            0 => break,
            read => hash.update(&block[..read]),
        }
    }
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(if found == etag { Ok(()) } else { Err(format!("its sha256 is {found}, not {etag}")) })
}

/// The files that the index of a folder names.
fn shards(folder: &Path) -> Result<Vec<String>> {
    let mut files: Vec<String> = read_index(&folder.join(INDEX))?.into_iter().map(|(_, file)| file).collect();
    files.sort_unstable();
    files.dedup();
    Ok(files)
}

/// What to say of GGUF files where there is no folder.
fn ggufs(there: &[&str]) -> String {
    let files: Vec<&str> = there.iter().copied().filter(|file| file.ends_with(".gguf")).collect();
    match files[..] {
        [] => String::new(),
        [first, ..] => format!(", but GGUF files: name one of them after it, such as /{first}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_an_organisation_a_model_and_perhaps_a_file_and_a_revision() {
        let name = Name::parse("hub:org/a.model-1").unwrap();
        assert_eq!((&name.repository[..], name.file, &name.revision[..]), ("org/a.model-1", None, "main"));
        let name = Name::parse("hub:org/model/sub/x.gguf@refs/pr/1").unwrap();
        assert_eq!((name.file.as_deref(), &name.revision[..]), (Some("sub/x.gguf"), "refs/pr/1"));
    }

    #[test]
    fn no_name_leads_out_of_the_cache() {
        for text in [
            "hub:",
            "hub:model",
            "hub:/model",
            "hub:org/",
            "hub:../model",
            "hub:org/..",
            "hub:org/m/../x.gguf",
            "hub:org/m/x",
            "hub:org/m@",
            "hub:org/m@../x",
            "hub:org/m//x.gguf",
            "hub:o rg/m",
            "hub:org/m@a b",
            "hub:org/m/\\x.gguf",
        ] {
            assert_eq!(Name::parse(text), None, "{text}");
        }
    }
}

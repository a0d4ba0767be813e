//! Models from a hub: a small server on loopback, with connections that break.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use h1::checkpoint::{Checkpoint, Hub};
use serde_json::json;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the server behaves.
#[derive(Clone, Copy, Default)]
struct Manners {
    /// A body breaks off after so many bytes.
    cut: Option<usize>,
    /// Every range of a file but the first byte is the whole file.
    no_ranges: bool,
    /// One byte of a file is wrong.
    garbles: bool,
    /// After so many bytes of a body, or of any answer where it is 0, nothing comes and the connection stays.
    silent_after: Option<usize>,
}

/// What it was asked for: path and range.
type Asked = Arc<Mutex<Vec<(String, String)>>>;

struct Server {
    address: String,
    asked: Asked,
}

impl Server {
    fn start(files: BTreeMap<String, Vec<u8>>, manners: Manners) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Asked::default();
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                kept.extend(manners.silent_after.and_then(|_| stream.try_clone().ok()));
                // A client that hangs up early is what some of these tests are about.
                let _ = answer(stream, &files, manners, &log);
            }
        });
        Server { address, asked }
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub::new(&self.address, cache)
    }

    /// The files that were asked for, each once.
    fn files(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        let mut files: Vec<String> = asked
            .iter()
            .filter_map(|(path, _)| Some(path.split_once("/resolve/")?.1.split_once('/')?.1.to_owned()))
            .collect();
        files.sort();
        files.dedup();
        files
    }

    fn ranges(&self, file: &str) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(path, _)| path.ends_with(file)).map(|(_, range)| range.clone()).collect()
    }
}

fn answer(
    mut stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    manners: Manners,
    log: &Asked,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut range = String::new();
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some((key, value)) = line.split_once(": ")
            && key.eq_ignore_ascii_case("range")
        {
            range = value.to_owned();
        }
    }
    log.lock().unwrap().push((path.clone(), range.clone()));
    if manners.silent_after == Some(0) {
        return Ok(());
    }
    if path.starts_with("/api/models/org/model/revision/main") {
        let siblings: Vec<_> = files.keys().map(|name| json!({"rfilename": name})).collect();
        let body = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    }
    let file = path.strip_prefix(&format!("/org/model/resolve/{COMMIT}/")).and_then(|name| files.get(name));
    let Some(whole) = file else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let (start, end) = range.strip_prefix("bytes=").and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
    let mut start: usize = start.parse().unwrap();
    let end = end.parse().map_or(whole.len(), |end: usize| end + 1);
    if start >= whole.len() {
        return write!(stream, "HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    if manners.no_ranges && end == whole.len() {
        start = 0;
    }
    let mut body = whole[start..end].to_vec();
    if manners.garbles && body.len() > 1 {
        body[0] ^= 1;
    }
    let etag: String = Sha256::digest(whole).iter().map(|byte| format!("{byte:02x}")).collect();
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {start}-{}/{}\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        end - 1,
        whole.len(),
        body.len()
    )?;
    let sent = manners.cut.or(manners.silent_after).unwrap_or(usize::MAX);
    stream.write_all(&body[..sent.min(body.len())])
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// A repository with a small model and much that is of no use here.
fn repository() -> BTreeMap<String, Vec<u8>> {
    let read = |name: &str| fs::read(golden("gguf/qwen2").join(name)).unwrap();
    let mut files: BTreeMap<String, Vec<u8>> =
        ["config.json", "model.safetensors"].iter().map(|name| ((*name).to_owned(), read(name))).collect();
    for name in ["tokenizer_config.json", "README.md", "pytorch_model.bin", "onnx/model.onnx"] {
        files.insert(name.to_owned(), b"{}".to_vec());
    }
    files.insert("q/model.gguf".to_owned(), fs::read(golden("gguf/llama.gguf")).unwrap());
    files
}

#[test]
fn a_model_is_downloaded_once_and_no_file_that_is_not_needed() {
    let (server, cache) = (Server::start(repository(), Manners::default()), tempfile::tempdir().unwrap());
    let folder = server.hub(cache.path()).fetch("hub:org/model").unwrap();
    let downloaded = Checkpoint::open(&folder).unwrap();
    let original = Checkpoint::open(&golden("gguf/qwen2")).unwrap();
    assert_eq!(downloaded.read_f32("model.norm.weight").unwrap(), original.read_f32("model.norm.weight").unwrap());
    assert_eq!(server.files(), ["config.json", "model.safetensors", "tokenizer_config.json"]);
    let asked = server.asked.lock().unwrap().len();
    assert_eq!(server.hub(cache.path()).fetch("hub:org/model").unwrap(), folder);
    assert_eq!(server.asked.lock().unwrap().len(), asked, "what is in the cache is not asked for");
    // The layout of the cache is the one that other clients read.
    assert!(cache.path().join(format!("models--org--model/snapshots/{COMMIT}/config.json")).exists());
    assert_eq!(fs::read_to_string(cache.path().join("models--org--model/refs/main")).unwrap(), COMMIT);
}

#[test]
fn a_gguf_file_in_a_repository_is_named_after_it() {
    let (server, cache) = (Server::start(repository(), Manners::default()), tempfile::tempdir().unwrap());
    let file = server.hub(cache.path()).fetch("hub:org/model/q/model.gguf").unwrap();
    Checkpoint::open(&file).unwrap();
    assert_eq!(server.files(), ["q/model.gguf"]);
    let mut only = repository();
    only.remove("config.json");
    let server = Server::start(only, Manners::default());
    let error = server.hub(tempfile::tempdir().unwrap().path()).fetch("hub:org/model").unwrap_err().to_string();
    assert!(error.contains("no config.json") && error.contains("/q/model.gguf"), "{error}");
}

#[test]
fn a_connection_that_breaks_goes_on_where_it_broke() {
    let cut = Manners { cut: Some(9_000), ..Manners::default() };
    let (server, cache) = (Server::start(repository(), cut), tempfile::tempdir().unwrap());
    let folder = server.hub(cache.path()).fetch("hub:org/model").unwrap();
    Checkpoint::open(&folder).unwrap();
    let size = fs::metadata(golden("gguf/qwen2/model.safetensors")).unwrap().len();
    // The client looks at the file before each try, by its first byte.
    let mut bodies: Vec<String> = server.ranges("model.safetensors");
    bodies.retain(|range| range != "bytes=0-0");
    let expected: Vec<String> = (0..size).step_by(9_000).map(|first| format!("bytes={first}-")).collect();
    assert_eq!(bodies, expected);
}

#[test]
fn a_download_that_another_process_left_goes_on() {
    let (server, cache) = (Server::start(repository(), Manners::default()), tempfile::tempdir().unwrap());
    let whole = &repository()["model.safetensors"];
    let etag: String = Sha256::digest(whole).iter().map(|byte| format!("{byte:02x}")).collect();
    let blobs = cache.path().join("models--org--model/blobs");
    fs::create_dir_all(&blobs).unwrap();
    // Half of it; all of it, but not yet under its name; more than all of it.
    let more = [&whole[..], b"more"].concat();
    for (left, range) in
        [(&whole[..1000], "bytes=1000-"), (whole, &format!("bytes={}-", whole.len() - 1)), (&more, "bytes=0-")]
    {
        let _ = fs::remove_dir_all(cache.path().join("models--org--model/snapshots"));
        let _ = fs::remove_file(blobs.join(&etag));
        fs::write(blobs.join(format!("{etag}.part")), left).unwrap();
        Checkpoint::open(&server.hub(cache.path()).fetch("hub:org/model").unwrap()).unwrap();
        assert_eq!(server.ranges("model.safetensors").last().unwrap(), range);
    }
}

#[test]
fn what_came_wrong_is_thrown_away() {
    for manners in [
        Manners { garbles: true, ..Manners::default() },
        Manners { no_ranges: true, cut: Some(9_000), ..Manners::default() },
    ] {
        let (server, cache) = (Server::start(repository(), manners), tempfile::tempdir().unwrap());
        let error = server.hub(cache.path()).fetch("hub:org/model").unwrap_err().to_string();
        assert!(error.contains("hub:org/model: ") && error.contains("thrown away, try again"), "{error}");
        let sound = Server::start(repository(), Manners::default());
        Checkpoint::open(&sound.hub(cache.path()).fetch("hub:org/model").unwrap()).unwrap();
    }
}

#[test]
fn what_is_not_there_and_a_hub_that_is_not_there_are_said_in_a_sentence() {
    let (server, cache) = (Server::start(repository(), Manners::default()), tempfile::tempdir().unwrap());
    let refusal = |hub: &Hub, name: &str| hub.fetch(name).unwrap_err().to_string();
    let hub = server.hub(cache.path());
    assert!(refusal(&hub, "hub:org/other").contains("no such model"));
    assert!(refusal(&hub, "hub:org/model@v9").contains("no such model"));
    assert!(refusal(&hub, "hub:org/model/none.gguf").contains("no file none.gguf"));
    assert!(refusal(&hub, "hub:model").contains("expected hub:ORG/NAME"));
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = refusal(&Hub::new(&format!("http://{nobody}"), cache.path()), "hub:org/model");
    assert!(error.contains("cannot be reached") && error.contains("HF_ENDPOINT"), "{error}");
}

#[test]
fn a_hub_that_says_nothing_is_given_up_in_a_sentence_and_what_came_is_kept() {
    let silence = Duration::from_millis(300);
    for (silent_after, kept) in [(0, 0), (9_000, 9_000)] {
        let silent = Manners { silent_after: Some(silent_after), ..Manners::default() };
        let (server, cache) = (Server::start(repository(), silent), tempfile::tempdir().unwrap());
        let error = server.hub(cache.path()).silent_at_most(silence).fetch("hub:org/model").unwrap_err().to_string();
        assert!(error.contains("has said nothing for 0.3 seconds") && !error.contains('\n'), "{error}");
        let blobs = fs::read_dir(cache.path().join("models--org--model/blobs")).into_iter().flatten();
        let part =
            blobs.map(|file| file.unwrap().path()).find(|file| file.extension().is_some_and(|end| end == "part"));
        assert_eq!(part.map_or(0, |part| fs::metadata(part).unwrap().len()), kept);
    }
}

#[test]
fn every_verb_takes_a_name_and_the_environment_says_where_the_hub_is() {
    let (server, home) = (Server::start(repository(), Manners::default()), tempfile::tempdir().unwrap());
    let run = |endpoint: &str, model: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_h1"));
        command.args(["inspect", model]).env("HF_ENDPOINT", endpoint).env("HF_HOME", home.path()).output().unwrap()
    };
    let inspected = run(&server.address, "hub:org/model");
    assert!(inspected.status.success(), "{}", String::from_utf8_lossy(&inspected.stderr));
    assert!(String::from_utf8_lossy(&inspected.stdout).contains("Qwen2"));
    let unreachable = run("http://nowhere.invalid", "hub:org/other");
    assert_eq!(unreachable.status.code(), Some(1));
    let words = String::from_utf8_lossy(&unreachable.stderr).into_owned();
    assert!(words.contains("http://nowhere.invalid cannot be reached") && words.trim().lines().count() == 1, "{words}");
}

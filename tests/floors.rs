//! A floor uses floors below it, never one above.

use std::fs;
use std::path::{Path, PathBuf};

/// From the roof down; modules of one floor stand in one line.
const FLOORS: [&[&str]; 8] = [
    &["cli"],
    &["bench", "distill", "verify"],
    &["train", "eval", "report"],
    &["generate"],
    &["hybrid", "text", "checkpoint"],
    &["model"],
    &["backend"],
    &["random"],
];

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The modules that a file names as `crate::module`.
fn used(text: &str) -> Vec<&str> {
    let names = text.match_indices("crate::").map(|(at, prefix)| &text[at + prefix.len()..]);
    names.map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap()).collect()
}

#[test]
fn no_floor_uses_one_above() {
    let mut files = Vec::new();
    sources(&root(), &mut files);
    assert!(files.len() > 50, "the sources are found");
    let mut wrong = Vec::new();
    for file in files {
        let inside = file.strip_prefix(root()).unwrap();
        let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        let Some(own) = floor(module) else { continue };
        let text = fs::read_to_string(&file).unwrap();
        for other in used(&text) {
            if floor(other).is_some_and(|other| other < own) {
                wrong.push(format!("{} uses {other}", inside.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_module_has_a_floor() {
    let lib = fs::read_to_string(root().join("lib.rs")).unwrap();
    for line in lib.lines().filter_map(|line| line.strip_prefix("pub mod ")) {
        let module = line.trim_end_matches(';');
        assert!(floor(module).is_some(), "{module} stands on no floor");
    }
}

#[test]
fn the_reference_knows_nothing_of_the_rest() {
    let mut files = Vec::new();
    sources(&root().join("../reference/src"), &mut files);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        assert!(!text.contains("h1::"), "{} names h1", file.display());
    }
}

#[test]
fn no_file_is_longer_than_600_lines() {
    let mut files = Vec::new();
    for folder in ["", "../reference", "../tests", "../benches"] {
        let folder = root().join(folder);
        if folder.is_dir() {
            sources(&folder, &mut files);
        }
    }
    let long = |file: &PathBuf| fs::read_to_string(file).unwrap().lines().count() > 600;
    let long: Vec<_> =
        files.into_iter().filter(|file| !file.components().any(|c| c.as_os_str() == "target")).filter(long).collect();
    assert!(long.is_empty(), "{long:?}");
}

//! The libraries of CUDA, found when the program runs: the driver, NVRTC, cuBLASLt.

use std::path::{Path, PathBuf};

use libloading::Library;

/// A folder, or several, that are looked in first.
pub const FOLDERS: &str = "H1_CUDA_LIBRARIES";

/// Looks for a library where `present` says that the system does not find it by itself: by the beginnings of the names of its
/// files, `libnvrtc.so` or so, last, and those that it opens when it is used. What is found stays loaded, so that whoever asks
/// the system for it by name gets it. `None` where there is none.
pub fn preload_unless(prefixes: &[&str], present: impl Fn() -> bool) -> Option<()> {
    if present() {
        return Some(());
    }
    let loaded = folders().iter().any(|folder| {
        prefixes.iter().all(|prefix| {
            // SAFETY: a library of CUDA, whose initialisers are safe to run.
            let library = matching(folder, prefix).iter().find_map(|file| unsafe { Library::new(file) }.ok());
            library.map(std::mem::forget).is_some()
        })
    });
    (loaded && present()).then_some(())
}

/// Files of a folder that a prefix begins, the highest version first.
fn matching(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    let mut files: Vec<PathBuf> = entries.filter(named).collect();
    files.sort();
    files.reverse();
    files
}

/// Where libraries of CUDA lie as a rule: the folders of the environment's variable, the toolkit's, and those of Python's
/// packages.
fn folders() -> Vec<PathBuf> {
    let given = std::env::var_os(FOLDERS).unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&given).filter(|path| !path.as_os_str().is_empty()).collect();
    for toolkit in matching(Path::new("/usr/local"), "cuda") {
        folders.extend(["lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|lib| toolkit.join(lib)));
    }
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let pythons = ["/usr/lib", "/usr/local/lib", "/opt/conda/lib", "/opt/venv/lib"].map(PathBuf::from);
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os);
    let active = active.map(|folder| PathBuf::from(folder).join("lib"));
    for lib in pythons.into_iter().chain(home.map(|home| home.join(".local/lib"))).chain(active) {
        for python in matching(&lib, "python3") {
            for packages in ["site-packages", "dist-packages"] {
                // nvidia/cu13/lib, nvidia/cuda_nvrtc/lib, ….
                folders.extend(matching(&python.join(packages).join("nvidia"), "").iter().map(|part| part.join("lib")));
            }
        }
    }
    folders
}

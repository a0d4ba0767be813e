//! What the targets share: a file for the bytes, and a meter that ends the run when reading takes more memory than a small
//! multiple of them.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicIsize, Ordering::Relaxed};

/// Counts the bytes that are held, and the most that were.
struct Meter;

static HELD: AtomicIsize = AtomicIsize::new(0);
static MOST: AtomicIsize = AtomicIsize::new(0);

// SAFETY: it only counts; the memory is the system's.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size() as isize, Relaxed) + layout.size() as isize;
        MOST.fetch_max(held, Relaxed);
        // SAFETY: as asked of the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size() as isize, Relaxed);
        // SAFETY: as asked of the caller.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static METER: Meter = Meter;

/// Memory beside that for the input: messages, the buffers of a reader.
const ALWAYS: usize = 1 << 20;

/// Runs `work`, which reads `bytes` bytes; ends the process when it held more than `times` as many, and a little.
pub fn metered<T>(bytes: usize, times: usize, work: impl FnOnce() -> T) -> T {
    let before = HELD.load(Relaxed);
    MOST.store(before, Relaxed);
    let result = work();
    let most = (MOST.load(Relaxed) - before) as usize;
    if most > times * bytes + ALWAYS {
        // Not a panic, whose words `contain_panics` would hide.
        eprintln!("{most} bytes held for {bytes} bytes of input");
        std::process::abort();
    }
    result
}

/// A folder of this process, in memory where the system has one there.
pub fn folder() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let above = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = above.join(format!("h1-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the input");
    folder
}

/// Lets a panic that h1 takes for an error of a library reach it: the fuzzer would end the process at once.
pub fn contain_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| std::panic::set_hook(Box::new(|_| ())));
}

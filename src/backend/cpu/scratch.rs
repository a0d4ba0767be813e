//! Memory for packed blocks: one piece a thread, made at its first use and kept.

use super::simd::LANES;
use std::cell::RefCell;

/// A cache line, so that packed vectors never straddle two.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    _values: [f32; LANES],
}

thread_local! {
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` values of this thread's scratch. They hold what the last user left.
///
/// `f` may not call `with_scratch`, and so may not wait for other tasks, which this thread could take up meanwhile.
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|lines| {
        let needed = len.div_ceil(LANES);
        if lines.len() < needed {
            lines.resize(needed, Line { _values: [0.0; LANES] });
        }
        // SAFETY: a line is 16 f32 without padding.
        let values = unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast::<f32>(), lines.len() * LANES) };
        f(&mut values[..len])
    })
}

//! How a kernel spreads over threads.

use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Below this many lane-wise operations of 16 waking other threads costs more than it saves.
/// Tests spread everything.
const WORTH_A_THREAD: usize = if cfg!(test) { 1 } else { 16 * 1024 };

/// Runs `task` for each of `0..count`, `work` lane-wise operations in all. Which thread takes which task, and whether there
/// is more than one, must not show in the results: tasks write disjoint outputs, each in a fixed order.
pub(super) fn parallel(count: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    if count <= 1 || work < WORTH_A_THREAD || rayon::current_num_threads() == 1 {
        (0..count).for_each(task);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// As [`parallel`], and the tasks begin in order: with the long ones first all threads are busy to the end.
pub(super) fn parallel_in_order(count: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    let next = AtomicUsize::new(0);
    parallel(count.min(rayon::current_num_threads()), work, |_| {
        while let Some(index) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&index| index < count) {
            task(index);
        }
    });
}

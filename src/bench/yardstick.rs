//! What the machine itself can do: the `gemm` crate's matrix products, and memory.

use std::time::{Duration, Instant};

use gemm::Parallelism;
use serde::Serialize;

use super::shapes::uniform;
use super::{Error, Result};

/// Bytes of one of the two buffers that memory is measured with: more than any cache.
const BYTES: usize = 1 << 28;

/// Stretches of time that a rate is the best of.
const STRETCHES: u32 = 4;

/// A row-major product `[m, k]·[k, n]` in f32 by the `gemm` crate, on threads of its own.
pub struct Gemm {
    pool: rayon::ThreadPool,
    operands: Operands,
}

struct Operands {
    threads: usize,
    sizes: [usize; 3],
    lhs: Vec<f32>,
    rhs: Vec<f32>,
    out: Vec<f32>,
}

impl Gemm {
    /// A product of `sizes` m, k, n on `threads` threads.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn new(sizes: [usize; 3], threads: usize) -> Result<Self> {
        let [m, k, n] = sizes;
        let threads = threads.max(1);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        Ok(Gemm {
            pool: pool.map_err(|error| Error::Threads(error.to_string()))?,
            operands: Operands {
                threads,
                sizes,
                lhs: uniform("left side", m * k, 1.0),
                rhs: uniform("right side", k * n, 1.0),
                out: vec![0.0; m * n],
            },
        })
    }

    /// GFLOP/s over a stretch of time, a product being 2·m·k·n operations.
    pub fn rate(&mut self, stretch: Duration) -> f64 {
        let Gemm { pool, operands } = self;
        let start = Instant::now();
        let mut count = 0_u32;
        while count == 0 || start.elapsed() < stretch {
            pool.install(|| operands.multiply());
            count += 1;
        }
        let [m, k, n] = operands.sizes.map(|size| size as f64);
        f64::from(count) * 2.0 * m * k * n / start.elapsed().as_secs_f64() / 1e9
    }

    /// The best of several stretches within `budget`, after a first one that is not counted.
    pub fn best_rate(&mut self, budget: Duration) -> f64 {
        self.rate(Duration::ZERO);
        (0..STRETCHES).map(|_| self.rate(budget / STRETCHES)).fold(0.0, f64::max)
    }
}

impl Operands {
    fn multiply(&mut self) {
        let [m, k, n] = self.sizes;
        let (inner, width) = (k as isize, n as isize);
        let (out, lhs, rhs) = (self.out.as_mut_ptr(), self.lhs.as_ptr(), self.rhs.as_ptr());
        let parallelism = if self.threads == 1 { Parallelism::None } else { Parallelism::Rayon(self.threads) };
        // SAFETY: the three matrices have m·n, m·k and k·n values, their rows n, k and n apart.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out,
                1,
                width,
                false,
                lhs,
                1,
                inner,
                rhs,
                1,
                width,
                0.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

/// Whose limits they are, and where they are from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Whose {
    /// The processor's, measured.
    Processor,
    /// A card's, measured.
    Card,
    /// Those of a known card ([`super::card::CARDS`]).
    Known,
}

/// What the machine does at its best.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limits {
    /// Whose.
    pub whose: Whose,
    /// Threads that it was measured with; 0 for a card.
    pub threads: usize,
    /// GFLOP/s of matrix products: of the `gemm` crate, f32, 1024 × 1024 × 1024, or of the card.
    pub gemm_gflops: f64,
    /// GB/s of memory being copied: read and written bytes together.
    pub copy_gbytes: f64,
    /// GB/s of memory being read.
    pub read_gbytes: f64,
}

impl Limits {
    /// Measures for about `budget` each.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn measure(threads: usize, budget: Duration) -> Result<Self> {
        let (copy_gbytes, read_gbytes) = memory_rates(threads, budget);
        let gemm_gflops = Gemm::new([1024; 3], threads)?.best_rate(budget);
        Ok(Limits { whose: Whose::Processor, threads, gemm_gflops, copy_gbytes, read_gbytes })
    }

    /// Seconds that the machine takes at least for so many operations and bytes.
    pub fn floor(&self, flops: f64, bytes: f64) -> f64 {
        (flops / self.gemm_gflops).max(bytes / self.copy_gbytes.max(self.read_gbytes)) / 1e9
    }
}

/// Bytes of this machine's memory, where the system says.
#[cfg(unix)]
pub fn memory_bytes() -> Option<u64> {
    // SAFETY: the call reads a number of the system and touches no memory of ours.
    let [pages, size] = [libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE].map(|name| unsafe { libc::sysconf(name) });
    u64::try_from(pages).ok()?.checked_mul(u64::try_from(size).ok()?).filter(|bytes| *bytes > 0)
}

/// Bytes of this machine's memory: not asked for on this system.
#[cfg(not(unix))]
pub fn memory_bytes() -> Option<u64> {
    None
}

/// GB/s of a copy and of a read, each the best of several within `budget`.
fn memory_rates(threads: usize, budget: Duration) -> (f64, f64) {
    let words = BYTES / size_of::<u64>();
    let (source, mut target) = (vec![1_u64; words], vec![2_u64; words]);
    let part = words.div_ceil(threads.max(1));
    let copy = best(budget, || {
        std::thread::scope(|scope| {
            for (from, to) in source.chunks(part).zip(target.chunks_mut(part)) {
                scope.spawn(move || to.copy_from_slice(from));
            }
        });
    });
    let read = best(budget, || {
        std::thread::scope(|scope| {
            for from in source.chunks(part) {
                scope.spawn(move || std::hint::black_box(from.iter().fold(0_u64, |sum, word| sum.wrapping_add(*word))));
            }
        });
    });
    let gbytes = |bytes: usize, seconds: f64| bytes as f64 / seconds / 1e9;
    (gbytes(2 * BYTES, copy), gbytes(BYTES, read))
}

/// Seconds of `run`, the best of several within `budget`, after a first one that is not counted.
fn best(budget: Duration, mut run: impl FnMut()) -> f64 {
    run();
    let begun = Instant::now();
    let mut best = f64::INFINITY;
    loop {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        if begun.elapsed() >= budget {
            return best;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_yardstick_multiplies() {
        let mut gemm = Gemm::new([3, 5, 4], 2).unwrap();
        assert!(gemm.rate(Duration::ZERO) > 0.0);
        let Operands { lhs, rhs, out, .. } = &gemm.operands;
        for (row, values) in out.chunks(4).enumerate() {
            for (column, value) in values.iter().enumerate() {
                let expected: f32 = (0..5).map(|i| lhs[row * 5 + i] * rhs[i * 4 + column]).sum();
                assert!((value - expected).abs() < 1e-5);
            }
        }
    }
}

//! The register tile of all products.
//!
//! A tile is a few rows times one panel of columns, each value one chain of fused multiply-adds over the steps of the
//! inner index, in order. How many rows and columns share the registers changes no bit of any of them.

use super::matrix::PANEL;
use super::simd::{Element, Kernel, LANES, Lanes};
use std::ops::Range;

/// Most rows of a tile: 24 sums and two vectors of the right factor fit the registers of AVX-512, and twice half of the rows and
/// a quarter of the columns those of AVX2.
pub const TILE_ROWS: usize = 12;

/// The left factor: its value of row i and step s lies at `ptr + i·row + s·step`.
#[derive(Clone, Copy)]
pub struct Left {
    /// Row 0, step 0.
    pub ptr: *const f32,
    /// Values from a row to the next.
    pub row: usize,
    /// Values from a step to the next.
    pub step: usize,
}

/// The right factor: the [`PANEL`] values of step s lie at `ptr + s·step`, readable even where the target has fewer
/// columns.
#[derive(Clone, Copy)]
pub struct Right<T> {
    /// Step 0.
    pub ptr: *const T,
    /// Values from a step to the next.
    pub step: usize,
}

/// Where the chains begin and where the values go. Row i of either lies `i·row` values on.
#[derive(Clone, Copy)]
pub struct Target {
    /// The values, and from row to row, that the chains go on from; without them they begin at 0.
    pub start: Option<(*const f32, usize)>,
    /// Where the values go.
    pub end: *mut f32,
    /// Values from a row of `end` to the next.
    pub end_row: usize,
    /// How many of the [`PANEL`] columns there are, in `start`, `end` and `bias`.
    pub cols: usize,
    /// One value a column, added after the chain.
    pub bias: Option<*const f32>,
    /// Whether the value is added to what is in `end`, after the bias, or replaces it.
    pub add: bool,
}

/// Cuts `range` into the fewest parts of at most `most`, of sizes that differ by one at most.
#[inline(always)]
pub fn even_parts(range: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = range.len().div_ceil(most.max(1));
    (0..parts).map(move |i| range.start + i * range.len() / parts..range.start + (i + 1) * range.len() / parts)
}

/// `rows` rows (1 to [`TILE_ROWS`]) of one panel over `steps` steps.
pub struct Tile<T> {
    rows: usize,
    steps: usize,
    left: Left,
    right: Right<T>,
    target: Target,
}

impl<T: Element> Tile<T> {
    /// The arguments of a tile.
    ///
    /// # Safety
    /// The addresses that `left`, `right` and `target` name are valid for `rows` rows, `steps` steps and the target's
    /// columns, at most [`PANEL`], and nobody else touches `end` until the tile has run.
    pub unsafe fn new(rows: usize, steps: usize, left: Left, right: Right<T>, target: Target) -> Self {
        debug_assert!((1..=TILE_ROWS).contains(&rows) && target.cols <= PANEL);
        Tile { rows, steps, left, right, target }
    }
}

impl<T: Element> Kernel for Tile<T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        macro_rules! of_rows {
            ($tile:expr, $vectors:literal, $($rows:literal)*) => {
                match $tile.rows {
                    // SAFETY: as the caller of `new` promised.
                    $($rows => unsafe { $tile.registers::<L, $rows, $vectors>() },)*
                    rows => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        let vectors = self.target.cols.div_ceil(LANES);
        if L::REGISTERS >= 32 {
            if vectors > 1 {
                of_rows!(self, 2, 1 2 3 4 5 6 7 8 9 10 11 12)
            } else {
                of_rows!(self, 1, 1 2 3 4 5 6 7 8 9 10 11 12)
            }
        } else if vectors > 1 && self.rows <= 2 {
            // Few rows wait for the memory of the weight: better read from end to end.
            of_rows!(self, 2, 1 2)
        } else {
            for rows in even_parts(0..self.rows, TILE_ROWS / 2) {
                for vector in 0..vectors {
                    let part = self.part(rows.clone(), vector);
                    of_rows!(part, 1, 1 2 3 4 5 6)
                }
            }
        }
    }
}

impl<T: Element> Tile<T> {
    /// Some rows of one vector of columns.
    #[inline(always)]
    fn part(&self, rows: Range<usize>, vector: usize) -> Tile<T> {
        let (row, col) = (rows.start, vector * LANES);
        let Tile { steps, left, right, target, .. } = *self;
        Tile {
            rows: rows.len(),
            steps,
            left: Left { ptr: left.ptr.wrapping_add(row * left.row), ..left },
            right: Right { ptr: right.ptr.wrapping_add(col), ..right },
            target: Target {
                start: target.start.map(|(ptr, stride)| (ptr.wrapping_add(row * stride + col), stride)),
                end: target.end.wrapping_add(row * target.end_row + col),
                cols: target.cols.saturating_sub(col).min(LANES),
                bias: target.bias.map(|ptr| ptr.wrapping_add(col)),
                ..target
            },
        }
    }

    /// M rows and V vectors, all in registers.
    ///
    /// # Safety
    /// As for [`Tile::new`], with `rows` = M and V vectors of columns.
    #[inline(always)]
    unsafe fn registers<L: Lanes, const M: usize, const V: usize>(&self) {
        let Tile { steps, left, right, target, .. } = *self;
        // SAFETY: as the caller promises.
        unsafe {
            let mut sums = [[L::zero(); V]; M];
            if let Some((start, stride)) = target.start {
                for (i, sums) in sums.iter_mut().enumerate() {
                    *sums = load(start.add(i * stride), target.cols);
                }
            }
            let (mut a, mut b) = (left.ptr, right.ptr);
            for _ in 0..steps {
                let mut b_now = [L::zero(); V];
                for (v, b_now) in b_now.iter_mut().enumerate() {
                    *b_now = T::load_ptr(b.add(v * LANES));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a_now = L::splat(*a.add(i * left.row));
                    for (sum, b_now) in sums.iter_mut().zip(b_now) {
                        *sum = a_now.mul_add(b_now, *sum);
                    }
                }
                a = a.wrapping_add(left.step);
                b = b.wrapping_add(right.step);
            }
            let bias = target.bias.map(|bias| load::<L, V>(bias, target.cols));
            for (i, sums) in sums.into_iter().enumerate() {
                let end = target.end.add(i * target.end_row);
                finish(sums, bias, target.add, end, target.cols);
            }
        }
    }
}

/// Adds the bias and what is at `end`, as asked, and writes the first `cols` values there.
#[inline(always)]
unsafe fn finish<L: Lanes, const V: usize>(sums: [L; V], bias: Option<[L; V]>, add: bool, end: *mut f32, cols: usize) {
    for (v, mut sum) in sums.into_iter().enumerate() {
        if let Some(bias) = bias {
            sum = sum + bias[v];
        }
        let first = v * LANES;
        let (end, cols) = (end.wrapping_add(first), cols.saturating_sub(first).min(LANES));
        // SAFETY: as the caller of `Tile::new` promises.
        unsafe {
            if add {
                sum = L::load_first_ptr(end, cols) + sum;
            }
            sum.store_first_ptr(end, cols);
        }
    }
}

/// The first `cols` values at `ptr`, then zeros.
#[inline(always)]
unsafe fn load<L: Lanes, const V: usize>(ptr: *const f32, cols: usize) -> [L; V] {
    let mut values = [L::zero(); V];
    for (v, value) in values.iter_mut().enumerate() {
        let first = v * LANES;
        // SAFETY: as the caller of `Tile::new` promises.
        *value = unsafe { L::load_first_ptr(ptr.wrapping_add(first), cols.saturating_sub(first).min(LANES)) };
    }
    values
}

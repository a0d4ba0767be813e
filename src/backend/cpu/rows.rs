//! Rows taken by index and added back, rows into pages, weighted sums of rows.

use super::elementwise::Storage;
use super::lines::{load, put, store};
use super::matrix::{PANEL, Panels, Rows, RowsMut};
use super::segment::Segment;
use super::simd::{Element, Kernel, LANES, Lanes, Simd};
use super::work::parallel;
use std::ops::Range;

/// Rows, or columns, that one task takes.
const BLOCK: usize = 64;

/// Runs `task` over blocks of `0..count`, `work` lane-wise operations in all.
fn over_blocks(count: usize, work: usize, task: impl Fn(Range<usize>) + Sync + Send) {
    parallel(count.div_ceil(BLOCK), work, |block| task(block * BLOCK..count.min((block + 1) * BLOCK)));
}

/// `out[t] = weight[ids[t]]`: ids `[tokens]`, out `[tokens, hidden]`. A row of a weight in panels has gaps.
pub fn embed<T: Element>(ids: &[u32], weight: Panels<'_, T>, out: &RowsMut<'_>) {
    over_blocks(ids.len(), ids.len() * out.cols(), |rows| {
        for t in rows {
            let id = ids[t] as usize;
            let values = weight.panel(id / PANEL).iter().skip(id % PANEL).step_by(PANEL);
            // SAFETY: the row belongs to this task.
            for (out, value) in unsafe { out.shared_row(t) }.iter_mut().zip(values) {
                *out = value.widen();
            }
        }
    });
}

/// `dweight[ids[t]] += dout[t]`, in the order of the rows: dout `[tokens, hidden]`, dweight the panels as a matrix
/// `[panels·hidden, PANEL]`.
pub fn embed_backward(ids: &[u32], dout: Rows<'_>, dweight: &RowsMut<'_>) {
    let hidden = dout.cols();
    over_blocks(hidden, ids.len() * hidden, |columns| {
        for (t, id) in ids.iter().enumerate() {
            let id = *id as usize;
            for (j, value) in columns.clone().zip(dout.part(t, columns.start, columns.len())) {
                // SAFETY: the columns belong to this task, whatever their row.
                let cell = unsafe { dweight.part(id / PANEL * hidden + j, id % PANEL, 1) };
                cell[0] += value;
            }
        }
    });
}

/// `out[i] = src[rows[i]]`: src `[any, width]`, out `[n, width]`.
pub fn gather<T: Copy + Send + Sync>(src: Rows<'_, T>, rows: &[u32], out: &RowsMut<'_, T>) {
    over_blocks(rows.len(), rows.len() * out.cols() / LANES, |block| {
        for i in block {
            // SAFETY: the row belongs to this task.
            unsafe { out.shared_row(i) }.copy_from_slice(src.row(rows[i] as usize));
        }
    });
}

/// `out[rows[i]] += src[i]`, in the order of `i`, so that a row may come twice: src `[n, width]`, out `[any, width]`.
pub fn scatter_add(simd: Simd, src: Rows<'_>, rows: &[u32], out: &RowsMut<'_>) {
    over_blocks(src.cols(), rows.len() * src.cols() / LANES, |columns| {
        simd.run(ScatterAdd { src, rows, out, columns });
    });
}

struct ScatterAdd<'a> {
    src: Rows<'a>,
    rows: &'a [u32],
    out: &'a RowsMut<'a>,
    columns: Range<usize>,
}

impl Kernel for ScatterAdd<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (first, count) = (self.columns.start, self.columns.len());
        for (i, row) in self.rows.iter().enumerate() {
            // SAFETY: the columns belong to this task, whatever their row.
            let out = unsafe { self.out.part(*row as usize, first, count) };
            for j in (0..count).step_by(LANES) {
                put(load::<L>(self.src.part(i, first, count), j), out, j, true);
            }
        }
    }
}

/// Writes the rows of each segment to the pages of its slot: position p of slot s is row
/// `pages[s, p / page_size]·page_size + p % page_size` of out `[page count·page_size, width]`. rows `[tokens, width]`,
/// pages `[slots, pages a slot]`. No two segments share a page.
pub fn page_write<T: Storage>(
    rows: Rows<'_>,
    segments: &[Segment],
    pages: Rows<'_, u32>,
    page_size: usize,
    out: &RowsMut<'_, T>,
) {
    parallel(segments.len(), rows.rows() * rows.cols() / 8, |s| {
        let segment = &segments[s];
        for (row, position) in segment.rows().zip(segment.past as usize..) {
            let page = pages.row(segment.slot as usize)[position / page_size] as usize;
            // SAFETY: the pages of a slot belong to the task of its segment.
            let out = unsafe { out.shared_row(page * page_size + position % page_size) };
            for (out, value) in out.iter_mut().zip(rows.row(row)) {
                *out = T::narrow(*value);
            }
        }
    });
}

/// `out[c] += Σ_r weights[r]·values[r, c]`, rows in order; rows of weight 0 are passed over, whatever they hold.
/// values `[rows, cols]`, weights `[rows]`, out `[1, cols]`.
pub fn weighted_sum(simd: Simd, values: Rows<'_>, weights: &[f32], out: &RowsMut<'_>) {
    over_blocks(values.cols(), values.rows() * values.cols() / LANES, |columns| {
        // SAFETY: the columns belong to this task.
        let out = unsafe { out.part(0, columns.start, columns.len()) };
        simd.run(WeightedSum { values, weights, first: columns.start, out });
    });
}

struct WeightedSum<'a> {
    values: Rows<'a>,
    weights: &'a [f32],
    first: usize,
    out: &'a mut [f32],
}

impl Kernel for WeightedSum<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let count = self.out.len();
        let mut sums = [L::zero(); BLOCK / LANES];
        for (r, &weight) in self.weights.iter().enumerate().filter(|(_, weight)| **weight != 0.0) {
            let values = self.values.part(r, self.first, count);
            for (j, sum) in (0..count).step_by(LANES).zip(&mut sums) {
                *sum = load::<L>(values, j).mul_add(L::splat(weight), *sum);
            }
        }
        for (j, sum) in (0..count).step_by(LANES).zip(sums) {
            let before = load::<L>(self.out, j);
            store(before + sum, self.out, j);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Grid, assert_close, everywhere, f64s, random, segments};
    use super::*;
    use half::bf16;
    use ndarray::Array2;
    use proptest::prelude::*;
    use rand::RngExt;

    /// The panels of a weight as a matrix `[panels·inputs, PANEL]`, padding 0.
    fn panels(weight: &Array2<f32>) -> Vec<f32> {
        let (outputs, inputs) = weight.dim();
        let mut panels = vec![0.0; super::super::matrix::panels_len(outputs, inputs)];
        for ((v, j), value) in weight.indexed_iter() {
            panels[(v / PANEL * inputs + j) * PANEL + v % PANEL] = *value;
        }
        panels
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn embedding_takes_rows_and_its_gradient_adds_them(
            seed: u64, tokens in 0usize..80, vocabulary in 1usize..70, hidden in 1usize..80,
        ) {
            let rng = &mut crate::random::stream(seed, "embed");
            let weight = Array2::from_shape_simple_fn((vocabulary, hidden), || rng.random_range(-1.0f32..1.0));
            let packed = panels(&weight);
            let ids: Vec<u32> = (0..tokens).map(|_| rng.random_range(0..vocabulary as u32)).collect();
            let dout = Grid::random(rng, tokens, hidden, 1.0);
            let outputs = everywhere(|_| {
                let mut out = Grid::poisoned(tokens, hidden);
                embed(&ids, Panels::new(&packed, vocabulary, hidden), &out.view_mut());
                let mut dweight = packed.clone();
                embed_backward(&ids, dout.view(), &RowsMut::dense(&mut dweight, packed.len() / PANEL, PANEL));
                vec![out.values(), dweight]
            });
            let taken = h1_reference::embed(&ids, weight.view());
            prop_assert_eq!(&outputs[0], taken.as_slice().unwrap());
            let dweight =
                weight.mapv(f64::from) + h1_reference::embed_backward(&ids, dout.f64().view(), vocabulary);
            assert_close("dweight", &outputs[1], &f64s(&panels(&dweight.mapv(|value| value as f32))), 3e-7);
        }

        #[test]
        fn rows_are_gathered_and_scattered_in_order(
            seed: u64, n in 0usize..40, many in 1usize..20, width in 1usize..90,
        ) {
            let rng = &mut crate::random::stream(seed, "gather");
            let (source, back) = (Grid::random(rng, many, width, 1.0), Grid::random(rng, n, width, 1.0));
            let index: Vec<u32> = (0..n).map(|_| rng.random_range(0..many as u32)).collect();
            let weights: Vec<f32> = (0..n).map(|i| (i % 3) as f32 - 1.0).collect();
            let before = random(rng, width, 1.0);
            let outputs = everywhere(|simd| {
                let (mut taken, mut target) = (Grid::poisoned(n, width), source.clone());
                gather(source.view(), &index, &taken.view_mut());
                scatter_add(simd, back.view(), &index, &target.view_mut());
                let mut sum = before.clone();
                weighted_sum(simd, back.view(), &weights, &RowsMut::dense(&mut sum, 1, width));
                vec![taken.values(), target.values(), sum]
            });
            let taken = h1_reference::gather(source.f64().view(), &index);
            assert_close("taken", &outputs[0], &taken, 0.0);
            let mut target = source.f64();
            h1_reference::scatter_add(target.view_mut(), &index, back.f64().view());
            assert_close("target", &outputs[1], &target, 3e-7);
            let sum = f64s(&before) + f64s(&weights).dot(&back.f64());
            assert_close("sum", &outputs[2], &sum, 1e-6);
        }

        #[test]
        fn rows_go_to_the_pages_of_their_slot(
            seed: u64, sizes in prop::collection::vec((0usize..9, 0usize..9), 0..5), width in 1usize..20,
            page_size in 1usize..6,
        ) {
            let rng = &mut crate::random::stream(seed, "pages");
            let segments = segments(&sizes);
            let (tokens, a_slot) = (sizes.iter().map(|(len, _)| len).sum(), 16);
            let rows = Grid::random(rng, tokens, width, 1.0);
            let mut table: Vec<u32> = (0..(sizes.len() * a_slot) as u32).collect();
            table.reverse();
            let pages = Rows::dense(&table, sizes.len(), a_slot);
            let pool_rows = sizes.len() * a_slot * page_size;
            let outputs = everywhere(|_| {
                let mut pool = Grid::from_fn(pool_rows, width, || -7.0);
                page_write(rows.view(), &segments, pages, page_size, &pool.view_mut());
                vec![pool.values()]
            });
            let mut expected = Array2::from_elem((pool_rows, width), -7.0);
            for segment in &segments {
                for (row, position) in segment.rows().zip(segment.past as usize..) {
                    let page = pages.row(segment.slot as usize)[position / page_size] as usize;
                    let values = rows.f64().row(row).to_owned();
                    expected.row_mut(page * page_size + position % page_size).assign(&values);
                }
            }
            assert_close("pool", &outputs[0], &expected, 0.0);
            let mut narrow = vec![bf16::ONE; pool_rows * width];
            page_write(rows.view(), &segments, pages, page_size, &RowsMut::dense(&mut narrow, pool_rows, width));
            for (narrow, expected) in narrow.iter().zip(&expected) {
                let untouched = *expected == -7.0 && *narrow == bf16::ONE;
                prop_assert!(untouched || *narrow == bf16::from_f32(*expected as f32));
            }
        }
    }
}

//! Keys and values in pages (Kwon et al., arXiv:2309.06180): a pool of rows, and for each sequence a table of its pages.
//!
//! A pool is `[pages * page_size, width]`. The row of position `p` of segment `s` is
//! `table[s][p / page_size] * page_size + p % page_size`; table `[segments, most pages of one]`, whose unused entries may be anything.

use ndarray::{Array2, ArrayView2, ArrayViewMut2};

use crate::{Attention, Real, Segment, attention, gather};

fn pool_row(table: ArrayView2<u32>, page_size: usize, segment: usize, position: usize) -> usize {
    table[[segment, position / page_size]] as usize * page_size + position % page_size
}

/// Writes row `start + i` of x `[tokens, width]` to the pool at position `past + i` of its segment. Other rows stay.
pub fn page_write<T: Real>(
    mut pool: ArrayViewMut2<T>,
    x: ArrayView2<T>,
    segments: &[Segment],
    table: ArrayView2<u32>,
    page_size: usize,
) {
    for (s, segment) in segments.iter().enumerate() {
        for (i, row) in segment.rows().enumerate() {
            pool.row_mut(pool_row(table, page_size, s, segment.past + i)).assign(&x.row(row));
        }
    }
}

/// The first `past + len` positions of each segment, end to end: `[kv_tokens, width]`, as [`attention`] takes its keys.
pub fn page_read<T: Real>(
    pool: ArrayView2<T>,
    segments: &[Segment],
    table: ArrayView2<u32>,
    page_size: usize,
) -> Array2<T> {
    let mut index = Vec::new();
    for (s, segment) in segments.iter().enumerate() {
        index.extend((0..segment.kv_len()).map(|position| pool_row(table, page_size, s, position) as u32));
    }
    gather(pool, &index)
}

/// [`attention`] whose keys and values lie in pages, the segments' own rows already written ([`page_write`]).
///
/// q `[tokens, Hq * Dh]`, k_pool and v_pool `[pages * page_size, Hk * Dh]` → (out `[tokens, Hq * Dh]`, lse `[tokens, Hq]`).
pub fn attention_paged<T: Real>(
    q: ArrayView2<T>,
    k_pool: ArrayView2<T>,
    v_pool: ArrayView2<T>,
    segments: &[Segment],
    table: ArrayView2<u32>,
    page_size: usize,
    op: &Attention,
) -> (Array2<T>, Array2<T>) {
    let k = page_read(k_pool, segments, table, page_size);
    let v = page_read(v_pool, segments, table, page_size);
    attention(q, k.view(), v.view(), segments, op)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    proptest! {
        #[test]
        fn keys_written_page_by_page_in_two_calls_equal_keys_end_to_end(
            segments in segments(),
            page_size in size(),
            window in prop::option::of(1..=4usize),
            seed: u64,
        ) {
            let (head_dim, q_width, kv_width) = (2, 8, 4);
            let mut noise = Noise(seed);
            let op = Attention { head_dim, window, scale: 0.7 };
            let kv_tokens = segments.iter().map(Segment::kv_len).sum();
            let q = noise.array((tokens(&segments), q_width));
            let (k, v) = (noise.array((kv_tokens, kv_width)), noise.array((kv_tokens, kv_width)));

            // Pages are dealt from the back of the pool, in turns, so that no sequence has a contiguous run.
            let most = segments.iter().map(|segment| segment.kv_len().div_ceil(page_size)).max().unwrap_or(0);
            let pages = most * segments.len();
            let table = Array2::from_shape_fn((segments.len(), most), |(s, page)| {
                (pages - 1 - (page * segments.len() + s)) as u32
            });
            let mut pools = [noise.array((pages * page_size, kv_width)), noise.array((pages * page_size, kv_width))];
            for (pool, keys) in pools.iter_mut().zip([&k, &v]) {
                let starts = crate::kv_starts(&segments);
                let past: Vec<Segment> = segments
                    .iter()
                    .zip(&starts)
                    .map(|(segment, &start)| Segment { start, len: segment.past, past: 0 })
                    .collect();
                let own: Vec<Segment> = segments
                    .iter()
                    .zip(&starts)
                    .map(|(segment, &start)| Segment { start: start + segment.past, ..*segment })
                    .collect();
                page_write(pool.view_mut(), keys.view(), &past, table.view(), page_size);
                page_write(pool.view_mut(), keys.view(), &own, table.view(), page_size);
                assert_eq!(page_read(pool.view(), &segments, table.view(), page_size), keys);
            }
            let paged =
                attention_paged(q.view(), pools[0].view(), pools[1].view(), &segments, table.view(), page_size, &op);
            assert_eq!(paged, attention(q.view(), k.view(), v.view(), &segments, &op));
        }
    }

    #[test]
    fn a_write_touches_its_own_rows_only() {
        let mut pool = Array2::zeros((6, 1));
        let segments = [Segment { start: 0, len: 2, past: 1 }];
        page_write(
            pool.view_mut(),
            ndarray::array![[5.0f32], [7.0]].view(),
            &segments,
            ndarray::array![[2, 0]].view(),
            2,
        );
        assert_eq!(pool, ndarray::array![[7.0], [0.0], [0.0], [0.0], [0.0], [5.0]]);
    }
}

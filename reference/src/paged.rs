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

use super::super::testing::{Grid, assert_close, assert_same_bits, everywhere, reference_segments, segments};
use super::*;
use half::bf16;
use proptest::prelude::*;
use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Everything attention reads, at random.
#[derive(Clone)]
pub struct Case {
    pub shape: AttentionShape,
    pub segments: Vec<Segment>,
    pub q: Grid,
    pub k: Grid,
    pub v: Grid,
}

/// Sizes: (key heads, query heads of a group, width of a head).
pub fn sizes() -> impl Strategy<Value = (usize, usize, usize)> {
    (1usize..4, 1usize..6, prop::sample::select(vec![1, 5, 8, 16, 31, 32, 33, 64, 80]))
}

pub fn window() -> impl Strategy<Value = Option<usize>> {
    prop::option::of(prop_oneof![1usize..6, Just(TILE), 60usize..200])
}

/// (len, past) of a few segments.
pub fn lengths() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let len = prop_oneof![Just(0usize), Just(1), 2usize..20, TILE - 1..TILE + 2, 90usize..140];
    let past = prop_oneof![Just(0usize), 1usize..20, TILE - 1..TILE + 2, 90usize..140];
    prop::collection::vec((len, past), 0..4)
}

impl Case {
    pub fn new(
        seed: u64,
        (kv_heads, group, head_dim): (usize, usize, usize),
        window: Option<usize>,
        lengths: &[(usize, usize)],
    ) -> Self {
        let rng = &mut crate::random::stream(seed, "attention");
        let scale = rng.random_range(0.5..2.0) / (head_dim as f32).sqrt();
        let shape = AttentionShape { heads: kv_heads * group, kv_heads, head_dim, scale, window };
        let tokens = lengths.iter().map(|(len, _)| len).sum();
        let keys = lengths.iter().map(|(len, past)| len + past).sum();
        Self {
            shape,
            segments: segments(lengths),
            q: Grid::random(rng, tokens, shape.q_cols(), 2.0),
            k: Grid::random(rng, keys, shape.kv_cols(), 2.0),
            v: Grid::random(rng, keys, shape.kv_cols(), 1.0),
        }
    }

    fn tokens(&self) -> usize {
        self.q.view().rows()
    }

    fn rows(&self) -> Keys<'_> {
        Keys::Rows { k: self.k.view(), v: self.v.view() }
    }

    pub fn reference_shape(&self) -> h1_reference::Attention {
        let AttentionShape { head_dim, window, scale, .. } = self.shape;
        h1_reference::Attention { head_dim, window, scale: f64::from(scale) }
    }

    /// out and lse over the given keys.
    pub fn run<T: Element>(&self, simd: Simd, keys: Keys<'_, T>) -> (Grid, Grid) {
        let mut out = Grid::poisoned(self.tokens(), self.shape.q_cols());
        let mut lse = Grid::poisoned(self.tokens(), self.shape.heads);
        let inputs = AttentionInputs { shape: self.shape, q: self.q.view(), keys, segments: &self.segments };
        attention(simd, &inputs, &out.view_mut(), Some(&lse.view_mut()));
        (out, lse)
    }
}

/// Keys and values in pages.
struct Pool {
    pages: Vec<u32>,
    slots: usize,
    page_size: usize,
    k: Grid,
    v: Grid,
}

impl Pool {
    /// The keys of a case in pages of a random order, NaN wherever there is no key.
    fn new(case: &Case, rng: &mut ChaCha8Rng, page_size: usize) -> Self {
        let slots = case.segments.len();
        let width = case.segments.iter().map(Segment::total).max().unwrap_or(0).div_ceil(page_size) + 1;
        let mut pages: Vec<u32> = (0..(slots * width) as u32).collect();
        pages.shuffle(rng);
        let empty = Grid::poisoned(slots * width * page_size, case.shape.kv_cols());
        let mut pool = Self { pages, slots, page_size, k: empty.clone(), v: empty };
        for segment in &case.segments {
            for position in 0..segment.total() {
                let to = pool.keys().row(segment, position);
                let from = segment.keys as usize + position;
                pool.k.view_mut().row(to).copy_from_slice(case.k.view().row(from));
                pool.v.view_mut().row(to).copy_from_slice(case.v.view().row(from));
            }
        }
        pool
    }

    fn keys(&self) -> Keys<'_> {
        let pages = Rows::dense(&self.pages, self.slots, self.pages.len() / self.slots.max(1));
        Keys::Pages { k: self.k.view(), v: self.v.view(), pages, page_size: self.page_size }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn outputs_follow_the_formula_and_pages_are_rows(
        seed: u64,
        sizes in sizes(),
        window in window(),
        lengths in lengths(),
        page_size in prop_oneof![Just(1usize), Just(16), 2usize..70],
    ) {
        let case = Case::new(seed, sizes, window, &lengths);
        let pool = Pool::new(&case, &mut crate::random::stream(seed, "pages"), page_size);
        let outputs = everywhere(|simd| {
            let (out, lse) = case.run(simd, case.rows());
            let (paged_out, paged_lse) = case.run(simd, pool.keys());
            assert_same_bits("out in pages", &out.values(), &paged_out.values());
            assert_same_bits("lse in pages", &lse.values(), &paged_lse.values());
            vec![out.values(), lse.values()]
        });
        let (q, k, v) = (case.q.f64(), case.k.f64(), case.v.f64());
        let segments = reference_segments(&case.segments);
        let (out, lse) = h1_reference::attention(q.view(), k.view(), v.view(), &segments, &case.reference_shape());
        assert_close("out", &outputs[0], &out, 1e-6);
        assert_close("lse", &outputs[1], &lse, 1e-6);
    }

    /// A sequence in one call, and in several beside another sequence, its keys in pages of which those to come are NaN.
    #[test]
    fn a_cut_changes_no_bit(
        seed: u64,
        sizes in sizes(),
        window in window(),
        len in 2usize..150,
        cuts in prop::collection::vec(0usize..150, 0..4),
        other in (0usize..5, 0usize..70),
    ) {
        let case = Case::new(seed, sizes, window, &[(len, 0)]);
        let (out, lse) = case.run(Simd::detect(), case.rows());
        // One cut is into single tokens.
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % len).collect();
        ends.extend(len - len.min(3)..=len);
        ends.sort();
        let outputs = everywhere(|simd| {
            let (mut parts_out, mut parts_lse) = (Vec::new(), Vec::new());
            let mut done = 0;
            for &end in &ends {
                let rng = &mut crate::random::stream(seed, "other");
                let mut part = Case::new(seed, sizes, window, &[other, (end - done, done)]);
                part.shape = case.shape;
                for i in 0..end - done {
                    part.q.view_mut().row(other.0 + i).copy_from_slice(case.q.view().row(done + i));
                }
                for i in 0..end {
                    part.k.view_mut().row(other.0 + other.1 + i).copy_from_slice(case.k.view().row(i));
                    part.v.view_mut().row(other.0 + other.1 + i).copy_from_slice(case.v.view().row(i));
                }
                let pool = Pool::new(&part, rng, 1 + seed as usize % 20);
                let (out, lse) = part.run(simd, pool.keys());
                parts_out.extend_from_slice(&out.values()[other.0 * case.shape.q_cols()..]);
                parts_lse.extend_from_slice(&lse.values()[other.0 * case.shape.heads..]);
                done = end;
            }
            vec![parts_out, parts_lse]
        });
        assert_same_bits("out", &out.values(), &outputs[0]);
        assert_same_bits("lse", &lse.values(), &outputs[1]);
    }

    #[test]
    fn keys_that_a_query_does_not_see_change_no_bit(
        seed: u64, sizes in sizes(), window in window(), len in 1usize..150, at in 0usize..150,
    ) {
        let at = at % len;
        let case = Case::new(seed, sizes, window, &[(len, 0)]);
        let mut poisoned = case.clone();
        let seen = window.map_or(0, |window| (at + 1).saturating_sub(window))..at + 1;
        for position in (0..len).filter(|position| !seen.contains(position)) {
            poisoned.k.view_mut().row(position).fill(f32::NAN);
            poisoned.v.view_mut().row(position).fill(f32::INFINITY);
        }
        let row = |case: &Case| {
            let (out, lse) = case.run(Simd::detect(), case.rows());
            [out.view().row(at), lse.view().row(at)].concat()
        };
        assert_same_bits("row", &row(&case), &row(&poisoned));
    }

    #[test]
    fn keys_in_half_precision_are_their_values(seed: u64, sizes in sizes(), len in 1usize..100) {
        let mut case = Case::new(seed, sizes, None, &[(len, 0)]);
        let narrow = |grid: &Grid| grid.values().into_iter().map(bf16::from_f32).collect::<Vec<_>>();
        let (k, v) = (narrow(&case.k), narrow(&case.v));
        let wide = |values: &[bf16]| {
            let mut values = values.iter();
            Grid::from_fn(len, case.shape.kv_cols(), || values.next().unwrap().to_f32())
        };
        (case.k, case.v) = (wide(&k), wide(&v));
        let rows = |values| Rows::dense(values, len, case.shape.kv_cols());
        let outputs = everywhere(|simd| {
            let (out, lse) = case.run(simd, Keys::Rows { k: rows(&k), v: rows(&v) });
            vec![out.values(), lse.values()]
        });
        let (out, lse) = case.run(Simd::detect(), case.rows());
        assert_same_bits("out", &out.values(), &outputs[0]);
        assert_same_bits("lse", &lse.values(), &outputs[1]);
    }

    /// Every row of a block's range lies in one block, whatever the gaps.
    #[test]
    fn blocks_cover_the_rows_of_segments_once(lengths in lengths(), size in 1usize..100, empty in 0usize..3) {
        let mut table = segments(&lengths);
        table.extend(vec![Segment { start: 0, len: 0, past: 0, slot: 0, keys: 0 }; empty]);
        for range in [Segment::rows, |segment: &Segment| segment.keys as usize..segment.keys as usize + segment.total()] {
            let blocks = Blocks::new(&table, size, range);
            let found = (0..blocks.count()).filter_map(|number| blocks.get(number)).flat_map(|(segment, part)| {
                part.map(move |i| range(&segment).start + i)
            });
            let expected = table.iter().filter(|segment| segment.len > 0).flat_map(range);
            assert!(found.eq(expected));
        }
    }
}

#[test]
fn scores_that_overflow_exp_are_no_trouble() {
    let x = Grid::from_fn(2, 1, {
        let mut x = 999.0;
        move || {
            x += 1.0;
            x
        }
    });
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 1, scale: 1.0, window: None };
    let case = Case { shape, segments: segments(&[(2, 0)]), q: x.clone(), k: x.clone(), v: x.clone() };
    let (out, lse) = case.run(Simd::detect(), case.rows());
    assert_eq!(out.values(), x.values());
    assert_eq!(lse.values(), [1e6, 1001.0 * 1001.0]);
}

//! What the tests of the kernels share: random matrices, poisoned outputs, and one run for each instruction set and number
//! of threads.

use super::matrix::{Rows, RowsMut};
use super::segment::Segment;
use super::simd::Simd;
use ndarray::{Array2, Array3};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rayon::ThreadPool;
use std::sync::OnceLock;

/// What lies between the rows of a [`Grid`].
const BETWEEN: f32 = 12345.5;

/// A matrix in a buffer with gaps between its rows.
#[derive(Clone)]
pub struct Grid {
    pub data: Vec<f32>,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Grid {
    pub fn from_fn(rows: usize, cols: usize, mut value: impl FnMut() -> f32) -> Self {
        let stride = cols + 3;
        let mut data = vec![BETWEEN; rows * stride];
        for row in data.chunks_mut(stride) {
            row[..cols].fill_with(&mut value);
        }
        Self { data, rows, cols, stride }
    }

    /// Uniform values within ±`scale`.
    pub fn random(rng: &mut ChaCha8Rng, rows: usize, cols: usize, scale: f32) -> Self {
        Self::from_fn(rows, cols, || rng.random_range(-scale..scale))
    }

    /// NaN everywhere, so that what a kernel leaves out shows.
    pub fn poisoned(rows: usize, cols: usize) -> Self {
        Self::from_fn(rows, cols, || f32::NAN)
    }

    pub fn view(&self) -> Rows<'_> {
        Rows::new(&self.data, self.rows, self.cols, self.stride)
    }

    pub fn view_mut(&mut self) -> RowsMut<'_> {
        RowsMut::new(&mut self.data, self.rows, self.cols, self.stride)
    }

    /// The values without the gaps, which nothing may have touched.
    pub fn values(&self) -> Vec<f32> {
        let mut values = Vec::new();
        for row in self.data.chunks(self.stride) {
            assert!(row[self.cols..].iter().all(|&value| value == BETWEEN), "written between the rows");
            values.extend(&row[..self.cols]);
        }
        values
    }

    pub fn f64(&self) -> Array2<f64> {
        let values = self.values().into_iter().map(f64::from).collect();
        Array2::from_shape_vec((self.rows, self.cols), values).unwrap()
    }
}

pub fn random(rng: &mut ChaCha8Rng, len: usize, scale: f32) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-scale..scale)).collect()
}

pub fn f64s(values: &[f32]) -> ndarray::Array1<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// Segments of the given (len, past), in slots that are not in their order.
pub fn segments(sizes: &[(usize, usize)]) -> Vec<Segment> {
    let (mut start, mut keys) = (0, 0);
    let slots = sizes.len() as u32;
    sizes
        .iter()
        .enumerate()
        .map(|(i, &(len, past))| {
            let (len, past) = (len as u32, past as u32);
            let segment = Segment { start, len, past, slot: slots - 1 - i as u32, keys };
            (start, keys) = (start + len, keys + past + len);
            segment
        })
        .collect()
}

pub fn reference_segments(segments: &[Segment]) -> Vec<h1_reference::Segment> {
    segments
        .iter()
        .map(|s| h1_reference::Segment { start: s.start as usize, len: s.len as usize, past: s.past as usize })
        .collect()
}

/// What the states before each segment are, `[segments, shape]`: 0 where a sequence starts afresh.
pub fn states_by_segment(segments: &[Segment], states: &Grid, shape: (usize, usize)) -> Array3<f64> {
    let states = states.f64();
    Array3::from_shape_fn((segments.len(), shape.0, shape.1), |(s, i, j)| {
        let segment = &segments[s];
        if segment.past > 0 { states[[segment.slot as usize, i * shape.1 + j]] } else { 0.0 }
    })
}

/// The states of `values` values by slot in the order of segments, those of segments without rows left out.
pub fn written_states(segments: &[Segment], states: &[f32], values: usize) -> Vec<f32> {
    let rows = segments.iter().filter(|segment| segment.len > 0);
    rows.flat_map(|segment| &states[segment.slot as usize * values..][..values]).copied().collect()
}

/// The same of states that are by segment already.
pub fn expected_states(segments: &[Segment], states: &Array3<f64>) -> Vec<f64> {
    let rows = segments.iter().zip(states.outer_iter()).filter(|(segment, _)| segment.len > 0);
    rows.flat_map(|(_, state)| state.iter().copied().collect::<Vec<_>>()).collect()
}

/// Runs `kernel` on 1, 2 and 3 threads with each instruction set of the machine; the outputs must be the same bits.
pub fn everywhere(kernel: impl Fn(Simd) -> Vec<Vec<f32>> + Sync) -> Vec<Vec<f32>> {
    static POOLS: OnceLock<Vec<ThreadPool>> = OnceLock::new();
    let pools = POOLS.get_or_init(|| {
        (1..=3).map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()).collect()
    });
    let mut first: Option<Vec<Vec<f32>>> = None;
    for simd in Simd::all() {
        for pool in pools {
            let outputs = pool.install(|| kernel(simd));
            let Some(first) = &first else {
                first = Some(outputs);
                continue;
            };
            for (i, (a, b)) in first.iter().zip(&outputs).enumerate() {
                let place = format!("output {i}, {}, {} threads", simd.name(), pool.current_num_threads());
                assert_same_bits(&place, a, b);
            }
        }
    }
    first.unwrap()
}

pub fn assert_same_bits(place: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{place}: lengths");
    for (j, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{place}: value {j} is {a} and {b}");
    }
}

/// The root of the mean squared error must be within four times `tolerance` of the root mean square of what is expected,
/// or of 0.1 where terms of the size of 1 cancel to less.
pub fn assert_close<'a>(name: &str, got: &[f32], expected: impl IntoIterator<Item = &'a f64>, tolerance: f64) {
    let expected: Vec<f64> = expected.into_iter().copied().collect();
    assert_eq!(got.len(), expected.len(), "{name}: lengths");
    let (mut error, mut size) = (0.0, 0.0);
    for (i, (&got, &expected)) in got.iter().zip(&expected).enumerate() {
        assert!(got.is_finite(), "{name}: value {i} is {got} for {expected}");
        error += (f64::from(got) - expected).powi(2);
        size += expected.powi(2);
    }
    let floor = 0.1 * (got.len() as f64).sqrt();
    assert!(error.sqrt() <= 4.0 * tolerance * size.sqrt().max(floor), "{name}: {:.2e}", error.sqrt() / size.sqrt());
}

use super::*;
use crate::backend::cpu::pack::pack;
use half::{bf16, f16};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Sizes around every boundary: one, primes, tiles, panels, blocks, and one more and one less.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        2 => prop::sample::select(vec![1, 2, 11, 12, 13, 23, 25, 31, 32, 33, 47, 63, 64, 65, 95, 97]),
        1 => 1_usize..140,
    ]
}

/// Lengths of chains, some longer than a block.
fn steps() -> impl Strategy<Value = usize> {
    prop_oneof![6 => size(), 1 => prop::sample::select(vec![1023, 1024, 1025, 2049])]
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    rows: usize,
    inputs: usize,
    outputs: usize,
    /// Values between the rows of x and of y beyond their columns.
    gaps: (usize, usize),
}

fn sizes(
    rows: impl Strategy<Value = usize>,
    inputs: impl Strategy<Value = usize>,
    outputs: impl Strategy<Value = usize>,
) -> impl Strategy<Value = Sizes> {
    let gap = || prop::sample::select(vec![0, 1, 16, 500]);
    (rows, inputs, outputs, gap(), gap()).prop_map(|(rows, inputs, outputs, x, y)| Sizes {
        rows,
        inputs,
        outputs,
        gaps: (x, y),
    })
}

/// The operands of one linear layer, with every gap between rows filled with a value that must stay.
#[derive(Clone)]
struct Layer<T> {
    sizes: Sizes,
    x: Vec<f32>,
    y: Vec<f32>,
    weight: Vec<T>,
    panels: Vec<T>,
    bias: Vec<f32>,
}

impl<T: Element> Layer<T> {
    fn new(sizes: Sizes, seed: u64, narrow: impl Fn(f32) -> T) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut values =
            |n: usize| (0..n).map(|_| random.next_u32() as f32 / 2f32.powi(31) - 1.0).collect::<Vec<f32>>();
        let Sizes { rows, inputs, outputs, gaps } = sizes;
        let weight: Vec<T> = values(outputs * inputs).into_iter().map(narrow).collect();
        let mut panels = vec![T::default(); panels_len(outputs, inputs)];
        pack(Rows::dense(&weight, outputs, inputs), &mut panels);
        let (x, y, bias) = (values(rows * (inputs + gaps.0)), values(rows * (outputs + gaps.1)), values(outputs));
        Layer { sizes, x, y, weight, panels, bias }
    }

    fn x(&self) -> Rows<'_> {
        Rows::new(&self.x, self.sizes.rows, self.sizes.inputs, self.sizes.inputs + self.sizes.gaps.0)
    }

    fn y(&self) -> Rows<'_> {
        Rows::new(&self.y, self.sizes.rows, self.sizes.outputs, self.sizes.outputs + self.sizes.gaps.1)
    }

    fn w(&self) -> Panels<'_, T> {
        Panels::new(&self.panels, self.sizes.outputs, self.sizes.inputs)
    }

    fn weight(&self, output: usize, input: usize) -> f64 {
        f64::from(self.weight[output * self.sizes.inputs + input].widen())
    }

    /// y after `forward` onto what y holds.
    fn forward(&self, simd: Simd, bias: bool, add: bool) -> Vec<f32> {
        let mut out = self.y.clone();
        let mut y = RowsMut::new(&mut out, self.sizes.rows, self.sizes.outputs, self.sizes.outputs + self.sizes.gaps.1);
        forward(simd, self.x(), self.w(), bias.then_some(&self.bias), add, &mut y);
        out
    }

    /// dx after `input_gradient` of y as dy, onto what x holds.
    fn input_gradient(&self, simd: Simd, add: bool) -> Vec<f32> {
        let mut out = self.x.clone();
        let mut dx = RowsMut::new(&mut out, self.sizes.rows, self.sizes.inputs, self.sizes.inputs + self.sizes.gaps.0);
        input_gradient(simd, self.y(), self.w(), add, &mut dx);
        out
    }

    /// dw and db after `weight_gradient` of y as dy, onto the weight and the bias.
    fn weight_gradient(&self, simd: Simd) -> (Vec<f32>, Vec<f32>) {
        let mut dw: Vec<f32> = self.panels.iter().map(|w| w.widen()).collect();
        let mut db = self.bias.clone();
        weight_gradient(simd, self.x(), self.y(), &mut dw, Some(&mut db));
        (dw, db)
    }
}

/// Every value of `got`, rows `stride` apart, is the sum of its terms and of what was there, to a bound on the error of a chain; values between
/// rows are as `before`.
fn assert_sums(got: &[f32], before: &[f32], cols: usize, stride: usize, terms: impl Fn(usize, usize) -> Vec<f64>) {
    for (i, (&got, &before)) in got.iter().zip(before).enumerate() {
        let (row, col) = (i / stride, i % stride);
        if col >= cols {
            assert_eq!(got, before, "between the rows, at {row}, {col}");
            continue;
        }
        let terms = terms(row, col);
        let exact: f64 = terms.iter().sum();
        let magnitude: f64 = terms.iter().map(|t| t.abs()).sum();
        let bound = magnitude * (terms.len() + 1) as f64 * f64::from(f32::EPSILON) / 2.0;
        assert!((f64::from(got) - exact).abs() <= bound, "{got} for {exact} ± {bound} at {row}, {col}");
    }
}

fn check_forward<T: Element>(layer: &Layer<T>, bias: bool, add: bool) {
    let Sizes { inputs, outputs, gaps, .. } = layer.sizes;
    let y = layer.forward(Simd::detect(), bias, add);
    assert_sums(&y, &layer.y, outputs, outputs + gaps.1, |row, output| {
        let x = layer.x().row(row);
        let mut terms: Vec<f64> = (0..inputs).map(|i| f64::from(x[i]) * layer.weight(output, i)).collect();
        terms.extend(bias.then_some(f64::from(layer.bias[output])));
        terms.extend(add.then_some(f64::from(layer.y().row(row)[output])));
        terms
    });
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn forward_is_the_product(sizes in sizes(size(), steps(), size()), bias: bool, add: bool, seed: u64) {
        check_forward(&Layer::new(sizes, seed, |w| w), bias, add);
        check_forward(&Layer::new(sizes, seed, bf16::from_f32), bias, add);
        check_forward(&Layer::new(sizes, seed, f16::from_f32), bias, add);
    }

    #[test]
    fn input_gradient_is_the_product(sizes in sizes(size(), size(), steps()), add: bool, seed: u64) {
        let layer = Layer::new(sizes, seed, |w| w);
        let Sizes { inputs, outputs, gaps, .. } = sizes;
        let dx = layer.input_gradient(Simd::detect(), add);
        assert_sums(&dx, &layer.x, inputs, inputs + gaps.0, |row, input| {
            let dy = layer.y().row(row);
            let mut terms: Vec<f64> = (0..outputs).map(|o| f64::from(dy[o]) * layer.weight(o, input)).collect();
            terms.extend(add.then_some(f64::from(layer.x().row(row)[input])));
            terms
        });
        let half = Layer::new(sizes, seed, f16::from_f32);
        let widened = Layer { panels: half.panels.iter().map(|w| w.to_f32()).collect(), ..layer };
        let simd = Simd::detect();
        prop_assert_eq!(bits(&half.input_gradient(simd, add)), bits(&widened.input_gradient(simd, add)));
    }

    #[test]
    fn weight_gradient_adds_the_product_and_leaves_the_padding(sizes in sizes(steps(), size(), size()), seed: u64) {
        let layer = Layer::new(sizes, seed, |w| w);
        let Sizes { rows, inputs, outputs, .. } = sizes;
        let (dw, db) = layer.weight_gradient(Simd::detect());
        assert_sums(&dw, &layer.panels, panels_len(1, inputs), panels_len(1, inputs), |panel, i| {
            let (output, input) = (panel * PANEL + i % PANEL, i / PANEL);
            if output >= outputs {
                return vec![0.0];
            }
            let mut terms = vec![layer.weight(output, input)];
            terms.extend((0..rows).map(|r| f64::from(layer.y().row(r)[output]) * f64::from(layer.x().row(r)[input])));
            terms
        });
        assert_sums(&db, &layer.bias, outputs, outputs, |_, output| {
            let mut terms = vec![f64::from(layer.bias[output])];
            terms.extend((0..rows).map(|r| f64::from(layer.y().row(r)[output])));
            terms
        });
    }

    #[test]
    fn no_product_depends_on_the_threads_or_the_instruction_set(
        sizes in sizes(steps(), steps(), size()), bias: bool, add: bool, seed: u64,
    ) {
        let layer = Layer::new(sizes, seed, bf16::from_f32);
        let products = |simd| {
            let (dw, db) = layer.weight_gradient(simd);
            [bits(&layer.forward(simd, bias, add)), bits(&layer.input_gradient(simd, add)), bits(&dw), bits(&db)]
        };
        let expected = products(Simd::detect());
        for simd in Simd::all() {
            for threads in [1, 2, 3] {
                let got = pool(threads).install(|| products(simd));
                for (product, (got, expected)) in ["y", "dx", "dw", "db"].iter().zip(got.iter().zip(&expected)) {
                    prop_assert!(got == expected, "{} on {} threads, {}", product, threads, simd.name());
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_among_others(
        sizes in sizes(2_usize..60, steps(), size()), bias: bool, add: bool, seed: u64, first in 0_usize..60, count in 1_usize..60,
    ) {
        let layer = Layer::new(sizes, seed, f16::from_f32);
        let simd = Simd::detect();
        let whole = layer.forward(simd, bias, add);
        let first = first % sizes.rows;
        let rows = count.min(sizes.rows - first);
        let (x, y) = (sizes.inputs + sizes.gaps.0, sizes.outputs + sizes.gaps.1);
        let some = Layer {
            sizes: Sizes { rows, ..sizes },
            x: layer.x[first * x..(first + rows) * x].to_vec(),
            y: layer.y[first * y..(first + rows) * y].to_vec(),
            ..layer.clone()
        };
        prop_assert_eq!(bits(&some.forward(simd, bias, add)), bits(&whole[first * y..(first + rows) * y]));
    }

    #[test]
    fn rows_in_two_calls_leave_the_weight_gradient_of_one(
        sizes in sizes(steps(), size(), size()), seed: u64, cut in 0_usize..3000,
    ) {
        let layer = Layer::new(sizes, seed, |w| w);
        let simd = Simd::detect();
        let Sizes { rows, inputs, outputs, gaps } = sizes;
        let cut = cut % (rows + 1);
        let (mut dw, mut db) = (layer.panels.clone(), layer.bias.clone());
        for (first, rows) in [(0, cut), (cut, rows - cut)] {
            let x = Rows::new(&layer.x[first * (inputs + gaps.0)..], rows, inputs, inputs + gaps.0);
            let dy = Rows::new(&layer.y[first * (outputs + gaps.1)..], rows, outputs, outputs + gaps.1);
            weight_gradient(simd, x, dy, &mut dw, Some(&mut db));
        }
        let (whole, sums) = layer.weight_gradient(simd);
        prop_assert_eq!(bits(&dw), bits(&whole));
        prop_assert_eq!(bits(&db), bits(&sums));
    }
}

#[test]
fn a_product_is_one_chain_of_fused_multiply_adds_in_order() {
    let sizes = Sizes { rows: 40, inputs: 2051, outputs: 37, gaps: (0, 0) };
    let layer = Layer::new(sizes, 5, |w| w);
    let y = layer.forward(Simd::detect(), true, true);
    for row in 0..sizes.rows {
        for output in 0..sizes.outputs {
            let x = layer.x().row(row);
            let w = &layer.weight[output * sizes.inputs..][..sizes.inputs];
            let chain = x.iter().zip(w).fold(0.0, |sum: f32, (&x, &w)| x.mul_add(w, sum));
            let before = layer.y().row(row)[output];
            assert_eq!(y[row * sizes.outputs + output], before + (chain + layer.bias[output]), "{row}, {output}");
        }
    }
}

#[test]
fn empty_products_write_what_an_empty_sum_is() {
    for (rows, inputs, outputs) in [(0, 3, 5), (3, 0, 5), (3, 5, 0)] {
        let layer = Layer::new(Sizes { rows, inputs, outputs, gaps: (0, 0) }, 1, |w| w);
        let simd = Simd::detect();
        if inputs == 0 {
            let expected: Vec<f32> = (0..rows).flat_map(|_| layer.bias.iter().map(|b| 0.0 + b)).collect();
            assert_eq!(layer.forward(simd, true, false), expected);
        }
        if outputs == 0 {
            assert_eq!(layer.input_gradient(simd, false), vec![0.0; rows * inputs]);
        }
        assert_eq!(layer.weight_gradient(simd).0, layer.panels);
    }
}

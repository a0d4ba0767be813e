use super::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Values of every magnitude, ties, zeros of both signs, infinities, NaN and denormals.
fn inputs() -> Vec<[f32; LANES]> {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let special = [0.0, 0.5, 1.0, 1.5, 2.5, 1e-45, f32::MIN_POSITIVE, f32::MAX, f32::INFINITY, f32::NAN, 65_504.0];
    (0..4000)
        .map(|_| {
            std::array::from_fn(|_| {
                let bits = random.next_u32();
                match bits % 4 {
                    0 => special[bits as usize / 8 % special.len()] * if bits & 4 == 0 { 1.0 } else { -1.0 },
                    1 => f32::from_bits(random.next_u32()),
                    _ => (random.next_u32() as f32 - 2e9) / 1e8,
                }
            })
        })
        .collect()
}

/// Every operation on three values; one row of the result an operation.
struct Operations([[f32; LANES]; 3]);

impl Kernel for Operations {
    type Output = Vec<[f32; LANES]>;
    #[inline(always)]
    fn run<L: Lanes>(self) -> Vec<[f32; LANES]> {
        let [a, b, c] = self.0.map(|x| L::from_array(x));
        let of = |mask| L::select(mask, L::splat(1.0), L::zero()).to_array();
        let (mantissa, exponent) = a.split2();
        let positive = L::zero().lt(a).and(a.lt(L::splat(f32::INFINITY)));
        let small = L::select(a.abs().lt(L::splat(2.0)).and(L::splat(0.5).le(a.abs())), a, L::splat(1.25));
        let power = L::select(b.abs().lt(L::splat(250.0)), b.round(), L::splat(-140.0));
        let mut rows = vec![
            (a + b).to_array(),
            (a - b).to_array(),
            (a * b).to_array(),
            (a / b).to_array(),
            (-a).to_array(),
            a.mul_add(b, c).to_array(),
            a.neg_mul_add(b, c).to_array(),
            a.abs().to_array(),
            a.sqrt().to_array(),
            a.round().to_array(),
            a.floor().to_array(),
            a.min(b).to_array(),
            a.max(b).to_array(),
            small.scale2(power).to_array(),
            L::select(positive, mantissa, L::zero()).to_array(),
            L::select(positive, exponent, L::zero()).to_array(),
            of(a.lt(b)),
            of(a.le(b)),
            of(a.eq(b)),
            of(a.eq(b).or(a.lt(c))),
            [a.sum(); LANES],
            [f32::from(u8::from(a.eq(b).any())); LANES],
        ];
        // The order of NaN in a tree of maxima is fixed too.
        rows.push([a.max_lane(); LANES]);
        // Sixteen different values: every lane of a and b in another place.
        let many = std::array::from_fn(|i| if i % 2 == 0 { a } else { b } + L::splat(i as f32));
        rows.extend(L::transpose(many).map(L::to_array));
        rows.push(L::sum_each(many).to_array());
        rows.push(many.map(L::sum));
        rows
    }
}

#[test]
fn every_operation_has_the_same_bits_on_every_instruction_set() {
    let x = inputs();
    for triple in x.windows(3) {
        let triple = [triple[0], triple[1], triple[2]];
        let expected = Simd(Level::Portable).run(Operations(triple));
        for simd in Simd::all() {
            let got = simd.run(Operations(triple));
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                for (got, expected) in got.iter().zip(expected) {
                    let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
                    assert!(same, "operation {i} on {}: {got:e} for {expected:e} of {triple:?}", simd.name());
                }
            }
        }
    }
}

#[test]
fn split2_and_scale2_are_inverse_on_positive_finite_values() {
    struct There([f32; LANES]);
    impl Kernel for There {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<L: Lanes>(self) -> [f32; LANES] {
            let (mantissa, exponent) = L::from_array(self.0).split2();
            mantissa.scale2(exponent).to_array()
        }
    }
    for x in inputs() {
        let x = x.map(|x| if x.abs() > 0.0 && x.is_finite() { x.abs() } else { 3.0 });
        for simd in Simd::all() {
            assert_eq!(simd.run(There(x)), x, "{}", simd.name());
        }
    }
}

/// Loads `n` of 16 values and stores `n` of them over a pattern.
struct First<'a>(&'a [f32], &'a mut [f32]);

impl Kernel for First<'_> {
    type Output = [f32; LANES];
    #[inline(always)]
    fn run<L: Lanes>(self) -> [f32; LANES] {
        let x = L::load_first(self.0);
        (x + x).store_first(self.1);
        x.to_array()
    }
}

#[test]
fn a_partial_load_or_store_touches_its_lanes_alone() {
    let x: [f32; LANES + 1] = std::array::from_fn(|i| i as f32 + 1.0);
    for simd in Simd::all() {
        for n in 0..=LANES + 1 {
            let mut y = [-1.0; LANES + 2];
            let loaded = simd.run(First(&x[..n], &mut y[..n]));
            for i in 0..LANES {
                assert_eq!(loaded[i], if i < n { x[i] } else { 0.0 }, "{} lane {i} of {n}", simd.name());
            }
            for (i, &y) in y.iter().enumerate() {
                let expected = if i < n.min(LANES) { 2.0 * x[i] } else { -1.0 };
                assert_eq!(y, expected, "{} value {i} of {n}", simd.name());
            }
        }
    }
}

struct Widen<'a, T: Element>(&'a [T; LANES]);

impl<T: Element> Kernel for Widen<'_, T> {
    type Output = [f32; LANES];
    #[inline(always)]
    fn run<L: Lanes>(self) -> [f32; LANES] {
        // SAFETY: the array has 16 values.
        unsafe { T::load_ptr::<L>(self.0.as_ptr()) }.to_array()
    }
}

#[test]
fn every_half_precision_value_widens_exactly() {
    for first in (0..=u16::MAX).step_by(LANES) {
        let bits: [u16; LANES] = std::array::from_fn(|i| first + i as u16);
        let (brain, half) = (bits.map(bf16::from_bits), bits.map(f16::from_bits));
        for simd in Simd::all() {
            let got = simd.run(Widen(&brain)).into_iter().zip(brain.map(Element::widen));
            let got = got.chain(simd.run(Widen(&half)).into_iter().zip(half.map(Element::widen)));
            for (got, expected) in got {
                let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
                assert!(same, "{}: {got:e} for {expected:e}", simd.name());
            }
        }
    }
}

#[test]
fn the_widest_instruction_set_is_the_default() {
    assert_eq!(Simd::detect(), Simd::all()[0]);
}

struct Transpose;

impl Kernel for Transpose {
    type Output = [[f32; LANES]; LANES];
    #[inline(always)]
    fn run<L: Lanes>(self) -> Self::Output {
        let rows = std::array::from_fn(|i| L::from_array(std::array::from_fn(|j| (i * LANES + j) as f32)));
        L::transpose(rows).map(L::to_array)
    }
}

#[test]
fn a_transpose_turns_rows_into_columns() {
    for simd in Simd::all() {
        for (j, column) in simd.run(Transpose).iter().enumerate() {
            for (i, &value) in column.iter().enumerate() {
                assert_eq!(value, (i * LANES + j) as f32, "{}", simd.name());
            }
        }
    }
}

use super::*;
use crate::backend::cpu::simd::{Kernel, LANES, Simd};

/// Every 9973rd bit pattern, and those around each function's turning points.
fn inputs() -> Vec<f32> {
    let mut x: Vec<f32> = (0..=u32::MAX).step_by(9973).map(f32::from_bits).collect();
    let special = [0.0, f32::MIN_POSITIVE, 1e-45, 0.5, 1.0, 2.0, 20.0, 88.722_84, 89.0, 103.972, 104.0, 262_144.0];
    for s in special.into_iter().chain([f32::MAX, f32::INFINITY, std::f32::consts::SQRT_2, std::f32::consts::PI]) {
        for neighbour in [s.next_down(), s, s.next_up()] {
            x.extend([neighbour, -neighbour]);
        }
    }
    // Dense where the functions live.
    x.extend((0..40_000).map(|i| (i as f32 - 20_000.0) * 0.0053));
    x.push(f32::NAN);
    x.resize(x.len().next_multiple_of(LANES), 0.0);
    x
}

/// The hardest case of argument reduction: no f32 is closer to a multiple of π/2 (J.-M. Muller, Elementary Functions).
const HARD: f32 = 16_367_173.0 * (1u128 << 72) as f32;

trait Function: Copy {
    const NAME: &str;
    const ULPS: f64;
    /// An error that is allowed besides, where an intermediate result is denormal.
    const BESIDES: f64;
    fn lanes<L: Lanes>(x: L) -> L;
    fn exact(x: f64) -> f64;
}

macro_rules! function {
    ($type:ident, $ulps:expr, $f:expr, $exact:expr) => {
        function!($type, $ulps, 0.0, $f, $exact);
    };
    ($type:ident, $ulps:expr, $besides:expr, $f:expr, $exact:expr) => {
        #[derive(Clone, Copy)]
        struct $type;
        impl Function for $type {
            const NAME: &str = stringify!($type);
            const ULPS: f64 = $ulps;
            const BESIDES: f64 = $besides;
            #[inline(always)]
            fn lanes<L: Lanes>(x: L) -> L {
                $f(x)
            }
            fn exact(x: f64) -> f64 {
                $exact(x)
            }
        }
    };
}

function!(Exp, 1.0, exp, f64::exp);
function!(Ln, 1.0, ln, f64::ln);
function!(Log1p, 1.0, log1p, f64::ln_1p);
function!(Sigmoid, 2.5, sigmoid, exact_sigmoid);
function!(Silu, 3.0, 1e-42, silu, |x: f64| x * exact_sigmoid(x));
function!(Softplus, 2.0, softplus, |x: f64| if x > 20.0 { x } else { x.exp().ln_1p() });
function!(Sin, 1.5, |x| sin_cos(x).0, f64::sin);
function!(Cos, 1.5, |x| sin_cos(x).1, f64::cos);

fn exact_sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

struct Map<'a, F: Function>(&'a [f32], &'a mut [f32], F);

impl<F: Function> Kernel for Map<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (x, y) in self.0.chunks_exact(LANES).zip(self.1.chunks_exact_mut(LANES)) {
            F::lanes(L::load(x)).store(y);
        }
    }
}

fn map<F: Function>(simd: Simd, f: F, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    simd.run(Map(x, &mut y, f));
    y
}

/// The distance in units of the last place of the f32 nearest to `exact`.
fn ulps(got: f32, exact: f64, besides: f64) -> f64 {
    if exact.is_nan() || got.is_nan() {
        return if exact.is_nan() && got.is_nan() { 0.0 } else { f64::INFINITY };
    }
    // An overflow is right from the middle between the largest f32 and the next power of two.
    let nearest = exact as f32;
    if nearest.is_infinite() || got.is_infinite() {
        let distance = if nearest == got { 0.0 } else { 1.0 };
        return if got.is_infinite() && nearest.abs() < f32::MAX { f64::INFINITY } else { distance };
    }
    let ulp = (f64::from(nearest.abs().next_up()) - f64::from(nearest.abs())).max(f64::from(f32::from_bits(1)));
    ((f64::from(got) - exact).abs() - besides).max(0.0) / ulp
}

fn check<F: Function>(f: F) {
    let mut x = inputs();
    x.extend([HARD; LANES]);
    let all = Simd::all();
    let y = map(all[0], f, &x);
    let mut worst = (0.0, 0.0, 0.0);
    for (&x, &y) in x.iter().zip(&y) {
        let error = ulps(y, F::exact(f64::from(x)), F::BESIDES);
        if error > worst.0 {
            worst = (error, x, y);
        }
    }
    let (error, at, got) = worst;
    println!("{} is within {error:.2} ulp, worst at {at:e}: {got:e}", F::NAME);
    assert!(error <= F::ULPS, "{}: {error:.2} ulp at {at:e}: {got:e} for {:e}", F::NAME, F::exact(f64::from(at)));
    for &simd in &all[1..] {
        for ((&x, &y), other) in x.iter().zip(&y).zip(map(simd, f, &x)) {
            let same = y.to_bits() == other.to_bits() || y.is_nan() && other.is_nan();
            assert!(same, "{} of {x:e}: {y:e} by {}, {other:e} by {}", F::NAME, all[0].name(), simd.name());
        }
    }
}

#[test]
fn exp_is_within_its_bound_and_the_same_on_every_instruction_set() {
    check(Exp);
}

#[test]
fn ln_is_within_its_bound_and_the_same_on_every_instruction_set() {
    check(Ln);
}

#[test]
fn log1p_is_within_its_bound_and_the_same_on_every_instruction_set() {
    check(Log1p);
}

#[test]
fn sigmoid_is_within_its_bound_and_the_same_on_every_instruction_set() {
    check(Sigmoid);
}

#[test]
fn silu_is_within_its_bound_and_the_same_on_every_instruction_set() {
    check(Silu);
}

#[test]
fn softplus_is_within_its_bound_and_the_same_on_every_instruction_set() {
    check(Softplus);
}

#[test]
fn sin_is_within_its_bound_and_the_same_on_every_instruction_set() {
    check(Sin);
}

#[test]
fn cos_is_within_its_bound_and_the_same_on_every_instruction_set() {
    check(Cos);
}

#[test]
fn silu_derivative_is_the_slope_of_silu() {
    struct Slope<'a>(&'a [f32], &'a mut [f32]);
    impl Kernel for Slope<'_> {
        type Output = ();
        #[inline(always)]
        fn run<L: Lanes>(self) {
            silu_derivative(L::load(self.0)).store(self.1);
        }
    }
    let x: [f32; LANES] = std::array::from_fn(|i| (i as f32 - 8.0) * 0.7);
    for simd in Simd::all() {
        let mut slope = [0.0; LANES];
        simd.run(Slope(&x, &mut slope));
        for (&x, &slope) in x.iter().zip(&slope) {
            let silu = |x: f64| x * exact_sigmoid(x);
            let (x, h) = (f64::from(x), 1e-5);
            let expected = (silu(x + h) - silu(x - h)) / (2.0 * h);
            assert!((f64::from(slope) - expected).abs() < 1e-6, "{slope} for {expected} at {x}");
        }
    }
}

//! Symmetric positive definite systems in f64.

use rayon::prelude::*;

/// A matrix that is not positive definite.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("the {size}×{size} matrix is not positive definite at row {row} (pivot {pivot})")]
pub struct NotPositive {
    /// Rows of the matrix.
    pub size: usize,
    /// The row where it fails.
    pub row: usize,
    /// What should have been positive.
    pub pivot: f64,
}

/// Columns that the factor is made of at a time.
const BLOCK: usize = 64;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Solves `A·x = b` for every row b of `rhs`, in place, by Cholesky's factorisation `A = L·Lᵀ`.
///
/// `a` is `[n, n]`, symmetric, and only its lower triangle is read; it is overwritten by L. `rhs` is `[any, n]`. The
/// order of every sum depends on n alone, so that the bits do not depend on the number of threads.
///
/// # Errors
/// When `a` is not positive definite (or not finite).
///
/// # Panics
/// When the lengths are not those of the shapes above.
pub fn solve_positive(a: &mut [f64], n: usize, rhs: &mut [f64]) -> Result<(), NotPositive> {
    assert_eq!(a.len(), n * n, "a square matrix");
    assert!(n > 0 && rhs.len().is_multiple_of(n), "whole right-hand sides");
    factor(a, n)?;
    // Back substitution reads columns of L: its transpose has them as rows.
    let transposed: Vec<f64> = (0..n * n).into_par_iter().map(|i| a[i % n * n + i / n]).collect();
    rhs.par_chunks_exact_mut(n).for_each(|x| {
        for i in 0..n {
            x[i] = (x[i] - dot(&a[i * n..i * n + i], &x[..i])) / a[i * n + i];
        }
        for i in (0..n).rev() {
            x[i] = (x[i] - dot(&transposed[i * n + i + 1..(i + 1) * n], &x[i + 1..])) / a[i * n + i];
        }
    });
    Ok(())
}

/// `A = L·Lᵀ`, block of columns after block of columns; rows below a block run in parallel.
fn factor(a: &mut [f64], n: usize) -> Result<(), NotPositive> {
    for first in (0..n).step_by(BLOCK) {
        let end = (first + BLOCK).min(n);
        let (above, below) = a.split_at_mut(end * n);
        for i in first..end {
            for j in first..=i {
                let (rows, row) = above.split_at_mut(i * n);
                let sum = match j == i {
                    true => dot(&row[..j], &row[..j]),
                    false => dot(&row[..j], &rows[j * n..j * n + j]),
                };
                let rest = row[j] - sum;
                row[j] = match j == i {
                    false => rest / rows[j * n + j],
                    true if rest > 0.0 && rest.is_finite() => rest.sqrt(),
                    true => return Err(NotPositive { size: n, row: i, pivot: rest }),
                };
            }
        }
        let above = &*above;
        below.par_chunks_exact_mut(n).for_each(|row| {
            for j in first..end {
                row[j] = (row[j] - dot(&row[..j], &above[j * n..j * n + j])) / above[j * n + j];
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::RngExt;

    #[test]
    fn a_system_with_a_known_solution_gives_it() {
        // L = [[2, 0, 0], [6, 1, 0], [-8, 5, 3]], x = (1, -2, 3).
        let mut a = vec![4.0, 0.0, 0.0, 12.0, 37.0, 0.0, -16.0, -43.0, 98.0];
        let mut rhs = vec![4.0 - 24.0 - 48.0, 12.0 - 74.0 - 129.0, -16.0 + 86.0 + 294.0];
        solve_positive(&mut a, 3, &mut rhs).unwrap();
        for (x, expected) in rhs.iter().zip([1.0, -2.0, 3.0]) {
            assert!((x - expected).abs() < 1e-12, "{rhs:?}");
        }
        assert_eq!([a[0], a[3], a[4], a[6], a[7], a[8]], [2.0, 6.0, 1.0, -8.0, 5.0, 3.0]);
    }

    #[test]
    fn a_matrix_that_is_not_positive_definite_is_refused_where_it_fails() {
        let refusal = solve_positive(&mut [1.0, 0.0, 2.0, 1.0], 2, &mut []).unwrap_err();
        assert_eq!((refusal.row, refusal.pivot), (1, -3.0));
        assert!(solve_positive(&mut [f64::NAN], 1, &mut []).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn the_solution_solves_the_system(n in 1_usize..150, seed in any::<u64>()) {
            let mut stream = crate::random::stream(seed, "matrix");
            let mut draw = |count: usize| -> Vec<f64> { (0..count).map(|_| stream.random::<f64>() - 0.5).collect() };
            let (x, solution) = (draw(n * (n + 3)), draw(2 * n));
            let a: Vec<f64> = (0..n * n)
                .map(|i| (i / n, i % n))
                .map(|(i, j)| {
                    let rows = x.chunks_exact(n);
                    rows.map(|row| row[i] * row[j]).sum::<f64>() + if i == j { 0.1 } else { 0.0 }
                })
                .collect();
            let rows = |x: &[f64]| -> Vec<f64> { a.chunks_exact(n).map(|row| dot(row, x)).collect() };
            let mut rhs: Vec<f64> = solution.chunks_exact(n).flat_map(rows).collect();
            solve_positive(&mut a.clone(), n, &mut rhs).unwrap();
            for (found, expected) in rhs.iter().zip(&solution) {
                prop_assert!((found - expected).abs() < 1e-8, "{found} {expected}");
            }
        }
    }
}

//! The CPU backend.

pub mod math;
pub mod simd;

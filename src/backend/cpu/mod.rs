//! The CPU backend.

pub mod adamw;
pub mod conv;
pub mod conv_backward;
pub mod elementwise;
pub mod gradient;
pub mod head_loss;
mod lines;
pub mod math;
pub mod matrix;
pub mod norm;
pub mod pack;
pub mod products;
pub mod rope;
pub mod rows;
pub mod sample;
pub mod scan;
pub mod scan_backward;
mod scratch;
pub mod segment;
pub mod simd;
#[cfg(test)]
mod testing;
pub mod tile;
mod work;

//! h1 turns a pretrained grouped-query-attention transformer into a hybrid of attention and Mamba blocks by staged
//! reverse-KL distillation, and runs the result.
//!
//! Floors, each using only those below it: `cli`; `distill`; `train`, `eval`, `report`; `generate`; `hybrid`, `text`,
//! `checkpoint`; `model`; `backend`.

pub mod backend;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod distill;
pub mod eval;
pub mod generate;
pub mod hybrid;
pub mod model;
pub mod random;
pub mod report;
pub mod text;
pub mod train;
pub mod verify;

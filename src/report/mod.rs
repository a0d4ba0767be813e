//! Plots and tables of a run.

mod axis;
mod canvas;
pub mod metrics;
pub mod plot;
pub mod table;

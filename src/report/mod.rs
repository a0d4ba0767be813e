//! Plots and tables of a run.

pub mod table;

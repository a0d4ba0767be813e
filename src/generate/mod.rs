//! Sampling and the scheduler of many sequences.

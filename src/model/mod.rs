//! Configuration, parameters, layers with their backward, the cache.

pub mod config;
pub mod tensors;

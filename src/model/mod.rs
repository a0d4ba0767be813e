//! Configuration, parameters, layers with their backward, the cache.

pub mod config;

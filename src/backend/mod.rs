//! What every backend promises, and the backends.

pub mod cpu;

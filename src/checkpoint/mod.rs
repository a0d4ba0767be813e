//! Reads and writes checkpoints: knows names and dtypes, not maths.

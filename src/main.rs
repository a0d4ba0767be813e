//! The `h1` program.
fn main() {}

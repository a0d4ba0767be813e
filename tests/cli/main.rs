//! The program as a person uses it, through its binary: what each verb gives, and how it takes bad input.

mod bad;
mod good;
mod texts;
mod world;

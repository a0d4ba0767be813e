//! What can go wrong on a backend.

use super::{BufferId, DType};

/// A failure of a backend; the text names the op, the argument and the sizes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has another shape than its op asks for.
    #[error("{op}: {argument} is [{}, {}], expected [{}, {}]", found.0, found.1, expected.0, expected.1)]
    Shape {
        /// The op.
        op: &'static str,
        /// Its argument.
        argument: &'static str,
        /// Rows and columns asked for.
        expected: (usize, usize),
        /// Rows and columns given.
        found: (usize, usize),
    },
    /// An argument is stored as another type, or in another order, than its op takes.
    #[error("{op}: {argument} is {found}, expected {expected}")]
    Storage {
        /// The op.
        op: &'static str,
        /// Its argument.
        argument: &'static str,
        /// What the op takes.
        expected: &'static str,
        /// What it got.
        found: String,
    },
    /// A size of an op makes no sense.
    #[error("{op}: {what}")]
    Argument {
        /// The op.
        op: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// A view of another device.
    #[error("{op}: {argument} lies on another device")]
    Foreign {
        /// The op.
        op: &'static str,
        /// Its argument.
        argument: &'static str,
    },
    /// An output shares its buffer with an input, or its values with another output.
    #[error("{op}: the output {output} overlaps {other}")]
    Overlap {
        /// The op.
        op: &'static str,
        /// The output.
        output: &'static str,
        /// The argument that it overlaps.
        other: &'static str,
    },
    /// A range that does not lie in its view.
    #[error("{what} {first}..{} do not lie in a view of {of} {what}", first + count)]
    Range {
        /// Rows, columns or values.
        what: &'static str,
        /// The first one.
        first: usize,
        /// How many.
        count: usize,
        /// How many there are.
        of: usize,
    },
    /// A number too large for its field.
    #[error("{value} is too large a {what}")]
    Size {
        /// What it counts.
        what: &'static str,
        /// The number.
        value: usize,
    },
    /// A view that reaches outside its buffer, or whose buffer was freed.
    #[error("view {first}..{end} of {dtype} does not lie in buffer {}", buffer.0)]
    Memory {
        /// The buffer.
        buffer: BufferId,
        /// The type of the view.
        dtype: DType,
        /// Its first value.
        first: usize,
        /// One past its last value.
        end: usize,
    },
    /// The device has no room.
    #[error("{device} has no memory for {bytes} bytes of {what}")]
    OutOfMemory {
        /// The device.
        device: String,
        /// What the memory is for.
        what: String,
        /// How much was asked for.
        bytes: usize,
    },
    /// The device or its driver failed: nothing that was computed there since can be trusted.
    #[error("{op} failed on {device}: {what}")]
    Failed {
        /// The device.
        device: String,
        /// The op in which it was noticed.
        op: &'static str,
        /// What the driver says.
        what: String,
    },
    /// Something that the backend cannot do.
    #[error("{backend} cannot do {op}: {what}")]
    Unsupported {
        /// The backend.
        backend: &'static str,
        /// The op.
        op: &'static str,
        /// What it lacks.
        what: String,
    },
    /// No such backend, or none that works here.
    #[error("backend {backend}: {why}")]
    Unavailable {
        /// The backend asked for.
        backend: String,
        /// The reason.
        why: String,
    },
}

/// The result of a backend's call.
pub type Result<T> = std::result::Result<T, Error>;

//! The seam between the host side and what computes: the card's driver, or the CPU that stands in for it in tests.

use super::source::{KernelKey, ModuleKey};
use crate::backend::{DType, Result};

/// An address in device memory.
pub type Pointer = u64;

/// What a device can do.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The device as a person knows it.
    pub name: String,
    /// Major and minor number of the architecture, (9, 0) for an H100.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block may ask for.
    pub shared_bytes: usize,
    /// Bytes of device memory.
    pub memory_bytes: usize,
    /// Nanoseconds that a launch takes beside its work.
    pub launch_ns: usize,
}

/// Rows of bytes in device memory.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// The first byte.
    pub start: Pointer,
    /// Bytes of a row.
    pub width: usize,
    /// Rows.
    pub rows: usize,
    /// Bytes from one row to the next.
    pub pitch: usize,
}

/// A loaded kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel(pub usize);

/// Launches, clears and products that were recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub usize);

/// How many blocks of how many threads, and the bytes of shared memory that a block asks for when it is launched.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes.
    pub shared_bytes: u32,
}

/// The arguments of a launch in the order of the kernel's parameters, each as its bytes.
#[derive(Clone, Debug)]
pub struct Arguments {
    /// In words, so that every argument is aligned.
    words: Vec<u64>,
    /// The word at which each argument starts.
    starts: Vec<usize>,
}

/// Words that arguments have room for at first: more than any kernel of ours takes.
const WORDS: usize = 128;

impl Default for Arguments {
    fn default() -> Self {
        Arguments { words: Vec::with_capacity(WORDS), starts: Vec::with_capacity(WORDS) }
    }
}

impl Arguments {
    /// No argument.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an argument.
    fn push(mut self, words: &[u64]) -> Self {
        self.starts.push(self.words.len());
        self.words.extend(words);
        self
    }

    /// A pointer; 0 is null.
    pub fn pointer(self, pointer: Pointer) -> Self {
        self.push(&[pointer])
    }

    /// A `Rows<T>`: a pointer, and the values from one row to the next.
    pub fn rows(self, pointer: Pointer, stride: usize) -> Self {
        self.push(&[pointer, stride as u64])
    }

    /// A `long long` or `size_t`.
    pub fn size(self, value: usize) -> Self {
        self.push(&[value as u64])
    }

    /// An `int` or `unsigned`; the low half of the word on a little-endian machine.
    pub fn int(self, value: u32) -> Self {
        self.push(&[u64::from(value)])
    }

    /// A `float`.
    pub fn float(self, value: f32) -> Self {
        self.int(value.to_bits())
    }

    /// A `TensorMap`.
    pub fn tensor_map(self, map: &TensorMap) -> Self {
        self.push(map)
    }

    /// Where each argument lies, as the driver takes them.
    pub fn addresses(&self) -> Vec<*mut std::ffi::c_void> {
        self.starts.iter().map(|&start| std::ptr::from_ref(&self.words[start]).cast_mut().cast()).collect()
    }
}

/// A matrix of 16-bit values `[rows][heads][columns]` in device memory and a box `[box rows][box heads][64]` of it, which
/// the copy engine takes to shared memory at once. Addresses and strides are multiples of 16 bytes, no size is 0.
#[derive(Clone, Copy, Debug)]
pub struct Boxes {
    /// The first value.
    pub start: Pointer,
    /// Bytes from one row to the next.
    pub row_bytes: usize,
    /// Rows.
    pub rows: u32,
    /// Heads, one behind the other.
    pub heads: u32,
    /// Columns of a head.
    pub columns: u32,
    /// Rows of a box, at most 256.
    pub box_rows: u32,
    /// Heads of a box, at most 256.
    pub box_heads: u32,
}

impl Boxes {
    /// Bytes from one head to the next.
    pub fn head_bytes(&self) -> u64 {
        2 * u64::from(self.columns)
    }
}

/// What the copy engine is told of [`Boxes`], as a kernel's argument.
pub type TensorMap = [u64; 16];

/// A matrix of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Its first value.
    pub start: Pointer,
    /// f32, bf16 or f16.
    pub dtype: DType,
    /// Values from one row to the next, as it lies in memory.
    pub stride: usize,
    /// Whether it is the transpose of what lies in memory.
    pub transposed: bool,
}

/// `out[m, n] = a[m, k]·b[k, n] (+ bias[n]) (+ out)`, with f32 sums in an order that the sizes fix. Both factors have one dtype;
/// that of `out` is theirs or f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Rows of `out`.
    pub m: usize,
    /// Columns of `out`.
    pub n: usize,
    /// Terms of a sum.
    pub k: usize,
    /// `[m, k]`.
    pub a: Matrix,
    /// `[k, n]`.
    pub b: Matrix,
    /// `[m, n]`, in rows.
    pub out: Matrix,
    /// `[n]` values in the dtype of `out`, added to each row; 0 for none.
    pub bias: Pointer,
    /// Add to what `out` holds.
    pub add: bool,
}

/// Finishes a read: waits for it, and gives the bytes.
pub type Finish = Box<dyn FnOnce() -> Result<Vec<u8>> + Send>;

/// What computes. Calls take effect in the order in which they are made; none but [`Driver::synchronise`] and a read's
/// [`Finish`] waits for the device.
pub trait Driver: Send + Sync {
    /// What the device can do.
    fn limits(&self) -> &Limits;
    /// Device memory, all 0, aligned to 256 bytes.
    ///
    /// # Errors
    /// When there is no room.
    fn allocate(&self, bytes: usize, what: &str) -> Result<Pointer>;
    /// Gives device memory back once all calls so far are done with it.
    fn free(&self, start: Pointer);
    /// Gets so many bytes ready for what is allocated next, where memory is not taken as it comes.
    ///
    /// # Errors
    /// When there is no room.
    fn plan(&self, _bytes: usize) -> Result<()> {
        Ok(())
    }
    /// Sets bytes to 0.
    ///
    /// # Errors
    /// When the device was lost.
    fn clear(&self, region: Region) -> Result<()>;
    /// Copies rows without gaps from the host; they may change once this returns.
    ///
    /// # Errors
    /// When the device was lost.
    fn upload(&self, from: &[u8], to: Region) -> Result<()>;
    /// Starts to copy rows to the host, without gaps.
    ///
    /// # Errors
    /// When the device was lost.
    fn download(&self, from: Region) -> Result<Finish>;
    /// Compiles a kernel, or finds it compiled.
    ///
    /// # Errors
    /// What the compiler said.
    fn load(&self, key: &KernelKey) -> Result<Kernel>;
    /// What an earlier run kept of a module on this very device, next to its code.
    fn recall(&self, module: &ModuleKey) -> Option<Vec<u8>>;
    /// Keeps something of a module on this very device for later runs.
    fn remember(&self, module: &ModuleKey, value: &[u8]);
    /// Describes boxes to the copy engine.
    ///
    /// # Errors
    /// When it cannot copy such ones.
    fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap>;
    /// Launches a kernel.
    ///
    /// # Errors
    /// When the device cannot, or an earlier launch failed.
    fn launch(&self, kernel: Kernel, shape: Shape, arguments: &Arguments) -> Result<()>;
    /// Makes a product.
    ///
    /// # Errors
    /// When the library has no algorithm for it.
    fn product(&self, product: &Product) -> Result<()>;
    /// From now on launches, clears and products are recorded and not done; nothing else may be called.
    ///
    /// # Errors
    /// When the device cannot.
    fn begin_recording(&self) -> Result<()>;
    /// Ends the recording.
    ///
    /// # Errors
    /// When the device could not record a call.
    fn end_recording(&self) -> Result<Graph>;
    /// Does what was recorded, with the arguments that were given then.
    ///
    /// # Errors
    /// When the device cannot.
    fn replay(&self, graph: Graph) -> Result<()>;
    /// Forgets a recording.
    fn forget(&self, graph: Graph);
    /// Waits until all calls so far are done.
    ///
    /// # Errors
    /// When one of them failed.
    fn synchronise(&self) -> Result<()>;
}

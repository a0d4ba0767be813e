//! How values lie in a file: plain numbers, or blocks of quantised ones.

/// How a tensor's values lie in a file.
///
/// Those from [`Storage::Q4_0`] on are blocks of values that share scales, and lie in GGUF files alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each is what its name says")]
#[expect(non_camel_case_types, reason = "the names by which the formats are known")]
pub enum Storage {
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F16,
    Bf16,
    F32,
    F64,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl Storage {
    /// Those of a safetensors file.
    pub(super) const PLAIN: [Storage; 13] = [
        Storage::Bool,
        Storage::U8,
        Storage::I8,
        Storage::U16,
        Storage::I16,
        Storage::U32,
        Storage::I32,
        Storage::U64,
        Storage::I64,
        Storage::F16,
        Storage::Bf16,
        Storage::F32,
        Storage::F64,
    ];

    /// Its name in a safetensors header, or that of its GGML type.
    pub fn name(self) -> &'static str {
        match self {
            Storage::Bool => "BOOL",
            Storage::U8 => "U8",
            Storage::I8 => "I8",
            Storage::U16 => "U16",
            Storage::I16 => "I16",
            Storage::U32 => "U32",
            Storage::I32 => "I32",
            Storage::U64 => "U64",
            Storage::I64 => "I64",
            Storage::F16 => "F16",
            Storage::Bf16 => "BF16",
            Storage::F32 => "F32",
            Storage::F64 => "F64",
            Storage::Q4_0 => "Q4_0",
            Storage::Q4_1 => "Q4_1",
            Storage::Q5_0 => "Q5_0",
            Storage::Q5_1 => "Q5_1",
            Storage::Q8_0 => "Q8_0",
            Storage::Q4_K => "Q4_K",
            Storage::Q5_K => "Q5_K",
            Storage::Q6_K => "Q6_K",
        }
    }

    /// Values of a block; 1 where they are not quantised.
    pub fn block_len(self) -> usize {
        match self {
            Storage::Q4_0 | Storage::Q4_1 | Storage::Q5_0 | Storage::Q5_1 | Storage::Q8_0 => 32,
            Storage::Q4_K | Storage::Q5_K | Storage::Q6_K => 256,
            _ => 1,
        }
    }

    /// Bytes of a block: of one value where they are not quantised.
    pub fn block_bytes(self) -> usize {
        match self {
            Storage::Bool | Storage::U8 | Storage::I8 => 1,
            Storage::U16 | Storage::I16 | Storage::F16 | Storage::Bf16 => 2,
            Storage::U32 | Storage::I32 | Storage::F32 => 4,
            Storage::U64 | Storage::I64 | Storage::F64 => 8,
            Storage::Q4_0 => 18,
            Storage::Q4_1 => 20,
            Storage::Q5_0 => 22,
            Storage::Q5_1 => 24,
            Storage::Q8_0 => 34,
            Storage::Q4_K => 144,
            Storage::Q5_K => 176,
            Storage::Q6_K => 210,
        }
    }

    /// Whether the values are floating-point numbers, or stand for them.
    pub fn is_float(self) -> bool {
        matches!(self, Storage::F16 | Storage::Bf16 | Storage::F32 | Storage::F64) || self.block_len() > 1
    }
}

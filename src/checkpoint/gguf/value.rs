//! Metadata of a GGUF file: typed values, checked when the file is opened, read from the map when asked for.

use std::ops::Range;

use super::cursor::{Cursor, Parsed};

/// The type of a metadata value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is what its name says")]
pub enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    U64,
    I64,
    F64,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Kind::Bool => "a flag",
            Kind::String => "a string",
            Kind::F32 | Kind::F64 => "a floating-point number",
            _ => "a whole number",
        })
    }
}

/// The number in a file that says: an array.
const ARRAY: u32 = 9;

impl Kind {
    fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Kind::U8,
            1 => Kind::I8,
            2 => Kind::U16,
            3 => Kind::I16,
            4 => Kind::U32,
            5 => Kind::I32,
            6 => Kind::F32,
            7 => Kind::Bool,
            8 => Kind::String,
            10 => Kind::U64,
            11 => Kind::I64,
            12 => Kind::F64,
            _ => return None,
        })
    }

    /// Bytes of a value; a string has a length before its bytes.
    pub(super) fn size(self) -> Option<usize> {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => Some(1),
            Kind::U16 | Kind::I16 => Some(2),
            Kind::U32 | Kind::I32 | Kind::F32 => Some(4),
            Kind::U64 | Kind::I64 | Kind::F64 => Some(8),
            Kind::String => None,
        }
    }
}

/// Where a metadata value lies: one value, or the elements of an array.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) kind: Kind,
    /// Elements of an array; `None` for a value by itself.
    pub(super) count: Option<usize>,
    pub(super) range: Range<usize>,
}

impl Stored {
    /// Reads past a value, and checks all of it but that strings are UTF-8.
    pub(super) fn parse(cursor: &mut Cursor<'_>) -> Parsed<Self> {
        let id = cursor.u32()?;
        let (id, count) = match id {
            ARRAY => (cursor.u32()?, Some(cursor.u64()?)),
            _ => (id, None),
        };
        let kind = match (Kind::from_id(id), id) {
            (Some(kind), _) => kind,
            (None, ARRAY) => return Err("it is an array of arrays, which h1 does not read".to_owned()),
            (None, _) => return Err(format!("there is no value type {id}")),
        };
        let start = cursor.at();
        let elements = count.unwrap_or(1);
        match kind.size() {
            Some(size) => cursor.skip(elements, size)?,
            None => {
                for _ in 0..elements {
                    cursor.string()?;
                }
            }
        }
        // Every element took a byte at least, so that there are no more than the file has bytes.
        let count = count.map(|count| count as usize);
        Ok(Stored { kind, count, range: start..cursor.at() })
    }
}

/// A number of any type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Number {
    Whole(i128),
    Real(f64),
}

/// The number that these bytes hold; `None` for strings.
pub(super) fn number(kind: Kind, bytes: &[u8]) -> Option<Number> {
    use Number::{Real, Whole};
    Some(match kind {
        Kind::U8 | Kind::Bool => Whole(u8::from_le_bytes(bytes.try_into().ok()?).into()),
        Kind::I8 => Whole(i8::from_le_bytes(bytes.try_into().ok()?).into()),
        Kind::U16 => Whole(u16::from_le_bytes(bytes.try_into().ok()?).into()),
        Kind::I16 => Whole(i16::from_le_bytes(bytes.try_into().ok()?).into()),
        Kind::U32 => Whole(u32::from_le_bytes(bytes.try_into().ok()?).into()),
        Kind::I32 => Whole(i32::from_le_bytes(bytes.try_into().ok()?).into()),
        Kind::U64 => Whole(u64::from_le_bytes(bytes.try_into().ok()?).into()),
        Kind::I64 => Whole(i64::from_le_bytes(bytes.try_into().ok()?).into()),
        Kind::F32 => Real(f32::from_le_bytes(bytes.try_into().ok()?).into()),
        Kind::F64 => Real(f64::from_le_bytes(bytes.try_into().ok()?)),
        Kind::String => return None,
    })
}

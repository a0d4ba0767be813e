//! A look at a footer before the Parquet library reads it: the library reserves room for as many children as a column claims.
//!
//! Source: `parquet.thrift` and Thrift's compact protocol.

/// Types of the compact protocol.
const DOUBLE: u8 = 7;
const TEXT: u8 = 8;
const LIST: u8 = 9;
const SET: u8 = 10;
const MAP: u8 = 11;
const STRUCT: u8 = 12;
/// `FileMetaData.schema`, `SchemaElement.num_children`.
const SCHEMA: u64 = 2;
const CHILDREN: u64 = 5;
/// Structs lie no deeper in each other than this.
const DEEPEST: usize = 32;

/// Whether no column of the schema claims more children than the footer has bytes.
pub(super) fn is_sound(footer: &[u8]) -> bool {
    schema(&mut Compact(footer), footer.len() as u64).is_some()
}

fn schema(compact: &mut Compact<'_>, most: u64) -> Option<()> {
    let mut last = 0;
    while let Some((id, kind)) = compact.field(&mut last)? {
        if (id, kind) != (SCHEMA, LIST) {
            compact.skip(kind, 0)?;
            continue;
        }
        let (count, kind) = compact.list()?;
        for _ in 0..if kind == STRUCT { count } else { return None } {
            let mut last = 0;
            while let Some((id, kind)) = compact.field(&mut last)? {
                match id {
                    // Zigzag: twice the number, if it is not negative.
                    CHILDREN => (compact.varint()? / 2 <= most).then_some(())?,
                    _ => compact.skip(kind, 0)?,
                }
            }
        }
    }
    Some(())
}

/// Bytes in the compact protocol; nothing where they end too early.
struct Compact<'a>(&'a [u8]);

impl Compact<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn step(&mut self, bytes: u64) -> Option<()> {
        self.0 = self.0.get(usize::try_from(bytes).ok()?..)?;
        Some(())
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    /// Number and type of the next field; the inner nothing where the struct ends.
    fn field(&mut self, last: &mut u64) -> Option<Option<(u64, u8)>> {
        let (delta, kind) = match self.byte()? {
            0 => return Some(None),
            byte => (byte >> 4, byte & 15),
        };
        *last = match delta {
            0 => self.varint()? / 2,
            delta => last.checked_add(delta.into())?,
        };
        Some(Some((*last, kind)))
    }

    /// Length and type of a list.
    fn list(&mut self) -> Option<(u64, u8)> {
        let byte = self.byte()?;
        let count = if byte >> 4 == 15 { self.varint()? } else { u64::from(byte >> 4) };
        // Every value has a byte at least.
        (count <= self.0.len() as u64).then_some((count, byte & 15))
    }

    /// Steps over the value of a field. The value of a truth is in its type.
    fn skip(&mut self, kind: u8, depth: usize) -> Option<()> {
        match kind {
            1 | 2 => Some(()),
            3 => self.step(1),
            4..=6 => self.varint().map(drop),
            DOUBLE => self.step(8),
            TEXT => {
                let length = self.varint()?;
                self.step(length)
            }
            LIST | SET if depth < DEEPEST => {
                let (count, kind) = self.list()?;
                (0..count).try_for_each(|_| self.item(kind, depth + 1))
            }
            MAP if depth < DEEPEST => {
                let count = self.varint()?;
                let kinds = if count == 0 { 0 } else { self.byte()? };
                (0..count).try_for_each(|_| {
                    self.item(kinds >> 4, depth + 1)?;
                    self.item(kinds & 15, depth + 1)
                })
            }
            STRUCT if depth < DEEPEST => {
                let mut last = 0;
                while let Some((_, kind)) = self.field(&mut last)? {
                    self.skip(kind, depth + 1)?;
                }
                Some(())
            }
            _ => None,
        }
    }

    /// Steps over a value of a list or a map, where a truth is a byte.
    fn item(&mut self, kind: u8, depth: usize) -> Option<()> {
        if matches!(kind, 1 | 2) { self.step(1) } else { self.skip(kind, depth) }
    }
}

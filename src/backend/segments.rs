//! Segments: which rows of the one axis of tokens belong to which sequence.

use super::{Error, Result, View};

/// Rows `start..start + len` belong to one sequence, which has already seen `past` tokens and owns cache slot `slot`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row.
    pub start: u32,
    /// Number of rows; 0 is legal and does nothing.
    pub len: u32,
    /// Tokens of the sequence before the first row. At 0 the sequence starts afresh, whatever its slot holds.
    pub past: u32,
    /// The sequence's row in every cache and state; not read where an op has no cache.
    pub slot: u32,
}

/// The segments of a call, in the order of their rows; together they cover every row exactly once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    list: Vec<Segment>,
    tokens: usize,
}

/// Values of one segment in the device table: start, len, past, slot, and the first row of its keys where keys lie
/// one segment after the other (the running sum of past + len).
pub const SEGMENT_FIELDS: usize = 5;

impl Segments {
    /// Documents of the given lengths one after the other, each from its start, in slots 0, 1, ….
    ///
    /// # Errors
    /// When there are more than 2³² tokens.
    pub fn documents(lengths: impl IntoIterator<Item = usize>) -> Result<Self> {
        let mut segments = Segments::default();
        for (slot, len) in lengths.into_iter().enumerate() {
            segments.push(len, 0, slot)?;
        }
        Ok(segments)
    }

    /// Appends `len` rows of a sequence that has seen `past` tokens and owns `slot`.
    ///
    /// # Errors
    /// When a number passes 2³².
    pub fn push(&mut self, len: usize, past: usize, slot: usize) -> Result<()> {
        let narrow = |what, value: usize| u32::try_from(value).map_err(|_| Error::Size { what, value });
        narrow("tokens", self.tokens.saturating_add(len))?;
        narrow("position", past.saturating_add(len))?;
        self.list.push(Segment {
            start: narrow("tokens", self.tokens)?,
            len: narrow("tokens", len)?,
            past: narrow("position", past)?,
            slot: narrow("slot", slot)?,
        });
        self.tokens += len;
        Ok(())
    }

    /// Removes all segments and keeps the memory.
    pub fn clear(&mut self) {
        self.list.clear();
        self.tokens = 0;
    }

    /// The segments in the order of their rows.
    pub fn list(&self) -> &[Segment] {
        &self.list
    }

    /// Rows in all.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Keys in all where each segment's keys lie one after the other: the sum of past + len.
    pub fn keys(&self) -> usize {
        self.list.iter().map(|s| (s.past + s.len) as usize).sum()
    }

    /// The device table `[capacity, SEGMENT_FIELDS]`, filled up with empty segments.
    pub(super) fn table(&self, capacity: usize, table: &mut Vec<u32>) {
        table.clear();
        let mut keys = 0;
        for s in &self.list {
            table.extend([s.start, s.len, s.past, s.slot, keys]);
            keys += s.past + s.len;
        }
        table.resize(capacity * SEGMENT_FIELDS, 0);
    }

    /// The position of each row in its sequence.
    pub(super) fn positions(&self, positions: &mut Vec<u32>) {
        positions.clear();
        positions.extend(self.list.iter().flat_map(|s| s.past..s.past + s.len));
    }
}

/// Segments on a device, at addresses that stay the same from step to step; only their capacity is a launch argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentsView {
    /// `[capacity, SEGMENT_FIELDS]` u32; rows past the last segment have length 0.
    pub table: View,
    /// `[1, tokens]` u32: the position of each row in its sequence.
    pub positions: View,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_gives_rows_positions_and_keys_of_each_segment() {
        let mut segments = Segments::documents([2, 0]).unwrap();
        segments.push(3, 4, 7).unwrap();
        let mut values = Vec::new();
        segments.table(4, &mut values);
        assert_eq!(values, [0, 2, 0, 0, 0, 2, 0, 0, 1, 2, 2, 3, 4, 7, 2, 0, 0, 0, 0, 0]);
        segments.positions(&mut values);
        assert_eq!(values, [0, 1, 4, 5, 6]);
        assert_eq!((segments.tokens(), segments.keys()), (5, 9));
    }

    #[test]
    fn a_position_past_the_table_is_an_error() {
        assert!(Segments::default().push(1, u32::MAX as usize, 0).is_err());
    }
}

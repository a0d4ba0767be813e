//! Which rows of `[tokens, width]` belong to which sequence.

use std::ops::Range;

/// A run of rows that belongs to one sequence.
///
/// Every row lies in exactly one segment. A segment may be empty (`len` 0), which leaves its sequence's state as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row.
    pub start: usize,
    /// Rows, in tokens.
    pub len: usize,
    /// Tokens that the sequence has seen before the first row.
    pub past: usize,
}

impl Segment {
    /// The segment's rows.
    pub fn rows(&self) -> Range<usize> {
        self.start..self.start + self.len
    }

    /// Keys that the sequence has once its rows are added: `past + len`.
    pub fn kv_len(&self) -> usize {
        self.past + self.len
    }
}

/// The first key row of each segment where the keys of all segments lie end to end: the running sum of
/// [`kv_len`](Segment::kv_len) over the segments before it.
pub fn kv_starts(segments: &[Segment]) -> Vec<usize> {
    segments
        .iter()
        .scan(0, |next, segment| {
            let start = *next;
            *next += segment.kv_len();
            Some(start)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::segments;

    proptest! {
        #[test]
        fn keys_of_segments_lie_end_to_end(segments in segments()) {
            let mut end = 0;
            for (segment, start) in segments.iter().zip(kv_starts(&segments)) {
                assert_eq!(start, end);
                end = start + segment.past + segment.rows().len();
            }
        }
    }
}

//! A micro-batch as a trainer writes it to the device.

use super::error::Result;
use super::trainer::Room;
use crate::backend::{Device, Segments};
use crate::model::head::Targets;
use crate::text::packing::{Batch, NO_LABEL};

/// Sizes are rounded up to multiples of these shares of the room, themselves multiples of 64: tokens cost more than rows
/// of the head.
const TOKENS: usize = 64;
const ROWS: usize = 16;
const MULTIPLE: usize = 64;

/// How many tokens and rows of the head a trainer makes of `batch`, which has no more than the room. Where the device
/// records, those are a few more than the batch's tokens and the ones that count, so that sizes come again although
/// those of packed documents seldom do: a document of its own and rows of weight 0 fill them up, and add nothing to
/// losses and gradients. There are never more tokens than the room has, nor more rows than tokens.
pub fn filled_up(device: &Device, room: Room, batch: &Batch) -> (usize, usize) {
    let up = |count: usize, share: usize, most: usize| {
        let multiple = if device.info().records { (room.tokens / share).max(1).next_multiple_of(MULTIPLE) } else { 1 };
        count.next_multiple_of(multiple).min(most)
    };
    let tokens = up(batch.tokens(), TOKENS, room.tokens);
    (tokens, up(batch.counted_tokens(), ROWS, tokens))
}

/// The tokens of a micro-batch, and those whose logits are computed.
#[derive(Debug)]
pub(super) struct MicroBatch {
    pub ids: Vec<u32>,
    pub segments: Segments,
    rows: Vec<u32>,
    labels: Vec<u32>,
    weights: Vec<f32>,
}

impl MicroBatch {
    /// Room for up to `tokens` tokens.
    pub fn new(tokens: usize) -> Self {
        MicroBatch {
            ids: Vec::with_capacity(tokens),
            segments: Segments::default(),
            rows: Vec::with_capacity(tokens),
            labels: Vec::with_capacity(tokens),
            weights: Vec::with_capacity(tokens),
        }
    }

    /// Becomes `batch`, filled up to `tokens` tokens and `rows` rows; those that count have weight `weight`.
    pub fn fill(&mut self, batch: &Batch, (tokens, rows): (usize, usize), weight: f32) -> Result<()> {
        // The tokens that the batch begins with, once more: what they give is finite if the batch is.
        self.ids.clear();
        self.ids.extend(batch.ids.iter().cycle().take(tokens));
        self.segments.clear();
        let more = Some(tokens - batch.tokens()).filter(|more| *more > 0);
        for (slot, len) in batch.segments.iter().map(|segment| segment.len).chain(more).enumerate() {
            self.segments.push(len, 0, slot)?;
        }
        self.rows.clear();
        self.labels.clear();
        self.weights.clear();
        let mut spare = rows - batch.counted_tokens();
        let more = std::iter::repeat_n((&NO_LABEL, &false), more.unwrap_or(0));
        for (row, (label, counts)) in batch.labels.iter().zip(&batch.counted).chain(more).enumerate() {
            if *counts {
                self.push(row, *label, weight);
            } else if spare > 0 {
                spare -= 1;
                self.push(row, NO_LABEL, 0.0);
            }
        }
        Ok(())
    }

    fn push(&mut self, row: usize, label: u32, weight: f32) {
        self.rows.push(row as u32);
        self.labels.push(label);
        self.weights.push(weight);
    }

    /// The rows of the head.
    pub fn targets(&self) -> Targets<'_> {
        Targets { rows: &self.rows, labels: &self.labels, weights: &self.weights }
    }
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;
    use crate::backend::cuda::emulated::{self, Emulation};
    use crate::backend::reference::Reference;
    use crate::text::packing::Segment;

    /// Two documents of which every third token counts.
    fn batch(tokens: usize) -> Batch {
        let first = tokens / 3;
        let segment = |(document, start, len)| Segment { start, len, document };
        Batch {
            ids: (1..=tokens as u32).collect(),
            labels: (2..tokens as u32 + 2).collect(),
            counted: (0..tokens).map(|row| row % 3 == 0).collect(),
            segments: [(0, 0, first), (1, first, tokens - first)].map(segment).into(),
        }
    }

    #[test]
    fn a_micro_batch_is_filled_up_with_what_does_not_count_where_a_device_records() {
        let folder = tempfile::tempdir().unwrap().path().to_owned();
        let emulation = Emulation { folder, order: 0, capability: (9, 0), sanitize: false, rough: false };
        let (card, other) = (emulated::device(emulation).unwrap(), Device::new(Reference::new()));
        let room = Room { tokens: 5000, segments: 2 };
        for (tokens, expected) in [(3, (128, 128)), (128, (128, 128)), (4001, (4096, 1600)), (5000, (5000, 1920))] {
            let (batch, mut filled) = (batch(tokens), MicroBatch::new(tokens));
            assert_eq!(filled_up(&other, room, &batch), (tokens, tokens.div_ceil(3)));
            let (tokens, rows) = filled_up(&card, room, &batch);
            assert_eq!((tokens, rows), expected);
            filled.fill(&batch, (tokens, rows), 0.5).unwrap();
            assert_eq!((filled.ids.len(), filled.segments.tokens(), filled.rows.len()), (tokens, tokens, rows));
            assert!(filled.ids.starts_with(&batch.ids) && filled.rows.is_sorted_by(|a, b| a < b));
            for ((row, label), weight) in filled.rows.iter().zip(&filled.labels).zip(&filled.weights) {
                let counts = batch.counted.get(*row as usize) == Some(&true);
                assert_eq!((*label, *weight), if counts { (row + 2, 0.5) } else { (NO_LABEL, 0.0) });
            }
            assert_eq!(filled.weights.iter().filter(|weight| **weight > 0.0).count(), batch.counted_tokens());
        }
    }
}

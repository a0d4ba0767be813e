//! Documents packed whole into rows of a fixed number of tokens, and rows into the batches of a run.
//!
//! A row is a budget, not a shape: there is no padding, a batch is its documents one after the other, each a segment
//! that sees nothing of the others.

use super::documents::Documents;
use crate::random;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// The label of a token that has no next one.
pub const NO_LABEL: u32 = u32::MAX;

/// How many waiting documents are looked at for one that fits into the rest of a row.
const WAITING: usize = 64;

/// Why there are no batches.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackingError {
    /// There is nothing to pack.
    #[error("the data set has no tokens")]
    NoTokens,
    /// A size is 0.
    #[error("{0} is 0; expected at least 1")]
    Zero(&'static str),
    /// A batch would have more tokens than a label or a row index can tell apart.
    #[error("{rows} rows of {row_tokens} tokens are more than a batch may have; expected fewer than 2^32 tokens")]
    TooLarge {
        /// Rows of a batch.
        rows: usize,
        /// Tokens of a row.
        row_tokens: usize,
    },
    /// The position belongs to other data or other settings.
    #[error("the position to resume at belongs to data {expected}, but the data, seed and row length now make {found}")]
    OtherData {
        /// The fingerprint in the position.
        expected: String,
        /// The fingerprint of what is here.
        found: String,
    },
    /// The position is past the epoch's last row.
    #[error("the position to resume at is row {row} of an epoch of {rows} rows")]
    PastEnd {
        /// The row asked for.
        row: usize,
        /// How many there are.
        rows: usize,
    },
}

/// A part of a document that lies in one row: all of it, unless it is longer than a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    document: usize,
    start: usize,
    len: usize,
}

/// Tokens of one document that lie together in a [`Batch`] and see each other alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first token's index in the batch.
    pub start: usize,
    /// The number of tokens, at least 1.
    pub len: usize,
    /// The document's index in its data set.
    pub document: usize,
}

/// The tokens of some rows, `[tokens]` each; its buffers are meant to be used again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The ids.
    pub ids: Vec<u32>,
    /// The next token of the same document, or [`NO_LABEL`] at its end.
    pub labels: Vec<u32>,
    /// Whether the logits at this token count: its label is there and is to be learnt.
    pub counted: Vec<bool>,
    /// What belongs together; in order, without gaps.
    pub segments: Vec<Segment>,
}

impl Batch {
    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// The number of tokens whose logits count.
    pub fn counted_tokens(&self) -> usize {
        self.counted.iter().filter(|counted| **counted).count()
    }

    /// Empties the batch and keeps its buffers.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.labels.clear();
        self.counted.clear();
        self.segments.clear();
    }

    /// Makes room for a whole batch at once, so that later ones of the same size allocate nothing.
    fn reserve(&mut self, tokens: usize) {
        self.ids.reserve(tokens);
        self.labels.reserve(tokens);
        self.counted.reserve(tokens);
    }

    /// Appends a piece of a document. Its last token's label is the token after it even when that lies in another row.
    fn push(&mut self, documents: &Documents, piece: Piece) {
        let Some(document) = documents.get(piece.document) else { return };
        let end = piece.start + piece.len;
        let next = piece.start + 1..(end + 1).min(document.ids.len());
        self.segments.push(Segment { start: self.ids.len(), len: piece.len, document: piece.document });
        self.ids.extend_from_slice(&document.ids[piece.start..end]);
        self.labels.extend_from_slice(&document.ids[next.clone()]);
        self.counted.extend_from_slice(&document.counts[next]);
        self.labels.resize(self.ids.len(), NO_LABEL);
        self.counted.resize(self.ids.len(), false);
    }
}

/// Documents laid into rows of at most a fixed number of tokens.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    pieces: Vec<Piece>,
    /// Where each row ends in `pieces`.
    ends: Vec<usize>,
    cut: usize,
    waiting: Vec<Piece>,
    open: Vec<Piece>,
}

impl Rows {
    /// The documents in their own order, as an evaluation takes them.
    pub fn in_order(documents: &Documents, row_tokens: usize) -> Result<Rows, PackingError> {
        if row_tokens == 0 {
            return Err(PackingError::Zero("the number of tokens of a row"));
        }
        if documents.tokens() == 0 {
            return Err(PackingError::NoTokens);
        }
        let mut rows = Rows::default();
        rows.pack(documents, 0..documents.len(), row_tokens);
        Ok(rows)
    }

    /// Lays the documents of `order` into rows anew: the next waiting document that fits, or else a new row.
    ///
    /// A document longer than a row is cut: each whole row of it stands alone, the rest waits like a document.
    fn pack(&mut self, documents: &Documents, order: impl IntoIterator<Item = usize>, row_tokens: usize) {
        self.pieces.clear();
        self.ends.clear();
        self.cut = 0;
        let mut order = order.into_iter();
        let mut room = row_tokens;
        loop {
            while self.waiting.len() < WAITING
                && let Some(document) = order.next()
            {
                self.enqueue(document, documents.get(document).map_or(0, |document| document.ids.len()), row_tokens);
            }
            match self.waiting.iter().position(|piece| piece.len <= room) {
                Some(index) => {
                    let piece = self.waiting.remove(index);
                    room -= piece.len;
                    self.open.push(piece);
                }
                None if self.open.is_empty() => break,
                None => {
                    self.pieces.append(&mut self.open);
                    self.ends.push(self.pieces.len());
                    room = row_tokens;
                }
            }
        }
    }

    /// Puts a document among those that wait; the whole rows of a long one go ahead of the open row.
    fn enqueue(&mut self, document: usize, len: usize, row_tokens: usize) {
        self.cut += usize::from(len > row_tokens);
        let mut start = 0;
        while len - start > row_tokens {
            self.pieces.push(Piece { document, start, len: row_tokens });
            self.ends.push(self.pieces.len());
            start += row_tokens;
        }
        if len > start {
            self.waiting.push(Piece { document, start, len: len - start });
        }
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// How many documents were longer than a row and lie in several.
    pub fn cut_documents(&self) -> usize {
        self.cut
    }

    /// Appends the rows of `range` that there are to `batch`.
    pub fn append(&self, documents: &Documents, range: Range<usize>, batch: &mut Batch) {
        for row in range.start..range.end.min(self.len()) {
            let start = row.checked_sub(1).map_or(0, |before| self.ends[before]);
            for piece in &self.pieces[start..self.ends[row]] {
                batch.push(documents, *piece);
            }
        }
    }
}

/// Where a run stands in its data; kept in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// How often all documents have been seen.
    pub epoch: u64,
    /// The next row of this epoch.
    pub row: usize,
    /// What the rows were made of: the documents, the seed, the length of a row.
    pub data: String,
}

/// Endless batches: all documents once an epoch, in an order drawn from the seed and the epoch's number.
#[derive(Clone, Debug)]
pub struct Batches {
    documents: Arc<Documents>,
    row_tokens: usize,
    rows_per_batch: usize,
    seed: u64,
    order: Vec<usize>,
    rows: Rows,
    position: Position,
}

impl Batches {
    /// Batches of `rows_per_batch` rows of at most `row_tokens` tokens, from the start.
    pub fn new(
        documents: Arc<Documents>,
        row_tokens: usize,
        rows_per_batch: usize,
        seed: u64,
    ) -> Result<Batches, PackingError> {
        if row_tokens == 0 {
            return Err(PackingError::Zero("the number of tokens of a row"));
        }
        if rows_per_batch == 0 {
            return Err(PackingError::Zero("the number of rows of a batch"));
        }
        if documents.tokens() == 0 {
            return Err(PackingError::NoTokens);
        }
        if rows_per_batch.checked_mul(row_tokens).is_none_or(|tokens| tokens >= u32::MAX as usize) {
            return Err(PackingError::TooLarge { rows: rows_per_batch, row_tokens });
        }
        let data = format!("{}-{seed}-{row_tokens}", documents.fingerprint());
        let position = Position { epoch: 0, row: 0, data };
        let (order, rows) = (Vec::new(), Rows::default());
        let mut batches = Batches { documents, row_tokens, rows_per_batch, seed, order, rows, position };
        batches.shuffle();
        Ok(batches)
    }

    /// Goes on where a run stood: the batches from here on are those that it would have had.
    pub fn resume(mut self, position: &Position) -> Result<Batches, PackingError> {
        if position.data != self.position.data {
            let (expected, found) = (position.data.clone(), self.position.data);
            return Err(PackingError::OtherData { expected, found });
        }
        self.position = position.clone();
        self.shuffle();
        if position.row >= self.rows.len() {
            return Err(PackingError::PastEnd { row: position.row, rows: self.rows.len() });
        }
        Ok(self)
    }

    /// Where the next batch begins.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// The rows of the present epoch.
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// The most tokens that a batch can have.
    pub fn most_tokens(&self) -> usize {
        self.rows_per_batch * self.row_tokens
    }

    /// Replaces `batch` by the next rows; those of the next epoch follow those of this one, within a batch too.
    pub fn next_into(&mut self, batch: &mut Batch) {
        batch.clear();
        batch.reserve(self.most_tokens());
        for _ in 0..self.rows_per_batch {
            let row = self.position.row;
            self.rows.append(&self.documents, row..row + 1, batch);
            self.position.row += 1;
            if self.position.row == self.rows.len() {
                self.position.row = 0;
                self.position.epoch += 1;
                self.shuffle();
            }
        }
    }

    /// Draws this epoch's order and lays it into rows.
    fn shuffle(&mut self) {
        self.order.clear();
        self.order.extend(0..self.documents.len());
        self.order.shuffle(&mut random::stream(self.seed, &format!("order of epoch {}", self.position.epoch)));
        self.rows.pack(&self.documents, self.order.iter().copied(), self.row_tokens);
    }
}

#[cfg(test)]
mod tests;

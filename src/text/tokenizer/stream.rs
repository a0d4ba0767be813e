//! Text as its tokens come.

use super::{Tokenizer, TokenizerError};

/// Text as its tokens come, never half a character: a piece is held back until the bytes of its last character are
/// there.
///
/// The pieces, and [`finish`](Self::finish) after them, make up what [`Tokenizer::decode`] gives for all ids at once.
#[derive(Clone, Debug, Default)]
pub struct DecodeStream {
    /// The last piece that was given out, and what came since.
    ids: Vec<u32>,
    /// How many of `ids` were given out: they are decoded again, since a token's text may depend on the one before it.
    given: usize,
}

impl DecodeStream {
    /// The text that `id` completes; empty while a character is incomplete. Special tokens say nothing.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let text = self.pending(tokenizer)?;
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Ok(text)
    }

    /// What was held back and will not be completed; the stream is empty after it.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let text = self.pending(tokenizer)?;
        *self = DecodeStream::default();
        Ok(text)
    }

    /// The text of the ids that were not given out.
    fn pending(&self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let given = tokenizer.decode(&self.ids[..self.given], true)?;
        let text = tokenizer.decode(&self.ids, true)?;
        let shared: usize = std::iter::zip(given.chars(), text.chars())
            .take_while(|(before, now)| before == now)
            .map(|(character, _)| character.len_utf8())
            .sum();
        Ok(text[shared..].to_string())
    }
}

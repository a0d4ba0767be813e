//! Records become tokens, and roles say which of them are learnt.

use super::record::Record;
use super::template::{ChatTemplate, Clock, Conversation, Message, TemplateError};
use super::tokenizer::{Tokenizer, TokenizerError};
use jiff::civil::date;
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fmt;
use std::ops::Range;

/// The role of what a model says.
const ASSISTANT: &str = "assistant";
/// What no turn says.
const OTHER: &str = "\u{f8ff}";
/// The role of what it is asked.
const USER: &str = "user";

/// Which tokens of a document are learnt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LossOn {
    /// What the assistant says, with the token that ends it; of a plain text, all.
    #[default]
    Response,
    /// Everything.
    All,
    /// What these roles say; of a plain text, all.
    Roles(Vec<String>),
}

impl LossOn {
    fn counts(&self, role: &str) -> bool {
        match self {
            LossOn::Response => role == ASSISTANT,
            LossOn::All => true,
            LossOn::Roles(roles) => roles.iter().any(|other| other == role),
        }
    }
}

impl<'de> Deserialize<'de> for LossOn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl<'de> Visitor<'de> for Words {
            type Value = LossOn;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"response\", \"all\" or a list of roles")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<LossOn, E> {
                match word {
                    "response" => Ok(LossOn::Response),
                    "all" => Ok(LossOn::All),
                    _ => Err(E::invalid_value(de::Unexpected::Str(word), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<LossOn, A::Error> {
                let mut roles = Vec::new();
                while let Some(role) = list.next_element()? {
                    roles.push(role);
                }
                match roles.is_empty() {
                    true => Err(de::Error::invalid_length(0, &self)),
                    false => Ok(LossOn::Roles(roles)),
                }
            }
        }
        deserializer.deserialize_any(Words)
    }
}

/// How a question with its answer becomes text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Render {
    /// As turns of a user and an assistant where the model has a chat template, plain otherwise.
    #[default]
    Auto,
    /// As turns.
    Chat,
    /// One after the other.
    Plain,
}

impl std::str::FromStr for Render {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Render::Auto),
            "chat" => Ok(Render::Chat),
            "plain" => Ok(Render::Plain),
            _ => Err(format!("unknown rendering '{name}': expected auto, chat or plain")),
        }
    }
}

/// The ids of a record, and whether each is learnt: the logits before it count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The ids.
    pub ids: Vec<u32>,
    /// Whether each is learnt.
    pub counts: Vec<bool>,
}

/// Turns records into tokens.
#[derive(Clone, Debug)]
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    render: Render,
    loss_on: LossOn,
}

impl<'a> Encoder<'a> {
    /// An encoder for the model of `tokenizer`.
    pub fn new(tokenizer: &'a Tokenizer, render: Render, loss_on: LossOn) -> Self {
        Encoder { tokenizer, render, loss_on }
    }

    /// The tokens of a record.
    ///
    /// A plain text, and a pair rendered plainly, begins with bos where the tokenizer puts one and ends with eos where
    /// there is one. Turns are what the template makes of them.
    ///
    /// The ids of what is given are those that it has alone, so that what follows it in training follows it in generation;
    /// each part is encoded after those before it where that leaves their ids alone, otherwise by itself.
    ///
    /// # Errors
    /// When the template refuses the turns, or there is none for them.
    pub fn encode(&self, record: &Record) -> Result<Encoded, TokenizerError> {
        let template = self.tokenizer.template();
        match record {
            Record::Text(text) => self.plain(&[(text, true)], true),
            Record::Pair { prompt, between, response } => match (self.render, template) {
                (Render::Plain, _) | (Render::Auto, None) => {
                    let prompt = format!("{prompt}{between}");
                    let (given, said) = (self.loss_on.counts(USER), self.loss_on.counts(ASSISTANT));
                    self.plain(&[(&prompt, given), (response, said)], said)
                }
                _ => self.turns(template, &Record::as_turns(prompt, response), None),
            },
            Record::Messages { messages, tools } => self.turns(template, messages, tools.as_ref()),
        }
    }

    /// Everything but the record that the tokens depend on, as a hash.
    pub fn identity(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.tokenizer.identity());
        hash.update(format!("{:?} {:?}", self.render, self.loss_on));
        hash.finalize().into()
    }

    fn plain(&self, parts: &[(&str, bool)], end: bool) -> Result<Encoded, TokenizerError> {
        let mut encoded = Encoded::default();
        let bos = self.tokenizer.bos().filter(|_| self.tokenizer.adds_bos());
        encoded.extend(bos, parts.iter().all(|(_, counts)| *counts));
        self.append(&mut encoded, parts)?;
        encoded.extend(self.tokenizer.eos(), end);
        Ok(encoded)
    }

    fn turns(
        &self,
        template: Option<&ChatTemplate>,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> Result<Encoded, TokenizerError> {
        let template = template.ok_or(TokenizerError::NoTemplate)?;
        let (text, spans) = self.spans(template, messages, tools)?;
        let mut encoded = Encoded::default();
        let parts: Vec<(&str, bool)> = spans
            .iter()
            .map(|(end, counts)| (*end, *counts))
            .scan(0, |start, (end, counts)| {
                let part = &text[*start..end];
                *start = end;
                Some((part, counts))
            })
            .collect();
        self.append(&mut encoded, &parts)?;
        Ok(encoded)
    }

    /// The text of a conversation, and where each of its parts ends with whether it is learnt.
    ///
    /// A turn starts where the turns before it, rendered alone, end, and ends where they end with it. Where a template
    /// renders turns in another way when they are the last, the text shows where: what changes in it with a turn's content
    /// is what the turn says.
    fn spans(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> Result<(String, Vec<(usize, bool)>), TokenizerError> {
        let render = |messages: &[Message], add_generation_prompt| {
            // A day that stays the same, so that a run that goes on tomorrow has the same tokens.
            let clock = Clock::At(date(2024, 7, 26).at(0, 0, 0, 0));
            template.render(&Conversation { messages, tools, add_generation_prompt, clock })
        };
        let text = render(messages, false)?;
        if self.loss_on == LossOn::All {
            let spans = vec![(text.len(), true)];
            return Ok((text, spans));
        }
        let said = |turn: usize| -> Result<Range<usize>, TemplateError> {
            let mut others = messages.to_vec();
            others[turn].insert("content".to_owned(), OTHER.into());
            let other = render(&others, false)?;
            let start = shared(text.chars(), other.chars());
            let after = shared(text[start..].chars().rev(), other[start..].chars().rev());
            match text == other {
                true => Err(TemplateError::Unstable { turn: turn + 1 }),
                false => Ok(start..text.len() - after),
            }
        };
        let mut spans = Vec::new();
        let mut at = 0;
        for (index, turn) in messages.iter().enumerate() {
            let role = turn.get("role").and_then(Value::as_str).unwrap_or_default();
            if !self.loss_on.counts(role) {
                continue;
            }
            let start = match (role, index) {
                (role, 0) if role != ASSISTANT => 0,
                _ => {
                    let before = render(&messages[..index], role == ASSISTANT)?;
                    let start = shared(text.chars(), before.chars());
                    match index.checked_sub(1).filter(|_| start < before.len()) {
                        None => start,
                        Some(previous) if start > said(previous)?.end => start.min(said(index)?.start),
                        Some(_) => said(index)?.start,
                    }
                }
            };
            let end = if index + 1 == messages.len() {
                text.len()
            } else {
                let with = render(&messages[..=index], false)?;
                let end = shared(text.chars(), with.chars());
                if end < with.len() { self.end(&text, said(index)?.end, said(index + 1)?.start)? } else { end }
            };
            if start < at || end <= start {
                return Err(TemplateError::Unstable { turn: index + 1 }.into());
            }
            spans.extend([(start, false), (end, true)]);
            at = end;
        }
        spans.push((text.len(), false));
        Ok((text, spans))
    }

    /// Where a turn ends whose content ends at `said`, when the next one's begins at `next`: with what ends it, if that is
    /// between them.
    fn end(&self, text: &str, said: usize, next: usize) -> Result<usize, TokenizerError> {
        let between = self.tokenizer.encode(text.get(said..next).unwrap_or_default(), false)?;
        Ok(if between.iter().any(|id| self.tokenizer.ends().contains(id)) { next } else { said })
    }

    /// Appends the tokens of parts of one text. What follows the end of a turn within its part is not learnt.
    fn append(&self, encoded: &mut Encoded, parts: &[(&str, bool)]) -> Result<(), TokenizerError> {
        let before = encoded.ids.len();
        let mut text = String::new();
        for (part, counts) in parts.iter().filter(|(part, _)| !part.is_empty()) {
            text.push_str(part);
            let start = encoded.ids.len();
            let whole = self.tokenizer.encode(&text, false)?;
            match whole.strip_prefix(&encoded.ids[before..]) {
                Some(rest) => encoded.ids.extend_from_slice(rest),
                None => encoded.ids.extend(self.tokenizer.encode(part, false)?),
            }
            let new = &encoded.ids[start..];
            let ends = self.tokenizer.ends();
            let learnt = match new.iter().rposition(|id| ends.contains(id)) {
                Some(end) if *counts && self.loss_on != LossOn::All => end + 1,
                _ => new.len(),
            };
            let len = new.len();
            encoded.counts.extend((0..len).map(|index| *counts && index < learnt));
        }
        Ok(())
    }
}

impl Encoded {
    fn extend(&mut self, id: Option<u32>, counts: bool) {
        self.ids.extend(id);
        self.counts.resize(self.ids.len(), counts);
    }
}

/// How many bytes two texts have in common from one end on, whole characters of them.
fn shared(text: impl Iterator<Item = char>, other: impl Iterator<Item = char>) -> usize {
    std::iter::zip(text, other).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

#[cfg(test)]
mod tests;

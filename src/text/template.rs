//! Chat templates: a conversation becomes the text that its model was trained on.
//!
//! A template is a Jinja program that comes with a checkpoint, so it is run as one that nobody vouches for: it has no
//! files and no includes, and fuel for its steps and for what it makes, so that one that loops for ever ends in an
//! error.

use jiff::ZonedDateTime;
use jiff::civil::DateTime;
use minijinja::machinery::{eval, make_string_output};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value as Json};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;

mod measure;

/// The steps that a template may take on an empty conversation; each pays for 64 bytes that it makes.
const FUEL: u64 = 200_000;

/// More steps for every byte of the conversation.
const FUEL_PER_BYTE: u64 = 64;

/// No value has more bytes than this, neither as it is nor as JSON.
const LONGEST: usize = 1 << 26;

/// Why a conversation could not be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template is no template.
    #[error("the chat template cannot be read: {0}")]
    Syntax(String),
    /// The template refused the conversation, in its own words.
    #[error("the chat template refuses this conversation: {0}")]
    Refused(String),
    /// The template went wrong on the way.
    #[error("the chat template failed: {0}")]
    Failed(String),
    /// The template did not come to an end.
    #[error("the chat template takes more steps than a conversation of this length may need; does it loop for ever?")]
    Endless,
    /// What a turn says cannot be told from what is around it.
    #[error("the chat template renders turn {turn} in such a way that what it says cannot be found in the text")]
    Unstable {
        /// The turn, counted from 1.
        turn: usize,
    },
}

/// One turn, with the keys that its data has: `role`, `content`, and what else a template may ask for.
pub type Message = Map<String, Json>;

/// A turn that says `content`.
pub fn message(role: &str, content: &str) -> Message {
    Map::from_iter([("role".to_owned(), role.into()), ("content".to_owned(), content.into())])
}

/// What time a template is told that it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// The present, here.
    #[default]
    Now,
    /// A time that stays the same, for texts that must.
    At(DateTime),
}

/// A conversation to be rendered.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// Its turns.
    pub messages: &'a [Message],
    /// The tools that it may call, as its data has them.
    pub tools: Option<&'a Json>,
    /// Whether the text ends where the assistant begins to speak.
    pub add_generation_prompt: bool,
    /// What time it is.
    pub clock: Clock,
}

/// A template of a checkpoint, with the special tokens that it may name.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    source: Arc<str>,
    tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// A template by its source. `tokens` are variables that it finds, such as `bos_token`, and their text.
    ///
    /// # Errors
    /// When it is no template.
    pub fn new(source: &str, tokens: Vec<(String, String)>) -> Result<Self, TemplateError> {
        // A syntax error is found here, not at the first conversation.
        let environment = environment();
        let source: Arc<str> = readable(source).into();
        measure::compile(&source, environment.syntax()).map_err(|error| TemplateError::Syntax(words(&error)))?;
        Ok(ChatTemplate { environment: Arc::new(environment), source, tokens })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// When the template refuses it, goes wrong or does not come to an end.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        let Conversation { messages, tools, add_generation_prompt, clock } = *conversation;
        let bytes = Json::from(messages.to_vec()).to_string().len() + tools.map_or(0, |tools| tools.to_string().len());
        let mut environment = Environment::clone(&self.environment);
        environment.set_fuel(Some(FUEL + FUEL_PER_BYTE * bytes as u64));
        environment.add_function("strftime_now", move |format: &str| strftime(clock, format));
        let mut variables: Vec<(&str, Value)> = vec![
            ("messages", Serde(messages).into()),
            ("tools", Serde(tools).into()),
            ("documents", Value::from(())),
            ("add_generation_prompt", add_generation_prompt.into()),
        ];
        variables.extend(self.tokens.iter().map(|(name, token)| (&name[..], token.into())));
        let mut text = String::new();
        let blocks = BTreeMap::new();
        let rendered = measure::compile(&self.source, environment.syntax()).and_then(|instructions| {
            let mut output = make_string_output(&mut text);
            eval(&environment, &instructions, Value::from_pairs(variables), &blocks, &mut output, AutoEscape::None)
                .map(drop)
        });
        rendered.map_err(|error| {
            match (error.kind(), error.detail().and_then(|detail| detail.strip_prefix(REFUSED))) {
                (ErrorKind::OutOfFuel, _) => TemplateError::Endless,
                (_, Some(refused)) => TemplateError::Refused(refused.to_owned()),
                _ => TemplateError::Failed(words(&error)),
            }
        })?;
        Ok(text)
    }

    /// Everything that a rendered text depends on beside the conversation, as bytes.
    pub fn identity(&self) -> Vec<u8> {
        let tokens = self.tokens.iter().map(|(name, token)| format!("\0{name}={token}"));
        tokens.fold(self.source.to_string(), |all, token| all + &token).into_bytes()
    }
}

/// Marks an error that the template raised itself.
const REFUSED: &str = "\u{1}";

/// What transformers gives to a template.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    measure::prepare(&mut environment);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |words: &str| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{REFUSED}{words}")))
    });
    environment
}

/// The source without the tags that say which of its text the assistant speaks: they print nothing.
fn readable(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // Not `{%}`, whose signs would be both.
        let Some(end) = rest[start + 2..].find("%}").map(|end| start + end + 4) else { break };
        let tag = &rest[start..end];
        let word = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        let replacement = match word {
            "generation" => tag.replacen("generation", "if true", 1),
            "endgeneration" => tag.replacen("endgeneration", "endif", 1),
            _ => tag.to_owned(),
        };
        text.push_str(&rest[..start]);
        text.push_str(&replacement);
        rest = &rest[end..];
    }
    text + rest
}

fn words(error: &Error) -> String {
    error.to_string().replace('\n', " ")
}

fn strftime(clock: Clock, format: &str) -> Result<String, Error> {
    let formatted = match clock {
        Clock::Now => jiff::fmt::strtime::format(format, &ZonedDateTime::now()),
        Clock::At(time) => jiff::fmt::strtime::format(format, time),
    };
    formatted.map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it.
fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let failed = |error: serde_json::Error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}"));
    let mut text = Bounded(Vec::new());
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut text, Spaced)).map_err(failed)?,
        Some(indent) => {
            let spaces = " ".repeat(indent.min(16));
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut text, formatter)).map_err(failed)?;
        }
    }
    let text = String::from_utf8(text.0)
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson: the value is not UTF-8"))?;
    Ok(Value::from_safe_string(text))
}

/// Bytes that do not become more than [`LONGEST`]: a small value may hold one part many times.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > LONGEST {
            return Err(io::Error::other("the text is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A space after each comma and each colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests;

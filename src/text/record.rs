//! Records: one text, a question with its answer, or a conversation, as the keys of a row say.

use super::template::{Message, message};
use serde_json::{Map, Value};

/// What a row of a data set says.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A plain text.
    Text(String),
    /// What is given, and what is to be said.
    Pair {
        /// The question.
        prompt: String,
        /// What sets the two apart where they are plain text.
        between: &'static str,
        /// The answer.
        response: String,
    },
    /// A conversation.
    Messages {
        /// Its turns, each with a `role`.
        messages: Vec<Message>,
        /// The tools that it may call.
        tools: Option<Value>,
    },
}

impl Record {
    /// The record of a row: `text`, `messages` (and `tools`), `prompt` and `completion`, or `question` and `answer`, which
    /// as plain text are set apart by a newline. Other keys mean nothing.
    ///
    /// # Errors
    /// What was expected and what was found.
    pub fn of_row(row: &Map<String, Value>) -> Result<Record, String> {
        if row.contains_key("text") {
            let text = string(row, "text")?;
            return match text.is_empty() {
                true => Err("expected some text under `text`, found none".to_owned()),
                false => Ok(Record::Text(text)),
            };
        }
        if let Some(messages) = row.get("messages") {
            let tools = row.get("tools").filter(|tools| !tools.is_null()).cloned();
            return Ok(Record::Messages { messages: turns(messages)?, tools });
        }
        for (prompt, response, between) in [("prompt", "completion", ""), ("question", "answer", "\n")] {
            if row.contains_key(prompt) || row.contains_key(response) {
                return Ok(Record::Pair { prompt: string(row, prompt)?, between, response: string(row, response)? });
            }
        }
        let found: Vec<&str> = row.keys().map(String::as_str).collect();
        let found = if found.is_empty() { "no keys".to_owned() } else { format!("only {}", found.join(", ")) };
        Err(format!(
            "expected `text`, `messages`, `prompt` and `completion`, or `question` and `answer`; found {found}"
        ))
    }

    /// All of its text, which tells it from other records.
    pub fn content(&self) -> String {
        match self {
            Record::Text(text) => text.clone(),
            Record::Pair { prompt, between, response } => format!("{prompt}{between}{response}"),
            Record::Messages { messages, tools } => {
                let tools = tools.as_ref().map(Value::to_string).unwrap_or_default();
                format!("{}{tools}", Value::from(messages.clone()))
            }
        }
    }

    /// A pair as the turns of a user and an assistant.
    pub(super) fn as_turns(prompt: &str, response: &str) -> Vec<Message> {
        vec![message("user", prompt), message("assistant", response)]
    }
}

/// The turns of a conversation.
///
/// # Errors
/// What was expected and what was found.
pub fn turns(messages: &Value) -> Result<Vec<Message>, String> {
    let Value::Array(list) = messages else {
        return Err(format!("`messages`: expected a list, found {}", kind(messages)));
    };
    if list.is_empty() {
        return Err("`messages`: expected at least one, found none".to_owned());
    }
    let turn = |(turn, number): (&Value, usize)| match turn
        .as_object()
        .filter(|turn| turn.get("role").is_some_and(Value::is_string))
    {
        Some(turn) => Ok(turn.clone()),
        None => Err(format!("`messages`: expected an object with a `role`, found {} as number {number}", kind(turn))),
    };
    list.iter().zip(1..).map(turn).collect()
}

fn string(row: &Map<String, Value>, key: &str) -> Result<String, String> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("`{key}`: expected a string, found {}", kind(other))),
        None => Err(format!("expected the key `{key}` beside the others, found none")),
    }
}

/// What a JSON value is, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

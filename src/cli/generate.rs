//! `h1 generate MODEL --prompt TEXT [--chat]`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, anyhow, ensure};
use serde_json::{Value, json};

use super::common::{DeviceArguments, located, print, print_json, print_part};
use crate::checkpoint::Checkpoint;
use crate::generate::{Event, Finish, Generator, Limits, Request};
use crate::model::Model;
use crate::text::record;
use crate::text::template::{Clock, Conversation, Message, message};
use crate::text::tokenizer::{DecodeStream, Tokenizer, TokenizerError};

/// Continue texts, several at once.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// A model's folder, a GGUF file, or hub:ORG/NAME.
    model: PathBuf,
    /// A text to continue; may be given several times.
    #[arg(long, short, value_name = "TEXT")]
    prompt: Vec<String>,
    /// A file with a text to continue on each line.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Take each prompt as what a user says, and answer it, as the model's chat template has it.
    #[arg(long)]
    chat: bool,
    /// What the system says before that.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// A JSON file with a conversation to answer: a list of messages, or an object with `messages` and `tools`.
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
    /// New tokens, at most.
    #[arg(long, value_name = "N", default_value = "256")]
    max_new_tokens: std::num::NonZeroUsize,
    /// 0 takes the likeliest token.
    #[arg(long, value_name = "T", default_value = "0", allow_negative_numbers = true)]
    temperature: f32,
    /// Seed of the draws.
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// Texts at a time.
    #[arg(long, value_name = "N", default_value = "16")]
    batch: std::num::NonZeroUsize,
    #[command(flatten)]
    device: DeviceArguments,
    /// The results as JSON.
    #[arg(long)]
    json: bool,
}

struct Text {
    stream: DecodeStream,
    text: String,
    tokens: Vec<u32>,
    finish: Option<Finish>,
}

/// What a model goes on with.
struct Prompt {
    text: String,
    /// Whether the tokenizer puts bos in front; a template has it in its text.
    special: bool,
}

impl Prompt {
    /// What is written before the answer: a text goes on, an answer stands alone.
    fn shown(&self) -> &str {
        if self.special { &self.text } else { "" }
    }
}

/// The texts to continue and the conversations to answer.
fn prompts(arguments: &Arguments, said: Vec<String>, tokenizer: &Tokenizer) -> anyhow::Result<Vec<Prompt>> {
    let answer = |messages: &[Message], tools: Option<&Value>| {
        let template = tokenizer.template().ok_or(TokenizerError::NoTemplate)?;
        let conversation = Conversation { messages, tools, add_generation_prompt: true, clock: Clock::Now };
        Ok::<_, anyhow::Error>(Prompt { text: template.render(&conversation)?, special: false })
    };
    let mut prompts = Vec::new();
    for text in said {
        prompts.push(match arguments.chat {
            false => Prompt { text, special: true },
            true => {
                let system = arguments.system.iter().map(|system| message("system", system));
                answer(&system.chain([message("user", &text)]).collect::<Vec<_>>(), None)?
            }
        });
    }
    if let Some(path) = &arguments.messages {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let file: Value = serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))?;
        let (messages, tools) = match &file {
            Value::Object(file) => (file.get("messages").unwrap_or(&Value::Null), file.get("tools")),
            list => (list, None),
        };
        let turns = record::turns(messages).map_err(|problem| anyhow!("{}: {problem}", path.display()))?;
        prompts.push(answer(&turns, tools)?);
    }
    Ok(prompts)
}

pub(super) fn run(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
    let mut said = arguments.prompt.clone();
    if let Some(path) = &arguments.prompts {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        said.extend(text.lines().map(str::to_owned));
    }
    ensure!(
        !said.is_empty() || arguments.messages.is_some(),
        "there is nothing to continue: give --prompt TEXT, --prompts FILE or --messages FILE"
    );
    arguments.model = located(&arguments.model)?;
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let tokenizer = Tokenizer::open(&arguments.model)?;
    let prompts = prompts(&arguments, said, &tokenizer)?;
    let mut requests = Vec::new();
    for (index, Prompt { text, special, .. }) in prompts.iter().enumerate() {
        requests.push(Request {
            past: 0,
            prompt: tokenizer.encode(text, *special)?,
            max_new_tokens: arguments.max_new_tokens.get(),
            temperature: arguments.temperature,
            seed: arguments.seed.wrapping_add(index as u64),
        });
    }
    let longest = requests.iter().map(|request| request.prompt.len()).max().unwrap_or(0);
    let device = arguments.device.open()?;
    let sequences = arguments.batch.get().min(requests.len());
    let context = longest.saturating_add(arguments.max_new_tokens.get());
    let limits = Limits { sequences, context, call: longest.clamp(sequences, 512) };
    device.plan(|device| {
        let model = Model::new(device, checkpoint.config().clone(), arguments.device.dtype())?;
        Generator::new(&model, limits).map(drop)
    })?;
    let model = arguments.device.load(&device, &checkpoint)?;
    let mut generator = Generator::new(&model, limits)?;
    generator.check(&requests)?;

    let new = || Text { stream: DecodeStream::default(), text: String::new(), tokens: Vec::new(), finish: None };
    let mut texts: Vec<Text> = prompts.iter().map(|_| new()).collect();
    let streaming = prompts.len() == 1 && !arguments.json;
    let mut failure = None;
    if streaming {
        print_part(prompts[0].shown())?;
    }
    generator.run(&requests, tokenizer.ends(), |index, event| {
        let text = &mut texts[index];
        let piece = match event {
            Event::Token(token) => {
                text.tokens.push(token);
                text.stream.push(&tokenizer, token)
            }
            Event::Finished(finish) => {
                text.finish = Some(finish);
                text.stream.finish(&tokenizer)
            }
        };
        let shown = piece.map_err(anyhow::Error::from).and_then(|piece| {
            text.text.push_str(&piece);
            if streaming { print_part(&piece) } else { Ok(()) }
        });
        failure = shown.err();
        failure.is_none()
    })?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    if arguments.json {
        let results: Vec<_> = prompts
            .iter()
            .zip(&texts)
            .map(|(prompt, text)| {
                json!({"prompt": prompt.text, "text": text.text, "tokens": text.tokens, "finish": text.finish})
            })
            .collect();
        print_json(&results)?;
    } else if streaming {
        print("")?;
    } else {
        for (prompt, text) in prompts.iter().zip(&texts) {
            print(&format!("{}{}", prompt.shown(), text.text))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

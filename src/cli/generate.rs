//! `h1 generate MODEL --prompt TEXT`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use serde_json::json;

use super::common::{DeviceArguments, located, print, print_json, print_part};
use crate::checkpoint::Checkpoint;
use crate::generate::{Event, Finish, Generator, Limits, Request};
use crate::text::tokenizer::{DecodeStream, Tokenizer};

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

pub(super) fn run(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
    let mut prompts = arguments.prompt.clone();
    if let Some(path) = &arguments.prompts {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        prompts.extend(text.lines().map(str::to_owned));
    }
    ensure!(!prompts.is_empty(), "there is nothing to continue: give --prompt TEXT or --prompts FILE");
    arguments.model = located(&arguments.model)?;
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let tokenizer = Tokenizer::open(&arguments.model)?;
    let mut requests = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        requests.push(Request {
            prompt: tokenizer.encode(prompt, true)?,
            max_new_tokens: arguments.max_new_tokens.get(),
            temperature: arguments.temperature,
            seed: arguments.seed.wrapping_add(index as u64),
        });
    }
    let longest = requests.iter().map(|request| request.prompt.len()).max().unwrap_or(0);
    let device = arguments.device.open()?;
    let model = arguments.device.load(&device, &checkpoint)?;
    let sequences = arguments.batch.get().min(requests.len());
    let context = longest.saturating_add(arguments.max_new_tokens.get());
    let mut generator = Generator::new(&model, Limits { sequences, context, call: longest.clamp(sequences, 512) })?;
    generator.check(&requests)?;

    let new = || Text { stream: DecodeStream::default(), text: String::new(), tokens: Vec::new(), finish: None };
    let mut texts: Vec<Text> = prompts.iter().map(|_| new()).collect();
    let streaming = prompts.len() == 1 && !arguments.json;
    let mut failure = None;
    if streaming {
        print_part(&prompts[0])?;
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
                json!({"prompt": prompt, "text": text.text, "tokens": text.tokens, "finish": text.finish})
            })
            .collect();
        print_json(&results)?;
    } else if streaming {
        print("")?;
    } else {
        for (prompt, text) in prompts.iter().zip(&texts) {
            print(&format!("{prompt}{}", text.text))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

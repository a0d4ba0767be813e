//! The command line: one file a verb, arguments in, progress and results out; no maths here.

mod bench;
mod common;
mod convert;
mod data;
mod distill;
mod doctor;
mod eval;
mod forward;
mod generate;
mod importance;
mod inspect;
mod interrupt;
mod train;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Turn a pretrained attention transformer into a Mamba hybrid by staged distillation, and run it.
#[derive(Parser)]
#[command(name = "h1", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Bench(bench::Arguments),
    Convert(convert::Arguments),
    Data(data::Arguments),
    Distill(distill::Arguments),
    Doctor(doctor::Arguments),
    Eval(eval::Arguments),
    Forward(forward::Arguments),
    Generate(generate::Arguments),
    Importance(importance::Arguments),
    Inspect(inspect::Arguments),
    Train(train::Arguments),
    Verify(verify::Arguments),
}

/// Runs the program: 0 when all went well, 1 with the reason in a sentence or two, 2 for a wrong command line.
pub fn run() -> ExitCode {
    let result = match Cli::parse().verb {
        Verb::Bench(arguments) => bench::run(arguments),
        Verb::Convert(arguments) => convert::run(arguments),
        Verb::Data(arguments) => data::run(arguments),
        Verb::Distill(arguments) => distill::run(arguments),
        Verb::Doctor(arguments) => doctor::run(arguments),
        Verb::Eval(arguments) => eval::run(arguments),
        Verb::Forward(arguments) => forward::run(arguments),
        Verb::Generate(arguments) => generate::run(arguments),
        Verb::Importance(arguments) => importance::run(arguments),
        Verb::Inspect(arguments) => inspect::run(arguments),
        Verb::Train(arguments) => train::run(arguments),
        Verb::Verify(arguments) => verify::run(arguments),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", sentence(&error));
            ExitCode::FAILURE
        }
    }
}

/// The chain of causes; one that the sentence ends with already is not said again.
fn sentence(error: &anyhow::Error) -> String {
    let mut sentence = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if sentence.is_empty() {
            sentence = cause;
        } else if !sentence.ends_with(&cause) {
            sentence = format!("{sentence}: {cause}");
        }
    }
    sentence
}

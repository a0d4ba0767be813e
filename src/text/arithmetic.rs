//! The task of the bundled example: multi-digit arithmetic and look-up chains, with worked steps and the answer after
//! `>`.
//!
//! | kind | a problem |
//! |---|---|
//! | add | `1706+6907=6+7+0=13;0+0+1=01;7+9+0=16;1+6+1=08;>08613` |
//! | sub | `7835-3608=5-8-0=17;3-0-1=02;8-6-0=02;7-3-0=04;>4227` |
//! | mul | `4158*5=8*5+0=40;5*5+4=29;1*5+2=07;4*5+0=20;>20790` |
//! | vars | `e9;h0;d7;g3;?h-d+d-e=h0;-d7=3;+d7=0;-e9=1;>1` |
//!
//! Digits are worked from the right: `digit op digit op carry=` and two digits, the carry (sub: the borrow) before the
//! digit of the answer. `vars` reckons modulo 10 and copies a variable's name before its value.

use crate::random;
use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::RangeInclusive;

/// The lengths an operand may have (`vars`: how many variables, and how many terms): there are eight names of
/// variables.
pub const DIGITS: RangeInclusive<u32> = 1..=8;

/// Every character that a problem may hold, and the space and the newline that may lie around one. With the four
/// special tokens of [`write_character_tokenizer`](super::characters::write_character_tokenizer) they make a vocabulary
/// of 32.
pub const ALPHABET: &str = "0123456789+-*=;:>?abcdefgh \n";

/// One question in this many belongs to [`Split::Test`].
const TEST_SHARE: u64 = 8;

/// What a problem asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The sum of two numbers of as many digits; the answer has one digit more.
    Add,
    /// The difference of two numbers of as many digits, the greater first; the answer has as many, leading zeros kept.
    Sub,
    /// A number times a digit from 2 to 9; the answer has one digit more than the number.
    Mul,
    /// A chain of named digits, added and subtracted modulo 10.
    Vars,
}

impl Kind {
    /// Every kind, in the order in which a generator takes turns.
    pub const ALL: [Kind; 4] = [Kind::Add, Kind::Sub, Kind::Mul, Kind::Vars];

    /// The name a JSON line gives the kind.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Add => "add",
            Kind::Sub => "sub",
            Kind::Mul => "mul",
            Kind::Vars => "vars",
        }
    }
}

impl std::str::FromStr for Kind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Kind::ALL.into_iter().find(|kind| kind.name() == name);
        known.ok_or_else(|| format!("unknown kind '{name}': expected add, sub, mul or vars"))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The two halves of all questions; which half is a matter of the question's text alone, whatever the seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// To learn from.
    Train,
    /// Held out.
    Test,
}

impl std::str::FromStr for Split {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "train" => Ok(Split::Train),
            "test" => Ok(Split::Test),
            _ => Err(format!("unknown half '{name}': expected train or test")),
        }
    }
}

impl Split {
    /// The half that `question` belongs to.
    pub fn of(question: &str) -> Split {
        match super::text_hash("arithmetic split", question.as_bytes()) % TEST_SHARE {
            0 => Split::Test,
            _ => Split::Train,
        }
    }
}

/// One problem; its JSON is one line of a data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The question, up to and with its `=`.
    pub prompt: String,
    /// The worked steps, then `>` and the answer.
    pub completion: String,
    /// What is asked for.
    pub kind: Kind,
}

/// A request that has no problems.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArithmeticError {
    /// The list of kinds is empty.
    #[error("no kind of arithmetic problem was asked for; there are add, sub, mul and vars")]
    NoKind,
    /// The range of digits is empty or goes beyond [`DIGITS`].
    #[error("operands of {} to {} digits were asked for; expected a range within 1 to 8", .0.start(), .0.end())]
    Digits(RangeInclusive<u32>),
}

/// `count` problems of one half, kinds taking turns, operands of a number of digits drawn from `digits`.
///
/// The same arguments give the same text on every machine; a longer run of problems begins with the shorter one.
/// A question may come twice within its half.
pub fn generate(
    seed: u64,
    split: Split,
    count: usize,
    kinds: &[Kind],
    digits: RangeInclusive<u32>,
) -> Result<impl Iterator<Item = Problem>, ArithmeticError> {
    if kinds.is_empty() {
        return Err(ArithmeticError::NoKind);
    }
    if digits.is_empty() || !DIGITS.contains(digits.start()) || !DIGITS.contains(digits.end()) {
        return Err(ArithmeticError::Digits(digits));
    }
    let purpose = match split {
        Split::Train => "arithmetic train",
        Split::Test => "arithmetic test",
    };
    let mut rng = random::stream(seed, purpose);
    let kinds = kinds.to_vec();
    Ok((0..count).map(move |index| {
        let kind = kinds[index % kinds.len()];
        loop {
            let size = rng.random_range(digits.clone());
            let problem = problem(kind, size, &mut rng);
            if Split::of(&problem.prompt) == split {
                return problem;
            }
        }
    }))
}

/// A problem of `kind` whose operands have `size` digits (`vars`: `size` variables and `size` terms).
fn problem(kind: Kind, size: u32, rng: &mut ChaCha8Rng) -> Problem {
    let smallest = 10_u64.pow(size - 1);
    let mut operand = || rng.random_range(smallest..smallest * 10);
    let (prompt, completion) = match kind {
        Kind::Add => {
            let (a, b) = (operand(), operand());
            let steps = steps(size, |position, carry| {
                let (x, y) = (digit(a, position), digit(b, position));
                (format!("{x}+{y}+{carry}"), (x + y + carry) / 10, (x + y + carry) % 10)
            });
            let width = size as usize + 1;
            (format!("{a}+{b}="), format!("{steps}>{:0width$}", a + b))
        }
        Kind::Sub => {
            let (x, y) = (operand(), operand());
            let (a, b) = (x.max(y), x.min(y));
            let steps = steps(size, |position, borrow| {
                let (x, y) = (digit(a, position), digit(b, position));
                (format!("{x}-{y}-{borrow}"), u64::from(x < y + borrow), (10 + x - y - borrow) % 10)
            });
            let width = size as usize;
            (format!("{a}-{b}="), format!("{steps}>{:0width$}", a - b))
        }
        Kind::Mul => {
            let a = operand();
            let b = rng.random_range(2..=9_u64);
            let steps = steps(size, |position, carry| {
                let x = digit(a, position);
                (format!("{x}*{b}+{carry}"), (x * b + carry) / 10, (x * b + carry) % 10)
            });
            let width = size as usize + 1;
            (format!("{a}*{b}="), format!("{steps}>{:0width$}", a * b))
        }
        Kind::Vars => chain(size as usize, rng),
    };
    Problem { prompt, completion, kind }
}

/// The decimal digit of `number` at `position`, counted from the right.
fn digit(number: u64, position: u32) -> u64 {
    number / 10_u64.pow(position) % 10
}

/// `formula=carry digit;` for every position from the right, each step given the carry of the one before.
fn steps(size: u32, mut step: impl FnMut(u32, u64) -> (String, u64, u64)) -> String {
    let mut text = String::new();
    let mut carry = 0;
    for position in 0..size {
        let (formula, next, digit) = step(position, carry);
        text += &format!("{formula}={next}{digit};");
        carry = next;
    }
    text
}

/// `size` variables with a digit each, a chain of `size` terms over them, and the running value modulo 10.
fn chain(size: usize, rng: &mut ChaCha8Rng) -> (String, String) {
    let mut names = ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'];
    names.shuffle(rng);
    let variables: Vec<(char, u32)> = names[..size].iter().map(|name| (*name, rng.random_range(0..10))).collect();
    let mut prompt: String = variables.iter().map(|(name, value)| format!("{name}{value};")).collect();
    let mut completion = String::new();
    let mut total = 0;
    prompt.push('?');
    for term in 0..size {
        let (name, value) = variables[rng.random_range(0..size)];
        if term == 0 {
            total = value;
            prompt.push(name);
            completion += &format!("{name}{value};");
        } else {
            let (sign, change) = if rng.random() { ('+', value) } else { ('-', 10 - value) };
            total = (total + change) % 10;
            prompt.extend([sign, name]);
            completion += &format!("{sign}{name}{value}={total};");
        }
    }
    prompt.push('=');
    completion += &format!(">{total}");
    (prompt, completion)
}

#[cfg(test)]
mod tests;

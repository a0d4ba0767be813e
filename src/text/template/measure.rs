//! What a template builds stays small: each value is measured when it is made.
//!
//! A list may hold another one twice, and that one a third twice, so that a few lines make a value of more parts than
//! could ever be printed or compared. The engine's fuel pays for steps and for bytes, not for walking such a value. So
//! the instructions of a template are given more of them, which measure what the others make and what they compare, and
//! pay for it.

use super::LONGEST;
use minijinja::formatting::{FormatStyle, format};
use minijinja::machinery::{CodeGenerator, Instruction, Instructions, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// What errors call the template.
const NAME: &str = "template";
/// The filters that measure. No template can write their names.
const MEASURE: &str = "<measure>";
const ASSIGN: &str = "<assign>";
/// A value's parts lie no deeper in it than this.
const DEEPEST: usize = 64;
/// So many parts of a value cost one step.
const PARTS_PER_FUEL: u64 = 4;
/// Bytes that one step pays for.
const BYTES_PER_FUEL: usize = 64;

/// Adds to an environment what the instructions of [`compile`] and the methods of Python's values need.
pub(super) fn prepare(environment: &mut Environment<'_>) {
    environment.add_filter(MEASURE, |state: &State<'_, '_>, value: Value| {
        if value.as_object().is_some() {
            Measure::new(state).part(&value, 0)?;
        }
        Ok::<_, Error>(value)
    });
    environment.add_filter(ASSIGN, |state: &State<'_, '_>, value: Value| {
        Measure::new(state).part(&value, 1)?;
        Ok::<_, Error>(value)
    });
    environment.add_filter("format", |state: &State<'_, '_>, text: &str, arguments: Rest<Value>| {
        state.consume_fuel(format_cost(state, text, &arguments)?)?;
        format(FormatStyle::Printf, text, &arguments)
    });
    environment.set_unknown_method_callback(|state, value, method, arguments| {
        if let ("format", Some(text)) = (method, value.as_str()) {
            state.consume_fuel(format_cost(state, text, arguments)?)?;
        }
        unknown_method_callback(state, value, method, arguments)
    });
}

/// The instructions of a template, with those that measure.
pub(super) fn compile<'a>(source: &'a str, syntax: &SyntaxConfig) -> Result<Instructions<'a>, Error> {
    let tree = parse(source, NAME, syntax.clone())?;
    let mut generator = CodeGenerator::new(NAME, source);
    generator.compile_stmt(&tree);
    let (plain, _) = generator.finish();
    let mut measured = Instructions::new(NAME, source);
    let mut places = Vec::new();
    let mut end = 0;
    let mut keyed = false;
    for (index, instruction) in (0..).map_while(|index| Some((index, plain.get(index)?))) {
        places.push(end);
        let line = plain.get_line(index).and_then(|line| u16::try_from(line).ok()).unwrap_or(u16::MAX);
        let mut add = |instruction| end = measured.add_with_line(instruction, line) + 1;
        if matches!(instruction, Instruction::SetAttr(_)) {
            [Instruction::Swap, filter(ASSIGN), Instruction::Swap].into_iter().for_each(&mut add);
        }
        if compares(instruction) && !keyed {
            add(filter(MEASURE));
        }
        add(instruction.clone());
        if makes(instruction) {
            add(filter(MEASURE));
        }
        keyed = matches!(instruction, Instruction::BuildKwargs(_) | Instruction::MergeKwargs(_));
    }
    for index in 0..end {
        if let Some(target) = measured.get_mut(index).and_then(target) {
            *target = places.get(*target as usize).copied().unwrap_or(end);
        }
    }
    Ok(measured)
}

fn filter(name: &'static str) -> Instruction<'static> {
    // No place among the filters that are looked up once.
    Instruction::ApplyFilter(name, Some(1), !0)
}

/// Whether an instruction makes a value that may hold others.
fn makes(instruction: &Instruction<'_>) -> bool {
    use Instruction::*;
    matches!(
        instruction,
        BuildMap(_)
            | BuildList(_)
            | BuildTuple(_)
            | Add
            | Mul
            | ApplyFilter(..)
            | CallFunction(..)
            | CallMethod(..)
            | CallObject(_)
    )
}

/// Whether an instruction walks the whole value on top of the stack.
fn compares(instruction: &Instruction<'_>) -> bool {
    use Instruction::*;
    match instruction {
        Eq | Ne | Gt | Gte | Lt | Lte | In | CompareAndPreserve(_) | PerformTest(..) | CallMethod("count", _) => true,
        ApplyFilter(name, ..) => matches!(*name, "sort" | "unique" | "groupby" | "dictsort" | "min" | "max"),
        _ => false,
    }
}

/// The instruction that this one may go to.
fn target<'a>(instruction: &'a mut Instruction<'_>) -> Option<&'a mut u32> {
    use Instruction::*;
    match instruction {
        Jump(target)
        | JumpIfFalse(target)
        | JumpIfFalseOrPop(target)
        | JumpIfTrueOrPop(target)
        | Iterate(target)
        | BuildMacro(_, target, _) => Some(target),
        _ => None,
    }
}

/// A value that is being walked.
struct Measure<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    parts: u64,
    bytes: usize,
}

impl<'a, 'b, 'c> Measure<'a, 'b, 'c> {
    fn new(state: &'a State<'b, 'c>) -> Self {
        Measure { state, parts: 0, bytes: 0 }
    }

    fn part(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.parts += 1;
        if self.parts.is_multiple_of(PARTS_PER_FUEL) {
            self.state.consume_fuel(1)?;
        }
        let wrong = |what: &'static str| Err(Error::new(ErrorKind::InvalidOperation, what));
        if depth > DEEPEST {
            return wrong("a value is nested too deeply");
        }
        // A namespace may come to hold itself.
        if depth > 0 && value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace")) {
            return wrong("a namespace is put into a value");
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                value.try_iter()?.try_for_each(|item| self.part(&item, depth + 1))?;
            }
            ValueKind::Map => value.try_iter()?.try_for_each(|key| {
                self.part(&key, depth + 1)?;
                self.part(&value.get_item(&key)?, depth + 1)
            })?,
            // As many bytes as a number may have when it is printed.
            _ => self.bytes += value.as_str().map_or(32, str::len),
        }
        if self.bytes > LONGEST { wrong("a value is too large") } else { Ok(()) }
    }
}

/// What it may cost to fill in the fields of a text: the widths that it names, and for each field all arguments.
fn format_cost(state: &State<'_, '_>, text: &str, arguments: &[Value]) -> Result<u64, Error> {
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let widths = numbers.fold(0usize, |sum, digits| sum.saturating_add(digits.parse().unwrap_or(usize::MAX)));
    let mut measure = Measure::new(state);
    arguments.iter().try_for_each(|argument| measure.part(argument, 0))?;
    let fields = text.matches(['{', '%']).count().saturating_mul(measure.bytes);
    Ok((widths.saturating_add(fields) / BYTES_PER_FUEL) as u64)
}

//! The checker below reads a problem's text and reckons on its own: whole numbers first, then each step from them.

use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

fn problems(seed: u64, split: Split, count: usize, kinds: &[Kind], digits: RangeInclusive<u32>) -> Vec<Problem> {
    generate(seed, split, count, kinds, digits).unwrap().collect()
}

/// The one right completion of `prompt`, by arithmetic on whole numbers.
fn expected(prompt: &str) -> Option<String> {
    let question = prompt.strip_suffix('=')?;
    if let Some((variables, terms)) = question.split_once('?') {
        return expected_chain(variables, terms);
    }
    let at = question.find(['+', '-', '*'])?;
    let (left, right) = (&question[..at], &question[at + 1..]);
    let (a, b): (i64, i64) = (left.parse().ok()?, right.parse().ok()?);
    let sign = &question[at..=at];
    let whole = |a: i64, b: i64| match sign {
        "+" => a + b,
        "-" => a - b,
        _ => a * b,
    };
    let mut text = String::new();
    let mut power = 1;
    for character in left.chars().rev() {
        let x = i64::from(character.to_digit(10)?);
        let y = if sign == "*" { b } else { b / power % 10 };
        // What the digits right of this one make, and what it and they make.
        let (low_a, high_a) = (a % power, a % (power * 10));
        let (low_b, high_b) = if sign == "*" { (b, b) } else { (b % power, b % (power * 10)) };
        let carry = whole(low_a, low_b).div_euclid(power).abs();
        let next = whole(high_a, high_b).div_euclid(power * 10).abs();
        let digit = whole(high_a, high_b).div_euclid(power).rem_euclid(10);
        let join = if sign == "-" { "-" } else { "+" };
        text += &format!("{x}{sign}{y}{join}{carry}={next}{digit};");
        power *= 10;
    }
    let width = left.len() + usize::from(sign != "-");
    Some(format!("{text}>{:0width$}", whole(a, b)))
}

fn expected_chain(variables: &str, terms: &str) -> Option<String> {
    let value = |name: char| {
        let at = variables.find(name)?;
        variables[at + 1..].chars().next()?.to_digit(10).map(i64::from)
    };
    let signed: Vec<(i64, char)> = format!("+{terms}")
        .as_bytes()
        .chunks(2)
        .map(|term| (if term[0] == b'+' { 1 } else { -1 }, char::from(term[1])))
        .collect();
    let mut text = format!("{}{};", signed[0].1, value(signed[0].1)?);
    let mut total = 0;
    for (index, (sign, name)) in signed.iter().enumerate() {
        total += sign * value(*name)?;
        if index > 0 {
            let sign = if *sign > 0 { '+' } else { '-' };
            text += &format!("{sign}{name}{}={};", value(*name)?, total.rem_euclid(10));
        }
    }
    Some(format!("{text}>{}", total.rem_euclid(10)))
}

#[test]
fn the_checker_agrees_with_the_published_examples() {
    for (prompt, completion) in [
        ("1706+6907=", "6+7+0=13;0+0+1=01;7+9+0=16;1+6+1=08;>08613"),
        ("7835-3608=", "5-8-0=17;3-0-1=02;8-6-0=02;7-3-0=04;>4227"),
        ("4158*5=", "8*5+0=40;5*5+4=29;1*5+2=07;4*5+0=20;>20790"),
        ("e9;h0;d7;g3;f6;?h-d+f+d-e=", "h0;-d7=3;+f6=9;+d7=6;-e9=7;>7"),
    ] {
        assert_eq!(expected(prompt).as_deref(), Some(completion));
    }
}

proptest! {
    #[test]
    fn every_step_and_answer_is_right(seed: u64, kind in 0..4_usize, low in DIGITS, more in 0..8_u32) {
        let digits = low..=(low + more).min(*DIGITS.end());
        for problem in problems(seed, Split::Train, 8, &[Kind::ALL[kind]], digits) {
            prop_assert_eq!(expected(&problem.prompt), Some(problem.completion.clone()), "{:?}", problem);
        }
    }

    #[test]
    fn operands_keep_to_their_range_of_digits(seed: u64, low in DIGITS, more in 0..8_u32) {
        let digits = low..=(low + more).min(*DIGITS.end());
        for problem in problems(seed, Split::Train, 8, &Kind::ALL, digits.clone()) {
            let size = match problem.kind {
                Kind::Vars => problem.prompt.matches(';').count(),
                _ => problem.prompt.chars().take_while(char::is_ascii_digit).count(),
            };
            prop_assert!(digits.contains(&(size as u32)), "{:?}", problem);
        }
    }

    #[test]
    fn a_longer_run_begins_with_the_shorter(seed: u64, count in 0..20_usize) {
        let all = problems(seed, Split::Test, 20, &Kind::ALL, 4..=6);
        prop_assert_eq!(&all[..count], &problems(seed, Split::Test, count, &Kind::ALL, 4..=6)[..]);
    }
}

#[test]
fn train_and_test_share_no_question() {
    let questions = |split, seed| -> HashSet<String> {
        problems(seed, split, 4000, &Kind::ALL, 1..=6).into_iter().map(|problem| problem.prompt).collect()
    };
    let (train, test) = (questions(Split::Train, 1), questions(Split::Test, 2));
    assert!(train.is_disjoint(&test));
    assert!(test.iter().all(|question| Split::of(question) == Split::Test));
}

#[test]
fn kinds_come_in_equal_shares_and_in_the_order_asked() {
    let kinds: Vec<Kind> =
        problems(3, Split::Train, 6, &[Kind::Mul, Kind::Add], 4..=6).iter().map(|problem| problem.kind).collect();
    assert_eq!(kinds, [Kind::Mul, Kind::Add].repeat(3));
}

#[test]
fn a_problem_of_four_to_six_digits_takes_44_to_76_characters_of_the_alphabet() {
    let mut lengths = HashSet::new();
    for problem in problems(5, Split::Train, 2000, &Kind::ALL, 4..=6) {
        let text = problem.prompt + &problem.completion;
        assert!(text.chars().all(|character| ALPHABET.contains(character)), "{text}");
        lengths.insert(text.len());
    }
    assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&44), Some(&76)));
}

#[test]
fn every_kind_has_questions_of_one_digit_in_both_halves() {
    for kind in Kind::ALL {
        for split in [Split::Train, Split::Test] {
            assert_eq!(problems(0, split, 1, &[kind], 1..=1).len(), 1);
        }
    }
}

#[test]
fn the_same_seed_is_the_same_bytes() {
    let lines = |seed| -> String {
        problems(seed, Split::Train, 400, &Kind::ALL, 4..=6)
            .iter()
            .map(|problem| serde_json::to_string(problem).unwrap() + "\n")
            .collect()
    };
    let text = lines(0);
    // Fixed once, so that a change of a library or of this file that moves the data is seen.
    assert_eq!(super::super::text_hash("golden", text.as_bytes()), 10_982_247_396_788_479_004);
    assert_ne!(lines(1), text);
    assert!(text.starts_with(r#"{"prompt":""#), "{text}");
}

#[test]
fn what_has_no_problems_is_an_error() {
    let error = |kinds: &[Kind], digits| generate(0, Split::Train, 1, kinds, digits).err();
    assert_eq!(error(&[], 4..=6), Some(ArithmeticError::NoKind));
    for digits in [0..=3, 4..=9, RangeInclusive::new(6, 4)] {
        let expected = Some(ArithmeticError::Digits(digits.clone()));
        assert_eq!(error(&Kind::ALL, digits), expected);
    }
}

use super::*;
use crate::text::arithmetic::ALPHABET;
use crate::text::characters::write_character_tokenizer;
use crate::text::tokenizer::TOKENIZER_FILE;
use serde_json::json;

fn read(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<Record>, DatasetError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    read_records(&path)
}

fn record(prompt: Option<&str>, response: &str) -> Record {
    Record { prompt: prompt.map(String::from), response: response.to_string() }
}

fn characters() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    write_character_tokenizer(folder.path(), ALPHABET).unwrap();
    Tokenizer::from_folder(folder.path()).unwrap()
}

#[test]
fn the_three_shapes_of_a_line_and_a_plain_text_are_read() {
    let lines = concat!(
        "\u{feff}{\"text\": \"all of it\"}\n",
        "\n   \r\n",
        "{\"completion\": \"2\", \"prompt\": \"1+1=\", \"kind\": \"add\"}\r\n",
        "{\"question\": \"How many?\", \"answer\": \"#### 3\"}",
    );
    let expected = [record(None, "all of it"), record(Some("1+1="), "2"), record(Some("How many?\n"), "#### 3")];
    assert_eq!(read("data.jsonl", lines).unwrap(), expected);
    assert_eq!(read("data.txt", "one\ntext\n").unwrap(), [record(None, "one\ntext\n")]);
}

#[test]
fn every_bad_line_is_named_with_what_was_expected() {
    let lines: [(&[u8], &str); 8] = [
        (b"{\"text\": \"good\"}", ""),
        (b"{\"text\": 3}", "2: `text`: expected a string, found a number"),
        (b"{\"prompt\": \"1\"}", "3: expected the key `completion` beside the others, found none"),
        (b"{\"txt\": \"1\", \"id\": 1}", "or `question` and `answer`; found only txt, id"),
        (b"[1]", "5: expected a JSON object, found a list"),
        (b"{\"text\": \"\xff\"}", "6: expected UTF-8 text, found other bytes from byte 11 on"),
        (b"{\"text\": ", "7: expected a JSON object, found no JSON"),
        (b"{\"text\": \"\"}", "8: expected some text under `text`, found none"),
    ];
    let content: Vec<u8> = lines.iter().flat_map(|(line, _)| [line, &b"\n"[..]].concat()).collect();
    let said = read("data.jsonl", content).unwrap_err().to_string();
    let sentences: Vec<&str> = said.lines().collect();
    assert_eq!(sentences.len(), 7, "{said}");
    for (sentence, (_, words)) in std::iter::zip(sentences, &lines[1..]) {
        assert!(sentence.contains("data.jsonl:") && sentence.contains(words), "{sentence}");
    }
}

#[test]
fn a_file_full_of_bad_lines_is_quoted_in_part() {
    let said = read("data.jsonl", "{}\n".repeat(35)).unwrap_err().to_string();
    assert_eq!(said.lines().count(), 11);
    assert!(said.contains("found no keys") && said.ends_with("and 25 more bad lines"), "{said}");
}

#[test]
fn files_without_text_are_errors() {
    for (name, content) in [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.txt", ""), ("a.txt", "\u{feff}")] {
        assert!(matches!(read(name, content), Err(DatasetError::Empty { .. })), "{name}");
    }
    assert!(matches!(read("a.csv", "1,2"), Err(DatasetError::UnknownFormat { .. })));
    assert!(matches!(read("a.txt", b"\xff"), Err(DatasetError::Lines { .. })));
    assert!(matches!(read_records(Path::new("absent.jsonl")), Err(DatasetError::Io { .. })));
}

#[test]
fn the_split_is_by_text_alone_and_takes_its_share() {
    let records: Vec<Record> = (0..2000).map(|number| record(Some("n"), &number.to_string())).collect();
    let (train, validation) = split(records.clone(), 0.25).unwrap();
    assert_eq!(train.len() + validation.len(), 2000);
    assert!((400..600).contains(&validation.len()), "{}", validation.len());
    let mut reversed = records.clone();
    reversed.reverse();
    let (_, mut again) = split(reversed, 0.25).unwrap();
    again.reverse();
    assert_eq!(validation, again);
    assert_eq!(split(records.clone(), 0.0).unwrap(), (records.clone(), vec![]));
    for share in [-0.1, 1.0, f64::NAN] {
        assert!(matches!(split(records.clone(), share), Err(DatasetError::Share(_))));
    }
}

#[test]
fn the_response_and_the_end_are_learnt_and_the_prompt_is_not() {
    let records = [record(Some("1+1="), "2"), record(None, "34")];
    let documents = Documents::tokenise(&records, &characters(), LossOn::Response).unwrap();
    let first = documents.get(0).unwrap();
    assert_eq!(first.ids, [1, 5, 14, 5, 17, 6, 2]);
    assert_eq!(first.counts, [false, false, false, false, false, true, true]);
    let second = documents.get(1).unwrap();
    assert_eq!((second.ids, second.counts), (&[1, 7, 8, 2][..], &[true; 4][..]));
    assert_eq!((documents.len(), documents.tokens(), documents.get(2)), (2, 11, None));

    let all = Documents::tokenise(&records, &characters(), LossOn::All).unwrap();
    assert_eq!(all.get(0).unwrap().counts, [true; 7]);
    assert_ne!(all.fingerprint(), documents.fingerprint());
}

/// A tokenizer of `a`, `b`, `c` and the merge `ab`, without bos or eos.
fn merging() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": { "type": "Fuse" },
        "model": { "type": "BPE", "vocab": { "a": 0, "b": 1, "c": 2, "ab": 3 }, "merges": [["a", "b"]] },
    });
    std::fs::write(folder.path().join(TOKENIZER_FILE), tokenizer.to_string()).unwrap();
    Tokenizer::from_folder(folder.path()).unwrap()
}

#[test]
fn the_ids_of_a_prompt_are_those_it_has_alone() {
    let tokenizer = merging();
    let encode = |prompt, response| encode_record(&record(Some(prompt), response), &tokenizer).unwrap();
    assert_eq!(encode("ca", "bc"), EncodedRecord { ids: vec![2, 0, 1, 2], given: 2 });
    assert_eq!(encode("cab", "ab"), EncodedRecord { ids: vec![2, 3, 3], given: 2 });
    assert_eq!(encode("", "ab"), EncodedRecord { ids: vec![3], given: 0 });
}

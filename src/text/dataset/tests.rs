use super::*;

fn read(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<Record>, DatasetError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    read_records(&path)
}

fn pair(prompt: &str, between: &'static str, response: &str) -> Record {
    Record::Pair { prompt: prompt.to_string(), between, response: response.to_string() }
}

#[test]
fn the_shapes_of_a_line_and_a_plain_text_are_read() {
    let lines = concat!(
        "\u{feff}{\"text\": \"all of it\"}\n",
        "\n   \r\n",
        "{\"completion\": \"2\", \"prompt\": \"1+1=\", \"kind\": \"add\"}\r\n",
        "{\"question\": \"How many?\", \"answer\": \"#### 3\"}\n",
        "{\"tools\": [1], \"messages\": [{\"role\": \"user\", \"content\": \"hi\", \"name\": \"me\"}]}",
    );
    let mut said = crate::text::template::message("user", "hi");
    said.insert("name".into(), "me".into());
    let expected = [
        Record::Text("all of it".into()),
        pair("1+1=", "", "2"),
        pair("How many?", "\n", "#### 3"),
        Record::Messages { messages: vec![said], tools: Some(serde_json::json!([1])) },
    ];
    assert_eq!(read("data.jsonl", lines).unwrap(), expected);
    assert_eq!(read("data.txt", "one\ntext\n").unwrap(), [Record::Text("one\ntext\n".into())]);
}

#[test]
fn every_bad_line_is_named_with_what_was_expected() {
    let lines: [(&[u8], &str); 10] = [
        (b"{\"text\": \"good\"}", ""),
        (b"{\"text\": 3}", "2: `text`: expected a string, found a number"),
        (b"{\"prompt\": \"1\"}", "3: expected the key `completion` beside the others, found none"),
        (b"{\"txt\": \"1\", \"id\": 1}", "or `question` and `answer`; found only txt, id"),
        (b"[1]", "5: expected a JSON object, found a list"),
        (b"{\"text\": \"\xff\"}", "6: expected UTF-8 text, found other bytes from byte 11 on"),
        (b"{\"text\": ", "7: expected a JSON object, found no JSON"),
        (b"{\"text\": \"\"}", "8: expected some text under `text`, found none"),
        (b"{\"messages\": {}}", "9: `messages`: expected a list, found an object"),
        (
            b"{\"messages\": [{\"role\": \"user\"}, {}]}",
            "10: `messages`: expected an object with a `role`, found an object as number 2",
        ),
    ];
    let content: Vec<u8> = lines.iter().flat_map(|(line, _)| [line, &b"\n"[..]].concat()).collect();
    let said = read("data.jsonl", content).unwrap_err().to_string();
    let sentences: Vec<&str> = said.lines().collect();
    assert_eq!(sentences.len(), 9, "{said}");
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
    let records: Vec<Record> = (0..2000).map(|number| pair("n", "", &number.to_string())).collect();
    let out = |share| records.iter().map(|record| held_out(record, share).unwrap()).collect::<Vec<_>>();
    let quarter = out(0.25);
    let count = quarter.iter().filter(|out| **out).count();
    assert!((400..600).contains(&count), "{count}");
    assert_eq!(quarter, out(0.25));
    assert!(std::iter::zip(&quarter, out(0.5)).all(|(quarter, half)| half || !quarter));
    assert!(!out(0.0).contains(&true));
    for share in [-0.1, 1.0, f64::NAN] {
        assert!(matches!(held_out(&records[0], share), Err(DatasetError::Share(_))));
    }
}

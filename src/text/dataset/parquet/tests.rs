use super::*;
use crate::text::dataset::read_records;
use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use std::path::PathBuf;
use std::sync::Arc;

fn bytes(texts: &[&str]) -> Vec<ByteArray> {
    texts.iter().map(|text| ByteArray::from(*text)).collect()
}

/// A table of questions, answers and numbers nobody asked for, in two groups of rows.
fn table(compression: Compression) -> Vec<u8> {
    let schema = "message rows { REQUIRED BYTE_ARRAY question (UTF8); OPTIONAL BYTE_ARRAY answer (UTF8);
        REQUIRED BYTE_ARRAY other (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties).unwrap();
    for group in [["a?", "é?"], ["b?", "c?"]] {
        let mut rows = writer.next_row_group().unwrap();
        let answers = ["1", "2"];
        for (values, levels) in [(bytes(&group), None), (bytes(&answers), Some([1, 1])), (bytes(&group), None)] {
            let mut column = rows.next_column().unwrap().unwrap();
            let levels = levels.as_ref().map(|levels| &levels[..]);
            column.typed::<ByteArrayType>().write_batch(&values, levels, None).unwrap();
            column.close().unwrap();
        }
        rows.close().unwrap();
    }
    writer.into_inner().unwrap()
}

/// A table of conversations.
fn conversations() -> Vec<u8> {
    let schema = "message rows { REQUIRED GROUP messages (LIST) { REPEATED GROUP list { REQUIRED GROUP element {
        REQUIRED BYTE_ARRAY content (UTF8); REQUIRED BYTE_ARRAY role (UTF8); } } } }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Default::default()).unwrap();
    let mut rows = writer.next_row_group().unwrap();
    for values in [["hi", "yo", "so"], ["user", "assistant", "user"]] {
        let mut column = rows.next_column().unwrap().unwrap();
        // Two turns in the first row, one in the second.
        column.typed::<ByteArrayType>().write_batch(&bytes(&values), Some(&[1, 1, 1]), Some(&[0, 1, 0])).unwrap();
        column.close().unwrap();
    }
    rows.close().unwrap();
    writer.into_inner().unwrap()
}

fn file(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    std::fs::write(&path, content).unwrap();
    (folder, path)
}

#[test]
fn rows_are_records_by_their_columns_however_they_are_compressed() {
    let levels = ZstdLevel::default();
    for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(levels), Compression::LZ4_RAW]
    {
        let (_folder, path) = file(&table(compression));
        let records = read_records(&path).unwrap();
        let expected = [("a?", "1"), ("é?", "2"), ("b?", "1"), ("c?", "2")];
        let pair = |(prompt, response): (&str, &str)| Record::Pair {
            prompt: prompt.into(),
            between: "\n",
            response: response.into(),
        };
        assert_eq!(records, expected.map(pair), "{compression}");
    }
}

#[test]
fn conversations_are_lists_of_turns() {
    let (_folder, path) = file(&conversations());
    let records = read_records(&path).unwrap();
    let turns = |list: &[(&str, &str)]| {
        let turn = |(role, content): &(&str, &str)| serde_json::json!({ "content": content, "role": role });
        let messages = list.iter().map(|said| turn(said).as_object().unwrap().clone()).collect();
        Record::Messages { messages, tools: None }
    };
    assert_eq!(records, [turns(&[("user", "hi"), ("assistant", "yo")]), turns(&[("user", "so")])]);
}

proptest! {
    #[test]
    fn a_file_that_is_cut_off_is_an_error_and_one_that_is_changed_no_panic(at in 0.0..1.0_f64, cut: bool, bit in 0..8_u32) {
        let mut bytes = table(Compression::SNAPPY);
        let at = (at * bytes.len() as f64) as usize;
        if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
        let (_folder, path) = file(&bytes);
        let read = read_records(&path);
        prop_assert!(!cut || read.is_err());
        if let Err(error) = read {
            prop_assert!(error.to_string().contains("data.parquet"), "{}", error);
        }
    }
}

#[test]
fn a_header_that_claims_more_values_than_the_file_has_is_left_at_its_end() {
    let mut bytes = table(Compression::UNCOMPRESSED);
    // Where the header of the first page was: a field 15 that no page has, a list of 2³¹ − 1 numbers of 8 bytes.
    bytes[4..11].copy_from_slice(&[0xf9, 0xf7, 0xff, 0xff, 0xff, 0xff, 0x07]);
    let (_folder, path) = file(&bytes);
    assert!(read_records(&path).unwrap_err().to_string().contains("data.parquet"));
}

#[test]
fn a_schema_that_claims_more_children_than_it_has_is_refused_before_room_is_made_for_them() {
    let mut bytes = table(Compression::UNCOMPRESSED);
    // The root's three children, field 5 after the name, as 2³¹ − 1 of them.
    let name = bytes.windows(4).rposition(|part| part == b"rows").unwrap();
    assert_eq!(bytes[name + 4..name + 6], [0x15, 6]);
    bytes.splice(name + 5..name + 6, [0xfe, 0xff, 0xff, 0xff, 0x0f]);
    let end = bytes.len() - 8;
    let length = u32::from_le_bytes(bytes[end..end + 4].try_into().unwrap()) + 4;
    bytes[end..end + 4].copy_from_slice(&length.to_le_bytes());
    let (_folder, path) = file(&bytes);
    assert!(read_records(&path).unwrap_err().to_string().contains("claims more columns"));
}

#[test]
fn a_table_without_a_column_of_text_is_named() {
    let schema = Arc::new(parse_message_type("message rows { REQUIRED INT32 number; }").unwrap());
    let writer = SerializedFileWriter::new(Vec::new(), schema, Default::default()).unwrap();
    let (_folder, path) = file(&writer.into_inner().unwrap());
    let error = read_records(&path).unwrap_err().to_string();
    assert!(error.contains("expected a column text, messages") && error.ends_with("found number"), "{error}");
}

//! Parquet files, row by row, by the columns that a record may have.

use super::{DatasetError, Rows};
use crate::text::record::Record;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, Length};
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

mod footer;

/// The columns that records are made of.
const COLUMNS: [&str; 7] = ["text", "messages", "tools", "prompt", "completion", "question", "answer"];

/// Rows are read so many at a time.
const BATCH: usize = 64;

pub(super) fn read<E: From<DatasetError>>(path: &Path, rows: &mut Rows<'_, E>) -> Result<(), E> {
    let io = |source| DatasetError::Io { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    let wrong = |problem: String| DatasetError::Malformed { path: path.to_path_buf(), problem };
    let mut table = contained(|| Table::open(Whole(file))).map_err(wrong)?;
    let share = bytes / table.rows.max(1);
    for number in 1.. {
        match contained(|| table.next()).map_err(wrong)? {
            Some(row) => rows.add(number, share, Record::of_row(&row).map(Some))?,
            None => break,
        }
    }
    Ok(())
}

/// What the parquet library does, with a panic of it as an error.
fn contained<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("the file is malformed: the parquet library gave up".into()))
}

/// A file that has an end: reading on there is an error. The library steps over what a header claims without looking whether
/// anything was read, and a header may claim two milliards of values.
struct Whole(File);

impl Length for Whole {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Whole {
    type T = Ending;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Ending> {
        let mut file = self.0.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(Ending(BufReader::new(file)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<bytes::Bytes> {
        if start.saturating_add(length as u64) > self.len() {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} lie outside the file")));
        }
        let mut bytes = vec![0; length];
        self.get_read(start)?.read_exact(&mut bytes)?;
        Ok(bytes.into())
    }
}

/// Reads to the end of a file and no further.
struct Ending(BufReader<File>);

impl Read for Ending {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.0.read(into)? {
            0 if !into.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            read => Ok(read),
        }
    }
}

struct Table {
    iterator: parquet::record::reader::RowIter<'static>,
    rows: u64,
}

impl Table {
    fn open(file: impl ChunkReader + 'static) -> Result<Table, String> {
        let bytes = file.len();
        if !footer(&file).is_none_or(|footer| footer::is_sound(&footer)) {
            return Err("the footer is malformed, or claims more columns than it has".into());
        }
        let reader = SerializedFileReader::new(file).map_err(|error| words(&error))?;
        let metadata = reader.metadata();
        for group in metadata.row_groups() {
            let inside = group.columns().iter().all(|column| {
                let (start, length) = (column.data_page_offset(), column.compressed_size());
                start >= 0 && length >= 0 && (start as u64).saturating_add(length as u64) <= bytes
            });
            if !inside {
                return Err("a column of it lies outside the file".into());
            }
        }
        let rows = u64::try_from(metadata.file_metadata().num_rows()).map_err(|_| "it claims fewer rows than none")?;
        let schema = metadata.file_metadata().schema();
        let known = |column: &&parquet::schema::types::TypePtr| COLUMNS.contains(&column.name());
        let columns: Vec<_> = schema.get_fields().iter().filter(known).cloned().collect();
        if columns.is_empty() {
            let found: Vec<&str> = schema.get_fields().iter().map(|column| column.name()).collect();
            return Err(format!("expected a column {}; found {}", COLUMNS.join(", "), found.join(", ")));
        }
        let projection =
            Type::group_type_builder(schema.name()).with_fields(columns).build().map_err(|error| words(&error))?;
        let iterator = parquet::record::reader::RowIter::from_file_into(Box::new(reader))
            .project(Some(projection))
            .map_err(|error| words(&error))?
            .with_batch_size(BATCH);
        Ok(Table { iterator, rows })
    }

    fn next(&mut self) -> Result<Option<Map<String, Value>>, String> {
        self.iterator.next().transpose().map(|row| row.as_ref().map(object)).map_err(|error| words(&error))
    }
}

/// What lies before the last eight bytes, its length and a magic; nothing where the library will say what is wrong.
fn footer(file: &impl ChunkReader) -> Option<bytes::Bytes> {
    let end = file.len().checked_sub(8)?;
    let length = u32::from_le_bytes(*file.get_bytes(end, 8).ok()?.first_chunk()?);
    file.get_bytes(end.checked_sub(length.into())?, usize::try_from(length).ok()?).ok()
}

fn words(error: &parquet::errors::ParquetError) -> String {
    error.to_string().replace('\n', " ")
}

/// A row by its columns; one that is null is not there.
fn object(row: &Row) -> Map<String, Value> {
    let columns = row.get_column_iter().map(|(name, field)| (name.clone(), value(field)));
    columns.filter(|(_, value)| !value.is_null()).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(text) => text.clone().into(),
        // Some writers do not say that their text is UTF-8.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(row) => object(row).into(),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        other => other.to_string().into(),
    }
}

#[cfg(test)]
mod tests;

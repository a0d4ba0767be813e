//! Reads a GGUF header byte after byte, never past its end.

/// The error is what is wrong with the file.
pub(super) type Parsed<T> = std::result::Result<T, String>;

/// Longest name of a key or a tensor, as in ggml.
const LONGEST_NAME: usize = 65_535;

/// A place in a file.
pub(super) struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(file: &'a [u8]) -> Self {
        Cursor { file, at: 0 }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Bytes from here to the end of the file.
    pub(super) fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, bytes: u64) -> Parsed<&'a [u8]> {
        let taken = usize::try_from(bytes).ok().and_then(|bytes| self.file[self.at..].get(..bytes));
        let taken = taken.ok_or_else(|| {
            format!("{bytes} bytes should follow at byte {}, but {} do: the file is cut", self.at, self.left())
        })?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const SIZE: usize>(&mut self) -> Parsed<[u8; SIZE]> {
        let mut bytes = [0; SIZE];
        bytes.copy_from_slice(self.take(SIZE as u64)?);
        Ok(bytes)
    }

    pub(super) fn u32(&mut self) -> Parsed<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Parsed<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A length of 64 bits and as many bytes.
    pub(super) fn string(&mut self) -> Parsed<&'a [u8]> {
        let length = self.u64()?;
        self.take(length)
    }

    /// A string that names something.
    pub(super) fn name(&mut self) -> Parsed<&'a str> {
        let name = std::str::from_utf8(self.string()?).map_err(|error| format!("a name is not UTF-8: {error}"))?;
        if name.chars().any(char::is_control) {
            return Err(format!("the name {name:?} has control characters"));
        }
        match name.len() {
            1..=LONGEST_NAME => Ok(name),
            length => Err(format!("a name has {length} bytes, expected 1 to {LONGEST_NAME}")),
        }
    }

    pub(super) fn skip(&mut self, count: u64, size: usize) -> Parsed<()> {
        self.take(count.saturating_mul(size as u64)).map(|_| ())
    }

    /// Refuses a count of things of `least` bytes each or more that the rest of the file cannot hold.
    pub(super) fn count(&mut self, what: &str, least: usize) -> Parsed<usize> {
        let count = self.u64()?;
        let held = self.left() / least;
        match usize::try_from(count) {
            Ok(count) if count <= held => Ok(count),
            _ => Err(format!("it claims {count} {what}, more than the rest of the file can hold")),
        }
    }
}

//! The kernels' text, which lies inside the binary, and what names a compiled one.

use std::fmt::Write as _;

/// A file of `kernels/`.
#[derive(Debug)]
pub struct Source {
    /// Its name.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

macro_rules! sources {
    ($($name:ident: $file:literal;)*) => {$(
        #[doc = concat!("`kernels/", $file, "`.")]
        pub static $name: Source = Source { name: $file, text: include_str!(concat!("../../../kernels/", $file)) };
    )*};
}

sources! {
    H1: "h1.cuh";
    PTX: "ptx.cuh";
}

/// What every kernel may include.
pub static HEADERS: [&Source; 2] = [&H1, &PTX];

/// A macro's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Value {
    /// A number.
    Number(u32),
    /// A type: `float`, `bf16` or `f16`.
    Type(&'static str),
}

/// A kernel: a file, the `extern "C"` function in it, and the macros that it is compiled with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KernelKey {
    source: &'static str,
    text: &'static str,
    /// The function.
    pub entry: &'static str,
    /// The macros, in the order in which they are given.
    pub defines: Vec<(&'static str, Value)>,
}

impl KernelKey {
    /// The kernel `entry` of a file.
    pub fn new(source: &'static Source, entry: &'static str, defines: &[(&'static str, Value)]) -> Self {
        KernelKey { source: source.name, text: source.text, entry, defines: defines.to_vec() }
    }

    /// The file's name.
    pub fn file(&self) -> &'static str {
        self.source
    }

    /// What a compiler is given: the macros, then the file. Headers are found by name.
    pub fn text(&self) -> String {
        let mut text = String::with_capacity(self.text.len() + 256);
        for (name, value) in &self.defines {
            // Writing to a string cannot fail.
            let _ = match value {
                Value::Number(number) => writeln!(text, "#define {name} {number}"),
                Value::Type(of) => writeln!(text, "#define {name} {of}"),
            };
        }
        let _ = writeln!(text, "#line 1 \"{}\"", self.source);
        text.push_str(self.text);
        text
    }
}

impl std::fmt::Display for KernelKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.source, self.entry)?;
        self.defines.iter().try_for_each(|(name, value)| match value {
            Value::Number(number) => write!(f, " {name}={number}"),
            Value::Type(of) => write!(f, " {name}={of}"),
        })
    }
}

//! The kernels' text, which lies inside the binary, and what names a compiled one.

use std::fmt::Write as _;

/// A file of `kernels/`; names are its identity, so that a launch need not look at texts.
#[derive(Debug)]
pub struct Source {
    /// Its name.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

impl Source {
    /// Whether its kernels may start while the launch before them still runs: they wait for it themselves.
    pub fn early(&self) -> bool {
        self.text.contains("after_earlier();")
    }

    /// The names of its kernels.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.text.split("extern \"C\" __global__ void").skip(1).map(|rest| {
            let bounded = rest.trim_start().strip_prefix("__launch_bounds__");
            let name = bounded.map_or(rest, after_parentheses).trim_start();
            &name[..name.find('(').unwrap_or(name.len())]
        })
    }
}

/// What follows an expression in parentheses.
fn after_parentheses(text: &str) -> &str {
    let mut depth = 0;
    let end = text.find(|of: char| {
        depth += i32::from(of == '(') - i32::from(of == ')');
        of == ')' && depth == 0
    });
    &text[end.map_or(text.len(), |end| end + 1)..]
}

impl PartialEq for Source {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other) || self.name == other.name
    }
}

impl Eq for Source {}

impl std::hash::Hash for Source {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
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
    ROWS_OF: "rows_of.cuh";
    TURNS: "rope.cuh";
    PAGES: "pages.cuh";
    CONV: "conv1d.cuh";
    SCAN: "scan.cuh";
    SCAN16: "scan16.cuh";
    KEYS: "attention.cuh";
    PLAIN_TILES: "attention_tiles.cuh";
    TILES: "attention_mma.cuh";
    BOXES: "attention_wgmma.cuh";
    EMBED: "embed.cu";
    RMS_NORM: "rms_norm.cu";
    COLUMNS: "columns.cu";
    GEMV: "gemv.cu";
    SWIGLU: "swiglu.cu";
    ROPE: "rope.cu";
    PAGE_WRITE: "page_write.cu";
    ROPE_PAGE_WRITE: "rope_page_write.cu";
    NEG_EXP: "neg_exp.cu";
    HEAD_LOSS: "head_loss.cu";
    CHOOSE: "choose.cu";
    ROWS: "rows.cu";
    MEMORY: "memory.cu";
    OPTIMISER: "optimiser.cu";
    CONV1D: "conv1d.cu";
    CONV1D_BACKWARD: "conv1d_backward.cu";
    SELECTIVE_SCAN: "selective_scan.cu";
    SELECTIVE_SCAN_BACKWARD: "selective_scan_backward.cu";
    SELECTIVE_SCAN_STEP: "selective_scan_step.cu";
    SELECTIVE_SCAN16: "selective_scan16.cu";
    SELECTIVE_SCAN16_BACKWARD: "selective_scan16_backward.cu";
    SCAN_PARTS: "scan_parts.cu";
    SCAN_SUMS: "scan_sums.cu";
    ATTENTION: "attention.cu";
    ATTENTION_BACKWARD: "attention_backward.cu";
    ATTENTION_COMBINE: "attention_combine.cu";
    ATTENTION_MMA: "attention_mma.cu";
    ATTENTION_BACKWARD_MMA: "attention_backward_mma.cu";
    ATTENTION_WGMMA: "attention_wgmma.cu";
    ATTENTION_BACKWARD_WGMMA: "attention_backward_wgmma.cu";
}

/// What every kernel may include.
pub static HEADERS: [&Source; 12] =
    [&H1, &PTX, &ROWS_OF, &TURNS, &PAGES, &CONV, &SCAN, &SCAN16, &KEYS, &PLAIN_TILES, &TILES, &BOXES];

/// A macro's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Value {
    /// A number.
    Number(u32),
    /// A type: `float`, `bf16` or `f16`.
    Type(&'static str),
}

/// What is compiled at once: a file, and the macros that it is compiled with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ModuleKey {
    /// The file.
    pub source: &'static Source,
    defines: Vec<(&'static str, Value)>,
}

/// A kernel: an `extern "C"` function of a module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KernelKey {
    /// Where it is.
    pub module: ModuleKey,
    /// The function.
    pub entry: &'static str,
}

impl KernelKey {
    /// The kernel `entry` of a file.
    pub fn new(source: &'static Source, entry: &'static str, defines: &[(&'static str, Value)]) -> Self {
        KernelKey { module: ModuleKey::new(source, defines), entry }
    }
}

impl ModuleKey {
    /// A file compiled with macros.
    pub fn new(source: &'static Source, defines: &[(&'static str, Value)]) -> Self {
        ModuleKey { source, defines: defines.to_vec() }
    }

    /// The same with one more macro.
    pub(super) fn with(&self, define: (&'static str, Value)) -> Self {
        let mut module = self.clone();
        module.defines.push(define);
        module
    }

    /// The macros that are numbers.
    pub fn numbers(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.defines.iter().filter_map(|&(name, value)| match value {
            Value::Number(number) => Some((name, number)),
            Value::Type(_) => None,
        })
    }

    /// What a compiler is given: the macros, then the file. Headers are found by name.
    pub fn text(&self) -> String {
        let mut text = String::with_capacity(self.source.text.len() + 256);
        for (name, value) in &self.defines {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "#define {name} {value}");
        }
        let _ = writeln!(text, "#line 1 \"{}\"", self.source.name);
        text.push_str(self.source.text);
        text
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Value::Number(number) => number.fmt(f),
            Value::Type(of) => of.fmt(f),
        }
    }
}

impl std::fmt::Display for ModuleKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.source.name)?;
        self.defines.iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::cuda::variants;

    #[test]
    fn every_kernel_of_an_early_file_waits() {
        let mut early = 0;
        for source in variants::all((9, 0)).iter().map(|module| module.source).filter(|source| source.early()) {
            let count = |words| source.text.matches(words).count();
            assert_eq!(count("after_earlier();"), count("extern \"C\""), "{}", source.name);
            early += 1;
        }
        assert!(early > 0);
    }
}

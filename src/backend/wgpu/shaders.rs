//! The shaders: files of `shaders/`, and how one becomes a kernel.
//!
//! A shader is `shaders/<name>.wgsl`. Its text is compiled after `shaders/prelude.wgsl` and the files that it has in common
//! with others, and before all comes one `alias` for each storage type that it leaves open. Everything else that is chosen
//! when a pipeline is made is an `override` constant of the shader. So a variant is (file, entry point, types, constants),
//! see [`Kernel`]. A shader `…_cooperative` may use cooperative matrices and is f16 where the others have open types.

use std::fmt::Write;

use crate::backend::DType;

/// Most types that a shader leaves open.
pub(super) const MOST_TYPES: usize = 4;
/// Most constants of a kernel.
pub(super) const MOST_CONSTANTS: usize = 8;

/// A file of `shaders/`.
#[derive(Debug)]
pub(super) struct Shader {
    /// The file's name without its ending.
    pub name: &'static str,
    text: &'static str,
    /// The aliases that it leaves open, in the order in which [`Shader::kernel`] takes their dtypes.
    types: &'static [&'static str],
}

/// A variant of an entry point: what a pipeline is made from, and its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Kernel {
    shader: &'static Shader,
    /// The entry point.
    pub entry: &'static str,
    /// The dtypes of the shader's open types.
    pub types: [DType; MOST_TYPES],
    constants: [(&'static str, u32); MOST_CONSTANTS],
    count: usize,
}

impl PartialEq for Shader {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Shader {}

impl std::hash::Hash for Shader {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl Shader {
    /// An entry point with the dtypes of its open types.
    pub fn kernel(&'static self, entry: &'static str, types: &[DType]) -> Kernel {
        debug_assert_eq!(types.len(), self.types.len(), "{}", self.name);
        let mut all = [DType::F32; MOST_TYPES];
        all.iter_mut().zip(types).for_each(|(to, from)| *to = *from);
        Kernel { shader: self, entry, types: all, constants: [("", 0); MOST_CONSTANTS], count: 0 }
    }

    /// Whether it is one of cooperative matrices.
    fn is_cooperative(&self) -> bool {
        self.name.ends_with("_cooperative")
    }

    /// The whole text with the dtypes of its open types.
    pub fn source(&self, types: &[DType]) -> String {
        let prelude = include_str!("../../../shaders/prelude.wgsl");
        let mut source = String::with_capacity(prelude.len() + self.text.len() + 80);
        if self.is_cooperative() || self.types.iter().zip(types).any(|(_, dtype)| *dtype == DType::F16) {
            source.push_str("enable f16;\n");
        }
        if self.is_cooperative() {
            source.push_str("enable wgpu_cooperative_matrix;\n");
        }
        for (alias, dtype) in self.types.iter().zip(types) {
            // Writing to a string cannot fail.
            let _ = writeln!(source, "alias {alias} = {dtype};");
        }
        source.push_str(prelude);
        source.push_str(self.text);
        source
    }
}

impl Kernel {
    /// The same with a value for an `override` constant: a number, or a bool as 0 or 1.
    pub fn with(mut self, name: &'static str, value: impl Into<u32>) -> Self {
        debug_assert!(self.count < MOST_CONSTANTS, "{}", self.shader.name);
        if let Some(constant) = self.constants.get_mut(self.count) {
            *constant = (name, value.into());
            self.count += 1;
        }
        self
    }

    /// Its shader.
    pub fn shader(&self) -> &'static Shader {
        self.shader
    }

    /// The constants that were given a value.
    pub fn constants(&self) -> Vec<(&'static str, f64)> {
        self.constants[..self.count].iter().map(|&(name, value)| (name, f64::from(value))).collect()
    }
}

/// Declares the shaders, by constant and file, after the files that it begins with, with the types that each leaves open.
macro_rules! shaders {
    ($($name:ident = $([$($include:literal),*])? $file:literal $(($($open:literal),*))?;)*) => {
        $(
            pub(super) static $name: Shader = Shader {
                name: $file,
                text: concat!(
                    $($(include_str!(concat!("../../../shaders/", $include, ".wgsl")),)*)?
                    include_str!(concat!("../../../shaders/", $file, ".wgsl"))
                ),
                types: &[$($($open),*)?],
            };
        )*

        /// Every shader.
        #[cfg(test)]
        pub(super) static ALL: &[&Shader] = &[$(&$name),*];
    };
}

shaders! {
    ADAMW = "adamw" ("Weight");
    CLIP_FACTOR = "clip_factor";
    COLUMN_SUMS = "column_sums" ("Value");
    COPY = "copy" ("AnyFrom", "AnyTo");
    EMBED_BACKWARD = "embed_backward" ("Value");
    FILL = "fill" ("Value");
    GATHER = "gather" ("Stored", "Value");
    GEMV = "gemv" ("Left", "Right", "Bias", "Out");
    HEAD_LOSS = "head_loss";
    NEG_EXP = "neg_exp" ("Weight");
    PAGE_WRITE = ["segments"] "page_write" ("Value", "Key");
    PRODUCTS = ["product"] "products" ("Left", "Right", "Bias", "Out");
    PRODUCTS_COOPERATIVE = ["product"] "products_cooperative" ("Bias", "Out");
    PRODUCTS_SUBGROUP = ["product"] "products_subgroup" ("Left", "Right", "Bias", "Out");
    RMS_NORM = "rms_norm" ("Value", "Weight");
    ROPE = "rope" ("Value");
    SAMPLE = "sample" ("Value");
    SCALE = "scale" ("Value");
    SCATTER_ADD = "scatter_add" ("Value");
    SQUARED_NORM = "squared_norm";
    SWIGLU = "swiglu" ("Value");
    ATTENTION = ["segments", "attention_sizes"] "attention" ("Value", "Key");
    ATTENTION_COOPERATIVE = ["segments", "attention_sizes"] "attention_cooperative";
    ATTENTION_SUBGROUP = ["segments", "attention_sizes"] "attention_subgroup" ("Value", "Key");
    ATTENTION_BACKWARD = ["segments", "attention_backward_sizes"] "attention_backward" ("Value");
    ATTENTION_BACKWARD_SUBGROUP = ["segments", "attention_backward_sizes"] "attention_backward_subgroup" ("Value");
    CONV1D = ["segments"] "conv1d" ("Value", "Weight");
    SELECTIVE_SCAN = ["segments", "scan"] "selective_scan" ("Value");
    SELECTIVE_SCAN_BACKWARD = ["segments", "scan"] "selective_scan_backward" ("Value");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The dtypes that an open type can have: u32 only where one is copied.
    fn choices(alias: &str) -> &'static [DType] {
        if alias.starts_with("Any") { &[DType::F32, DType::F16, DType::U32] } else { &[DType::F32, DType::F16] }
    }

    /// The values that the host gives to the numbers among a shader's constants, together.
    fn numbers(shader: &str) -> &'static [&'static [(&'static str, u32)]] {
        match shader {
            "products" => &[&[("TILE", 64), ("INVOCATIONS", 64)], &[("TILE", 128), ("INVOCATIONS", 256)]],
            "products_cooperative" => &[&[("TILE", 64)], &[("TILE", 128)]],
            "products_subgroup" => &[
                &[("LANES", 4), ("ROWS", 8), ("GROUPS", 2)],
                &[("LANES", 8), ("ROWS", 1), ("GROUPS", 2)],
                &[("LANES", 16), ("ROWS", 16), ("GROUPS", 2)],
            ],
            "attention_cooperative" => &[&[("WIDTH", 1)], &[("WIDTH", 4)], &[("WIDTH", 5)], &[("WIDTH", 8)]],
            "attention_subgroup" | "attention_backward_subgroup" => {
                &[&[("LANES", 4)], &[("LANES", 8)], &[("LANES", 16)]]
            }
            "attention" => &[
                &[("WIDTH", 4), ("PARTS", 1), ("ROWS", 64)],
                &[("WIDTH", 8), ("PARTS", 4), ("ROWS", 64)],
                &[("WIDTH", 8), ("PARTS", 10), ("ROWS", 25)],
            ],
            "attention_backward" => &[
                &[("WIDTH", 4), ("PARTS", 1), ("ROWS", 64), ("TILE", 16)],
                &[("WIDTH", 8), ("PARTS", 4), ("ROWS", 32), ("TILE", 8)],
                &[("WIDTH", 8), ("PARTS", 32), ("ROWS", 4), ("TILE", 2)],
            ],
            "conv1d" => {
                &[&[("WIDTH", 1), ("CHUNK", 32)], &[("WIDTH", 4), ("CHUNK", 32)], &[("WIDTH", 16), ("CHUNK", 32)]]
            }
            "selective_scan" | "selective_scan_backward" => &[
                &[("QUADS", 2), ("CHANNELS", 32)],
                &[("QUADS", 4), ("CHANNELS", 16)],
                &[("QUADS", 16), ("CHANNELS", 4)],
            ],
            _ => &[&[]],
        }
    }

    /// Every choice of one of several for each.
    fn products<T: Copy>(choices: impl IntoIterator<Item = Vec<T>>) -> Vec<Vec<T>> {
        let with = |all: Vec<Vec<T>>, of: Vec<T>| {
            all.iter().flat_map(|one| of.iter().map(|&next| one.iter().copied().chain([next]).collect())).collect()
        };
        choices.into_iter().fold(vec![Vec::new()], with)
    }

    /// Sizes that every adapter that h1 runs on has: invocations of a workgroup, and bytes of its memory.
    const INVOCATIONS: u32 = 256;
    const WORKGROUP_BYTES: u32 = 32 << 10;

    #[test]
    fn every_shader_is_valid_in_every_variant() {
        use naga::valid::{Capabilities, ValidationFlags, Validator};
        let mut too_large = Vec::new();
        for shader in ALL {
            for types in products(shader.types.iter().map(|alias| choices(alias).to_vec())) {
                let source = shader.source(&types);
                let module = naga::front::wgsl::parse_str(&source)
                    .unwrap_or_else(|e| panic!("{} {types:?}: {}", shader.name, e.emit_to_string(&source)));
                let valid = Validator::new(ValidationFlags::all(), Capabilities::all()).validate(&module);
                let info = valid.unwrap_or_else(|e| panic!("{} {types:?}: {e:?}", shader.name));
                // Constants are of no type: one of each suffices.
                if types.windows(2).all(|two| two[0] == two[1]) {
                    too_large.extend(every_variant_is_valid(shader, &module, &info));
                }
            }
        }
        assert!(too_large.is_empty(), "{}", too_large.join("\n"));
    }

    /// Gives the variants that ask for more than those sizes.
    fn every_variant_is_valid(shader: &Shader, module: &naga::Module, info: &naga::valid::ModuleInfo) -> Vec<String> {
        let flags = module.overrides.iter().filter_map(|(_, constant)| {
            // One without a name is an expression of others.
            let name = constant.name.as_deref()?;
            let flag = module.types[constant.ty].inner == naga::TypeInner::Scalar(naga::Scalar::BOOL);
            let given = numbers(shader.name)[0].iter().any(|(number, _)| *number == name);
            assert!(flag || given, "{}: which values has {name}?", shader.name);
            flag.then(|| vec![(name, 0.0), (name, 1.0)])
        });
        let mut too_large = Vec::new();
        for (flags, numbers) in products(flags).iter().flat_map(|f| numbers(shader.name).iter().map(move |n| (f, n))) {
            let numbers = numbers.iter().map(|&(name, value)| (name, f64::from(value)));
            let constants =
                flags.iter().copied().chain(numbers).map(|(name, value)| (name.to_owned(), value)).collect();
            for entry in &module.entry_points {
                let stage = Some((entry.stage, entry.name.as_str()));
                let made = naga::back::pipeline_constants::process_overrides(module, info, stage, &constants);
                let (made, info) = made.unwrap_or_else(|e| panic!("{} {constants:?}: {e:?}", shader.name));
                let [x, y, z] = made.entry_points[0].workgroup_size;
                let shared = made.global_variables.iter().filter(|(handle, variable)| {
                    variable.space == naga::AddressSpace::WorkGroup && !info.get_entry_point(0)[*handle].is_empty()
                });
                let bytes: u32 = shared.map(|(_, v)| made.types[v.ty].inner.size(made.to_ctx())).sum();
                if x * y * z > INVOCATIONS || bytes > WORKGROUP_BYTES {
                    let name = &entry.name;
                    too_large.push(format!("{} {name} {constants:?}: {x}×{y}×{z}, {bytes} bytes", shader.name));
                }
            }
        }
        too_large
    }
}

//! The ways in which byte-level tokenizers split a text before their merges, by the names that GGUF files give them.

use serde_json::{Value, json};

/// GPT-2's: contractions, letters, digits, other signs, each with a space before it.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's: up to three digits at a time, lines end by themselves.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's: the same with one digit at a time.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Tekken's: words are also cut where a small letter is followed by a capital.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o's: the same with contractions and up to three digits.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A way to split.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pre {
    /// The names of it.
    names: &'static [&'static str],
    /// Patterns, each of which cuts what those before it left.
    patterns: &'static [&'static str],
    /// Whether a piece that is a token is not built by merges.
    pub(super) ignores_merges: bool,
    /// Whether a text begins with bos where the metadata do not say.
    pub(super) adds_bos: bool,
    /// Whether a text is composed (Unicode's NFC) before it is split, which metadata have no key for.
    composes: bool,
}

const fn plain(names: &'static [&'static str], patterns: &'static [&'static str]) -> Pre {
    Pre { names, patterns, ignores_merges: false, adds_bos: false, composes: false }
}

const KNOWN: [Pre; 9] = [
    // What a file without a name means.
    plain(&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    plain(&["gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jais"], &[GPT2]),
    plain(&["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"], &[r"\p{N}", GPT2]),
    plain(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
    Pre { composes: true, ..plain(&["qwen2"], &[QWEN2]) },
    plain(&["deepseek-r1-qwen", "stablelm2", "megrez"], &[QWEN2]),
    Pre {
        ignores_merges: true,
        adds_bos: true,
        ..plain(&["llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"], &[LLAMA3])
    },
    Pre { ignores_merges: true, adds_bos: true, ..plain(&["tekken"], &[TEKKEN]) },
    plain(&["gpt-4o", "llama4"], &[GPT4O]),
];

/// The way of this name.
pub(super) fn find(name: &str) -> Option<Pre> {
    KNOWN.into_iter().find(|pre| pre.names.contains(&name))
}

/// Every name.
pub(super) fn names() -> String {
    KNOWN.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", ")
}

impl Pre {
    /// As `tokenizer.json` has it: what is done to a text before it is split.
    pub(super) fn normalizer(&self) -> Value {
        if self.composes { json!({ "type": "NFC" }) } else { Value::Null }
    }

    /// As `tokenizer.json` has it: the patterns, then bytes as characters.
    pub(super) fn pre_tokenizer(&self) -> Value {
        byte_level(self.patterns)
    }
}

/// Patterns, each of which cuts what those before it left, then bytes as characters.
pub(super) fn byte_level(patterns: &[&str]) -> Value {
    let split = |pattern: &&str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    json!({ "type": "Sequence", "pretokenizers": patterns.iter().map(split).chain([bytes]).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

    /// The pieces of a text, in the text's own characters.
    fn pieces(name: &str, text: &str) -> Vec<String> {
        let split: PreTokenizerWrapper = serde_json::from_value(find(name).unwrap().pre_tokenizer()).unwrap();
        let mut string = PreTokenizedString::from(text);
        split.pre_tokenize(&mut string).unwrap();
        let splits = string.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(_, (start, end), _)| text[start..end].to_owned()).collect()
    }

    #[test]
    fn each_way_cuts_as_the_models_of_its_name_do() {
        let text = "I'M you're  abCd 12345\n\n x+=\"é²\"//\n";
        for (name, expected) in [
            ("gpt-2", "I|'|M| you|'re| | abCd| 12345|\n\n| x|+=\"|é|²|\"//|\n"),
            ("smollm", "I|'|M| you|'re| | abCd| |1|2|3|4|5|\n\n| x|+=\"|é|²|\"//|\n"),
            ("llama-bpe", "I|'M| you|'re| | abCd| |123|45|\n\n| x|+=\"|é|²|\"//\n"),
            ("qwen2", "I|'M| you|'re| | abCd| |1|2|3|4|5|\n\n| x|+=\"|é|²|\"//\n"),
            ("tekken", "I|'M| you|'re| | ab|Cd| |1|2|3|4|5|\n\n| x|+=\"|é|²|\"//\n"),
            ("gpt-4o", "I'M| you're| | ab|Cd| |123|45|\n\n| x|+=\"|é|²|\"//\n"),
            ("falcon", "I|'|M| you|'|re| | abCd| |123|45|\n\n| x|+=\"|é|²|\"//|\n"),
        ] {
            assert_eq!(pieces(name, text).join("|"), expected, "{name}");
        }
    }

    #[test]
    fn every_pattern_is_one_and_every_name_is_one_way() {
        let mut names: Vec<&str> = KNOWN.iter().flat_map(|pre| pre.names).copied().collect();
        for name in &names {
            assert_eq!(pieces(name, "a b").concat(), "a b");
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}

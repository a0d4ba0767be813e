//! Byte-level tokens: each of the 256 bytes is written as a printable character, the way GPT-2 began.

/// The character that stands for a byte: itself where it is printable, otherwise one from U+0100 on, in order.
pub(super) fn character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match printable(byte) {
        true => char::from(byte),
        false => {
            let before = (0..byte).filter(|byte| !printable(*byte)).count();
            char::from_u32(0x100 + before as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    }
}

/// The characters of all bytes, and the way back.
#[derive(Clone, Debug)]
pub(super) struct ByteLevel {
    characters: [char; 256],
}

impl ByteLevel {
    pub(super) fn new() -> Self {
        ByteLevel { characters: std::array::from_fn(|byte| character(byte as u8)) }
    }

    /// Bytes as a token is spelt.
    pub(super) fn spell(&self, bytes: &[u8]) -> String {
        bytes.iter().map(|byte| self.characters[usize::from(*byte)]).collect()
    }

    /// The bytes of a token as it is spelt; its own where a character stands for none.
    pub(super) fn bytes(&self, token: &str) -> Vec<u8> {
        let byte = |character| self.characters.iter().position(|other| *other == character).map(|byte| byte as u8);
        token.chars().map(byte).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_characters_are_those_of_the_tokenizers_library_and_tell_all_bytes_apart() {
        let level = ByteLevel::new();
        let all: Vec<u8> = (0..=255).collect();
        let spelt = level.spell(&all);
        let known = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert!(spelt.chars().all(|character| known.contains(&character)));
        assert_eq!((level.bytes(&spelt), spelt.chars().count()), (all, 256));
        assert_eq!((level.spell(b" a\n"), level.bytes("<|\u{2581}|>")), ("ĠaĊ".into(), "<|\u{2581}|>".into()));
    }
}

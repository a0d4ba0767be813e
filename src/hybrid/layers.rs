//! A set of layers, as a person writes it: `3,5-8`.

use std::collections::BTreeSet;
use std::fmt;

use super::HybridError;

/// Layers of a model, counted from 0, each once, in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerSet(BTreeSet<usize>);

impl LayerSet {
    /// Reads numbers and ranges (both ends included) with commas between them, such as `3,5-8`; an empty text is the
    /// empty set.
    ///
    /// # Errors
    /// When a part is neither, a range runs backwards, or a layer is not below `layers`.
    pub fn parse(text: &str, layers: usize) -> Result<Self, HybridError> {
        let mut set = LayerSet::default();
        if text.trim().is_empty() {
            return Ok(set);
        }
        for part in text.split(',') {
            let part = part.trim();
            let wrong = || HybridError::LayerText { text: text.to_owned(), part: part.to_owned() };
            let number = |digits: &str| match digits.trim() {
                digits if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse::<usize>().map_err(|_| wrong()),
                _ => Err(wrong()),
            };
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if last < first {
                return Err(wrong());
            }
            if last >= layers {
                return Err(HybridError::NoSuchLayer { layer: last, layers });
            }
            set.0.extend(first..=last);
        }
        Ok(set)
    }

    /// The layers, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = usize> + '_ {
        self.0.iter().copied()
    }

    /// Whether `layer` is in it.
    pub fn contains(&self, layer: usize) -> bool {
        self.0.contains(&layer)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<usize> for LayerSet {
    fn from_iter<I: IntoIterator<Item = usize>>(layers: I) -> Self {
        LayerSet(layers.into_iter().collect())
    }
}

impl fmt::Display for LayerSet {
    /// As [`LayerSet::parse`] reads it, with neighbours drawn together.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut layers = self.iter().peekable();
        let mut comma = "";
        while let Some(first) = layers.next() {
            let mut last = first;
            while let Some(next) = layers.next_if_eq(&(last + 1)) {
                last = next;
            }
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                1 => write!(f, "{comma}{first},{last}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_reads_as_the_same_set(layers in prop::collection::btree_set(0_usize..40, 0..40)) {
            let set: LayerSet = layers.iter().copied().collect();
            prop_assert_eq!(LayerSet::parse(&set.to_string(), 40).unwrap(), set);
        }

        #[test]
        fn any_text_is_a_set_of_existing_layers_or_an_error(text in "[0-9, -]{0,12}") {
            if let Ok(set) = LayerSet::parse(&text, 12) {
                prop_assert!(set.iter().all(|layer| layer < 12));
            }
        }
    }

    #[test]
    fn ranges_include_both_ends() {
        let set = LayerSet::parse(" 3, 5-8 ,7", 9).unwrap();
        assert_eq!(set.iter().collect::<Vec<_>>(), [3, 5, 6, 7, 8]);
        assert_eq!(set.to_string(), "3,5-8");
    }

    #[test]
    fn an_error_names_the_part_or_the_layer() {
        let error = |text: &str| LayerSet::parse(text, 8).unwrap_err().to_string();
        assert!(error("3,x").contains("`x`"), "{}", error("3,x"));
        assert!(error("5-3").contains("`5-3`"));
        assert!(error("1,,2").contains("``"));
        assert!(error("+1").contains("`+1`"));
        assert!(error("3-99999999999").contains("8 layers"));
        assert!(error("99999999999999999999999").contains("`99999999999999999999999`"));
    }
}

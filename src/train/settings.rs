//! Configurations: TOML into a type, with `--set a.b=value` on top, and words for what is wrong with it.

use std::path::Path;

use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::error::{Error, Result};

/// A configuration as it is to be kept, and as it was read.
#[derive(Debug)]
pub struct Settings<T> {
    /// The text: the file's own where nothing was set on top.
    pub text: String,
    /// The values.
    pub values: T,
}

/// Reads the file `path` with `sets`, each `key.key=value`, on top. A value is TOML, or else a string.
///
/// # Errors
/// When the file cannot be read, is not TOML, has a key that `T` does not know, or lacks one.
pub fn load<T: DeserializeOwned>(path: &Path, sets: &[String]) -> Result<Settings<T>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let text = match sets {
        [] => text,
        _ => {
            let mut table: Table = text.parse().map_err(|error| wrong(path, &text, &error))?;
            sets.iter().try_for_each(|assignment| set(&mut table, assignment))?;
            toml::to_string(&table).map_err(|error| Error::Configuration(error.to_string()))?
        }
    };
    let values = toml::from_str(&text).map_err(|error| match sets {
        [] => wrong(path, &text, &error),
        _ => Error::Configuration(format!("{} with {}: {}", path.display(), sets.join(" "), words(error.message()))),
    })?;
    Ok(Settings { text, values })
}

fn wrong(path: &Path, text: &str, error: &toml::de::Error) -> Error {
    let line = error.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
    Error::Configuration(format!("{}:{line}: {}", path.display(), words(error.message())))
}

/// A message of serde, with the nearest known key where one is unknown.
fn words(message: &str) -> String {
    let message = message.trim().replace("unknown field", "unknown key").replace("missing field", "missing key");
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    match &quoted[..] {
        [unknown, known @ ..] if message.starts_with("unknown") => {
            let distance = |name: &&&str| strsim::damerau_levenshtein(unknown, name);
            match known.iter().min_by_key(distance).filter(|name| distance(name) <= name.len().div_ceil(2)) {
                Some(nearest) => format!("{message}; did you mean `{nearest}`?"),
                None => message,
            }
        }
        _ => message,
    }
}

fn set(table: &mut Table, assignment: &str) -> Result<()> {
    let (key, value) = assignment.split_once('=').filter(|(key, _)| !key.trim().is_empty()).ok_or_else(|| {
        Error::Configuration(format!(
            "--set {assignment}: expected key.key=value, such as optimizer.learning_rate=1e-3"
        ))
    })?;
    let value = match format!("value = {value}").parse::<Table>() {
        Ok(mut table) => table.remove("value").unwrap_or_else(|| Value::String(value.into())),
        Err(_) => Value::String(value.into()),
    };
    let mut keys: Vec<&str> = key.trim().split('.').collect();
    let last = keys.pop().unwrap_or_default();
    let mut at = table;
    for key in keys {
        let inner = at.entry(key).or_insert_with(|| Value::Table(Table::new()));
        at = inner
            .as_table_mut()
            .ok_or_else(|| Error::Configuration(format!("--set {assignment}: `{key}` is a value, not a table")))?;
    }
    at.insert(last.into(), value);
    Ok(())
}

/// The first difference in value between two configurations, in words; comments and order are none.
pub(super) fn difference(before: &str, now: &str) -> Option<String> {
    match (before.parse::<Table>(), now.parse::<Table>()) {
        (Ok(before), Ok(now)) => differing(&before, &now, ""),
        _ => (before != now).then(|| "one of them is not TOML".into()),
    }
}

fn differing(before: &Table, now: &Table, prefix: &str) -> Option<String> {
    let mut keys: Vec<&String> = before.keys().chain(now.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.into_iter().find_map(|key| match (before.get(key), now.get(key)) {
        (Some(Value::Table(before)), Some(Value::Table(now))) => differing(before, now, &format!("{prefix}{key}.")),
        (before, now) if before == now => None,
        (before, now) => {
            let value = |value: Option<&Value>| value.map_or("not there".into(), Value::to_string);
            Some(format!("{prefix}{key} was {}, now {}", value(before), value(now)))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        seed: u64,
        optimizer: Inner,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        learning_rate: f64,
        #[serde(default)]
        name: String,
    }

    fn load(text: &str, sets: &[&str]) -> Result<Settings<Outer>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        super::load(&path, &sets.iter().map(|set| set.to_string()).collect::<Vec<_>>())
    }

    const GOOD: &str = "seed = 1 # the first\n[optimizer]\nlearning_rate = 0.5\n";

    #[test]
    fn a_key_set_on_top_replaces_or_adds_and_the_text_follows() {
        assert_eq!(load(GOOD, &[]).unwrap().text, GOOD);
        let settings = load(GOOD, &["seed=7", "optimizer.name=a b", "optimizer.learning_rate=1e-3"]).unwrap();
        assert_eq!((settings.values.seed, settings.values.optimizer.learning_rate), (7, 1e-3));
        assert_eq!(settings.values.optimizer.name, "a b");
        assert_eq!(difference(GOOD, &settings.text).unwrap(), "optimizer.learning_rate was 0.5, now 0.001");
        assert_eq!(difference(GOOD, "optimizer.learning_rate = 0.5\nseed = 1"), None);
        assert_eq!(difference(GOOD, "seed = 1").unwrap(), "optimizer was { learning_rate = 0.5 }, now not there");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line_and_the_nearest_known_key() {
        let says = |text: &str, sets: &[&str], words: &str| {
            let error = load(text, sets).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains('\n'), "{error}");
        };
        says("seed = 1\n[optimizer]\nlearning_rat = 1\n", &[], "c.toml:3: unknown key `learning_rat`");
        says("seed = 1\n[optimizer]\nlearning_rat = 1\n", &[], "did you mean `learning_rate`?");
        says(GOOD, &["optimiser.name=x"], "did you mean `optimizer`?");
        says(GOOD, &["optimizer.name.x=1"], "optimizer.name.x=1");
        says(GOOD, &["seed"], "--set seed: expected key.key=value");
        says(GOOD, &["seed.x=1"], "`seed` is a value, not a table");
        says("seed = 1\n", &[], "missing key `optimizer`");
        says("seed = \n", &[], "c.toml:1:");
        says("seed = 'x'\n[optimizer]\nlearning_rate = 1\n", &[], "c.toml:1: invalid type");
    }
}

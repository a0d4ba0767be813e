//! What the tokenizers library takes for granted in a `tokenizer.json`, checked before it reads one.

use serde_json::{Map, Value};

/// What is wrong with a `tokenizer.json`, in words; also makes it say the same text every time, whole.
pub(super) fn check(tokenizer: &mut Value) -> Result<(), String> {
    let Some(parts) = tokenizer.as_object_mut() else { return Err("expected an object".into()) };
    // No text is cut, filled up or split by chance in silence.
    parts.insert("truncation".into(), Value::Null);
    parts.insert("padding".into(), Value::Null);
    let Some(model) = parts.get_mut("model").and_then(Value::as_object_mut) else {
        return Err("expected an object `model`".into());
    };
    if model.contains_key("dropout") {
        model.insert("dropout".into(), Value::Null);
    }
    match (model.get("type").and_then(Value::as_str), model.contains_key("merges")) {
        (Some("BPE"), _) | (None, true) => check_bpe(model),
        _ => Ok(()),
    }
}

/// Every merge joins two tokens of the vocabulary into a third.
fn check_bpe(model: &Map<String, Value>) -> Result<(), String> {
    let Some(vocabulary) = model.get("vocab").and_then(Value::as_object) else {
        return Err("expected an object `vocab` in `model`".into());
    };
    let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str).unwrap_or_default();
    let Some(merges) = model.get("merges").and_then(Value::as_array) else {
        return Err("expected a list `merges` in `model`".into());
    };
    let mut joined = String::new();
    for (merge, number) in merges.iter().zip(1..) {
        let pair = match merge {
            Value::String(pair) => pair.split_once(' '),
            Value::Array(pair) => match &pair[..] {
                [Value::String(left), Value::String(right)] => Some((&left[..], &right[..])),
                _ => None,
            },
            _ => None,
        };
        let Some((left, right)) = pair else {
            return Err(format!("merge {number}: expected two tokens, found {merge}"));
        };
        let Some(rest) = right.strip_prefix(prefix) else {
            return Err(format!("merge {number}: `{right}` does not start with `{prefix}`"));
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(rest);
        if let Some(hole) = [left, right, &joined].into_iter().find(|token| !vocabulary.contains_key(*token)) {
            return Err(format!("merge {number} of `{left}` and `{right}`: `{hole}` is not in the vocabulary"));
        }
    }
    Ok(())
}

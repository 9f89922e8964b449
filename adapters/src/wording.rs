//! serde's messages in words for people who write YAML and JSON, not Rust.

/// What serde calls a kind of value, and what it is called here. The longest names come first, since some begin as others do.
const KINDS: [(&str, &str); 35] = [
    ("string key for externally tagged enum", "a name with options such as `name: { key: value }`"),
    ("externally tagged enum expected scalar or mapping", "a name, or a name with options such as `name: { key: value }`"),
    ("string or struct variant", "a name, or a name with options such as `name: { key: value }`"),
    ("internally tagged enum", "a map such as `{ key: value }`"),
    ("adjacently tagged enum", "a map such as `{ key: value }`"),
    ("newtype struct", "a value"),
    ("newtype variant", "options such as `{ key: value }`"),
    ("struct variant", "options such as `{ key: value }`"),
    ("tuple variant", "a list"),
    ("unit variant", "a name without options"),
    ("tuple struct", "a list"),
    ("unit struct", "nothing"),
    ("mapping start", "a map such as `{ key: value }`"),
    ("sequence start", "a list such as `[a, b]`"),
    ("string scalar", "one value, such as a text or a number"),
    ("floating point", "a number"),
    ("unit value", "nothing"),
    ("sequence", "a list"),
    ("borrowed string", "a text"),
    ("path string", "a path"),
    ("a sequence", "a list"),
    ("a string", "a text"),
    ("a boolean", "true or false"),
    ("boolean", "the value"),
    ("integer", "the number"),
    ("character", "the text"),
    ("string", "the text"),
    ("struct", "a map such as `{ key: value }`"),
    ("enum", "a name, or a name with options such as `name: { key: value }`"),
    ("option", "a value or null"),
    ("tuple", "a list"),
    ("bool", "true or false"),
    ("null", "nothing"),
    ("unit", "nothing"),
    ("map", "a map"),
];

/// A message of serde, serde_json or a YAML parser without the words of their data model. What is in none of their forms stays as
/// it is.
///
/// # Example
/// ```
/// let message = "invalid type: string \"x\", expected u64 at line 2 column 5";
/// assert_eq!(peft_adapters::wording::plain(message), "expected a whole number from 0, found the text \"x\" at line 2 column 5");
/// ```
#[must_use]
pub fn plain(message: &str) -> String {
    let (text, place) = match message.rfind(" at line ") {
        Some(at) if message[at..].contains(" column ") => message.split_at(at),
        _ => (message, ""),
    };
    said(text) + place
}

fn said(text: &str) -> String {
    for head in ["invalid type: ", "invalid value: "] {
        // A message of its own may lead to serde's.
        let Some((before, rest)) = text.split_once(head) else { continue };
        let Some((found, expected)) = rest.rsplit_once(", expected ") else { continue };
        return format!("{before}expected {}, found {}", kind(expected), found_kind(found));
    }
    if let Some((found, expected)) = text.strip_prefix("invalid length ").and_then(|rest| rest.split_once(", expected ")) {
        return format!("expected {}, found {found} value{}", kind(expected), if found == "1" { "" } else { "s" });
    }
    if let Some(what) = text.strip_prefix("EOF while parsing ") {
        return format!("the text ends in the middle of {}", kind(what));
    }
    if text.contains("did not match any variant of untagged enum") {
        return "the value has none of the forms that are possible here".into();
    }
    if let Some(expected) = text.strip_prefix("expected ") {
        return format!("expected {}", kind(expected));
    }
    match text {
        "invalid floating point" | "invalid f32" | "invalid f64" => "expected a number".into(),
        "externally tagged enum expected scalar or mapping" => format!("expected {}", kind(text)),
        "invalid boolean" => "expected true or false".into(),
        _ if number(text.strip_prefix("invalid ").unwrap_or_default()).is_some() => {
            format!("expected {}", number(&text["invalid ".len()..]).unwrap_or_default())
        }
        "unexpected end of input" => "there is nothing here".into(),
        _ => text.replace("unknown variant", "unknown name"),
    }
}

/// What Rust calls a number.
fn number(name: &str) -> Option<&'static str> {
    match name {
        "u8" | "u16" | "u32" | "u64" | "u128" | "usize" => Some("a whole number from 0"),
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => Some("a whole number"),
        "f32" | "f64" => Some("a number"),
        _ => None,
    }
}

/// What was expected.
fn kind(name: &str) -> String {
    if let Some(known) = number(name) {
        return known.into();
    }
    for size in ["an array of length ", "a tuple of size ", "array of length ", "tuple of size "] {
        if let Some(n) = name.strip_prefix(size) {
            return format!("a list of {n} values");
        }
    }
    // With an article and the type's Rust name behind, such as `struct TrainConfig with 3 elements`.
    let bare = name.strip_prefix("a ").or_else(|| name.strip_prefix("an ")).unwrap_or(name);
    match KINDS.iter().find(|(raw, _)| name == *raw || bare.strip_prefix(raw).is_some_and(|rest| rest.is_empty() || is_type(rest))) {
        Some((_, said)) => (*said).to_string(),
        None => name.to_string(),
    }
}

/// ` TrainConfig`, ` Split::Ways with 2 elements`.
fn is_type(rest: &str) -> bool {
    let name = rest.trim_start().split(' ').next().unwrap_or_default();
    rest.starts_with(' ') && name.starts_with(|c: char| c.is_ascii_uppercase()) && name.chars().all(|c| c.is_alphanumeric() || c == ':')
}

/// What was found: `string "x"`, `integer `3``, `sequence`.
fn found_kind(found: &str) -> String {
    match found {
        "unit value" | "null" | "unit" | "Option value" => "nothing".into(),
        "map" => "a map".into(),
        "sequence" => "a list".into(),
        "newtype struct" | "enum" => "a value".into(),
        "unit variant" | "newtype variant" | "tuple variant" | "struct variant" => "a name".into(),
        _ => match found.split_once(' ') {
            Some(("string" | "character", text)) => format!("the text {text}"),
            Some(("integer", n)) => format!("the number {}", n.trim_matches('`')),
            Some(("boolean", b)) => format!("the value {}", b.trim_matches('`')),
            Some(("floating", rest)) => format!("the number {}", rest.trim_start_matches("point ").trim_matches('`')),
            _ => found.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn no_word_of_the_data_model_is_left() {
        for (raw, said) in [
            ("invalid type: map, expected a string at line 1 column 6", "expected a text, found a map at line 1 column 6"),
            ("invalid type: string \"a, expected b\", expected a sequence", "expected a list, found the text \"a, expected b\""),
            ("invalid type: null, expected struct Manifest with 3 elements", "expected a map such as `{ key: value }`, found nothing"),
            ("invalid type: floating point `1.5`, expected usize", "expected a whole number from 0, found the number 1.5"),
            ("invalid value: integer `-1`, expected u32", "expected a whole number from 0, found the number -1"),
            ("invalid length 1, expected an array of length 2", "expected a list of 2 values, found 1 value"),
            ("EOF while parsing an object at line 3 column 0", "the text ends in the middle of an object at line 3 column 0"),
            ("unknown variant `x`, expected `a` or `b`", "unknown name `x`, expected `a` or `b`"),
            ("data did not match any variant of untagged enum X", "the value has none of the forms that are possible here"),
            ("expected mapping start", "expected a map such as `{ key: value }`"),
            ("invalid boolean", "expected true or false"),
            ("the file is empty", "the file is empty"),
            ("expected a mapping of names", "expected a mapping of names"),
        ] {
            assert_eq!(plain(raw), said);
        }
    }
}

//! Parquet's values as JSON, and the class names of a file's metadata.

use parquet::basic::{ConvertedType, LogicalType, Type as Physical};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use crate::data::columns::Row;

/// A value as a JSONL table would have it; bytes that are no text, and times, are nothing that a column could mean.
pub(super) fn json(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(b) => b.into(),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) | Field::Date(n) | Field::TimeMillis(n) => n.into(),
        Field::Long(n) | Field::TimeMicros(n) | Field::TimestampMillis(n) | Field::TimestampMicros(n) => n.into(),
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        Field::Float16(n) => float(f64::from(n)),
        // As it would be written, so that 0.1 stays 0.1.
        Field::Float(n) => float(n.to_string().parse().unwrap_or(f64::from(n))),
        Field::Double(n) => float(n),
        Field::Decimal(_) => Value::String(field.to_string()),
        Field::Str(s) => s.into(),
        Field::Bytes(b) => std::str::from_utf8(b.data()).map_or(Value::Null, Into::into),
        Field::Group(row) => Value::Object(object(row)),
        Field::ListInternal(list) => list.elements().iter().cloned().map(json).collect(),
        Field::MapInternal(map) => {
            let pair = |(k, v): &(Field, Field)| (json(k.clone()).as_str().unwrap_or_default().to_string(), json(v.clone()));
            Value::Object(map.entries().iter().map(pair).collect())
        }
    }
}

/// Infinite and undefined numbers stay visible, so that they can be refused.
fn float(n: f64) -> Value {
    Number::from_f64(n).map_or_else(|| Value::String(n.to_string()), Value::Number)
}

pub(super) fn object(row: parquet::record::Row) -> Row {
    row.into_columns().into_iter().map(|(name, field)| (name, json(field))).collect()
}

/// The features of `datasets` in a file's metadata: `{"info": {"features": {column: {"_type": "ClassLabel", …}}}}`.
pub(super) fn features(text: Option<&str>) -> Map<String, Value> {
    let info: Option<Value> = text.and_then(|t| crate::json::from_slice(t.as_bytes()).ok());
    match info.as_ref().and_then(|i| i.pointer("/info/features")) {
        Some(Value::Object(features)) => features.clone(),
        _ => Map::new(),
    }
}

/// What a column's cells are, lists of these included; nothing where all are empty.
pub(super) fn kind(field: &Type) -> Option<&'static str> {
    if field.is_group() {
        return kind(field.get_fields().first()?);
    }
    match (field.get_basic_info().logical_type_ref(), field.get_basic_info().converted_type()) {
        (Some(LogicalType::Unknown), _) => return None,
        (Some(LogicalType::Date), _) | (_, ConvertedType::DATE) => return Some("dates"),
        (Some(LogicalType::Timestamp { .. }), _) | (_, ConvertedType::TIMESTAMP_MILLIS | ConvertedType::TIMESTAMP_MICROS) => {
            return Some("timestamps");
        }
        (Some(LogicalType::Time { .. }), _) | (_, ConvertedType::TIME_MILLIS | ConvertedType::TIME_MICROS) => return Some("times of day"),
        (Some(LogicalType::Float16), _) => return Some("numbers with a fraction"),
        (Some(LogicalType::Decimal { .. }), _) | (_, ConvertedType::DECIMAL) => return Some("decimal numbers"),
        _ => {}
    }
    Some(match field.get_physical_type() {
        Physical::BOOLEAN => "truth values",
        Physical::INT32 | Physical::INT64 => "whole numbers",
        Physical::FLOAT | Physical::DOUBLE => "numbers with a fraction",
        // What Spark and Impala write for a timestamp.
        Physical::INT96 => "timestamps",
        Physical::BYTE_ARRAY | Physical::FIXED_LEN_BYTE_ARRAY => "texts",
    })
}

/// The names of a `ClassLabel`, or of a list of them.
pub(super) fn class_names(feature: &Value) -> Option<Vec<String>> {
    if feature.get("_type").and_then(Value::as_str) == Some("ClassLabel") {
        return match feature.get("names")? {
            Value::Array(names) => names.iter().map(|n| n.as_str().map(str::to_string)).collect(),
            // As the YAML head of a dataset card numbers them.
            Value::Object(names) => (0..names.len()).map(|i| Some(names.get(&i.to_string())?.as_str()?.to_string())).collect(),
            _ => None,
        };
    }
    class_names(feature.get("feature").or_else(|| feature.get(0))?)
}

/// Puts names in the place of class numbers; -1 stands for none, as in `datasets`. What no class has is handed back.
pub(super) fn name_classes(value: &mut Value, names: &[String]) -> Result<(), String> {
    match value {
        Value::Number(n) => match n.as_i64() {
            Some(-1) => *value = Value::Null,
            Some(i) => {
                let name = usize::try_from(i).ok().and_then(|i| names.get(i)).ok_or_else(|| i.to_string())?;
                *value = Value::String(name.clone());
            }
            None => return Err(n.to_string()),
        },
        Value::Array(items) => {
            items.iter_mut().try_for_each(|item| name_classes(item, names))?;
            items.retain(|item| !item.is_null());
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn class_names_in_each_form_that_datasets_wrote() {
        let names = Some(vec!["a".to_string(), "b".to_string()]);
        let label = json!({"_type": "ClassLabel", "names": ["a", "b"]});
        assert_eq!(class_names(&label), names);
        assert_eq!(class_names(&json!({"_type": "ClassLabel", "names": {"1": "b", "0": "a"}})), names);
        assert_eq!(class_names(&json!({"_type": "List", "feature": label})), names);
        assert_eq!(class_names(&json!({"_type": "Sequence", "feature": label, "length": -1})), names);
        assert_eq!(class_names(&json!([label])), names);
        assert_eq!(class_names(&json!({"_type": "Value", "dtype": "int64"})), None);
    }

    #[test]
    fn numbers_become_names() {
        let names = ["a".to_string(), "b".to_string()];
        for (from, to) in
            [(json!(1), json!("b")), (json!(-1), json!(null)), (json!([1, -1, 0]), json!(["b", "a"])), (json!("x"), json!("x"))]
        {
            let mut value = from;
            name_classes(&mut value, &names).unwrap();
            assert_eq!(value, to);
        }
        assert_eq!(name_classes(&mut json!(2), &names), Err("2".into()));
        assert_eq!(name_classes(&mut json!([0, -2]), &names), Err("-2".into()));
    }
}

//! What a finished machine holds, as tensors or as plain data.

use candle_core::DType;

use super::{Machine, Outcome, Rebuilt, Value};

/// Modules inside modules, and dicts inside dicts.
const MAX_NESTING: usize = 32;

/// Attributes of a module that are looked at; one that is shared counts each time.
const MAX_VISITED: usize = 1 << 18;

/// Bytes of names and texts; one that is shared counts each time.
const MAX_TEXT: usize = 16 << 20;

/// What walks have taken so far.
#[derive(Default)]
pub(super) struct Budget {
    visited: usize,
    text: usize,
}

impl Budget {
    /// Shared and cyclic containers are walked each time they are met, so walks are bounded.
    fn visit(&mut self, depth: usize) -> Outcome<()> {
        self.visited += 1;
        if depth > MAX_NESTING || self.visited > MAX_VISITED {
            return Err("it is nested too deeply".into());
        }
        Ok(())
    }

    fn text(&mut self, bytes: usize) -> Outcome<()> {
        self.text += bytes;
        if self.text > MAX_TEXT {
            return Err(format!("its names and texts have more than {MAX_TEXT} bytes"));
        }
        Ok(())
    }
}

/// Plain data around tensors, as training scripts save it.
#[derive(Debug)]
pub(in crate::clip::weights) enum Node {
    /// With the keys that are strings.
    Map(Vec<(String, Node)>),
    Tensor(Rebuilt),
    Int(i64),
    Float(f64),
    Text(String),
    /// Lists and anything else.
    Other,
}

impl Machine<'_> {
    /// The top dict's tensors; training scripts put it under `state_dict`.
    pub(super) fn tensors(&self, top: &Value) -> Outcome<Vec<Rebuilt>> {
        let mut budget = Budget::default();
        let at = match top {
            Value::Dict(at) => at,
            Value::Object(_) => {
                let mut found = Vec::new();
                self.attributes("", top, 0, &mut budget, &mut found)?;
                return Ok(found);
            }
            _ => return Err("it holds no state dict".into()),
        };
        let dict = self.dicts.get(*at).ok_or("a dict is missing")?;
        let inner = dict.iter().find_map(|(key, value)| match (key, value) {
            (Value::Text(k), Value::Dict(at)) if &**k == "state_dict" => self.dicts.get(*at),
            _ => None,
        });
        inner.unwrap_or(dict).iter().map(|(key, value)| rebuilt(key, value, &mut budget)).collect()
    }

    /// The tensors among an object's attributes, and its submodules'.
    fn attributes(&self, path: &str, object: &Value, depth: usize, budget: &mut Budget, found: &mut Vec<Rebuilt>) -> Outcome<()> {
        let Value::Object(at) = object else { return Ok(()) };
        let Some(attributes) = self.objects.get(*at).copied().flatten().and_then(|dict| self.dicts.get(dict)) else { return Ok(()) };
        for (key, value) in attributes {
            budget.visit(depth)?;
            let Value::Text(key) = key else { continue };
            budget.text(path.len() + key.len())?;
            let name = if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
            match value {
                Value::Tensor(_) => found.push(rebuilt(&Value::Text(name.into()), value, budget)?),
                _ => self.attributes(&name, value, depth + 1, budget, found)?,
            }
        }
        Ok(())
    }

    pub(super) fn node(&self, name: &str, value: &Value, depth: usize, budget: &mut Budget) -> Outcome<Node> {
        budget.visit(depth)?;
        Ok(match value {
            Value::Dict(at) => {
                let mut map = Vec::new();
                for (key, value) in self.dicts.get(*at).ok_or("a dict is missing")? {
                    if let Value::Text(key) = key {
                        budget.text(key.len())?;
                        map.push((key.to_string(), self.node(key, value, depth + 1, budget)?));
                    }
                }
                Node::Map(map)
            }
            Value::Tensor(_) => Node::Tensor(rebuilt(&Value::Text(name.into()), value, budget)?),
            Value::Int(n) => Node::Int(*n),
            Value::Float(x) => Node::Float(*x),
            Value::Text(text) => {
                budget.text(text.len())?;
                Node::Text(text.to_string())
            }
            _ => Node::Other,
        })
    }
}

fn rebuilt(key: &Value, value: &Value, budget: &mut Budget) -> Outcome<Rebuilt> {
    let Value::Text(name) = key else { return Err("a tensor's name is no string".into()) };
    let Value::Tensor(tensor) = value else { return Err(format!("`{}` is no tensor", name.chars().take(80).collect::<String>())) };
    budget.text(name.len())?;
    Ok(Rebuilt {
        name: name.to_string(),
        key: tensor.storage.key.clone(),
        dtype: dtype(&tensor.storage.kind),
        offset: tensor.offset,
        shape: tensor.shape.clone(),
        strides: tensor.strides.clone(),
    })
}

fn dtype(storage: &str) -> std::result::Result<DType, String> {
    Ok(match storage {
        "DoubleStorage" => DType::F64,
        "FloatStorage" => DType::F32,
        "HalfStorage" => DType::F16,
        "BFloat16Storage" => DType::BF16,
        "LongStorage" => DType::I64,
        "IntStorage" => DType::I32,
        "ShortStorage" => DType::I16,
        "ByteStorage" | "BoolStorage" => DType::U8,
        other => return Err(other.to_string()),
    })
}

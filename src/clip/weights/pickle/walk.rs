//! What a finished machine holds, as tensors or as plain data.

use candle_core::DType;

use super::{Machine, Outcome, Rebuilt, Value};

/// Modules inside modules, and dicts inside dicts.
const MAX_NESTING: usize = 32;

/// Attributes of a module that are looked at; one that is shared counts each time.
const MAX_VISITED: usize = 1 << 18;

/// Bytes of names and texts; one that is shared counts each time.
const MAX_TEXT: usize = 16 << 20;

/// Where training scripts put the weights, the best known first; an average of the weights only where there is nothing else.
const WRAPPERS: [&str; 14] = [
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "clip",
    "clip_model",
    "checkpoint",
    "params",
    "weights",
    "state_dict_ema",
    "model_ema",
    "ema",
];

/// What holds tensors of the training, not of the model.
const NEVER: [&str; 4] = ["optim", "sched", "scaler", "loss"];

/// A state dict and what was found around it.
#[derive(Debug, Default)]
pub(in crate::clip::weights) struct StateDict {
    pub(in crate::clip::weights) tensors: Vec<Rebuilt>,
    /// Names of plain values among the tensors.
    pub(in crate::clip::weights) scalars: Vec<String>,
    /// What was taken and what was left out, as sentences.
    pub(in crate::clip::weights) notes: Vec<String>,
}

/// Wrappers in wrappers that are looked through.
const WRAPPED: usize = 3;

fn is_named_tensor(pair: &(Value, Value)) -> bool {
    matches!(pair, (Value::Text(_), Value::Tensor(_)))
}

/// The key of what is more than a number or a text.
fn left_out(key: &Value, value: &Value) -> Option<String> {
    match (key, value) {
        (Value::Text(key), Value::Dict(_) | Value::Object(_) | Value::Tensor(_)) => Some(format!("`{}`", short(key))),
        (Value::Text(key), Value::Foreign(name)) => Some(foreign(key, name)),
        _ => None,
    }
}

/// A key whose value is made of something that is not known, and of what.
fn foreign(key: &str, name: &str) -> String {
    format!("`{}` (`{}`, which is not read)", short(key), short(name))
}

fn short(key: &str) -> String {
    key.chars().take(80).collect()
}

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
    /// The tensors of a state dict, wherever a training script put it.
    pub(super) fn tensors(&self, top: &Value) -> Outcome<StateDict> {
        let mut budget = Budget::default();
        match top {
            Value::Dict(at) => self.state_dict(*at, &mut budget),
            Value::Object(_) => {
                let mut found = StateDict::default();
                self.attributes("", top, 0, &mut budget, &mut found.tensors)?;
                Ok(found)
            }
            Value::Foreign(name) => Err(format!("it holds a `{}` and no state dict: save `model.state_dict()` in its place", short(name))),
            _ => Err("it holds no state dict".into()),
        }
    }

    fn state_dict(&self, top: usize, budget: &mut Budget) -> Outcome<StateDict> {
        let (mut at, mut found) = (top, StateDict::default());
        for depth in 0.. {
            budget.visit(depth)?;
            let own = self.count(at);
            let mut inner = self.candidates(at, budget)?;
            // The first of those that are equally well known, in the file's order.
            inner.sort_by_key(|(rank, ..)| *rank);
            let Some(&(rank, taken, next)) = inner.first() else { break };
            // Tensors beside a wrapper, such as a generator's state, are fewer than those of the weights.
            if own > 0 && (rank == WRAPPERS.len() || self.reach(next, WRAPPED, budget)? <= own) {
                break;
            }
            let others: Vec<String> = self.dicts[at]
                .iter()
                .filter(|(key, _)| !matches!(key, Value::Text(key) if **key == *taken))
                .filter_map(|(key, value)| left_out(key, value))
                .collect();
            if !others.is_empty() {
                found.notes.push(format!("the weights under `{taken}` are used; beside them are {}", others.join(", ")));
            }
            at = next;
        }
        let dict = self.dicts.get(at).ok_or("a dict is missing")?;
        let tensors = self.holds_tensors(at);
        for (key, value) in dict {
            match (key, value) {
                (_, Value::Tensor(_)) => found.tensors.push(rebuilt(key, value, budget)?),
                // OpenAI's dict says its sizes in integers.
                (Value::Text(key), Value::Int(_) | Value::Float(_) | Value::Bool | Value::None | Value::Text(_)) if tensors => {
                    budget.text(key.len())?;
                    found.scalars.push(key.to_string());
                }
                (Value::Text(key), Value::Dict(_) | Value::List) if tensors => {
                    budget.text(key.len())?;
                    found.notes.push(format!("`{}` stands among the weights and is left out", short(key)));
                }
                (Value::Text(key), Value::Foreign(name)) if tensors => {
                    budget.text(key.len())?;
                    found.notes.push(format!("{} stands among the weights and is left out", foreign(key, name)));
                }
                _ => _ = rebuilt(key, value, budget)?,
            }
        }
        Ok(found)
    }

    fn holds_tensors(&self, at: usize) -> bool {
        self.dicts.get(at).is_some_and(|dict| dict.iter().any(is_named_tensor))
    }

    fn count(&self, at: usize) -> usize {
        self.dicts.get(at).map_or(0, |dict| dict.iter().filter(|pair| is_named_tensor(pair)).count())
    }

    /// The most tensors in one dict, of this one and those that it may lead to.
    fn reach(&self, at: usize, depth: usize, budget: &mut Budget) -> Outcome<usize> {
        let mut most = self.count(at);
        if depth > 0 {
            for (_, _, inner) in self.candidates(at, budget)? {
                most = most.max(self.reach(inner, depth - 1, budget)?);
            }
        }
        Ok(most)
    }

    /// The dicts inside a dict that may lead to weights: how well their key is known, the key, the dict.
    fn candidates(&self, at: usize, budget: &mut Budget) -> Outcome<Vec<(usize, &str, usize)>> {
        let mut found = Vec::new();
        for (key, value) in self.dicts.get(at).ok_or("a dict is missing")? {
            budget.visit(0)?;
            let (Value::Text(key), Value::Dict(inner)) = (key, value) else { continue };
            let lower = key.to_lowercase();
            if NEVER.iter().any(|part| lower.contains(part)) {
                continue;
            }
            let rank = WRAPPERS.iter().position(|w| **w == *lower);
            if rank.is_some() || self.holds_tensors(*inner) {
                found.push((rank.unwrap_or(WRAPPERS.len()), &**key, *inner));
            }
        }
        Ok(found)
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

//! A pickle machine that can rebuild tensors and nothing else.
//!
//! A pickle is a program; Python runs whatever it names. This machine knows the opcodes of plain
//! data and four names of PyTorch. Whatever else is named, such as the `argparse.Namespace` that a training script
//! saves beside the weights, is a foreign thing: what is made of it, put into it or called on it is the same foreign thing,
//! and nothing is ever called. Names that only attacks have (`posix.system`) are refused all the same. The classes of a
//! TorchScript archive (`__torch__.…`) are opaque: their objects are bags of attributes, their code is not looked at.
//! Values live in arenas, so hostile nesting cannot exhaust the stack. Opcodes of one byte make values of many, and what is
//! remembered can be used again and again, so numbers of values, dimensions and the bytes of names are bounded.

mod walk;

use std::collections::HashMap;
use std::rc::Rc;

use candle_core::DType;

pub(super) use walk::{Node, StateDict};

/// Why a pickle was refused.
pub(super) type Refusal = String;

type Outcome<T> = std::result::Result<T, Refusal>;

/// A tensor as the pickle describes it.
#[derive(Debug, Clone)]
pub(super) struct Rebuilt {
    pub(super) name: String,
    /// The name of the storage's record.
    pub(super) key: Rc<str>,
    pub(super) dtype: std::result::Result<DType, String>,
    /// In elements.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

#[derive(Debug, Clone)]
struct Storage {
    kind: Rc<str>,
    key: Rc<str>,
}

#[derive(Debug, Clone)]
struct Strided {
    storage: Storage,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// Containers are indices into the machine's arenas.
#[derive(Debug, Clone)]
enum Value {
    None,
    Bool,
    Int(i64),
    Float(f64),
    Text(Rc<str>),
    Tuple(Rc<Vec<Value>>, usize),
    List,
    Dict(usize),
    Object(usize),
    Global(Callable),
    Storage(Rc<Storage>),
    Tensor(Rc<Strided>),
    /// Whatever came of a name that is not known.
    Foreign(Rc<str>),
}

#[derive(Debug, Clone)]
enum Callable {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    StorageType(Rc<str>),
    /// A class or function of TorchScript, which is never called.
    Opaque,
    /// Anything else, which is never called either.
    Foreign(Rc<str>),
}

/// What no checkpoint has a use for: modules, and functions of Python itself.
const ATTACKS: [&str; 25] = [
    "pickle",
    "cPickle",
    "_pickle",
    "os",
    "posix",
    "nt",
    "sys",
    "subprocess",
    "commands",
    "pty",
    "shutil",
    "socket",
    "runpy",
    "importlib",
    "ctypes",
    "code",
    "pdb",
    "webbrowser",
    "multiprocessing",
    "asyncio",
    "threading",
    "pip",
    "tempfile",
    "requests",
    "urllib",
];
const BUILTINS: [&str; 8] = ["eval", "exec", "execfile", "compile", "open", "input", "breakpoint", "__import__"];

/// Whether a pickle that names this wants to do something.
fn is_attack(module: &str, name: &str) -> bool {
    let root = module.split('.').next().unwrap_or_default();
    ATTACKS.contains(&root) || (matches!(root, "builtins" | "__builtin__" | "__builtins__") && BUILTINS.contains(&name))
}

/// Tuples deeper than any that PyTorch writes.
const MAX_DEPTH: usize = 16;

/// Values on the stack, in memory and in dicts, each of some 32 bytes; a CLIP's pickle has some 20 000.
const MAX_VALUES: usize = 1 << 20;

/// Dimensions of a tensor.
const MAX_RANK: usize = 8;

#[derive(Default)]
struct Machine<'a> {
    rest: &'a [u8],
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    dicts: Vec<Vec<(Value, Value)>>,
    /// The dict of attributes of each object.
    objects: Vec<Option<usize>>,
    /// Pairs in all dicts.
    pairs: usize,
}

/// The tensors of a pickled state dict, or of a TorchScript module under their attributes' paths.
pub(super) fn state_dict(pickle: &[u8]) -> Outcome<StateDict> {
    let (machine, top) = run(pickle)?;
    machine.tensors(&top)
}

/// The whole content.
pub(super) fn tree(pickle: &[u8]) -> Outcome<Node> {
    let (machine, top) = run(pickle)?;
    machine.node("", &top, 0, &mut walk::Budget::default())
}

fn run(pickle: &[u8]) -> Outcome<(Machine<'_>, Value)> {
    let mut machine = Machine { rest: pickle, ..Machine::default() };
    while machine.step()? {
        if machine.size() > MAX_VALUES {
            return Err(format!("it has more than {MAX_VALUES} values"));
        }
    }
    let top = machine.pop()?;
    Ok((machine, top))
}

impl Machine<'_> {
    fn size(&self) -> usize {
        self.stack.len() + self.marks.len() + self.memo.len() + self.dicts.len() + self.objects.len() + self.pairs
    }

    /// One opcode; false after the last.
    fn step(&mut self) -> Outcome<bool> {
        let op = self.take::<1>()?[0];
        match op {
            // The protocol's number and a frame's length.
            0x80 => _ = self.take::<1>()?,
            0x95 => _ = self.take::<8>()?,
            b'.' => return Ok(false),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'}' => self.new_dict(),
            b']' | 0x8f => self.stack.push(Value::List),
            b')' => self.tuple(Vec::new())?,
            b't' => {
                let items = self.since_mark()?;
                self.tuple(items)?;
            }
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(op - 0x84))?;
                self.tuple(items)?;
            }
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.memo(op)?,
            b'c' | 0x93 => self.global(op)?,
            b'Q' => self.persistent()?,
            b'R' => self.reduce()?,
            0x81 => self.new_object(1)?,
            0x92 => self.new_object(2)?,
            b'b' => self.build()?,
            b's' | b'u' | b'a' | b'e' | 0x90 => self.fill(op)?,
            0x91 => {
                self.since_mark()?;
                self.stack.push(Value::List);
            }
            _ => self.scalar(op)?,
        }
        Ok(true)
    }

    fn take<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or("it ends too early")?;
        self.rest = rest;
        Ok(*head)
    }

    fn take_slice(&mut self, len: u64) -> Outcome<&[u8]> {
        let len = usize::try_from(len).ok().filter(|n| *n <= self.rest.len()).ok_or("it ends too early")?;
        let (head, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(head)
    }

    fn pop(&mut self) -> Outcome<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("an opcode lacks its operand".into());
        }
        self.stack.pop().ok_or_else(|| "an opcode lacks its operand".into())
    }

    fn pop_many(&mut self, count: usize) -> Outcome<Vec<Value>> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Outcome<Vec<_>>>()?;
        items.reverse();
        Ok(items)
    }

    fn since_mark(&mut self) -> Outcome<Vec<Value>> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn tuple(&mut self, items: Vec<Value>) -> Outcome<()> {
        let depth = items.iter().map(|v| if let Value::Tuple(_, d) = v { d + 1 } else { 0 }).max().unwrap_or(0);
        if depth > MAX_DEPTH {
            return Err("tuples are nested too deeply".into());
        }
        self.stack.push(Value::Tuple(Rc::new(items), depth));
        Ok(())
    }

    fn new_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    fn memo(&mut self, op: u8) -> Outcome<()> {
        let index = match op {
            b'q' | b'h' => u32::from(self.take::<1>()?[0]),
            b'r' | b'j' => u32::from_le_bytes(self.take()?),
            _ => self.memo.len() as u32,
        };
        if matches!(op, b'h' | b'j') {
            let value = self.memo.get(&index).ok_or("it recalls what it never stored")?;
            self.stack.push(value.clone());
        } else {
            let value = self.stack.last().ok_or("an opcode lacks its operand")?;
            self.memo.insert(index, value.clone());
        }
        Ok(())
    }

    fn scalar(&mut self, op: u8) -> Outcome<()> {
        let value = match op {
            b'N' => Value::None,
            0x88 | 0x89 => Value::Bool,
            b'K' => Value::Int(i64::from(self.take::<1>()?[0])),
            b'M' => Value::Int(i64::from(u16::from_le_bytes(self.take()?))),
            b'J' => Value::Int(i64::from(i32::from_le_bytes(self.take()?))),
            0x8a => self.long()?,
            b'G' => Value::Float(f64::from_be_bytes(self.take()?)),
            0x8c | b'U' | b'X' | 0x8d => self.text(op)?,
            b'C' | b'B' | 0x8e => self.bytes(op)?,
            _ => return Err(format!("it uses opcode 0x{op:02x}, which no saved state dict needs")),
        };
        self.stack.push(value);
        Ok(())
    }

    fn text(&mut self, op: u8) -> Outcome<Value> {
        let len = match op {
            b'X' => u64::from(u32::from_le_bytes(self.take()?)),
            0x8d => u64::from_le_bytes(self.take()?),
            _ => u64::from(self.take::<1>()?[0]),
        };
        let bytes = self.take_slice(len)?;
        let text = std::str::from_utf8(bytes).map_err(|_| "a string is not UTF-8")?;
        Ok(Value::Text(text.into()))
    }

    /// Bytes say nothing of tensors.
    fn bytes(&mut self, op: u8) -> Outcome<Value> {
        let len = match op {
            b'C' => u64::from(self.take::<1>()?[0]),
            b'B' => u64::from(u32::from_le_bytes(self.take()?)),
            _ => u64::from_le_bytes(self.take()?),
        };
        self.take_slice(len)?;
        Ok(Value::None)
    }

    /// Numbers of more than 64 bits, such as states of generators, say nothing of tensors.
    fn long(&mut self) -> Outcome<Value> {
        let len = self.take::<1>()?[0];
        let bytes = self.take_slice(u64::from(len))?;
        if bytes.len() > 8 {
            return Ok(Value::None);
        }
        let fill = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [fill; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        Ok(Value::Int(i64::from_le_bytes(wide)))
    }

    fn global(&mut self, op: u8) -> Outcome<()> {
        let (module, name) = if op == b'c' {
            (self.line()?, self.line()?)
        } else {
            let [module, name] = [self.pop()?, self.pop()?];
            match (name, module) {
                (Value::Text(m), Value::Text(n)) => (m.to_string(), n.to_string()),
                _ => return Err("it names a function by something that is no string".into()),
            }
        };
        let callable = match (module.as_str(), name.as_str()) {
            ("torch._utils", "_rebuild_tensor_v2") => Callable::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Callable::RebuildParameter,
            ("collections", "OrderedDict") => Callable::OrderedDict,
            ("torch" | "torch.storage", kind) if kind.ends_with("Storage") => Callable::StorageType(kind.into()),
            (module, _) if module == "__torch__" || module.starts_with("__torch__.") || module == "torch.jit._pickle" => Callable::Opaque,
            (module, name) if is_attack(module, name) => {
                return Err(format!("it would call `{module}.{name}`, which has nothing to do with tensors"));
            }
            (module, name) => Callable::Foreign(format!("{module}.{name}").into()),
        };
        self.stack.push(Value::Global(callable));
        Ok(())
    }

    fn line(&mut self) -> Outcome<String> {
        let end = self.rest.iter().position(|b| *b == b'\n').ok_or("it ends too early")?;
        let (line, rest) = self.rest.split_at(end);
        self.rest = rest.get(1..).unwrap_or_default();
        Ok(String::from_utf8_lossy(line).into_owned())
    }

    /// `("storage", type, key, device, elements)`.
    fn persistent(&mut self) -> Outcome<()> {
        let Value::Tuple(items, _) = self.pop()? else {
            return Err("a storage reference is malformed".into());
        };
        match items.as_slice() {
            [Value::Text(tag), Value::Global(Callable::StorageType(kind)), Value::Text(key), ..] if &**tag == "storage" => {
                let storage = Storage { kind: kind.clone(), key: key.clone() };
                self.stack.push(Value::Storage(Rc::new(storage)));
                Ok(())
            }
            _ => Err("a storage reference is malformed".into()),
        }
    }

    fn reduce(&mut self) -> Outcome<()> {
        let args = self.pop()?;
        let (callable, args) = match (self.pop()?, args) {
            (Value::Global(Callable::Foreign(name)) | Value::Foreign(name), _) => {
                self.stack.push(Value::Foreign(name));
                return Ok(());
            }
            (Value::Global(callable), Value::Tuple(args, _)) => (callable, args),
            _ => return Err("it calls something that is no function".into()),
        };
        match (callable, args.as_slice()) {
            (Callable::OrderedDict, []) => self.new_dict(),
            (Callable::Opaque, _) => self.stack.push(Value::None),
            (Callable::RebuildParameter, [Value::Tensor(tensor), ..]) => self.stack.push(Value::Tensor(tensor.clone())),
            (Callable::RebuildTensor, [Value::Storage(storage), Value::Int(offset), shape, strides, ..]) => {
                let offset = usize::try_from(*offset).map_err(|_| "a tensor has a negative offset")?;
                let (shape, strides) = (sizes(shape)?, sizes(strides)?);
                if shape.len() != strides.len() {
                    return Err("a tensor has more dimensions than strides".into());
                }
                let tensor = Strided { storage: (**storage).clone(), offset, shape, strides };
                self.stack.push(Value::Tensor(Rc::new(tensor)));
            }
            (callable, _) => return Err(format!("it calls {callable:?} with unexpected arguments")),
        }
        Ok(())
    }

    fn new_object(&mut self, arguments: usize) -> Outcome<()> {
        self.pop_many(arguments)?;
        match self.pop()? {
            Value::Global(Callable::Foreign(name)) | Value::Foreign(name) => self.stack.push(Value::Foreign(name)),
            Value::Global(Callable::Opaque) => {
                self.stack.push(Value::Object(self.objects.len()));
                self.objects.push(None);
            }
            _ => return Err("it makes an object of something that is no class of a TorchScript archive".into()),
        }
        Ok(())
    }

    /// Attributes of a dict (`_metadata`) say nothing about tensors.
    fn build(&mut self) -> Outcome<()> {
        let state = self.pop()?;
        match (self.stack.last(), state) {
            (Some(Value::Dict(_) | Value::Foreign(_)), _) => Ok(()),
            (Some(Value::Object(at)), Value::Dict(attributes)) => {
                *self.objects.get_mut(*at).ok_or("an object is missing")? = Some(attributes);
                Ok(())
            }
            // Packed parameters and the like; there are none in CLIP.
            (Some(Value::Object(_)), _) => Ok(()),
            _ => Err("it sets the state of something that is no dict".into()),
        }
    }

    fn fill(&mut self, op: u8) -> Outcome<()> {
        let items = match op {
            b's' => self.pop_many(2)?,
            b'a' => self.pop_many(1)?,
            _ => self.since_mark()?,
        };
        match (op, self.stack.last()) {
            (b'a' | b'e' | 0x90, Some(Value::List)) | (_, Some(Value::Foreign(_))) => Ok(()),
            (b's' | b'u', Some(Value::Dict(at))) if items.len() % 2 == 0 => {
                let dict = self.dicts.get_mut(*at).ok_or("a dict is missing")?;
                let mut items = items.into_iter();
                while let (Some(key), Some(value)) = (items.next(), items.next()) {
                    dict.push((key, value));
                    self.pairs += 1;
                }
                Ok(())
            }
            _ => Err("it fills something that is no container".into()),
        }
    }
}

fn sizes(value: &Value) -> Outcome<Vec<usize>> {
    let Value::Tuple(items, _) = value else { return Err("a tensor's shape is no tuple".into()) };
    if items.len() > MAX_RANK {
        return Err(format!("a tensor has {} dimensions, expected at most {MAX_RANK}", items.len()));
    }
    items
        .iter()
        .map(|v| match v {
            Value::Int(n) => usize::try_from(*n).map_err(|_| "a tensor has a negative size".into()),
            _ => Err("a tensor's size is no number".into()),
        })
        .collect()
}

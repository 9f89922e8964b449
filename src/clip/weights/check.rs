//! Which of a file's tensors make up the model, and whether they do.

use std::collections::{BTreeMap, HashMap};

use candle_core::DType;

use super::container::{Container, Entry};
use super::names;
use crate::clip::config::ClipConfig;
use crate::clip::foreign::Interpolation;
use crate::clip::source::Source;
use crate::error::{Error, Result};

/// How many tensors of a kind an error lists.
const LISTED: usize = 8;

/// A tensor of the model and where it is.
#[derive(Debug)]
pub(super) struct Chosen<'a> {
    /// The HF name.
    pub(super) name: String,
    pub(super) dtype: DType,
    /// The model's, which may differ from the file's in dimensions of one.
    pub(super) shape: Vec<usize>,
    pub(super) container: &'a Container<'a>,
    pub(super) entry: &'a Entry,
    /// How to come from the file's shape to the model's, for positional embeddings.
    pub(super) resize: Option<Interpolation>,
}

/// What is wrong with a set of tensors, by kind.
#[derive(Default)]
struct Problems(BTreeMap<&'static str, Vec<String>>);

impl Problems {
    fn add(&mut self, kind: &'static str, what: impl Into<String>) {
        self.0.entry(kind).or_default().push(what.into());
    }

    fn into_result(self, source: &Source) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let lines: Vec<String> = self.0.iter().map(|(kind, tensors)| format!("{} {kind}: {}", tensors.len(), list(tensors))).collect();
        Err(Error::input(source, format!("the weights do not fit config.json\n  {}", lines.join("\n  ")))
            .hint("the files of a base belong together; the config must describe these weights"))
    }
}

/// The first few, and how many more.
pub(super) fn list<T: AsRef<str>>(items: &[T]) -> String {
    let mut text = items.iter().take(LISTED).map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
    if items.len() > LISTED {
        text.push_str(&format!(" and {} more", items.len() - LISTED));
    }
    text
}

/// Finds each tensor of `config` under one of its names. Tensors of other modules, which a training script has saved with the model,
/// are told of; those of the model that the configuration does not have are refused.
pub(super) fn choose<'a>(
    source: &Source,
    containers: &'a [Container<'a>],
    config: &ClipConfig,
) -> Result<(Vec<Chosen<'a>>, Option<String>)> {
    let mut problems = Problems::default();
    let mut found: HashMap<String, (&Container<'_>, &Entry)> = HashMap::new();
    for (container, entry) in containers.iter().flat_map(|c| c.entries.iter().map(move |e| (c, e))) {
        let Some(name) = names::canonical(&entry.name) else { continue };
        if let Some((_, other)) = found.get(&name) {
            problems.add("present twice", format!("{name} (as {} and {})", other.name, entry.name));
        } else {
            found.insert(name, (container, entry));
        }
    }
    let mut chosen = Vec::new();
    for (name, shape) in config.tensors() {
        let Some((container, entry)) = found.remove(&name) else {
            problems.add("missing", name);
            continue;
        };
        let resize = source.interpolation().filter(|_| resizable(&name, &shape, &entry.shape));
        if resize.is_none() && !same_shape(&name, &shape, &entry.shape) {
            problems.add("misshapen", format!("{name} {:?} instead of {shape:?}", entry.shape));
            continue;
        }
        match &entry.dtype {
            Ok(dtype) if is_float(*dtype) => chosen.push(Chosen { name, dtype: *dtype, shape, container, entry, resize }),
            Ok(dtype) => problems.add("not in floating point", format!("{name} ({})", dtype.as_str())),
            Err(dtype) => problems.add("of an unsupported type", format!("{name} ({dtype})")),
        }
    }
    let (mut unexpected, mut beside): (Vec<String>, Vec<String>) = found.into_keys().partition(|name| names::is_of_model(name));
    unexpected.sort_unstable();
    for name in unexpected {
        problems.add("unexpected", name);
    }
    problems.into_result(source)?;
    beside.sort_unstable();
    let note = || format!("{source}: {} tensors beside the CLIP model are left out: {}", beside.len(), list(&beside));
    let note = (!beside.is_empty()).then(note);
    Ok((chosen, note))
}

/// The logit scale is a scalar that some save as a vector of one.
fn same_shape(name: &str, expected: &[usize], found: &[usize]) -> bool {
    expected == found || (name == "logit_scale" && found == [1])
}

/// Tables of positions of the same width; an image's are a class token and a square.
fn resizable(name: &str, expected: &[usize], found: &[usize]) -> bool {
    let ([rows, width], [old, same]) = (expected, found) else { return false };
    let square = |n: usize| n > 1 && (n - 1).isqrt().pow(2) == n - 1;
    match name {
        "vision_model.embeddings.position_embedding.weight" => width == same && square(*rows) && square(*old),
        "text_model.embeddings.position_embedding.weight" => width == same && *old > 0,
        _ => false,
    }
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
}

/// Refuses weights that are not numbers.
pub(super) fn finite<'a>(source: &Source, bad: impl Iterator<Item = &'a str>) -> Result<()> {
    let bad: Vec<&str> = bad.collect();
    if bad.is_empty() {
        return Ok(());
    }
    Err(Error::input(source, format!("{} tensors hold infinite values or NaN: {}", bad.len(), list(&bad)))
        .hint("the file is damaged, or the training that made it diverged"))
}

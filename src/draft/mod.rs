//! `peft new`: a commented recipe for somebody's data.

use peft_adapters::MethodConfig;
use peft_adapters::registry::METHODS;
use serde::Serialize;

use crate::data::{ColumnChoice, DataConfig, Dataset, Split};
use crate::error::Result;
use crate::recipe::Recipe;

mod few;
mod tasks;
mod transparency;

use tasks::DraftTask;
use transparency::Looked;

/// What the recipe is to be about.
#[derive(Debug, Clone)]
pub struct Wishes {
    /// Anything that [`DataConfig::locate`] understands.
    pub data: String,
    /// The base.
    pub model: String,
    /// A method's name.
    pub method: String,
    /// `classify`, `match`, `answer`, `retrieve` or `regress`; what the data offers when left out.
    pub task: Option<String>,
    /// The prompt around a class name.
    pub template: String,
    /// Training examples of each class; all when left out.
    pub shots: Option<usize>,
    /// Which columns hold what, where they are not called as usual.
    pub columns: ColumnChoice,
}

/// A recipe that was written, and what it rests on.
#[derive(Debug, Clone, Serialize)]
pub struct Draft {
    /// The recipe.
    #[serde(skip)]
    pub text: String,
    /// The source's key in a recipe: `folder`, `table`, `parquet`, …
    pub kind: &'static str,
    /// A task's key in a recipe.
    pub task: String,
    /// Class names.
    pub classes: Vec<String>,
    /// Examples in train, val and test.
    pub examples: [usize; 3],
    /// The names of the columns; nothing where the source has none.
    pub columns: Option<Vec<String>>,
    /// What the author should look at.
    pub notes: Vec<String>,
}

/// Steps that a few-shot adaptation takes to settle; epochs follow from the number of examples.
const STEPS: usize = 500;
const BATCH: usize = 32;
/// Learning rate of a linear probe.
const PROBE_LR: &str = "1.0e-2";

/// Looks at the data and writes a recipe for it; `file` stands in its launch command, `name` names the run.
///
/// # Errors
/// When there is no such data, or the task does not suit it.
pub fn draft(wishes: &Wishes, file: &str, name: &str) -> Result<Draft> {
    let located = DataConfig::locate(&wishes.data)?;
    let columns = &wishes.columns;
    let local = located.local(&mut |_| Ok(()))?.with_choice(columns)?;
    let found = local.column_names()?;
    let source = addressed(&local, located);
    let data = DataConfig { shots: wishes.shots, ..local.listed() }.open(0)?;
    let task = tasks::choose(wishes.task.as_deref(), &wishes.data, &data)?;
    let has_splits = local.has_own_splits();
    let looked = Looked::at(&data);
    let page = Page { wishes, source: &source, data: &data, task, has_splits, file, name, columns: found.as_deref(), looked };
    let text = page.text();
    // Nobody should be handed a recipe that is refused.
    Recipe::parse(file, &text, name, &[])?;
    Ok(Draft {
        text,
        kind: source.kind(),
        task: task.name.into(),
        examples: [data.train.len(), data.val.len(), data.test.len()],
        notes: [notes(&data, task.name), small(&data, task.name), looked.note().into_iter().collect()].concat(),
        columns: found,
        classes: data.classes,
    })
}

/// The source with its columns, where it was named: on the hub, not in the cache.
fn addressed(local: &DataConfig, located: DataConfig) -> DataConfig {
    let mut source = local.clone();
    if let (Some(own), Some(p)) = (&mut source.parquet, located.parquet) {
        (own.path, own.val, own.test) = (p.path, p.val, p.test);
    }
    if let (Some(own), Some(w)) = (&mut source.webdataset, located.webdataset) {
        (own.path, own.val, own.test) = (w.path, w.val, w.test);
    }
    source
}

/// What few examples mean.
fn small(data: &Dataset, task: &str) -> Vec<String> {
    let mut notes: Vec<String> = few::validation(data.val.len()).into_iter().collect();
    if let Some(shots) = few::shots(data, task) {
        notes.push(format!(
            "{shots:.0} training images a class: the recipe has a linear probe to compare with, which few images often suit"
        ));
    }
    if let Some(pairs) = few::pairs(data, task) {
        notes.push(format!("{pairs} training pairs are few: what is trained may not find better than the base does without training"));
    }
    notes
}

fn notes(data: &Dataset, task: &str) -> Vec<String> {
    let mut notes = data.notes.clone();
    if task != "classify" {
        return notes;
    }
    let counts = data.class_counts(Split::Train);
    let (least, most) = (counts.iter().min().copied().unwrap_or(0), counts.iter().max().copied().unwrap_or(0));
    if let Some((name, _)) = data.classes.iter().zip(&counts).find(|(_, n)| **n == 0) {
        notes.push(format!("class `{name}` has no training example"));
    } else if most > 10 * least {
        notes.push(format!("the largest class has {most} training examples, the smallest {least}: look at macro_f1 besides accuracy"));
    }
    if data.classes.iter().all(|c| c.bytes().all(|b| b.is_ascii_digit() || b == b'n')) {
        notes.push("the class names are numbers; CLIP reads them, so rename them to words".into());
    }
    notes
}

/// What the text is made of.
struct Page<'a> {
    wishes: &'a Wishes,
    source: &'a DataConfig,
    data: &'a Dataset,
    task: &'static DraftTask,
    has_splits: bool,
    file: &'a str,
    name: &'a str,
    columns: Option<&'a [String]>,
    looked: Looked,
}

/// A string as YAML; JSON's strings are YAML's.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:".contains(c);
    let safe =
        text.chars().all(plain) && !text.ends_with(':') && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '_');
    // Words that YAML takes for something else.
    let reserved = ["true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan", "inf"];
    if safe && !reserved.contains(&text.to_ascii_lowercase().as_str()) {
        text.to_string()
    } else {
        serde_json::Value::from(text).to_string()
    }
}

impl Page<'_> {
    fn text(&self) -> String {
        let tiny = self.wishes.model == "builtin:tiny";
        let what = match self.task.name {
            "classify" => format!("{} classes", self.data.classes.len()),
            "answer" => "questions".into(),
            "regress" => "numbers".into(),
            _ => "images and their texts".to_string(),
        };
        let [train, val, test] = [Split::Train, Split::Val, Split::Test].map(|s| self.data.split(s).len());
        let model = if tiny { "   # small and in the binary; take a CLIP such as openai/clip-vit-base-patch32 for real work" } else { "" };
        format!(
            "# peft train {file}\n\
             # {method} on {what} of {place}: {train} training, {val} validation and {test} test examples.\n\
             #\n\
             # First `peft train {file} --check`: it opens everything, estimates memory and trains nothing.\n\
             # Then `peft eval runs/{name}`, and `peft predict --model {base} --adapter runs/{name}/adapter{ask} IMAGE…`.\n\
             model: {base_yaml}{model}\n\
             method:\n  {method_yaml}\n\
             data:\n{data}\
             {images}\
             task:\n{task}\
             train:\n{settings}\
             output: {output}\n\
             {compare}",
            file = self.file,
            method = self.wishes.method,
            place = self.wishes.data,
            name = self.name,
            ask = self.task.ask,
            base = self.wishes.model,
            base_yaml = quoted(&self.wishes.model),
            method_yaml = self.method(),
            data = self.data(),
            images = self.looked.line().unwrap_or_default(),
            task = (self.task.lines)(self.data, &self.wishes.template),
            settings = self.settings(train, tiny),
            output = quoted(&format!("runs/{}", self.name)),
            compare = self.compare(),
        )
    }

    fn method(&self) -> String {
        let name = &self.wishes.method;
        match name.as_str() {
            "lora" => {
                "lora: { rank: 8, alpha: 16, targets: [q_proj, k_proj, v_proj] }   # rank: higher is more accurate, and larger".into()
            }
            "prefix" => "prefix: { length: 8 }   # learned keys and values in each block; longer is more accurate, and slower".into(),
            "bottleneck" => "bottleneck: { reduction: 8 }   # width / reduction; lower is more accurate, and larger".into(),
            "full" => "full: {}   # every weight; add `layers: { last: 2 }` to train only the last blocks".into(),
            name => other(name),
        }
    }

    fn data(&self) -> String {
        let source = match self.source {
            DataConfig { folder: Some(f), .. } => format!("  folder: {{ root: {} }}\n", quoted(&f.root.display().to_string())),
            DataConfig { table: Some(t), .. } => format!("  table: {}\n", flow(t)),
            DataConfig { parquet: Some(p), .. } => format!("  parquet: {}   # stream: true for sets larger than memory\n", flow(p)),
            DataConfig { webdataset: Some(w), .. } => format!("  webdataset: {}   # stream: true for sets larger than memory\n", flow(w)),
            DataConfig { coco: Some(c), .. } => format!("  coco: {}   # images: DIR where they are elsewhere\n", flow(c)),
            DataConfig { vqa: Some(v), .. } => format!("  vqa: {}   # images: DIR where they are elsewhere\n", flow(v)),
            DataConfig { coop: Some(c), .. } => format!(
                "  coop: {{ root: {} }}   # its published split, and shots as CoOp draws them\n",
                quoted(&c.root.display().to_string())
            ),
            DataConfig { builtin, .. } => format!("  builtin: {}\n", builtin.as_deref().unwrap_or_default()),
        };
        let split = match self.has_splits {
            true => "",
            false => "  split: { train: 0.7, val: 0.1, test: 0.2, seed: 0 }   # the data has no splits of its own\n",
        };
        let shots = match (self.wishes.shots, self.task.name) {
            (Some(n), _) => format!("  shots: {n}   # training examples of each class, drawn by train.seed\n"),
            (None, "classify") => "  # shots: 16   # fewer training examples of each class, drawn by train.seed\n".into(),
            _ => String::new(),
        };
        let columns = self.columns.map(|names| format!("  # columns found: {}\n", listed(names))).unwrap_or_default();
        format!("{source}{columns}{split}{shots}")
    }

    /// With few images a class, what else to try.
    fn compare(&self) -> String {
        let Some(shots) = few::shots(self.data, self.task.name) else { return String::new() };
        format!(
            "# With {shots:.0} training images a class a linear probe, which trains a classifier on the base's features and nothing else, may do as\n\
             # well in less time. `peft compare {file}` trains both and says by how much they differ.\n\
             compare:\n\
             \x20 methods:\n\
             \x20   {method}: {{}}\n\
             \x20   probe: {{ lr: {PROBE_LR} }}\n",
            file = self.file,
            method = self.wishes.method,
        )
    }

    fn settings(&self, train: usize, tiny: bool) -> String {
        let batch = if self.task.name == "retrieve" { 64 } else { BATCH };
        let epochs = (STEPS * batch).div_ceil(train.max(1)).clamp(3, 50);
        // Retrieval's loss is over the batch, so that a smaller last one is left out.
        let steps = epochs * if self.task.name == "retrieve" { (train / batch).max(1) } else { train.div_ceil(batch) };
        let few = few::pairs(self.data, self.task.name);
        let lr = match (self.wishes.method.as_str(), tiny) {
            ("full", false) => "1.0e-5",
            ("full", true) => "2.0e-4",
            (_, true) if few.is_some() => "5.0e-4",
            (_, false) if few.is_some() => "1.0e-4",
            (_, true) => "2.0e-3",
            (_, false) => "5.0e-4",
        };
        let careful = few.map(|pairs| format!(
            "  # {pairs} pairs are few: training may not find better than the base does without it. Hence a low lr and little patience; compare\n\
             \x20 # the figures before and after training, which `peft train` prints.\n"
        )).unwrap_or_default();
        let patience = if few.is_some() { 3 } else { 8 };
        let validation = few::validation(self.data.val.len()).map(|s| format!("  # {s}\n")).unwrap_or_default();
        format!(
            "{careful}\x20 epochs: {epochs}   # {steps} steps\n\
             \x20 batch: {batch}   # higher: steadier, faster for each image, more memory\n\
             \x20 lr: {lr}   # the first value to try others of; validation says which\n\
             \x20 schedule: {{ cosine: {{ warmup: 0.05 }} }}\n\
             \x20 clip_norm: 1.0\n\
             {validation}\
             \x20 early_stopping: {{ patience: {patience} }}   # validations without improvement\n\
             \x20 augment: {{ crop: [0.7, 1.0], flip: true }}   # no flip where left and right differ, as in letters\n\
             \x20 seed: 0\n"
        )
    }
}

/// A method with its defaults, or with its first example where it has none, and where it comes from.
fn other(name: &str) -> String {
    let Some(entry) = METHODS.iter().find(|m| m.name == name) else { return format!("{name}: {{}}") };
    let defaults = serde_json::json!({ name: {} });
    let example = || (entry.examples)().first().and_then(|e| serde_json::to_value(e).ok());
    let value = match serde_json::from_value::<MethodConfig>(defaults.clone()) {
        Ok(_) => defaults,
        Err(_) => example().unwrap_or(defaults),
    };
    // JSON in flow style is YAML.
    format!("{name}: {}   # {}", value.get(name).unwrap_or(&value), entry.source)
}

/// Names in a comment of one line; many are cut.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 20;
    let plain = |name: &String| name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
    let mut shown: Vec<String> = names.iter().take(SHOWN).map(plain).collect();
    if names.len() > SHOWN {
        shown.push(format!("and {} more", names.len() - SHOWN));
    }
    shown.join(", ")
}

/// Options as a YAML flow mapping, those left out apart.
fn flow(options: &impl Serialize) -> String {
    yaml(&serde_json::to_value(options).unwrap_or_default())
}

fn yaml(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(s) => quoted(s),
        serde_json::Value::Array(items) => format!("[{}]", items.iter().map(yaml).collect::<Vec<_>>().join(", ")),
        serde_json::Value::Object(map) => {
            let given: Vec<String> = map.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| format!("{k}: {}", yaml(v))).collect();
            format!("{{ {} }}", given.join(", "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_stay_strings_in_yaml() {
        for text in ["data/pets", "builtin:tiny", "a:", "a: b", "yes", "1e3", "#x", "it's", "C:\\data", "ünï", "~", "-x"] {
            let value = serde_saphyr::from_str::<String>(&quoted(text));
            assert_eq!(value.ok().as_deref(), Some(text));
        }
    }

    #[test]
    fn every_method_can_be_written() {
        for method in METHODS {
            let value: serde_json::Value = serde_saphyr::from_str(&other(method.name)).unwrap_or_default();
            let config = serde_json::from_value::<MethodConfig>(value);
            assert!(config.as_ref().is_ok_and(|c| c.name() == method.name), "{}: {config:?}", other(method.name));
        }
    }
}

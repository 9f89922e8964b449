//! `predict --csv`.

use std::path::Path;

use crate::error::{Error, Result};
use crate::files;
use crate::pool::Answer;

/// What an answer has to say in a column.
type Cell = fn(&Answer) -> Option<&String>;

/// One row an answer, in order: `image`, what was asked, `prediction` of tasks that give one, `label` and `score` of the most likely,
/// then the next ones. Cells are written as they are: a spreadsheet may take a label that begins with `=` for a formula.
pub(super) fn write(path: &Path, answers: &[&Answer]) -> Result<()> {
    let most = answers.iter().map(|a| a.predictions.len()).max().unwrap_or(0);
    let has = |of: Cell| answers.iter().any(|a| of(a).is_some());
    let asked: [(&str, Cell); 3] =
        [("text", |a| a.text.as_ref()), ("question", |a| a.question.as_ref()), ("prediction", |a| a.prediction.as_ref())];
    let asked: Vec<_> = asked.into_iter().filter(|(_, of)| has(*of)).collect();
    let mut header = vec!["image".to_string()];
    header.extend(asked.iter().map(|(name, _)| (*name).to_string()));
    for i in 1..=most {
        let nth = if i == 1 { String::new() } else { format!("_{i}") };
        header.extend([format!("label{nth}"), format!("score{nth}")]);
    }
    let fault = |e: csv::Error| Error::fault(path.display(), e);
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record(&header).map_err(fault)?;
    for answer in answers {
        let mut row = vec![answer.image.as_ref().map(|p| p.display().to_string()).unwrap_or_default()];
        row.extend(asked.iter().map(|(_, of)| of(answer).cloned().unwrap_or_default()));
        for i in 0..most {
            let ranked = answer.predictions.get(i);
            row.extend([
                ranked.map(|r| r.label.clone()).unwrap_or_default(),
                ranked.map(|r| r.probability.to_string()).unwrap_or_default(),
            ]);
        }
        out.write_record(&row).map_err(fault)?;
    }
    let bytes = out.into_inner().map_err(|e| Error::fault(path.display(), e.error()))?;
    files::refuse_input("--csv", path)?;
    files::write_atomic(path, &bytes)
}

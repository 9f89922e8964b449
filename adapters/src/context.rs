//! Learnt vectors in place of a text's words: what the context methods (CoOp, CoCoOp, MaPLe) share.

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};

use crate::flow::{ClassName, Embedded};
use crate::ops;
use crate::params::Start;
use crate::sites::{SiteId, SiteKind, Sites, Tower};
use crate::{Error, Result};

/// Where the class name stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClassPosition {
    /// Behind the context.
    #[default]
    End,
    /// Between its first half and its second.
    Middle,
    /// In front of it.
    Front,
}

/// Which of the words in front of the class name make room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replaced {
    /// All of them.
    All,
    /// As many as there are vectors, from the beginning; the others stay.
    First,
}

/// How vectors and words are put together.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Vectors for each text.
    pub count: usize,
    /// Where the class name stands.
    pub position: ClassPosition,
    /// What makes room.
    pub replaced: Replaced,
    /// The most tokens of a text; its end is cut beyond that, the end token stays.
    pub limit: usize,
}

/// Texts with `vectors` [V, D] in them; text `b` takes `layout.count` vectors from `first(b)` on. What follows the class name
/// (a full stop) stays behind it. Texts without class names are taken as names from begin to end.
///
/// # Errors
/// When a text has no room for the vectors, or shapes do not fit.
pub fn insert(texts: Embedded, vectors: &Tensor, first: impl Fn(usize) -> usize, layout: &Layout) -> TensorResult<Embedded> {
    let Embedded { x, pool, names, images } = texts;
    let (batch, len, dim) = x.dims3()?;
    if layout.count + 2 > layout.limit {
        candle_core::bail!("{} learnt vectors leave no room for a text in {} positions", layout.count, layout.limit);
    }
    let mut rows = Vec::with_capacity(batch);
    let mut moved = Vec::with_capacity(batch);
    for b in 0..batch {
        let end = pool.get(b).map_or(0, |p| *p as usize);
        let whole = ClassName { class: 0, start: 1, len: end.saturating_sub(1) as u32 };
        let (row, start) = order(layout, names.get(b).copied().unwrap_or(whole), end);
        moved.push((start, row.len() as u32 - 1));
        let from = batch * len + first(b);
        rows.push(row.into_iter().map(move |t| match t {
            Token::Word(i) => (b * len + i) as u32,
            Token::Vector(i) => (from + i) as u32,
        }));
    }
    let longest = rows.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
    // What follows a text's end is never seen.
    let ids: Vec<u32> = rows.into_iter().enumerate().flat_map(|(b, row)| padded(row, longest, (b * len) as u32)).collect();
    let ids = Tensor::from_vec(ids, (batch, longest), x.device())?;
    let table = Tensor::cat(&[&x.reshape((batch * len, dim))?, &vectors.to_dtype(x.dtype())?], 0)?;
    let names = names.iter().zip(&moved).map(|(n, (start, end))| ClassName { start: *start, len: n.len.min(end - start), ..*n });
    Ok(Embedded { x: ops::embedding(&table, &ids)?, names: names.collect(), pool: moved.iter().map(|(_, end)| *end).collect(), images })
}

fn padded(row: impl ExactSizeIterator<Item = u32>, to: usize, with: u32) -> impl Iterator<Item = u32> {
    let missing = to - row.len();
    row.chain(std::iter::repeat_n(with, missing))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Word(usize),
    Vector(usize),
}

/// The new order of a text whose end token stands at `end`, and where its class name now begins.
fn order(layout: &Layout, name: ClassName, end: usize) -> (Vec<Token>, u32) {
    let start = (name.start as usize).clamp(1, end.max(1));
    let after = (start + name.len as usize).min(end);
    let kept = match layout.replaced {
        Replaced::All => start,
        Replaced::First => (1 + layout.count).min(start),
    };
    let words = |range: std::ops::Range<usize>| range.map(Token::Word);
    let vectors = |range: std::ops::Range<usize>| range.map(Token::Vector);
    let count = layout.count;
    let half = match layout.position {
        ClassPosition::End => count,
        ClassPosition::Middle => count / 2,
        ClassPosition::Front => 0,
    };
    // All words but begin and end that there is room for.
    let room = layout.limit - count - 2;
    let front = (start - kept).min(room);
    let named = (after - start.min(after)).min(room - front);
    let rest = end.saturating_sub(after).min(room - front - named);
    let mut row = vec![Token::Word(0)];
    row.extend(vectors(0..half).chain(words(kept..kept + front)));
    let begins = row.len() as u32;
    row.extend(words(start..start + named).chain(vectors(half..count)).chain(words(after..after + rest)));
    row.push(Token::Word(end));
    (row, begins)
}

/// The text tower's entrance: its site, its width, its positions.
///
/// # Errors
/// When the model has no text tower.
pub fn text_entrance(sites: &Sites) -> Result<(SiteId, usize, usize)> {
    let entrance = |(id, s): (SiteId, &crate::Site)| match s.kind {
        SiteKind::Embed { dim, limit } if s.tower == Tower::Text => Some((id, dim, limit)),
        _ => None,
    };
    sites.iter().find_map(entrance).ok_or_else(|| Error::NoSites {
        key: "method".into(),
        message: "learnt context needs a text tower".into(),
        sites: sites.summary(|_| true),
    })
}

/// How many vectors there are and how they start, [count, D]: from the embeddings of `words`, or else random. `limit` cuts the
/// words to as many.
///
/// # Errors
/// When there are no words, more vectors than the text tower has positions, or no tokeniser.
pub fn start(sites: &Sites, count: usize, words: Option<&str>, std: f64, cut: bool) -> Result<(usize, Start)> {
    let (_, _, limit) = text_entrance(sites)?;
    let room = limit.saturating_sub(3);
    let (key, count, start) = match words {
        None => ("n_ctx", count, Start::Normal { std }),
        Some(words) => {
            let mut ids = sites.encode("init", &words.replace('_', " "))?;
            if cut {
                ids.truncate(count);
            }
            if ids.is_empty() || (cut && ids.len() < count) {
                let least = if cut { count } else { 1 };
                return Err(Error::config("init", format!("expected at least {least} tokens, `{words}` has {}", ids.len())));
            }
            let table = embedding_table(sites)?;
            let ids = Tensor::new(ids.as_slice(), table.device())?;
            ("init", ids.elem_count(), Start::Value(table.index_select(&ids, 0)?))
        }
    };
    if !(1..=room).contains(&count) {
        let message = format!("expected 1 to {room} vectors, which leaves a token for the class name, found {count}");
        return Err(Error::config(key, message));
    }
    Ok((count, start))
}

fn embedding_table(sites: &Sites) -> Result<Tensor> {
    let found = sites.weights().find(|(_, w)| w.tower == Tower::Text && w.name.ends_with("token_embedding.weight"));
    found.map(|(_, w)| w.tensor.clone()).ok_or_else(|| Error::config("init", "the text tower has no table of words"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(position: ClassPosition, replaced: Replaced, limit: usize) -> (String, u32) {
        // begin a photo of a | cat fish | . end
        let name = ClassName { class: 0, start: 5, len: 2 };
        let (row, at) = order(&Layout { count: 3, position, replaced, limit }, name, 8);
        let one = |t: &Token| match t {
            Token::Word(i) => "<apoaCF.>".chars().nth(*i).unwrap_or('?'),
            Token::Vector(i) => "012".chars().nth(*i).unwrap_or('?'),
        };
        (row.iter().map(one).collect(), at)
    }

    #[test]
    fn vectors_take_the_place_of_words() {
        assert_eq!(shown(ClassPosition::End, Replaced::All, 77), ("<012CF.>".into(), 4));
        assert_eq!(shown(ClassPosition::Middle, Replaced::All, 77), ("<0CF12.>".into(), 2));
        assert_eq!(shown(ClassPosition::Front, Replaced::All, 77), ("<CF012.>".into(), 1));
        assert_eq!(shown(ClassPosition::End, Replaced::First, 77), ("<012aCF.>".into(), 5));
    }

    #[test]
    fn what_does_not_fit_is_cut_before_the_end() {
        assert_eq!(shown(ClassPosition::End, Replaced::All, 7).0, "<012CF>");
        assert_eq!(shown(ClassPosition::Front, Replaced::All, 6).0, "<C012>");
        assert_eq!(shown(ClassPosition::End, Replaced::First, 5).0, "<012>");
    }
}

//! When two answers are the same, and how right one is (Antol et al. 2015, arXiv 1505.00468, section 3; the VQA challenge's rules).

/// Signs that separate words or stand beside them.
const SIGNS: [char; 21] = [';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',', '?', '!'];

const ARTICLES: [&str; 3] = ["a", "an", "the"];

const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];

/// Verbs before `n't`.
const NEGATED: [&str; 18] =
    ["ai", "are", "ca", "could", "did", "does", "do", "had", "has", "have", "is", "might", "must", "should", "was", "were", "wo", "would"];

/// Other contractions that are often written without their apostrophe, split where it belongs: those that the challenge's own
/// code puts right.
const CONTRACTED: [(&str, &str); 51] = [
    ("could", "ve"),
    ("should", "ve"),
    ("would", "ve"),
    ("might", "ve"),
    ("must", "ve"),
    ("not", "ve"),
    ("you", "ve"),
    ("they", "ve"),
    ("we", "ve"),
    ("what", "ve"),
    ("where", "ve"),
    ("who", "ve"),
    ("you", "re"),
    ("they", "re"),
    ("there", "re"),
    ("what", "re"),
    ("why", "re"),
    ("you", "ll"),
    ("they", "ll"),
    ("it", "ll"),
    ("how", "ll"),
    ("what", "ll"),
    ("who", "ll"),
    ("why", "ll"),
    ("somebody", "ll"),
    ("someone", "ll"),
    ("something", "ll"),
    ("that", "s"),
    ("what", "s"),
    ("where", "s"),
    ("who", "s"),
    ("how", "s"),
    ("there", "s"),
    ("when", "s"),
    ("why", "s"),
    ("he", "s"),
    ("somebody", "s"),
    ("someone", "s"),
    ("he", "d"),
    ("how", "d"),
    ("it", "d"),
    ("there", "d"),
    ("they", "d"),
    ("where", "d"),
    ("who", "d"),
    ("you", "d"),
    ("someone", "d"),
    ("something", "d"),
    ("o", "clock"),
    ("ma", "am"),
    ("y", "all"),
];

/// An answer as it is compared: lower case, no articles, digits for number words, no signs, contractions with their apostrophe.
pub(crate) fn normalise(answer: &str) -> String {
    let text = without_periods(&without_signs(answer.trim()));
    let words = text.split_whitespace().map(str::to_lowercase).filter(|w| !ARTICLES.contains(&w.as_str()));
    let word = |w: String| match NUMBERS.iter().find(|(name, _)| *name == w) {
        Some((_, digits)) => (*digits).to_string(),
        None => apostrophe(&w),
    };
    words.map(word).collect::<Vec<_>>().join(" ")
}

/// A sign beside a space, and a comma between digits, goes; a sign between words becomes a space.
fn without_signs(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let digit = |i: usize| chars.get(i).is_some_and(char::is_ascii_digit);
    let number = (1..chars.len().max(1)).any(|i| chars.get(i) == Some(&',') && digit(i - 1) && digit(i + 1));
    let mut out = text.to_string();
    for sign in SIGNS {
        let beside = text.contains(&format!("{sign} ")) || text.contains(&format!(" {sign}"));
        out = out.replace(sign, if beside || number { "" } else { " " });
    }
    out
}

/// A period stays where a digit follows.
fn without_periods(text: &str) -> String {
    let mut chars = text.chars().peekable();
    let mut out = String::new();
    while let Some(c) = chars.next() {
        if c != '.' || chars.peek().is_some_and(char::is_ascii_digit) {
            out.push(c);
        }
    }
    out
}

fn apostrophe(word: &str) -> String {
    if let Some(verb) = word.strip_suffix("nt").filter(|v| NEGATED.contains(v)) {
        return format!("{verb}n't");
    }
    let found = CONTRACTED.iter().find(|(start, end)| word.strip_prefix(start) == Some(end));
    found.map_or_else(|| word.to_string(), |(start, end)| format!("{start}'{end}"))
}

/// How right an answer is, from 0 to 1: with at least four annotators the mean over them of min(1, others who say so / 3), with
/// fewer the share who say so. Everything is normalised.
pub(super) fn accuracy(answer: &str, given: &[String]) -> f64 {
    let (said, all) = (given.iter().filter(|g| *g == answer).count() as f64, given.len() as f64);
    if given.len() < 4 {
        return if given.is_empty() { 0.0 } else { said / all };
    }
    let without = |others: f64| (others / 3.0).min(1.0);
    (said * without(said - 1.0) + (all - said) * without(said)) / all
}

/// The most frequent answer; of equally frequent ones the one that was given first.
pub(super) fn usual(given: &[String]) -> String {
    let count = |a: &String| given.iter().filter(|g| *g == a).count();
    let best = given.iter().fold(None::<&String>, |best, a| if best.is_none_or(|b| count(a) > count(b)) { Some(a) } else { best });
    best.cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `VQAEval` of salesforce-lavis 1.0.2 writes them (`scripts/reference/vqa.py`).
    #[test]
    fn answers_are_compared_as_in_the_challenge() {
        for (answer, expected) in [
            ("The Dog.", "dog"),
            ("two  dogs", "2 dogs"),
            ("black/white", "black white"),
            ("black, white", "black white"),
            ("1,000", "1000"),
            ("3.5", "3.5"),
            ("dont know", "don't know"),
            ("yes!", "yes"),
            ("t-shirt", "t shirt"),
            ("none", "0"),
            ("An apple (red)", "apple red"),
            ("U.S.A.", "usa"),
            ("$5.00", "$5.00"),
            ("whos there", "who's there"),
            ("lets go", "lets go"),
            ("5 oclock", "5 o'clock"),
            ("hot dog;bun", "hot dog bun"),
            ("no - yes", "no yes"),
            ("3,000,000", "3000000"),
        ] {
            assert_eq!(normalise(answer), expected, "{answer}");
        }
    }

    #[test]
    fn three_of_the_others_make_an_answer_right() {
        let given = |yes: usize| (0..10).map(|i| if i < yes { "yes" } else { "no" }.to_string()).collect::<Vec<_>>();
        for (yes, expected) in [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)] {
            assert!((accuracy("yes", &given(yes)) - expected).abs() < 1e-12, "{yes}");
        }
        assert_eq!((accuracy("yes", &["yes".into()]), accuracy("yes", &["yes".into(), "no".into()])), (1.0, 0.5));
        assert_eq!(usual(&["b".into(), "a".into(), "a".into(), "b".into()]), "b");
    }
}

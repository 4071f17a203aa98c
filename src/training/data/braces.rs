//! Patterns of paths as shells and WebDataset write them: `{00000..00012}` and `{a,b}`.

use crate::error::{Error, Result};

/// More paths than any data set has shards.
const MAX_PATHS: usize = 1 << 20;

/// All paths of a pattern, the last braces changing fastest. A pattern without braces is itself.
///
/// # Errors
/// `InvalidArgument` for braces that do not match, lie within each other, or hold neither a range nor a list, for a
/// range that goes down, and beyond 1,048,576 paths.
pub(super) fn expand(pattern: &str) -> Result<Vec<String>> {
    let mut paths = vec![String::new()];
    let mut rest = pattern;
    while let Some(open) = rest.find(['{', '}']) {
        let wrong = || Error::argument("data path", "braces such as {00000..00012} or {a,b}", pattern);
        let (literal, after) = rest.split_at(open);
        let (inside, after) =
            after.strip_prefix('{').and_then(|after| after.split_once('}')).ok_or_else(wrong)?;
        let choices = choices(inside).ok_or_else(wrong)?;
        if paths.len().saturating_mul(choices.len()) > MAX_PATHS {
            return Err(Error::argument(
                "data path",
                format!("a pattern of at most {MAX_PATHS} paths"),
                pattern,
            ));
        }
        let heads = std::mem::take(&mut paths);
        for head in heads {
            paths.extend(choices.iter().map(|choice| format!("{head}{literal}{choice}")));
        }
        rest = after;
    }
    for path in &mut paths {
        path.push_str(rest);
    }
    Ok(paths)
}

/// What may stand in the place of a pair of braces.
fn choices(inside: &str) -> Option<Vec<String>> {
    if inside.contains('{') {
        return None;
    }
    let Some((first, last)) = inside.split_once("..") else {
        return inside.contains(',').then(|| inside.split(',').map(str::to_owned).collect());
    };
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse::<usize>().ok()).flatten()
    };
    let (from, to) = (number(first)?, number(last)?);
    // A range that starts with zeros has numbers of one length; one beyond the limit is refused by its caller.
    let padded = first.len() > 1 && first.starts_with('0') || last.len() > 1 && last.starts_with('0');
    let width = if padded { first.len().max(last.len()) } else { 0 };
    let end = to.min(from.saturating_add(MAX_PATHS));
    (from <= to && width < 64).then(|| (from..=end).map(|i| format!("{i:0width$}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_expanded() {
        for (pattern, want) in [
            ("a.tar", vec!["a.tar"]),
            ("{00..02}.tar", vec!["00.tar", "01.tar", "02.tar"]),
            ("{8..11}", vec!["8", "9", "10", "11"]),
            ("{098..101}x", vec!["098x", "099x", "100x", "101x"]),
            ("{a,b}/{0..1}.tar", vec!["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
            ("x{,y}", vec!["x", "xy"]),
            ("{3..3}", vec!["3"]),
            ("ä{0..1}ö", vec!["ä0ö", "ä1ö"]),
        ] {
            assert_eq!(expand(pattern).unwrap(), want, "{pattern}");
        }
    }

    #[test]
    fn patterns_that_are_none_are_errors() {
        let wrong = [
            "{",
            "}",
            "a}b{",
            "{}",
            "{a}",
            "{1..}",
            "{..2}",
            "{a..c}",
            "{2..1}",
            "{-1..1}",
            "{0..1048576}",
            "{{a,b},c}",
            "{0..1023}{0..1024}",
            "{1..99999999999999999999999}",
        ];
        for pattern in wrong {
            let message = expand(pattern).unwrap_err().to_string();
            assert!(message.contains(pattern), "{message}");
        }
        assert_eq!(expand("{0..1023}{0..1023}").unwrap().len(), 1 << 20);
    }
}

//! The documents name files: every one of them must exist.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Endings of files that a repository holds; a name with one of them is a path even without a `/`.
const SOURCES: &[&str] = &["rs", "md", "h", "hpp", "c", "cpp", "go", "py", "sh", "toml", "txt"];

/// What is built or written by a program and therefore not in a fresh clone.
const MADE: &[&str] = &["target", "build"];

#[test]
fn every_path_in_the_documents_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let names: BTreeSet<String> = files_below(root).iter().filter_map(|path| file_name(path)).collect();
    let mut missing = Vec::new();
    let mut seen = 0;
    for document in documents(root) {
        let folder = document.parent().unwrap();
        let text = fs::read_to_string(&document).unwrap();
        let name = document.strip_prefix(root).unwrap().display().to_string();
        // A path may start at the top, in `src/`, or beside the document.
        let starts = [root.to_path_buf(), root.join("src"), folder.to_path_buf()];
        let tops: Vec<String> = starts.iter().flat_map(|start| entries(start)).collect();
        for path in code_spans(&text).into_iter().filter(|word| looks_like_a_path(word, &tops)) {
            seen += 1;
            // A bare name is that of some file; which one, the text around it says.
            let known = !path.contains('/') && names.contains(&path);
            if !known && !starts.iter().any(|start| start.join(&path).exists()) {
                missing.push(format!("{name}: `{path}`"));
            }
        }
        for path in link_targets(&text) {
            seen += 1;
            if !folder.join(&path).exists() {
                missing.push(format!("{name}: ({path})"));
            }
        }
    }
    assert!(seen > 0, "no path was found at all");
    assert!(missing.is_empty(), "these are not in the tree:\n{}", missing.join("\n"));
}

#[test]
fn paths_are_told_from_other_code() {
    let tops: Vec<String> = ["src", "ops", "docs", ".ci", "target"].map(String::from).into();
    let is_path = |word: &str| looks_like_a_path(word, &tops);
    for path in ["src/lib.rs", "ops/no_such_op/", "lib.rs", ".ci/run", "docs/a.md", "nowhere/file.rs"] {
        assert!(is_path(path), "{path}");
    }
    for other in
        ["image/png", "target/release/x.so", "github.com/a/b", "--model", "N/A", "ops/*/cpu.rs", ".rs"]
    {
        assert!(!is_path(other), "{other}");
    }
    let text = "a `src/a.rs --flag` b\n```sh\n`src/b.rs`\n```\n[c](d.md#e) ![f](g.png) [h](https://i)";
    assert_eq!(code_spans(text), ["src/a.rs"]);
    assert_eq!(link_targets(text), ["d.md", "g.png"]);
}

/// README.md and ARCHITECTURE.md at the top, all of docs/, and the README of every example and binding.
fn documents(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![root.join("README.md"), root.join("ARCHITECTURE.md")];
    for folder in ["docs", "bindings", "examples"] {
        let files = files_below(&root.join(folder)).into_iter();
        found.extend(files.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    }
    found
}

/// All files but those that are built, and what starts with a dot.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for name in entries(folder) {
        let path = folder.join(&name);
        if name.starts_with('.') || MADE.contains(&name.as_str()) {
            continue;
        }
        match path.is_dir() {
            true => found.extend(files_below(&path)),
            false => found.push(path),
        }
    }
    found
}

fn file_name(path: &Path) -> Option<String> {
    path.file_name().map(|name| name.to_string_lossy().into_owned())
}

fn entries(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().filter_map(|entry| file_name(&entry.unwrap().path())).collect()
}

/// The first word of everything in single backticks, outside fenced blocks.
fn code_spans(text: &str) -> Vec<String> {
    let mut spans = Vec::new();
    for paragraph in outside_fences(text).split("\n\n") {
        let words = paragraph.split('`').skip(1).step_by(2).filter_map(|span| span.split_whitespace().next());
        spans.extend(words.map(str::to_owned));
    }
    spans
}

/// The files that `[text](file)` and `![text](file)` lead to.
fn link_targets(text: &str) -> Vec<String> {
    let text = outside_fences(text);
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    targets.filter(|target| !target.is_empty() && !target.contains("://")).map(str::to_owned).collect()
}

fn outside_fences(text: &str) -> String {
    text.split("```").step_by(2).collect::<Vec<_>>().join("\n\n")
}

/// Whether `word` names a file by its ending, or starts with a folder that is there.
fn looks_like_a_path(word: &str, tops: &[String]) -> bool {
    let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
    let first = word.split('/').next().unwrap_or_default();
    if !plain || first.is_empty() || MADE.contains(&first) {
        return false;
    }
    let source = word
        .rsplit_once('.')
        .is_some_and(|(name, ending)| !name.is_empty() && !name.ends_with('/') && SOURCES.contains(&ending));
    source || (word.contains('/') && tops.iter().any(|top| top == first))
}

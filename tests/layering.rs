//! Data flows one way: every `crate::` path in `src/` must point to the module itself or to a lower layer.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// From the bottom to the top. Modules of one layer do not know each other.
const LAYERS: &[&[&str]] = &[
    &["error"],
    &["device"],
    &["tensor", "files"],
    &["ops"],
    &["nn"],
    &["stages", "diffusion", "weights", "text", "image"],
    &["pipeline"],
    &["training"],
    &["capi"],
];

/// Where the names that `lib.rs` re-exports come from.
const REEXPORTS: &[(&str, &str)] = &[
    ("CancelToken", "device"),
    ("simd_dispatch", "device"),
    ("Context", "device"),
    ("Device", "device"),
    ("Error", "error"),
    ("Result", "error"),
    ("Image", "image"),
    ("Tensor", "tensor"),
    ("DType", "tensor"),
];

#[test]
fn every_use_points_down() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in rust_files(&source) {
        let module = module_of(file.strip_prefix(&source).unwrap());
        if module == "lib" || file.ends_with("tests.rs") {
            continue;
        }
        let text = without_comments_and_tests(&fs::read_to_string(&file).unwrap());
        for used in crate_paths(&text) {
            seen += 1;
            if used != module && layer(&used) >= layer(&module) {
                wrong.push(format!("{}: {module} must not use {used}", file.display()));
            }
        }
    }
    assert!(seen > 0, "no `crate::` path was found at all");
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn paths_are_found() {
    let text = "use crate::device::{Context};\nuse crate::{Error, tensor::{DType, Tensor}, image};\nuse crate::{\n  text,\n};";
    assert_eq!(crate_paths(text), ["device", "error", "tensor", "image", "text"]);
}

fn layer(module: &str) -> usize {
    LAYERS
        .iter()
        .position(|layer| layer.contains(&module))
        .unwrap_or_else(|| panic!("{module} has no place in LAYERS of tests/layering.rs"))
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// `ops/layer_norm/cpu.rs` -> `ops`, `error.rs` -> `error`.
fn module_of(path: &Path) -> String {
    let first = path.components().next().unwrap().as_os_str().to_string_lossy();
    first.trim_end_matches(".rs").to_string()
}

/// Tests may use whatever they compare with; by custom they stand at the end of a file.
fn without_comments_and_tests(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The modules that `crate::` paths start with, also within braces.
fn crate_paths(text: &str) -> Vec<String> {
    let mut modules = Vec::new();
    for after in text.split("crate::").skip(1) {
        match after.strip_prefix('{') {
            None => modules.extend(first_name(after)),
            Some(list) => modules.extend(top_level_items(list).iter().filter_map(|item| first_name(item))),
        }
    }
    modules
}

/// `a, b::{c, d}, e}…` -> `a`, `b::{c, d}`, `e`
fn top_level_items(list: &str) -> Vec<String> {
    let (mut items, mut depth) = (vec![String::new()], 0);
    for letter in list.chars() {
        match letter {
            '}' if depth == 0 => break,
            ',' if depth == 0 => items.push(String::new()),
            _ => {
                depth += i32::from(letter == '{') - i32::from(letter == '}');
                items.last_mut().unwrap().push(letter);
            }
        }
    }
    items
}

fn first_name(path: &str) -> Option<String> {
    let name: String =
        path.trim_start().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
    let module =
        REEXPORTS.iter().find(|(export, _)| *export == name).map(|(_, module)| (*module).to_string());
    (!name.is_empty()).then(|| module.unwrap_or(name))
}

//! The ABI's paperwork: the committed header is fresh, its functions are described, names and versions agree.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn exports() -> BTreeSet<String> {
    read("tests/c/exports.txt").lines().map(str::to_owned).collect()
}

/// The shared library that cargo built beside this test.
fn library() -> PathBuf {
    let test = env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap();
    [folder.join("libwuerstchen.so"), folder.join("deps/libwuerstchen.so")]
        .into_iter()
        .find(|path| path.exists())
        .expect("libwuerstchen.so beside the test")
}

#[test]
fn the_committed_header_is_fresh() {
    let generated = fs::read_to_string(concat!(env!("OUT_DIR"), "/wuerstchen.h")).unwrap();
    assert!(generated == read("include/wuerstchen.h"), "include/wuerstchen.h: cargo build writes it anew");
}

/// The comment before each function, by name.
fn described(header: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for item in header.split("\n\n") {
        let Some((comment, code)) = item.rsplit_once("*/") else { continue };
        if code.trim_start().starts_with(['#', '}'])
            || code.contains("typedef")
            || item.contains("typedef struct")
        {
            continue;
        }
        let Some((before, _)) = code.split_once('(') else { continue };
        let name = before.rsplit([' ', '*']).next().unwrap_or_default();
        if name.starts_with("wst_") {
            found.push((name.to_owned(), comment.to_owned()));
        }
    }
    found
}

#[test]
fn every_function_says_who_owns_which_threads_and_which_errors() {
    let header = read("include/wuerstchen.h");
    let described = described(&header);
    for (name, comment) in &described {
        for tag in ["\n * Owner: ", "\n * Threads: ", "\n * Errors: "] {
            assert_eq!(comment.matches(tag).count(), 1, "{name}: {tag:?} in {comment}");
        }
    }
    let names: BTreeSet<String> = described.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, exports());
}

#[test]
fn every_status_must_be_looked_at() {
    let header = read("include/wuerstchen.h");
    for (before, line) in header.lines().zip(header.lines().skip(1)) {
        if line.starts_with("wst_status ") && !line.starts_with("wst_status wst_error_status") {
            assert_eq!(before, "WST_WARN_UNUSED", "{line}");
        }
    }
}

#[test]
fn the_versions_agree() {
    let header = read("include/wuerstchen.h");
    let version = env!("CARGO_PKG_VERSION");
    assert!(header.contains(&format!("#define WST_VERSION \"{version}\"\n")));
    let mut parts = version.split(['.', '-']);
    for name in ["MAJOR", "MINOR", "PATCH"] {
        assert!(header.contains(&format!("#define WST_VERSION_{name} {}\n", parts.next().unwrap())));
    }
    // SAFETY: a static text.
    let running = unsafe { std::ffi::CStr::from_ptr(wuerstchen::capi::version::wst_version()) };
    assert_eq!(running.to_str(), Ok(version));
}

#[test]
fn the_library_exports_the_list_and_has_its_soname() {
    let library = library();
    let Ok(symbols) = Command::new("nm").args(["-D", "--defined-only"]).arg(&library).output() else {
        return;
    };
    let symbols = String::from_utf8(symbols.stdout).unwrap();
    let mut names = BTreeSet::new();
    for line in symbols.lines() {
        let mut words = line.split_whitespace().skip(1);
        assert_eq!(words.next(), Some("T"), "not a function: {line}");
        names.insert(words.next().unwrap().to_owned());
    }
    assert_eq!(names, exports());
    let listed = read("tests/c/exports.txt");
    let mut sorted: Vec<&str> = listed.lines().collect();
    sorted.sort_unstable();
    assert!(sorted.iter().copied().eq(listed.lines()), "tests/c/exports.txt is not sorted");
    let dynamic = Command::new("readelf").arg("-d").arg(&library).output().unwrap();
    let dynamic = String::from_utf8(dynamic.stdout).unwrap();
    assert!(dynamic.lines().any(|l| l.contains("SONAME") && l.contains("[libwuerstchen.so.0]")), "{dynamic}");
}

#[test]
fn only_the_boundary_is_extern_and_every_call_goes_through_it() {
    for entry in fs::read_dir(root().join("src/capi")).unwrap() {
        let path = entry.unwrap().path();
        let source = fs::read_to_string(&path).unwrap();
        let functions: Vec<&str> = source.split("extern \"C\" fn wst_").skip(1).collect();
        for function in functions {
            let body = function.split("\n}\n").next().unwrap();
            let head = function.split('{').next().unwrap();
            if head.contains("-> wst_status") && head.contains("error: *mut") {
                assert!(body.contains("boundary(") || body.contains("change("), "{}: {head}", path.display());
            }
        }
    }
}

//! Generates include/wuerstchen.h from src/capi, names the shared library's ABI, and has the CUDA kernels compiled
//! where there is a compiler for them (src/device/cuda/build.rs).
//!
//! cbindgen gives the declarations; this file sorts them by noun, the file of src/capi that each stands in, and
//! puts the introduction before them. The header is written only when it changes, and a read-only source tree is
//! no error: the tests compare the committed header with the copy in OUT_DIR.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

#[path = "src/device/cuda/build.rs"]
mod cuda;

/// Grows only when a compiled program would break; see CHANGELOG.md.
const ABI: u32 = 0;

/// The nouns, in the header's order: each is a file of src/capi. What a noun uses is declared above it.
const NOUNS: [(&str, &str); 17] = [
    ("version", "Version"),
    ("error", "Statuses and errors"),
    ("device", "Devices"),
    ("cancel", "Cancel tokens"),
    ("image", "Images: RGB, 8 bits, rows top to bottom, no padding"),
    ("tensor", "Host tensors, for the stage-level calls"),
    ("model", "Models: weights mapped from safetensors, on one device, immutable, shareable between threads"),
    ("generate", "Prompt to picture"),
    ("job", "Jobs: runs in the background, for game loops"),
    ("stages", "Stage by stage: what the paper's figures show"),
    ("train_options", "Training: what and how"),
    ("samples", "Training: prepared pictures and captions"),
    ("trainer", "Training: steps, checkpoints, export"),
    ("loader_options", "Training data: where from and how"),
    ("batch", "Training data: batches"),
    ("loader", "Training data: pictures with captions from folders and WebDataset shards, decoded ahead"),
    ("folders", "Training: what it begins with and ends in"),
];

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    for path in [
        "build.rs",
        "src/device/cuda/build.rs",
        "src/device/cuda/options.txt",
        "cbindgen.toml",
        "Cargo.toml",
        "src/capi",
        "include/wuerstchen.h",
    ] {
        println!("cargo:rerun-if-changed={path}");
    }
    if matches!(env::var("CARGO_CFG_TARGET_OS").as_deref(), Ok("linux" | "freebsd" | "netbsd" | "openbsd")) {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libwuerstchen.so.{ABI}");
    }
    let root = env::var("CARGO_MANIFEST_DIR")?;
    let root = Path::new(&root);
    let out = env::var("OUT_DIR")?;
    let out = Path::new(&out);
    cuda::build_images(&root.join("src"), out)?;
    let header = header(root)?;
    fs::write(out.join("wuerstchen.h"), &header)?;
    let committed = root.join("include/wuerstchen.h");
    if fs::read_to_string(&committed).ok().as_ref() != Some(&header) {
        let written = fs::create_dir_all(root.join("include")).and_then(|()| fs::write(&committed, &header));
        if let Err(error) = written {
            println!("cargo:warning=include/wuerstchen.h is not up to date and cannot be written: {error}");
        }
    }
    Ok(())
}

fn header(root: &Path) -> Result<String, Failure> {
    let mut sources = Vec::new();
    let mut builder =
        cbindgen::Builder::new().with_config(cbindgen::Config::from_file(root.join("cbindgen.toml"))?);
    for (noun, _) in NOUNS {
        let path = root.join("src/capi").join(noun).with_extension("rs");
        sources.push(fs::read_to_string(&path)?);
        builder = builder.with_src(path);
    }
    let mut generated = Vec::new();
    builder.generate()?.write(&mut generated);
    let generated = String::from_utf8(generated)?;
    // The items of each noun, with the name that each declares.
    let mut groups: Vec<Vec<(&str, String)>> = vec![Vec::new(); NOUNS.len()];
    for item in generated.split("\n\n").map(str::trim).filter(|item| !item.is_empty()) {
        let name = name(item).ok_or_else(|| format!("build.rs cannot read the name of: {item}"))?;
        let home = sources.iter().position(|source| defines(source, name));
        let home = home.ok_or_else(|| format!("build.rs cannot find the noun of {name}"))?;
        // A constant stands under its type, which cbindgen declares before.
        let of = constant_type(&sources[home], name);
        match groups[home].iter_mut().find(|(name, _)| Some(*name) == of) {
            Some((_, text)) => write!(text, "\n{}", polish(item, name))?,
            None => groups[home].push((name, polish(item, name))),
        }
    }
    let mut text = frame_start()?;
    for ((_, title), group) in NOUNS.iter().zip(&groups) {
        write!(text, "/* {title}\n * {} */\n\n", "-".repeat(title.len()))?;
        for (_, item) in group {
            write!(text, "{item}\n\n")?;
        }
    }
    text.push_str(FRAME_END);
    Ok(text)
}

/// The identifier that a declaration declares.
fn name(item: &str) -> Option<&str> {
    let code = item.rsplit_once("*/").map_or(item, |(_, code)| code);
    let code =
        if item.contains("typedef struct") { &item[item.find("typedef struct")?..] } else { code }.trim();
    let words = |text: &'static str| move |c: char| text.contains(c) || c.is_whitespace();
    if let Some(rest) = code.strip_prefix("#define ") {
        return rest.split(words("")).next();
    }
    if let Some(rest) = code.strip_prefix("typedef struct ") {
        return rest.split(words("{;")).next();
    }
    if let Some(rest) = code.strip_prefix("typedef ") {
        // A function pointer or an alias.
        return match rest.split_once("(*") {
            Some((_, rest)) => rest.split(words(")")).next(),
            None => rest.trim_end_matches(';').rsplit(words("*")).next(),
        };
    }
    code.split_once('(')?.0.rsplit(words("*")).next()
}

/// Whether a source file of src/capi is where `name` is written down.
fn defines(source: &str, name: &str) -> bool {
    let starts =
        [format!("fn {name}("), format!("struct {name} "), format!("type {name} "), format!("const {name}:")];
    starts.iter().any(|start| source.contains(start.as_str()))
}

/// The type that the source gives to the constant `name`.
fn constant_type<'a>(source: &'a str, name: &str) -> Option<&'a str> {
    source.split_once(&format!("const {name}: "))?.1.split(' ').next()
}

/// Marks statuses that must be looked at; puts a constant's one-line description beside it.
fn polish(item: &str, name: &str) -> String {
    if let Some((comment, define)) = item.split_once("#define ") {
        let lines = comment.lines().map(|line| line.trim().trim_matches(['/', '*']).trim());
        let words: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
        return format!("{:<42}/**< {} */", format!("#define {define}"), words.join(" "));
    }
    let lines = item.lines().map(|line| {
        if line.starts_with("wst_status wst_") && !name.starts_with("wst_error_") {
            format!("WST_WARN_UNUSED\n{line}\n")
        } else {
            format!("{line}\n")
        }
    });
    let text = lines
        .collect::<String>()
        .replace("struct wst_", "wst_")
        .replace("typedef wst_", "typedef struct wst_");
    one_line_comments(text.trim_end())
}

/// A comment of one line takes one line.
fn one_line_comments(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let mut short = Vec::new();
    let mut at = 0;
    while at < lines.len() {
        let indent = &lines[at][..lines[at].len() - lines[at].trim_start().len()];
        match (lines[at].trim(), lines.get(at + 1), lines.get(at + 2).map(|line| line.trim())) {
            ("/**", Some(words), Some("*/")) => {
                short.push(format!("{indent}/** {} */", words.trim().trim_start_matches("* ")));
                at += 3;
            }
            _ => {
                short.push(lines[at].to_owned());
                at += 1;
            }
        }
    }
    short.join("\n")
}

fn frame_start() -> Result<String, Failure> {
    let mut text = INTRODUCTION.to_owned();
    let part = |name: &str| env::var(format!("CARGO_PKG_VERSION_{name}"));
    writeln!(text, "#define WST_VERSION_MAJOR {}", part("MAJOR")?)?;
    writeln!(text, "#define WST_VERSION_MINOR {}", part("MINOR")?)?;
    writeln!(text, "#define WST_VERSION_PATCH {}", part("PATCH")?)?;
    writeln!(text, "#define WST_VERSION \"{}\"", env::var("CARGO_PKG_VERSION")?)?;
    text.push_str(FRAME);
    Ok(text)
}

const INTRODUCTION: &str = "\
/* wuerstchen.h: text-to-image with the W\u{fc}rstchen family of models.
 *
 * Generated by build.rs from src/capi; edits go there. C99 and C++; for C++ see also wuerstchen.hpp.
 *
 *     wst_model *model = NULL;  wst_generate_options *options = NULL;  wst_image *image = NULL;  wst_error *error = NULL;
 *     if (wst_model_open(\"models/emoji-v1\", NULL, &model, &error) == WST_OK
 *         && wst_generate_options_new(model, &options, &error) == WST_OK
 *         && wst_generate_options_add_prompt(options, \"a red apple\", NULL, &error) == WST_OK
 *         && wst_generate(model, options, &image, 1, &error) == WST_OK
 *         && wst_image_write_png(image, \"apple.png\", &error) == WST_OK)
 *         puts(\"apple.png\");
 *     else
 *         fprintf(stderr, \"%s\\n\", wst_error_message(error));
 *     wst_image_free(image);  wst_generate_options_free(options);  wst_model_free(model);  wst_error_free(error);
 *
 * Errors. A call that can fail returns a wst_status, WST_OK or the kind of failure, and takes a last parameter
 *     `error`, which may be NULL. On failure it gets an object with a message, which the caller frees; it is never
 *     a thread's last error. Out-parameters are set to NULL or 0 first on every path. Any call may also return
 *     WST_INTERNAL for a defect of the library: the handle it was made on can then only be freed.
 *
 * Ownership. What a call hands out, the caller frees with the function of the same noun; wst_x_free(NULL) does
 *     nothing. Pointers that getters return belong to the handle. Handles keep alive what they need: the order of
 *     frees is free. Everything that goes in is copied or referenced, but for a callback's `user_data`.
 *
 * Threads. A call that takes `const` handles only may be made from any number of threads at once. A handle that is
 *     not const is exclusive, and a second caller gets WST_BUSY. A handle must not be freed while another thread is
 *     about to use it. After the last free no thread of the library is left.
 *
 * Callbacks take the `user_data` that was given with them and must not unwind. While one runs on behalf of a call,
 *     getters, wst_cancel_request and calls on other handles are allowed.
 *
 * Text is UTF-8 and ends with a NUL byte; broken UTF-8 is WST_INVALID_ARGUMENT; 65535 bytes are the most.
 *
 * Structs start with `struct_size`, which the caller sets; they only grow at the end, and a caller compiled against
 *     another version gets the part that both know. Enums are int32_t with numbers that never change.
 *
 * The library never ends the process, writes to standard output or error, or changes its signals, locale,
 * environment, directory or floating-point mode. */

#ifndef WUERSTCHEN_H
#define WUERSTCHEN_H

#include <stddef.h>
#include <stdint.h>

/* The version that this header belongs to. */
";

const FRAME: &str = r#"
#if defined(__GNUC__) || defined(__clang__)
#define WST_WARN_UNUSED __attribute__((warn_unused_result))
#else
#define WST_WARN_UNUSED
#endif

#ifdef __cplusplus
extern "C" {
#endif

"#;

const FRAME_END: &str = r#"#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* WUERSTCHEN_H */
"#;

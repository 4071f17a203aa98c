//! Compiles the CUDA kernels ahead of time; a part of build.rs, not of the library.
//!
//! Where there is an nvcc, each `.cu` file below `src/` becomes an image for the architectures of `options.txt`, and
//! `OUT_DIR/cuda_images.rs` embeds them all. Where there is none, or where it fails, that list is empty and the
//! library compiles the same sources with NVRTC when it first needs them: the build never fails for want of CUDA.
//!
//! nvcc is `$NVCC`, else `$CUDA_HOME/bin/nvcc`, else the one on `PATH`; `WST_NVCC=0` leaves it alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, thread};

use super::Failure;

const OPTIONS: &str = include_str!("options.txt");
/// Where the images are, below OUT_DIR.
const FOLDER: &str = "cuda";

/// Writes `out/cuda_images.rs`, the list of images of the kernels below `source`, by the stems of their files.
pub fn build_images(source: &Path, out: &Path) -> Result<(), Failure> {
    for variable in ["WST_NVCC", "NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let images = match find_nvcc() {
        None => BTreeMap::new(),
        Some(nvcc) => {
            // All of it, for the sake of kernels that are new; what is compiled already is kept.
            println!("cargo:rerun-if-changed={}", source.display());
            compile_all(&nvcc, source, &out.join(FOLDER))
                .inspect_err(|error| warn(&format!("no CUDA kernel is compiled ahead of time: {error}")))
                .unwrap_or_default()
        }
    };
    fs::write(out.join("cuda_images.rs"), list(&images)?)?;
    Ok(())
}

fn find_nvcc() -> Option<PathBuf> {
    if env::var("WST_NVCC").is_ok_and(|value| value == "0") {
        return None;
    }
    let named = env::var_os("NVCC").map(PathBuf::from);
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file());
    named.or(home).or(on_path)
}

/// Everything that an image is made of, but for its source.
struct Compiler {
    nvcc: PathBuf,
    arguments: Vec<String>,
    /// Changes whenever an image may change.
    key: u64,
}

/// Compiles every kernel file below `source` into `folder`: the images by the stems of the files.
fn compile_all(nvcc: &Path, source: &Path, folder: &Path) -> Result<BTreeMap<String, PathBuf>, Failure> {
    let compiler = Compiler::new(nvcc, source)?;
    let mut files = BTreeMap::new();
    for path in files_below(source, "cu")? {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(other) = files.insert(name, path.clone()) {
            return Err(format!("{} and {} have the same name", other.display(), path.display()).into());
        }
    }
    fs::create_dir_all(folder)?;
    let waiting = Mutex::new(files.iter());
    let done = Mutex::new(Ok(BTreeMap::new()));
    // Each worker takes the next file; after a failure none takes another.
    let work = || {
        while let Some((name, path)) = locked(&waiting).next() {
            let image = compiler.image(name, path, folder);
            let mut done = locked(&done);
            match (&mut *done, image) {
                (Ok(images), Ok(image)) => drop(images.insert(name.clone(), image)),
                (Ok(_), Err(error)) => *done = Err(error.to_string()),
                (Err(_), _) => return,
            }
        }
    };
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    thread::scope(|scope| (0..jobs).for_each(|_| drop(scope.spawn(work))));
    let images = locked(&done).clone()?;
    remove_others(folder, &images)?;
    Ok(images)
}

impl Compiler {
    fn new(nvcc: &Path, source: &Path) -> Result<Self, Failure> {
        let known = run(Command::new(nvcc).arg("--list-gpu-code"))?;
        let help = run(Command::new(nvcc).arg("--help"))?;
        let version = run(Command::new(nvcc).arg("--version"))?;

        let mut arguments = vec!["-fatbin".to_owned()];
        arguments.extend(lines("--").map(str::to_owned));
        for code in lines("sm_").filter(|code| knows(&known, code)) {
            arguments.push(format!("-gencode=arch={},code={code}", code.replace("sm_", "compute_")));
        }
        arguments.extend(lines("compute_").map(|ptx| format!("-gencode=arch={ptx},code={ptx}")));
        if help.contains("--compress-mode") {
            arguments.push("--compress-mode=size".to_owned());
        }
        let mut hasher = DefaultHasher::new();
        (&version, &arguments).hash(&mut hasher);
        for header in files_below(source, "cuh")? {
            fs::read(&header)?.hash(&mut hasher);
            if let Some(folder) = header.parent() {
                arguments.push(format!("-I{}", folder.display()));
            }
        }
        Ok(Self { nvcc: nvcc.to_owned(), arguments, key: hasher.finish() })
    }

    /// The image of one file, which may be there from an earlier build.
    fn image(&self, name: &str, path: &Path, folder: &Path) -> Result<PathBuf, Failure> {
        let mut hasher = DefaultHasher::new();
        (self.key, fs::read(path)?).hash(&mut hasher);
        let image = folder.join(format!("{name}-{:016x}.fatbin", hasher.finish()));
        if !image.is_file() {
            // Named in the end, so that a build that is interrupted leaves no half of an image.
            let part = image.with_extension("part");
            run(Command::new(&self.nvcc).args(&self.arguments).arg("-o").arg(&part).arg(path))?;
            fs::rename(&part, &image)?;
        }
        Ok(image)
    }
}

/// Whether an nvcc that lists `known` compiles for `code`. It does not list what only one architecture has, `sm_90a`.
fn knows(known: &str, code: &str) -> bool {
    known.lines().any(|line| line.trim() == code.trim_end_matches('a'))
}

/// The lines of options.txt that begin with `prefix`.
fn lines(prefix: &str) -> impl Iterator<Item = &'static str> {
    OPTIONS.lines().map(str::trim).filter(move |line| line.starts_with(prefix))
}

/// The files below `folder` with this extension, in a fixed order.
fn files_below(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, Failure> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(files_below(&path, extension)?);
        } else if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Images of sources that have changed since.
fn remove_others(folder: &Path, images: &BTreeMap<String, PathBuf>) -> Result<(), Failure> {
    for path in files_below(folder, "fatbin")? {
        if !images.values().any(|image| *image == path) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Runs a command; on failure the error is all that it wrote.
fn run(command: &mut Command) -> Result<String, Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{program}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    Err(format!("{program}, {}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr)).into())
}

/// The source of the list. The driver reads numbers of 8 bytes in an image, so each is aligned.
fn list(images: &BTreeMap<String, PathBuf>) -> Result<String, Failure> {
    let mut text = String::new();
    if !images.is_empty() {
        text.push_str("#[repr(C, align(64))]\nstruct Aligned<T>(T);\n\n");
    }
    text.push_str(
        "/// The kernels that were compiled with the library: the name of the source, and a fatbin.\n",
    );
    text.push_str("pub static IMAGES: &[(&str, &[u8])] = &[\n");
    for (name, path) in images {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        writeln!(text, "    ({name:?}, &Aligned(*include_bytes!({:?})).0),", format!("{FOLDER}/{file}"))?;
    }
    text.push_str("];\n");
    Ok(text)
}

fn warn(text: &str) {
    text.lines().for_each(|line| println!("cargo:warning={line}"));
}

/// A worker that panicked ends the build anyway.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

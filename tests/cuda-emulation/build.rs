//! Builds the three libraries with the machine's C++ compiler. Without one, or for another machine, the crate still
//! builds, and says so when it is used.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

type Failure = Box<dyn std::error::Error>;

/// SONAME, sources, the name under which programs look for it first.
const LIBRARIES: [(&str, &[&str], &str); 3] = [
    (
        "libcuda.so.1",
        &[
            "driver/context.cpp",
            "driver/control.cpp",
            "driver/graph.cpp",
            "driver/memory.cpp",
            "driver/module.cpp",
            "driver/stream.cpp",
        ],
        "libcuda.so",
    ),
    ("libnvrtc.so.13", &["nvrtc.cpp"], "libnvrtc.so"),
    ("libcublasLt.so.13", &["cublaslt.cpp"], "libcublasLt.so"),
];

/// What a kernel source is compiled against.
const HEADERS: [&str; 6] =
    ["cuemu.h", "module.h", "cuemu/arithmetic.h", "cuemu/engine.h", "cuemu/tensor.h", "cuemu/warp.h"];

fn main() -> Result<(), Failure> {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-env-changed=CXX");
    let (out, failure) = (PathBuf::from(env::var("OUT_DIR")?), build());
    println!("cargo:rustc-env=CUEMU_LIBRARIES={}", out.join("lib").display());
    let failure = failure.err().map(|failure| failure.to_string().replace('\n', " ")).unwrap_or_default();
    println!("cargo:rustc-env=CUEMU_FAILURE={failure}");
    Ok(())
}

fn build() -> Result<(), Failure> {
    // The compiler that kernels meet at run time is this machine's.
    if env::var("TARGET")? != env::var("HOST")? {
        return Err("it is for the machine that builds it".into());
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let (folder, include) = (out.join("lib"), out.join("include"));
    fs::create_dir_all(&folder)?;
    let mut hasher = DefaultHasher::new();
    for header in HEADERS {
        let text = fs::read(Path::new("cpp").join(header))?;
        text.hash(&mut hasher);
        let to = include.join(header);
        fs::create_dir_all(to.parent().ok_or("no folder for a header")?)?;
        fs::write(to, text)?;
    }
    let compiler = cc::Build::new().cpp(true).try_get_compiler()?;
    let defines = [
        format!("-DCUEMU_CXX=\"{}\"", compiler.path().display()),
        format!("-DCUEMU_INCLUDE=\"{}\"", include.display()),
        format!("-DCUEMU_CACHE=\"{}\"", out.join("kernels").display()),
        format!("-DCUEMU_HEADERS_HASH=\"{:016x}\"", hasher.finish()),
    ];
    let library = |soname: &str| {
        let mut command = Command::new(compiler.path());
        command.args([
            "-std=c++17",
            "-O2",
            "-g",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
        ]);
        command.args(["-Wl,-z,defs", "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed"]);
        command.arg(format!("-Wl,-soname,{soname}")).arg("-o").arg(folder.join(soname));
        command
    };
    for (soname, sources, short) in LIBRARIES {
        let mut command = library(soname);
        command.args(&defines).args(sources.iter().map(|source| format!("cpp/{source}")));
        if soname != "libcuda.so.1" {
            command.arg(folder.join("libcuda.so.1"));
        }
        run(command.args(["-pthread", "-ldl"]))?;
        // Programs ask for this name first, and a machine with a GPU would give them the real library.
        run(library(short).args(["-x", "c++", "/dev/null", "-x", "none"]).arg(folder.join(soname)))?;
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let output = command.output().map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(())
}

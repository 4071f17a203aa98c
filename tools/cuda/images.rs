//! Does what build.rs does for CUDA, apart from cargo: `images SOURCES OUT` writes OUT/cuda_images.rs.

#[path = "../../src/device/cuda/build.rs"]
mod cuda;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let folders: Vec<_> = std::env::args_os().skip(1).map(std::path::PathBuf::from).collect();
    let [source, out] = folders.as_slice() else { return Err("usage: images SOURCES OUT".into()) };
    std::fs::create_dir_all(out)?;
    cuda::build_images(source, out)
}

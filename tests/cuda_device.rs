//! A GPU as a host of the library meets it: names, contexts, streams, threads, and the cache of compiled kernels.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/errors.rs"]
mod errors;
#[path = "common/folder.rs"]
mod folder;

use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cuda_emulation::{Order, calls_by_name, live, set_memory, set_order};
use cudarc::driver::sys;
use emulated::{Host, MEMORY, Scratch, alone, current_context, in_child, is_child};
use errors::{Kind, assert_error};
use folder::{distance, open, open_on, options, picture, short, tiny, v2};
use wuerstchen::device::cuda::{Gpu, describe, gpus};
use wuerstchen::{
    DType, Error, GenerateOptions, Image, Job, LogLevel, Model, ModelOptions, Progress, Residency, Stage,
    Tensor,
};

fn on(device: &str) -> ModelOptions {
    let mut options = ModelOptions::default();
    options.set_device(device).unwrap();
    options.set_threads(1).unwrap();
    options
}

fn same(found: &Image, expected: &Image, what: &str) {
    let differing = found.data().iter().zip(expected.data()).filter(|(f, e)| f != e).count();
    assert_eq!(differing, 0, "{what}: bytes that differ of {}", expected.data().len());
}

// --- Names and errors -------------------------------------------------------------------------------------------

#[test]
fn the_gpu_is_listed() {
    let Some(_alone) = alone() else { return };
    assert_eq!(gpus().unwrap(), 1);
    let info = describe(0).unwrap();
    assert_eq!((info.name.as_str(), info.capability.to_string().as_str()), ("Emulated GPU", "9.0"));
    assert_eq!((info.memory_bytes, Gpu::open(0).unwrap().free_bytes().unwrap()), (MEMORY, MEMORY));
    assert!(info.multiprocessors > 0);
    assert_error("cuda:1", describe(1), Kind::Argument, &["cuda:1", "below 1"]);
    assert_eq!(live(None), 0);
}

#[test]
fn a_gpu_that_there_is_not_is_named() {
    let Some(_alone) = alone() else { return };
    assert_error(
        "one",
        Model::open(&tiny(), &on("cuda:7")),
        Kind::Argument,
        &["device", "cuda:7", "below 1"],
    );
    for name in ["cuda:", "cuda:-1", "cuda:1x", "gpu", "CUDA", "cuda:0 ", ""] {
        let set = ModelOptions::default().set_device(name);
        assert_error(name, set, Kind::Argument, &["device", "\"cuda:0\"", &format!("{name:?}")]);
    }
}

/// A log, and options whose model writes it.
fn logged(device: &str) -> (ModelOptions, Arc<Mutex<Vec<String>>>) {
    let (mut options, lines) = (on(device), Arc::new(Mutex::new(Vec::new())));
    let heard = lines.clone();
    let hear = move |level, line: &str| heard.lock().unwrap().push(format!("{level:?}: {line}"));
    options.set_log(LogLevel::Info, Some(Arc::new(hear)));
    (options, lines)
}

#[test]
fn auto_takes_the_gpu() {
    let Some(_alone) = alone() else { return };
    let (options, lines) = logged("auto");
    let model = Model::open(&tiny(), &options).unwrap();
    picture(&model, &short(&model, "a cat"));
    assert!(model.info().bytes_device > 0);
    let lines = lines.lock().unwrap();
    // On this architecture half precision is brain floats.
    assert!(lines.iter().any(|line| line.contains("cuda:0 (Emulated GPU) in BF16")), "{lines:?}");
}

/// Runs this test in a process with the variables. Returns whether this is that process.
fn apart(test: &str, variables: &[(&str, &Path)]) -> bool {
    if !is_child() {
        in_child(test, variables);
    }
    is_child()
}

#[test]
fn of_several_gpus_any_is_taken() {
    let variables = [("CUEMU_DEVICES", Path::new("3")), ("CUEMU_CC", Path::new("75"))];
    if !folder::devices::is_emulated() || !apart("of_several_gpus_any_is_taken", &variables) {
        return;
    }
    let Some(_alone) = alone() else { return };
    assert_eq!(gpus().unwrap(), 3);
    let expected = of_cuda(&on("cuda:0"));
    let (options, lines) = logged("cuda:2");
    // Turing has no brain floats.
    same(&of_cuda(&options), &expected, "the third GPU");
    assert!(lines.lock().unwrap().iter().any(|line| line.contains("cuda:2 (Emulated GPU) in F16")));
    assert_error("cuda:7", Model::open(&tiny(), &on("cuda:7")), Kind::Argument, &["cuda:7", "below 3"]);
    assert_eq!(live(None), 0);
}

fn of_cuda(options: &ModelOptions) -> Image {
    let model = Model::open(&tiny(), options).unwrap();
    picture(&model, &short(&model, "a cat"))
}

#[test]
fn a_gpu_that_is_too_old_is_refused() {
    let variables = [("CUEMU_CC", Path::new("70"))];
    if !folder::devices::is_emulated() || !apart("a_gpu_that_is_too_old_is_refused", &variables) {
        return;
    }
    let Some(_alone) = alone() else { return };
    let words = ["device \"cuda:0\"", "Emulated GPU", "compute capability 7.0", "7.5 is the least"];
    assert_error("Volta", Model::open(&tiny(), &on("cuda")), Kind::Unsupported, &words);
    let (options, lines) = logged("auto");
    Model::open(&tiny(), &options).unwrap();
    let lines = lines.lock().unwrap();
    assert!(lines.iter().any(|line| line.starts_with("Warning") && line.contains("7.5")), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("CPU threads")), "{lines:?}");
}

/// In a process that does not load the emulation.
#[test]
fn without_a_driver_the_libraries_that_were_tried_are_named() {
    let test = "without_a_driver_the_libraries_that_were_tried_are_named";
    if !apart(test, &[]) {
        return;
    }
    // SAFETY: NVIDIA's library, if it is there, is made for this.
    let real = unsafe { sys::is_culib_present() };
    if real {
        return eprintln!("not tested: this machine has a driver");
    }
    let words = ["cuda", "libcuda.so.1", "not found"];
    assert_error("cuda", Model::open(&tiny(), &on("cuda")), Kind::Unsupported, &words);
    assert_error("info", describe(0), Kind::Unsupported, &words);
    let (options, lines) = logged("auto");
    let model = Model::open(&tiny(), &options).unwrap();
    picture(&model, &short(&model, "a cat"));
    // Machines without a GPU are nothing to warn of.
    assert!(!lines.lock().unwrap().iter().any(|line| line.starts_with("Warning")));
    assert_eq!(model.info().bytes_device, 0);
}

/// With a driver but not NVIDIA's compiler.
#[test]
fn without_a_compiler_the_libraries_that_were_tried_are_named() {
    if !folder::devices::is_emulated() {
        return;
    }
    // The emulated driver alone, where the linker looks for it.
    let folder = Scratch::new();
    let [driver, ..] = cuda_emulation::libraries();
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::os::unix::fs::symlink(&driver, folder.0.join(name)).unwrap();
    }
    in_child("child_without_a_compiler", &[("LD_LIBRARY_PATH", &folder.0)]);
}

#[test]
fn child_without_a_compiler() {
    // SAFETY: NVIDIA's library, if it is there, is made for this.
    if !is_child() || unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return;
    }
    let words = ["device \"cuda\"", "libnvrtc.so.13", "no compiled kernels"];
    assert_error("cuda", Model::open(&tiny(), &on("cuda")), Kind::Unsupported, &words);
    let (options, lines) = logged("auto");
    let model = Model::open(&tiny(), &options).unwrap();
    picture(&model, &short(&model, "a cat"));
    let lines = lines.lock().unwrap();
    assert!(lines.iter().any(|line| line.starts_with("Warning") && line.contains("libnvrtc")), "{lines:?}");
}

#[test]
fn what_only_a_gpu_does() {
    let mut options = on("cpu");
    options.set_compute_dtype(DType::F16).unwrap();
    let words = ["compute_dtype", "F16", "the CPU computes in F32"];
    assert_error("half", Model::open(&tiny(), &options), Kind::Unsupported, &words);
    let mut options = on("cpu");
    // SAFETY: it is not looked at.
    unsafe { options.set_cuda_stream(64) }.unwrap();
    assert_error("stream", Model::open(&tiny(), &options), Kind::Argument, &["cuda_stream", "CPU"]);
}

// --- Contexts and streams ---------------------------------------------------------------------------------------

/// Calls of every kind, with `current` the caller's context throughout.
fn check_calls(model_options: &ModelOptions, current: usize) {
    let check = |what: &str| assert_eq!(current_context(), current, "{what}");
    describe(0).unwrap();
    check("describe");
    assert!(Model::open(Path::new("/nowhere"), model_options).is_err());
    check("open nothing");
    let model = Model::open(&tiny(), model_options).unwrap();
    check("open");
    model.info();
    check("info");
    let mut options = short(&model, "a cat");
    options.set_preview(1).unwrap();
    let heard = Arc::new(AtomicI64::new(0));
    let ear = heard.clone();
    let progress = move |_: &Progress| {
        assert_eq!(current_context(), current, "in a callback");
        ear.fetch_add(1, Ordering::Relaxed);
    };
    options.set_progress(Some(Arc::new(progress))).unwrap();
    let image = picture(&model, &options);
    assert!(heard.load(Ordering::Relaxed) > 0);
    check("generate");
    options.set_progress(None).unwrap();
    let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
    check("encode_text");
    let latents = model.stage_c_sample(&text, None, None, &options).unwrap();
    check("stage_c_sample");
    assert!(latents.slice::<f32>().unwrap().iter().all(|value| value.is_finite()));
    model.encode_image(&[&image]).unwrap();
    check("encode_image");
    let mut other = short(&model, "a cat");
    other.set_init_image(&image, 0.5).unwrap();
    let _ = picture(&model, &other);
    check("an initial image");
    let job = Job::start(&model, &options).unwrap();
    check("a job");
    drop(job);
    check("a cancelled job");
    drop((options, other));
    let clone = model.clone();
    drop(model);
    check("a model that lives on");
    drop(clone);
    check("drop");
}

#[test]
fn the_callers_context_stays() {
    let Some(_alone) = alone() else { return };
    check_calls(&options(), 0);
    assert_eq!(live(None), 0);
    let host = Host::new();
    host.set_current(true);
    let current = current_context();
    assert_ne!(current, 0);
    check_calls(&options(), current);
    host.set_current(false);
    drop(host);
    assert_eq!(live(None), 0);
}

#[test]
fn a_model_is_dropped_on_any_thread() {
    let Some(_alone) = alone() else { return };
    let host = Host::new();
    let model = open(&tiny()).unwrap();
    let options = short(&model, "a cat");
    picture(&model, &options);
    std::thread::scope(|scope| {
        let host = host.context as usize;
        scope.spawn(move || {
            // SAFETY: a context that the test holds.
            unsafe { sys::cuCtxSetCurrent(host as sys::CUcontext) }.result().unwrap();
            drop((options, model));
            assert_eq!(current_context(), host);
        });
    });
    assert_eq!(current_context(), 0);
    drop(host);
    assert_eq!(live(None), 0);
}

/// A stream as a host makes it.
struct HostStream {
    host: Host,
    raw: sys::CUstream,
}

impl HostStream {
    fn new() -> Self {
        let (host, mut raw) = (Host::new(), std::ptr::null_mut());
        host.set_current(true);
        // SAFETY: a context is current, `raw` outlives the call.
        unsafe { sys::cuStreamCreate(&mut raw, 1) }.result().unwrap();
        host.set_current(false);
        HostStream { host, raw }
    }

    fn options(&self) -> ModelOptions {
        let mut options = options();
        options.set_threads(1).unwrap();
        // SAFETY: tests drop the model before the stream.
        unsafe { options.set_cuda_stream(self.raw as usize) }.unwrap();
        options
    }
}

impl Drop for HostStream {
    fn drop(&mut self) {
        self.host.set_current(true);
        // SAFETY: made in `new`.
        unsafe { sys::cuStreamDestroy_v2(self.raw) }.result().unwrap();
        self.host.set_current(false);
    }
}

#[test]
fn all_work_goes_to_the_hosts_stream() {
    let Some(_alone) = alone() else { return };
    let expected = of_cuda(&on_f32());
    let stream = HostStream::new();
    let streams = live(Some("stream"));
    let model = Model::open(&tiny(), &stream.options()).unwrap();
    let options = short(&model, "a cat");
    same(&picture(&model, &options), &expected, "on the host's stream");
    same(&picture(&model, &options), &expected, "once more");
    assert_eq!(live(Some("stream")), streams, "a stream of the library's own");
    // While one call has the stream, another does not get it. A job reports on the thread that works.
    let (mut first, errors) = (options.clone(), Arc::new(Mutex::new(Vec::new())));
    let (busy, second, heard) = (model.clone(), options.clone(), errors.clone());
    let on_progress = move |_: &Progress| heard.lock().unwrap().push(busy.generate(&second).unwrap_err());
    first.set_progress(Some(Arc::new(on_progress))).unwrap();
    let job = Job::start(&model, &first).unwrap();
    assert!(job.wait(Duration::from_secs(600)));
    same(&job.images().unwrap()[0], &expected, "with others that want the stream");
    let errors = std::mem::take(&mut *errors.lock().unwrap());
    assert!(!errors.is_empty());
    for error in errors {
        assert!(matches!(&error, Error::Busy { what } if what.contains("cuda_stream")), "{error:?}");
    }
    same(&picture(&model, &options), &expected, "afterwards");
    drop((job, first, options, model));
    assert_eq!(live(Some("stream")), streams);
    drop(stream);
    assert_eq!(live(None), 0);
}

fn on_f32() -> ModelOptions {
    let mut options = options();
    options.set_threads(1).unwrap();
    options
}

#[test]
fn a_stream_of_another_context_is_refused() {
    let variables = [("CUEMU_DEVICES", Path::new("2"))];
    if !folder::devices::is_emulated() || !apart("a_stream_of_another_context_is_refused", &variables) {
        return;
    }
    let Some(_alone) = alone() else { return };
    let stream = HostStream::new();
    let mut options = stream.options();
    options.set_device("cuda:1").unwrap();
    assert!(Model::open(&tiny(), &options).is_err());
    // The default streams of CUDA's two interfaces.
    for number in [1, 2] {
        let mut options = on_f32();
        // SAFETY: not an address.
        unsafe { options.set_cuda_stream(number) }.unwrap();
        assert_error("default", Model::open(&tiny(), &options), Kind::Argument, &["cuda_stream", "default"]);
    }
    drop(stream);
    assert_eq!(live(None), 0);
}

// --- Together ---------------------------------------------------------------------------------------------------

#[test]
fn two_models_share_a_gpu() {
    let Some(_alone) = alone() else { return };
    let expected = [tiny(), v2("model")].map(|path| {
        let model = open(&path).unwrap();
        picture(&model, &short(&model, "a cat"))
    });
    let models = [tiny(), v2("model")].map(|path| open(&path).unwrap());
    assert_eq!(live(Some("context")), 1, "a GPU is opened once");
    for (model, expected) in models.iter().zip(&expected) {
        same(&picture(model, &short(model, "a cat")), expected, "beside another model");
    }
    let [one, other] = models;
    drop(one);
    same(&picture(&other, &short(&other, "a cat")), &expected[1], "after the other model went");
    drop(other);
    assert_eq!(live(None), 0);
}

#[test]
fn threads_make_the_pictures_that_one_makes() {
    let Some(_alone) = alone() else { return };
    for residency in [Residency::All, Residency::Stage] {
        let mut options = on_f32();
        options.set_residency(residency).unwrap();
        let model = Model::open(&tiny(), &options).unwrap();
        let options: Vec<GenerateOptions> = (0..8)
            .map(|i| {
                let mut options = short(&model, ["a cat", "a red apple"][i % 2]);
                options.set_seed(i as u64).unwrap();
                options
            })
            .collect();
        let alone: Vec<Image> = options.iter().map(|options| picture(&model, options)).collect();
        let together: Vec<Image> = std::thread::scope(|scope| {
            let threads = options.iter().map(|options| scope.spawn(|| picture(&model, options)));
            threads.collect::<Vec<_>>().into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (i, (found, expected)) in together.iter().zip(&alone).enumerate() {
            same(found, expected, &format!("{residency:?}, picture {i}"));
        }
        drop((options, model));
        assert_eq!(live(None), 0);
    }
}

/// Results leave the stream that made them before another call gets it.
#[test]
fn threads_call_stages() {
    let Some(_alone) = alone() else { return };
    let model = open_on(&tiny(), 1).unwrap();
    let latents = |i: usize| -> Tensor {
        let mut options = short(&model, "a cat");
        options.set_seed(i as u64).unwrap();
        let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
        model.stage_c_sample(&text, None, None, &options).unwrap()
    };
    let alone: Vec<Tensor> = (0..6).map(latents).collect();
    let together: Vec<Tensor> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6).map(|i| scope.spawn(move || latents(i))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (found, expected) in together.iter().zip(&alone) {
        assert!(found.bytes().unwrap() == expected.bytes().unwrap());
    }
}

#[test]
fn the_order_of_threads_and_blocks_changes_nothing() {
    let Some(_alone) = alone() else { return };
    for path in [tiny(), v2("model")] {
        let model = open(&path).unwrap();
        let options = short(&model, "a cat");
        let expected = picture(&model, &options);
        same(&picture(&model, &options), &expected, "the same seed");
        for order in [Order::Descending, Order::Random(1), Order::Random(2)] {
            set_order(order);
            same(&picture(&model, &options), &expected, &format!("{order:?}"));
        }
        set_order(Order::Ascending);
    }
}

// --- Memory and precision ---------------------------------------------------------------------------------------

fn with_residency(path: &Path, residency: Residency) -> (Image, i64) {
    let mut options = on_f32();
    options.set_residency(residency).unwrap();
    measured(&Model::open(path, &options).unwrap())
}

/// A picture, and the most memory of the device that was seen after a step.
fn measured(model: &Model) -> (Image, i64) {
    let (mut options, most) = (short(model, "a cat"), Arc::new(AtomicI64::new(0)));
    let seen = most.clone();
    let progress = move |_: &Progress| {
        seen.fetch_max(live(Some("bytes")), Ordering::Relaxed);
    };
    options.set_progress(Some(Arc::new(progress))).unwrap();
    let image = picture(model, &options);
    assert_eq!(model.info().bytes_device, live(Some("bytes")) as u64);
    (image, most.load(Ordering::Relaxed))
}

#[test]
fn with_one_stage_resident_less_memory_is_needed() {
    let Some(_alone) = alone() else { return };
    for path in [tiny(), v2("model")] {
        let (expected, all) = with_residency(&path, Residency::All);
        let (image, stage) = with_residency(&path, Residency::Stage);
        same(&image, &expected, "one stage at a time");
        assert!(stage < all, "{stage} bytes with one stage, {all} with all");
        let (image, auto) = with_residency(&path, Residency::Auto);
        same(&image, &expected, "auto");
        assert_eq!(auto, all, "there is room");
        assert_eq!(live(None), 0);
    }
}

#[test]
fn where_weights_fill_the_gpu_one_stage_is_resident() {
    let Some(_alone) = alone() else { return };
    let (expected, all) = with_residency(&v2("model"), Residency::All);
    let info = open(&v2("model")).unwrap().info();
    let parameters = info.stage_a_parameters
        + info.stage_b_parameters
        + info.stage_c_parameters
        + info.text_encoder_parameters;
    // Weights take two thirds of what is there when the model is opened.
    set_memory(parameters as usize * size_of::<f32>() * 3 / 2);
    let mut options = on_f32();
    options.set_residency(Residency::Auto).unwrap();
    let model = Model::open(&v2("model"), &options).unwrap();
    set_memory(MEMORY);
    let (image, auto) = measured(&model);
    same(&image, &expected, "auto");
    assert!(auto < all, "{auto} bytes of {all}");
}

/// Types, what rounding to them may change of Stage C's latents (of their norm), and of a picture's bytes (on average).
const HALVES: [(DType, f64, f64); 2] = [(DType::F16, 4e-3, 0.5), (DType::BF16, 3e-2, 4.0)];

#[test]
fn half_precision_makes_almost_the_same_latents() {
    let Some(_alone) = alone() else { return };
    for path in [tiny(), v2("model")] {
        let expected = latents_in_type(&path, DType::F32);
        for (dtype, most, _) in HALVES {
            let found = latents_in_type(&path, dtype);
            let difference =
                norm(found.iter().zip(&expected).map(|(f, e)| f - e)) / norm(expected.iter().copied());
            println!("{}: {dtype}, {difference} of the norm", path.display());
            assert!(difference > 0.0 && difference < most, "{}: {dtype}, {difference}", path.display());
        }
    }
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

fn latents_in_type(path: &Path, dtype: DType) -> Vec<f32> {
    let mut options = on_f32();
    options.set_compute_dtype(dtype).unwrap();
    let model = Model::open(path, &options).unwrap();
    let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
    let latents = model.stage_c_sample(&text, None, None, &short(&model, "a cat")).unwrap();
    latents.slice().unwrap().to_vec()
}

/// Of v2. v1's tokens are drawn, and the least difference of a probability moves all limits between the codes that
/// come after it: with the random weights here a third of the tokens become others, mostly as likely as they were.
#[test]
fn half_precision_makes_almost_the_same_picture() {
    let Some(_alone) = alone() else { return };
    let path = v2("model");
    let expected = in_type(&path, DType::F32);
    for (dtype, _, most) in HALVES {
        let found = distance(&in_type(&path, dtype), &expected);
        println!("{dtype}, {found} of 255");
        assert!(found > 0.0 && found < most, "{dtype}, {found}");
    }
}

fn in_type(path: &Path, dtype: DType) -> Image {
    let mut options = on_f32();
    options.set_compute_dtype(dtype).unwrap();
    let model = Model::open(path, &options).unwrap();
    let options = short(&model, "a cat");
    let image = picture(&model, &options);
    same(&picture(&model, &options), &image, "once more");
    image
}

#[test]
fn half_precision_stays_within_the_model() {
    let Some(_alone) = alone() else { return };
    let mut options = on_f32();
    options.set_compute_dtype(DType::BF16).unwrap();
    let model = Model::open(&tiny(), &options).unwrap();
    let options = short(&model, "a cat");
    let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
    assert_eq!(text.dtype(), DType::F32);
    let latents = model.stage_c_sample(&text, None, None, &options).unwrap();
    assert_eq!(latents.dtype(), DType::F32);
    let text = model.encode_text(Stage::B, &["a cat"]).unwrap();
    let tokens = model.stage_b_sample(&latents, &text, None, &options).unwrap();
    let time = Tensor::from_slice(&[1], &[0.5f32]).unwrap();
    let logits = model.stage_b_predict(&tokens, &time, &latents, &text).unwrap();
    assert_eq!(logits.dtype(), DType::F32);
    let pixels = model.stage_a_decode(&tokens).unwrap();
    assert_eq!(pixels.dtype(), DType::F32);
}

// --- The cache of compiled kernels ------------------------------------------------------------------------------

/// How often NVRTC compiled so far.
fn compiled() -> u64 {
    calls_by_name().get("nvrtcCompileProgram").copied().unwrap_or(0)
}

#[test]
fn kernels_are_compiled_once() {
    if !folder::devices::is_emulated() {
        return;
    }
    if !is_child() {
        let caches = Scratch::new();
        in_child("kernels_are_compiled_once", &[("XDG_CACHE_HOME", &caches.0)]);
        return;
    }
    let Some(_alone) = alone() else { return };
    let expected = of_cuda(&on_f32());
    let first = compiled();
    assert!(first > 0);
    let folder = std::path::PathBuf::from(std::env::var_os("XDG_CACHE_HOME").unwrap()).join("wuerstchen");
    let files =
        || -> Vec<_> { std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect() };
    let count = files().len();
    assert!(count > 0 && count as u64 <= first, "{count} files, {first} compiled");
    same(&of_cuda(&on_f32()), &expected, "from the disk");
    assert_eq!(compiled(), first, "all were on the disk");
    // Damage of every kind: no header, half a file, another content, none, a folder in its place.
    for (i, path) in files().into_iter().enumerate() {
        let content = std::fs::read(&path).unwrap();
        match i % 5 {
            0 => std::fs::write(&path, b"nonsense").unwrap(),
            1 => std::fs::write(&path, &content[..content.len() / 2]).unwrap(),
            2 => std::fs::write(&path, content.iter().map(|byte| byte ^ 1).collect::<Vec<u8>>()).unwrap(),
            3 => std::fs::write(&path, b"").unwrap(),
            _ => {
                std::fs::remove_file(&path).unwrap();
                std::fs::create_dir(&path).unwrap();
            }
        }
    }
    same(&of_cuda(&on_f32()), &expected, "with a damaged cache");
    assert_eq!(compiled(), 2 * first, "all were damaged");
    assert_eq!(files().len(), count, "nothing is left beside");
}

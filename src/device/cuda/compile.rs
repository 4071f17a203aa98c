//! Kernels from source to the device: images of the build if it had a compiler, else NVRTC when they are used first.
//! What NVRTC made is kept on the disk.

use std::collections::HashMap;
use std::ffi::{CString, c_char};
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::{self, CUfunction_attribute as Attribute};
use cudarc::nvrtc::sys as nvrtc;

use super::cache::Cache;
use super::driver;
use super::gpu::{Capability, Gpu, lock};
use super::{Parameter, Precision};
use crate::error::{Error, Result};

/// A file that sources include: its name and its text.
pub type Header = (&'static str, &'static str);

/// What every source includes.
const HEADER: Header = ("kernel.cuh", include_str!("kernel.cuh"));

/// How kernels are compiled: its lines that are options.
const OPTIONS: &str = include_str!("options.txt");

/// Dynamic shared memory that needs no permission.
const SHARED_DEFAULT: u32 = 48 << 10;

/// The kernels of one source file.
#[derive(Debug)]
pub struct Kernels {
    name: &'static str,
    source: &'static str,
    headers: &'static [Header],
}

impl Kernels {
    /// Of the file `name.cu`, which includes `headers` beside kernel.cuh.
    pub const fn new(name: &'static str, source: &'static str, headers: &'static [Header]) -> Self {
        Kernels { name, source, headers }
    }

    /// The file's name without its ending.
    pub fn name(&self) -> &'static str {
        self.name
    }
}

/// A kernel on a device.
#[derive(Debug, Clone)]
pub struct Function {
    raw: sys::CUfunction,
    /// The sizes of its parameters, where the driver can tell.
    parameters: Option<Arc<[usize]>>,
}

// SAFETY: a handle that any thread may launch.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    fn new(raw: sys::CUfunction) -> Self {
        if !driver::has(c"cuFuncGetParamInfo") {
            return Function { raw, parameters: None };
        }
        let mut sizes = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: the function is loaded; both numbers outlive the call.
            match unsafe { sys::cuFuncGetParamInfo(raw, sizes.len(), &mut offset, &mut size) } {
                sys::CUresult::CUDA_SUCCESS => sizes.push(size),
                // There are no more.
                sys::CUresult::CUDA_ERROR_INVALID_VALUE => {
                    return Function { raw, parameters: Some(sizes.into()) };
                }
                _ => return Function { raw, parameters: None },
            }
        }
    }

    pub(super) fn raw(&self) -> sys::CUfunction {
        self.raw
    }

    /// # Errors
    /// `Internal` if the kernel takes other parameters, as far as sizes tell.
    pub(super) fn check_parameters(&self, name: &str, given: &[&dyn Parameter]) -> Result<()> {
        let Some(declared) = &self.parameters else { return Ok(()) };
        let sizes = given.iter().map(|parameter| size_of_val(*parameter));
        if sizes.clone().eq(declared.iter().copied()) {
            return Ok(());
        }
        let found = format!("parameters of {:?} bytes for {declared:?}", sizes.collect::<Vec<_>>());
        Err(Error::internal(format!("the kernel {name}"), found))
    }

    /// Permits a block this much dynamic shared memory.
    pub(super) fn allow_shared(&self, gpu: &Gpu, bytes: u32) -> Result<()> {
        if bytes <= SHARED_DEFAULT {
            return Ok(());
        }
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is loaded.
        let result = unsafe { sys::cuFuncSetAttribute(self.raw, attribute, bytes as i32) };
        gpu.check("cuFuncSetAttribute", result)
    }
}

/// A source file on a device.
#[derive(Debug)]
pub(super) struct Module {
    raw: sys::CUmodule,
    functions: Mutex<HashMap<(&'static str, Option<Precision>), Function>>,
}

// SAFETY: a handle that any thread may use.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// The device's context must be current.
    pub fn load(gpu: &Gpu, kernels: &'static Kernels) -> Result<Self> {
        if let Some((_, image)) = super::images::IMAGES.iter().find(|(name, _)| *name == kernels.name)
            && let Ok(module) = Self::of_image(gpu, image)
        {
            return Ok(module);
        }
        let compiler = Compiler::find()?;
        let program = Program { kernels, architecture: compiler.architecture(gpu.info().capability)? };
        let key = compiler.key(&program);
        let cache = Cache::of_user();
        // What the disk holds may be damaged, or made for a driver that was replaced.
        if let Some(module) = cache.read(&key).and_then(|image| Self::of_image(gpu, &image).ok()) {
            return Ok(module);
        }
        let image = compiler.compile(&program)?;
        let module = Self::of_image(gpu, &image)?;
        cache.write(&key, &image);
        Ok(module)
    }

    fn of_image(gpu: &Gpu, image: &[u8]) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: a whole image, ended by a zero byte where it is text; a context is current; `raw` outlives the call.
        let result = unsafe { sys::cuModuleLoadData(&mut raw, image.as_ptr().cast()) };
        gpu.check("cuModuleLoadData", result)?;
        Ok(Module { raw, functions: Mutex::default() })
    }

    /// The kernel `name`, in its version for `precision`.
    pub fn function(&self, gpu: &Gpu, name: &'static str, precision: Option<Precision>) -> Result<Function> {
        let mut functions = lock(&self.functions);
        if let Some(function) = functions.get(&(name, precision)) {
            return Ok(function.clone());
        }
        let whole = match precision {
            Some(precision) => format!("{name}_{}", precision.suffix()),
            None => name.to_owned(),
        };
        let text = CString::new(whole.as_str()).map_err(|_| Error::internal(name, "a kernel's name"))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the module is loaded; `raw` and the name outlive the call.
        let result = unsafe { sys::cuModuleGetFunction(&mut raw, self.raw, text.as_ptr()) };
        gpu.check(&format!("cuModuleGetFunction {whole}"), result)?;
        let function = Function::new(raw);
        functions.insert((name, precision), function.clone());
        Ok(function)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded in `of_image`; the owner has the context current. A failure leaves nothing to be done.
        let _ = unsafe { sys::cuModuleUnload(self.raw) };
    }
}

/// NVIDIA's compiler at run time.
struct Compiler {
    version: (i32, i32),
}

/// What is compiled, and for what.
struct Program {
    kernels: &'static Kernels,
    /// `sm_90`, or `compute_90` if the compiler does not know the device.
    architecture: String,
}

impl Program {
    fn headers(&self) -> impl Iterator<Item = &'static Header> {
        std::iter::once(&HEADER).chain(self.kernels.headers)
    }
}

impl Compiler {
    fn find() -> Result<Self> {
        // SAFETY: opens and closes the library, whose initialisers may run.
        if !unsafe { nvrtc::is_culib_present() } {
            let reason = "this build holds no compiled kernels, and NVIDIA's run-time compiler was not found: \
                          tried libnvrtc.so and libnvrtc.so.13, .12, .11 (install cuda-nvrtc, or build where nvcc is)";
            return Err(Error::unsupported("device \"cuda\"", reason));
        }
        let mut version = (0, 0);
        // SAFETY: the library is there; both numbers outlive the call.
        check("nvrtcVersion", unsafe { nvrtc::nvrtcVersion(&mut version.0, &mut version.1) })?;
        Ok(Compiler { version })
    }

    /// The device's own architecture, or the newest one before it, whose instructions the driver translates.
    fn architecture(&self, capability: Capability) -> Result<String> {
        let mut count = 0;
        // SAFETY: the library is there; the number outlives the call.
        check("nvrtcGetNumSupportedArchs", unsafe { nvrtc::nvrtcGetNumSupportedArchs(&mut count) })?;
        let mut known = vec![0; usize::try_from(count).unwrap_or(0).min(256)];
        if known.len() == count as usize {
            // SAFETY: the list has room for as many as there are.
            check("nvrtcGetSupportedArchs", unsafe { nvrtc::nvrtcGetSupportedArchs(known.as_mut_ptr()) })?;
        }
        let own = (10 * capability.major + capability.minor) as i32;
        if known.contains(&own) {
            return Ok(format!("sm_{own}"));
        }
        let older = known.into_iter().filter(|&one| one < own).max();
        older.map(|one| format!("compute_{one}")).ok_or_else(|| {
            let (major, minor) = self.version;
            let reason = format!("NVRTC {major}.{minor} knows no architecture up to {capability}");
            Error::unsupported("device \"cuda\"", reason)
        })
    }

    /// All that a compiled image depends on.
    fn key(&self, program: &Program) -> Vec<u8> {
        let (major, minor) = self.version;
        let about = format!("{major}.{minor} {} {OPTIONS:?} {}", program.architecture, program.kernels.name);
        let mut parts = vec![about.as_bytes(), program.kernels.source.as_bytes()];
        parts.extend(program.headers().map(|(_, text)| text.as_bytes()));
        parts.join(&0)
    }

    fn compile(&self, program: &Program) -> Result<Vec<u8>> {
        let text =
            |text: &str| CString::new(text).map_err(|_| Error::internal("a kernel's source", "a NUL byte"));
        let source = text(program.kernels.source)?;
        let headers = program
            .headers()
            .map(|(name, body)| Ok((text(name)?, text(body)?)))
            .collect::<Result<Vec<_>>>()?;
        let (names, bodies): (Vec<_>, Vec<_>) =
            headers.iter().map(|(name, body)| (name.as_ptr(), body.as_ptr())).unzip();
        let name = text(&format!("{}.cu", program.kernels.name))?;
        let architecture = format!("--gpu-architecture={}", program.architecture);
        let options = OPTIONS.lines().filter(|line| line.starts_with("--")).chain([architecture.as_str()]);
        let options = options.map(text).collect::<Result<Vec<_>>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut raw = std::ptr::null_mut();
        // SAFETY: all texts outlive the calls.
        let created = unsafe {
            nvrtc::nvrtcCreateProgram(
                &mut raw,
                source.as_ptr(),
                name.as_ptr(),
                headers.len() as i32,
                bodies.as_ptr(),
                names.as_ptr(),
            )
        };
        check("nvrtcCreateProgram", created)?;
        let compiling = Compiling { raw };
        // SAFETY: the program and the options are alive.
        let result = unsafe { nvrtc::nvrtcCompileProgram(raw, options.len() as i32, options.as_ptr()) };
        if result == nvrtc::nvrtcResult::NVRTC_ERROR_COMPILATION {
            return Err(Error::internal(format!("{}.cu", program.kernels.name), compiling.log()));
        }
        check("nvrtcCompileProgram", result)?;
        compiling.image(program.architecture.starts_with("sm_"))
    }
}

/// A program of NVRTC's.
struct Compiling {
    raw: nvrtc::nvrtcProgram,
}

impl Compiling {
    fn image(&self, binary: bool) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: the program was compiled; the buffer has as many bytes as it says.
        unsafe {
            match binary {
                true => check("nvrtcGetCUBINSize", nvrtc::nvrtcGetCUBINSize(self.raw, &mut bytes))?,
                false => check("nvrtcGetPTXSize", nvrtc::nvrtcGetPTXSize(self.raw, &mut bytes))?,
            }
            let mut image = vec![0u8; bytes];
            match binary {
                true => check("nvrtcGetCUBIN", nvrtc::nvrtcGetCUBIN(self.raw, image.as_mut_ptr().cast()))?,
                false => check("nvrtcGetPTX", nvrtc::nvrtcGetPTX(self.raw, image.as_mut_ptr().cast()))?,
            }
            Ok(image)
        }
    }

    fn log(&self) -> String {
        let mut bytes = 0;
        // SAFETY: the program exists; the buffer has as many bytes as it says.
        unsafe {
            if nvrtc::nvrtcGetProgramLogSize(self.raw, &mut bytes) != nvrtc::nvrtcResult::NVRTC_SUCCESS {
                return String::from("no log");
            }
            let mut log = vec![0u8; bytes];
            let _ = nvrtc::nvrtcGetProgramLog(self.raw, log.as_mut_ptr().cast());
            String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned()
        }
    }
}

impl Drop for Compiling {
    fn drop(&mut self) {
        // SAFETY: created once, and destroyed here.
        let _ = unsafe { nvrtc::nvrtcDestroyProgram(&mut self.raw) };
    }
}

fn check(call: &str, result: nvrtc::nvrtcResult) -> Result<()> {
    match result {
        nvrtc::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        other => Err(Error::device("cuda", format!("{call}: {other:?}"))),
    }
}

/// The modules of a device, by the names of their files.
pub(super) type Modules = Mutex<HashMap<&'static str, Arc<Module>>>;

//! Products by cuBLASLt, where it is installed. Its matrices are column-major: it computes the transpose of the result,
//! from the transposes of the factors in the other order.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::cublaslt::sys as lt;

use super::{Product, Stream, Tail};
use crate::device::cuda::memory::Arena;
use crate::device::cuda::{Gpu, Precision, Taken};
use crate::error::{Error, Result};

/// Every symbol that is called; the bindings panic where one is missing.
const SYMBOLS: [&[u8]; 13] = [
    b"cublasLtCreate\0",
    b"cublasLtDestroy\0",
    b"cublasLtMatmul\0",
    b"cublasLtMatmulAlgoGetHeuristic\0",
    b"cublasLtMatmulDescCreate\0",
    b"cublasLtMatmulDescDestroy\0",
    b"cublasLtMatmulDescSetAttribute\0",
    b"cublasLtMatmulPreferenceCreate\0",
    b"cublasLtMatmulPreferenceDestroy\0",
    b"cublasLtMatmulPreferenceSetAttribute\0",
    b"cublasLtMatrixLayoutCreate\0",
    b"cublasLtMatrixLayoutDestroy\0",
    b"cublasLtMatrixLayoutSetAttribute\0",
];

/// What NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// Plans that are kept.
const PLANS: usize = 4096;

/// More alignment than this helps no algorithm.
const ALIGNMENT: u64 = 256;

/// A stream's use of the library.
pub struct Blas {
    gpu: Arc<Gpu>,
    handle: lt::cublasLtHandle_t,
    workspace: Taken,
    plans: HashMap<Key, Option<Plan>>,
}

// SAFETY: handles that any thread may use, one at a time.
unsafe impl Send for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        if let Some(_bound) = self.gpu.bind_to_free() {
            self.plans.clear();
            // SAFETY: created in `open`. A failure leaves nothing to be done.
            let _ = unsafe { lt::cublasLtDestroy(self.handle) };
        }
    }
}

/// All that an algorithm is chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 3],
    precisions: [Precision; 2],
    transposed: [bool; 2],
    leading: [usize; 3],
    batch: usize,
    strides: [usize; 3],
    has_bias: bool,
    adds: bool,
    /// Of b, a, what is added, and the result, in bytes.
    alignments: [u32; 4],
}

/// A product as the library computes it, and the part of its tail that it does not.
struct Folded {
    alpha: f32,
    beta: f32,
    /// What `beta` is the factor of.
    addend: u64,
    bias: u64,
    rest: Tail,
}

impl Folded {
    fn of(p: &Product) -> Self {
        let mut rest = p.tail;
        let (mut alpha, mut beta) = (p.alpha, if p.accumulate { 1.0 } else { 0.0 });
        let (mut addend, mut bias) = (p.out.address, 0);
        // The library wants a bias in the type of the result.
        if let Some((address, precision)) = rest.bias
            && rest.scale == 0
            && precision == p.out.precision
            && address.is_multiple_of(16)
        {
            (bias, rest.bias) = (address, None);
        }
        let linear = rest.scale == 0 && rest.activation.0 == 0 && rest.bias.is_none();
        if linear && bias == 0 {
            (alpha, beta) = (alpha * rest.gain, beta * rest.gain);
            rest.gain = 1.0;
        }
        if linear && rest.gain == 1.0 && rest.residual != 0 && !p.accumulate {
            (beta, addend) = (1.0, rest.residual);
            rest.residual = 0;
        }
        if rest.modulation == 0 {
            rest.rows_per_sample = 0;
        }
        Folded { alpha, beta, addend, bias, rest }
    }

    fn key(&self, p: &Product) -> Key {
        let alignment = |address: u64| {
            let address = if address == 0 { ALIGNMENT } else { address };
            (1 << address.trailing_zeros()).min(ALIGNMENT as u32)
        };
        Key {
            sizes: [p.m, p.n, p.k],
            precisions: [p.a.precision, p.out.precision],
            transposed: [p.a.transposed, p.b.transposed],
            leading: [p.a.leading, p.b.leading, p.out.leading],
            batch: p.batches(),
            strides: p.batch.map_or([0; 3], |batch| batch.strides),
            has_bias: self.bias != 0,
            adds: self.beta != 0.0,
            alignments: [p.b.address, p.a.address, self.addend, p.out.address].map(alignment),
        }
    }
}

impl Blas {
    /// None where the library is not installed, lacks a symbol, or does not start with this driver.
    ///
    /// # Errors
    /// `OutOfMemory`; `Device`.
    pub fn open(stream: &Stream) -> Result<Option<Self>> {
        // SAFETY: opens the library, whose initialisers may run.
        if !unsafe { lt::is_culib_present() } {
            return Ok(None);
        }
        // SAFETY: only whether there is such a symbol is asked.
        let has = |name: &[u8]| unsafe { lt::culib().get::<*const ()>(name) }.is_ok();
        if !SYMBOLS.into_iter().all(has) {
            return Ok(None);
        }
        let gpu = stream.gpu().clone();
        let _bound = gpu.bind()?;
        let memory = Arena::new(stream.handle()).take("the workspace of cuBLASLt", WORKSPACE_BYTES, false)?;
        let workspace = Taken::new(memory.address(), 0, Arc::new(memory));
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` outlives the call.
        match unsafe { lt::cublasLtCreate(&mut handle) } {
            lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS => {}
            lt::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => {
                return Err(Error::out_of_memory("cuBLASLt", 0));
            }
            _ => return Ok(None),
        }
        Ok(Some(Blas { gpu, handle, workspace, plans: HashMap::new() }))
    }

    /// How many kinds of products it has an algorithm for.
    #[cfg(test)]
    pub fn plans(&self) -> usize {
        self.plans.values().flatten().count()
    }

    /// Computes a product, and gives what is left of its tail; nothing if the library has no algorithm for it.
    ///
    /// # Safety
    /// As [`Stream::multiply`].
    pub unsafe fn multiply(&mut self, stream: &Stream, p: &Product) -> Result<Option<Tail>> {
        if p.k == 0 || i32::try_from(p.batches()).is_err() {
            return Ok(None);
        }
        let _bound = self.gpu.bind()?;
        let folded = Folded::of(p);
        let key = folded.key(p);
        if !self.plans.contains_key(&key) {
            if self.plans.len() >= PLANS {
                self.plans.clear();
            }
            let plan = Plan::new(self.handle, &key, folded.bias)?;
            self.plans.insert(key, plan);
        }
        let Some(Some(plan)) = self.plans.get(&key) else { return Ok(None) };
        let workspace = stream.using(self.workspace.clone());
        if folded.bias != 0 {
            plan.operation.set_bias(folded.bias)?;
        }
        // SAFETY: all handles are alive; the matrices are there by this function's contract, of the shapes and
        // alignments that the plan was made for; the workspace is as long as it says.
        let status = unsafe {
            lt::cublasLtMatmul(
                self.handle,
                plan.operation.0,
                (&raw const folded.alpha).cast(),
                p.b.address as *const _,
                plan.layouts[0].0,
                p.a.address as *const _,
                plan.layouts[1].0,
                (&raw const folded.beta).cast(),
                folded.addend as *const _,
                plan.layouts[2].0,
                p.out.address as *mut _,
                plan.layouts[2].0,
                &plan.algorithm,
                workspace.address() as *mut _,
                WORKSPACE_BYTES,
                stream.handle().raw.cast(),
            )
        };
        check("cublasLtMatmul", status)?;
        stream.count_launch();
        Ok(Some(folded.rest))
    }
}

/// An algorithm for products of one kind.
struct Plan {
    operation: Operation,
    /// Of b, a, and the result, which what is added shares.
    layouts: [Layout; 3],
    algorithm: lt::cublasLtMatmulAlgo_t,
}

impl Plan {
    /// None if the library has no algorithm.
    fn new(handle: lt::cublasLtHandle_t, key: &Key, bias: u64) -> Result<Option<Self>> {
        let operation = Operation::new(key, bias)?;
        let layouts = Layout::of(key)?;
        let preference = Preference::new(key)?;
        let mut found = lt::cublasLtMatmulHeuristicResult_t {
            algo: lt::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspaceSize: 0,
            state: lt::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        let mut count = 0;
        let [b, a, out] = &layouts;
        // SAFETY: all handles are alive; there is room for one result.
        let status = unsafe {
            lt::cublasLtMatmulAlgoGetHeuristic(
                handle,
                operation.0,
                b.0,
                a.0,
                out.0,
                out.0,
                preference.0,
                1,
                &mut found,
                &mut count,
            )
        };
        use lt::cublasStatus_t::{CUBLAS_STATUS_NOT_SUPPORTED, CUBLAS_STATUS_SUCCESS};
        if status == CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(None);
        }
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        let usable = count > 0 && found.state == CUBLAS_STATUS_SUCCESS;
        Ok(usable.then_some(Plan { operation, layouts, algorithm: found.algo }))
    }
}

/// `cublasLtMatmulDesc_t`.
struct Operation(lt::cublasLtMatmulDesc_t);

impl Operation {
    fn new(key: &Key, bias: u64) -> Result<Self> {
        use lt::cublasLtMatmulDescAttributes_t::*;
        let mut raw = std::ptr::null_mut();
        let compute = lt::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: `raw` outlives the call.
        let status =
            unsafe { lt::cublasLtMatmulDescCreate(&mut raw, compute, lt::cudaDataType_t::CUDA_R_32F) };
        check("cublasLtMatmulDescCreate", status)?;
        let operation = Operation(raw);
        let [a, b] = key.transposed.map(i32::from);
        operation.set(CUBLASLT_MATMUL_DESC_TRANSA, &b)?;
        operation.set(CUBLASLT_MATMUL_DESC_TRANSB, &a)?;
        if key.has_bias {
            let epilogue = lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            operation.set(CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            operation.set_bias(bias)?;
        }
        Ok(operation)
    }

    fn set_bias(&self, bias: u64) -> Result<()> {
        self.set(lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)
    }

    fn set<T>(&self, attribute: lt::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        // SAFETY: the handle is alive; the value is read within the call, and has the size that is said.
        let status = unsafe {
            lt::cublasLtMatmulDescSetAttribute(
                self.0,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        };
        check("cublasLtMatmulDescSetAttribute", status)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: created by us, and not used any more.
        let _ = unsafe { lt::cublasLtMatmulDescDestroy(self.0) };
    }
}

/// `cublasLtMatrixLayout_t`: a row-major matrix, seen as its transpose.
struct Layout(lt::cublasLtMatrixLayout_t);

impl Layout {
    fn of(key: &Key) -> Result<[Self; 3]> {
        let [m, n, k] = key.sizes;
        let [factors, out] = key.precisions;
        let stored = |rows, columns, transposed| if transposed { [columns, rows] } else { [rows, columns] };
        Ok([
            Layout::new(key, 1, factors, stored(k, n, key.transposed[1]))?,
            Layout::new(key, 0, factors, stored(m, k, key.transposed[0]))?,
            Layout::new(key, 2, out, [m, n])?,
        ])
    }

    fn new(key: &Key, which: usize, precision: Precision, [rows, columns]: [usize; 2]) -> Result<Self> {
        use lt::cublasLtMatrixLayoutAttribute_t::*;
        let of = match precision {
            Precision::F32 => lt::cudaDataType_t::CUDA_R_32F,
            Precision::F16 => lt::cudaDataType_t::CUDA_R_16F,
            Precision::BF16 => lt::cudaDataType_t::CUDA_R_16BF,
        };
        let mut raw = std::ptr::null_mut();
        let (height, width, leading) = (columns as u64, rows as u64, key.leading[which] as i64);
        // SAFETY: `raw` outlives the call.
        let status = unsafe { lt::cublasLtMatrixLayoutCreate(&mut raw, of, height, width, leading) };
        check("cublasLtMatrixLayoutCreate", status)?;
        let layout = Layout(raw);
        if key.batch > 1 {
            layout.set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &(key.batch as i32))?;
            layout.set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &(key.strides[which] as i64))?;
        }
        Ok(layout)
    }

    fn set<T>(&self, attribute: lt::cublasLtMatrixLayoutAttribute_t, value: &T) -> Result<()> {
        // SAFETY: as in `Operation::set`.
        let status = unsafe {
            lt::cublasLtMatrixLayoutSetAttribute(
                self.0,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        };
        check("cublasLtMatrixLayoutSetAttribute", status)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created by us, and not used any more.
        let _ = unsafe { lt::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

/// `cublasLtMatmulPreference_t`.
struct Preference(lt::cublasLtMatmulPreference_t);

impl Preference {
    fn new(key: &Key) -> Result<Self> {
        use lt::cublasLtMatmulPreferenceAttributes_t::*;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` outlives the call.
        check("cublasLtMatmulPreferenceCreate", unsafe { lt::cublasLtMatmulPreferenceCreate(&mut raw) })?;
        let preference = Preference(raw);
        preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE_BYTES as u64))?;
        // Parts of a sum are added in F32 and in their order, or there are none.
        let scheme = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme)?;
        // Without these, alignments of 256 bytes are taken for granted.
        for (attribute, alignment) in [
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.alignments[0]),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.alignments[1]),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.alignments[2]),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.alignments[3]),
        ] {
            preference.set(attribute, &alignment)?;
        }
        Ok(preference)
    }

    fn set<T>(&self, attribute: lt::cublasLtMatmulPreferenceAttributes_t, value: &T) -> Result<()> {
        // SAFETY: as in `Operation::set`.
        let status = unsafe {
            lt::cublasLtMatmulPreferenceSetAttribute(
                self.0,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        };
        check("cublasLtMatmulPreferenceSetAttribute", status)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created by us, and not used any more.
        let _ = unsafe { lt::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

fn check(call: &str, status: lt::cublasStatus_t) -> Result<()> {
    match status {
        lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        lt::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Err(Error::out_of_memory(call, 0)),
        other => Err(Error::device("cuda", format!("{call}: {other:?}"))),
    }
}

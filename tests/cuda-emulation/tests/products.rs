//! Matrix products, held to sums in f64.

#![allow(clippy::unwrap_used)]

mod common;

use std::ffi::c_void;

use common::alone;
use cudarc::cublaslt::{result, sys};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use half::{bf16, f16};
use sys::cublasLtMatmulDescAttributes_t as Attribute;
use sys::cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute;
use sys::cublasLtMatrixLayoutAttribute_t as LayoutAttribute;

/// An operand as it is stored: its shape before any transposition.
#[derive(Debug, Clone, Copy)]
struct Stored {
    rows: usize,
    columns: usize,
    row_major: bool,
}

impl Stored {
    fn ld(self) -> usize {
        // Longer than it must be, so that a wrong one is seen.
        3 + if self.row_major { self.columns } else { self.rows }
    }

    fn at(self, row: usize, column: usize) -> usize {
        if self.row_major { row * self.ld() + column } else { column * self.ld() + row }
    }

    fn len(self) -> usize {
        self.ld() * if self.row_major { self.rows } else { self.columns }
    }

    fn transposed(self, really: bool) -> Self {
        if really { Stored { rows: self.columns, columns: self.rows, ..self } } else { self }
    }
}

#[derive(Debug, Clone, Copy)]
struct Product {
    a: Stored,
    b: Stored,
    d: Stored,
    transpose_a: bool,
    transpose_b: bool,
    epilogue: u32,
    batch: usize,
    alpha: f32,
    beta: f32,
    aligned: u32,
    /// By how many elements A starts after the start of its memory.
    shift: usize,
}

impl Product {
    /// 5 x 7 by 7 x 6.
    fn new(transpose_a: bool, transpose_b: bool, row_major: bool) -> Self {
        let of = |rows, columns| Stored { rows, columns, row_major };
        let (a, b) = (of(5, 7).transposed(transpose_a), of(7, 6).transposed(transpose_b));
        let (alpha, beta) = (0.5, 0.0);
        let d = of(5, 6);
        Product {
            a,
            b,
            d,
            transpose_a,
            transpose_b,
            epilogue: 1,
            batch: 1,
            alpha,
            beta,
            aligned: 4,
            shift: 0,
        }
    }
}

trait Number: cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits + Copy + 'static {
    const TYPE: sys::cudaDataType;
    fn of(x: f32) -> Self;
    fn f64(self) -> f64;
}
macro_rules! number {
    ($t:ty, $name:ident, $of:expr) => {
        impl Number for $t {
            const TYPE: sys::cudaDataType = sys::cudaDataType::$name;
            fn of(x: f32) -> Self {
                $of(x)
            }
            fn f64(self) -> f64 {
                f64::from(self)
            }
        }
    };
}
number!(f32, CUDA_R_32F, |x| x);
number!(f16, CUDA_R_16F, f16::from_f32);
number!(bf16, CUDA_R_16BF, bf16::from_f32);

fn values<T: Number>(count: usize, seed: usize) -> Vec<T> {
    (0..count).map(|i| T::of(((i * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0)).collect()
}

struct Operands<T> {
    a: CudaSlice<T>,
    b: CudaSlice<T>,
    d: CudaSlice<T>,
    bias: CudaSlice<T>,
    workspace: CudaSlice<u8>,
}

/// Descriptors are leaked: these are tests of the product.
unsafe fn layout<T: Number>(of: Stored, batch: usize) -> sys::cublasLtMatrixLayout_t {
    let (order, batch, stride) = (i32::from(of.row_major), batch as i32, of.len() as i64);
    let made =
        result::create_matrix_layout(T::TYPE, of.rows as u64, of.columns as u64, of.ld() as i64).unwrap();
    let set = |attribute, value: *const c_void, bytes| {
        // SAFETY: the layout was made above; the value is as long as is said.
        unsafe { result::set_matrix_layout_attribute(made, attribute, value, bytes) }.unwrap();
    };
    set(LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_ORDER, (&raw const order).cast(), 4);
    set(LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (&raw const batch).cast(), 4);
    set(LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (&raw const stride).cast(), 8);
    made
}

fn multiply<T: Number>(
    stream: &CudaStream,
    p: &Product,
    on: &mut Operands<T>,
) -> Result<(), result::CublasError> {
    let handle = result::create_handle()?;
    let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
    // SAFETY: all objects live until the end; operands lie in memory of their size.
    unsafe {
        let description = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?;
        let bias = on.bias.device_ptr(stream).0;
        let set = |attribute, value: *const c_void, bytes| {
            result::set_matmul_desc_attribute(description, attribute, value, bytes).unwrap();
        };
        let (ta, tb) = (i32::from(p.transpose_a), i32::from(p.transpose_b));
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, (&raw const ta).cast(), 4);
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, (&raw const tb).cast(), 4);
        set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, (&raw const p.epilogue).cast(), 4);
        set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, (&raw const bias).cast(), 8);
        let (a, b, d) = (layout::<T>(p.a, p.batch), layout::<T>(p.b, p.batch), layout::<T>(p.d, p.batch));
        let preference = result::create_matmul_pref()?;
        let prefer = |attribute, value: *const c_void, bytes| {
            result::set_matmul_pref_attribute(preference, attribute, value, bytes).unwrap();
        };
        let workspace = on.workspace.len() as u64;
        prefer(
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            8,
        );
        for attribute in [
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            prefer(attribute, (&raw const p.aligned).cast(), 4);
        }
        let found = result::get_matmul_algo_heuristic(handle, description, a, b, d, d, preference)?;
        let d_data = on.d.device_ptr_mut(stream).0;
        result::matmul(
            handle,
            description,
            (&raw const p.alpha).cast(),
            (&raw const p.beta).cast(),
            (on.a.device_ptr(stream).0 as usize + p.shift * size_of::<T>()) as *const c_void,
            a,
            on.b.device_ptr(stream).0 as *const c_void,
            b,
            d_data as *const c_void,
            d,
            d_data as *mut c_void,
            d,
            &found.algo,
            on.workspace.device_ptr_mut(stream).0 as *mut c_void,
            found.workspaceSize,
            stream.cu_stream().cast(),
        )
    }
}

/// Compares with the definition; gives the first failure of the library.
fn run<T: Number>(p: &Product, precision: f64) -> Result<(), result::CublasError> {
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let (a, b) = (values::<T>(p.a.len() * p.batch + p.shift, 1), values::<T>(p.b.len() * p.batch, 2));
    let (c, bias) = (values::<T>(p.d.len() * p.batch, 3), values::<T>(p.d.rows, 4));
    let mut on = Operands {
        a: stream.clone_htod(&a).unwrap(),
        b: stream.clone_htod(&b).unwrap(),
        d: stream.clone_htod(&c).unwrap(),
        bias: stream.clone_htod(&bias).unwrap(),
        workspace: stream.alloc_zeros(1024).unwrap(),
    };
    multiply(&stream, p, &mut on)?;
    let found = stream.clone_dtoh(&on.d).unwrap();
    let depth = if p.transpose_a { p.a.rows } else { p.a.columns };
    for batch in 0..p.batch {
        for (row, bias) in bias.iter().enumerate() {
            for column in 0..p.d.columns {
                let sum: f64 = (0..depth)
                    .map(|k| {
                        let at_a = if p.transpose_a { p.a.at(k, row) } else { p.a.at(row, k) };
                        let at_b = if p.transpose_b { p.b.at(column, k) } else { p.b.at(k, column) };
                        a[batch * p.a.len() + at_a + p.shift].f64() * b[batch * p.b.len() + at_b].f64()
                    })
                    .sum();
                let at = batch * p.d.len() + p.d.at(row, column);
                let mut expected = f64::from(p.alpha) * sum + f64::from(p.beta) * c[at].f64();
                if p.epilogue & 4 != 0 {
                    expected += bias.f64();
                }
                if p.epilogue & 2 != 0 {
                    expected = expected.max(0.0);
                }
                if p.epilogue & 32 != 0 {
                    let inner = 0.797_884_560_8 * (expected + 0.044_715 * expected.powi(3));
                    expected = 0.5 * expected * (1.0 + inner.tanh());
                }
                let error = (found[at].f64() - expected).abs();
                assert!(
                    error <= precision * (1.0 + expected.abs()),
                    "{p:?} at {row}, {column}: off by {error}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn every_transposition_order_and_type() {
    let _alone = alone();
    for bits in 0..8 {
        let p = Product::new(bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
        run::<f32>(&p, 1e-6).unwrap();
        run::<f16>(&p, 1e-3).unwrap();
        run::<bf16>(&p, 8e-3).unwrap();
        run::<f32>(&Product { batch: 3, beta: 2.0, ..p }, 1e-6).unwrap();
    }
}

#[test]
fn every_epilogue() {
    let _alone = alone();
    for epilogue in [1, 2, 4, 6, 32, 36] {
        run::<f32>(&Product { epilogue, ..Product::new(true, false, false) }, 1e-6).unwrap();
    }
}

#[test]
fn what_cublaslt_refuses() {
    let _alone = alone();
    let of = |status| Err(result::CublasError(status));
    let base = Product::new(false, false, false);
    let row_bias = Product { epilogue: 4, ..Product::new(false, false, true) };
    assert_eq!(run::<f32>(&row_bias, 0.0), of(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
    let misaligned = Product { aligned: 16, shift: 1, ..base };
    assert_eq!(run::<f32>(&misaligned, 0.0), of(sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE));
    run::<f32>(&Product { aligned: 4, shift: 1, ..base }, 1e-6).unwrap();
    let wrong_shape = Product { transpose_a: true, ..base };
    assert_eq!(run::<f32>(&wrong_shape, 0.0), of(sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE));
    let unknown = Product { epilogue: 256, ..base };
    assert_eq!(run::<f32>(&unknown, 0.0), of(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
}

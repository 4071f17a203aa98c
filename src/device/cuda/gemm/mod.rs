//! Matrix products on a GPU: cuBLASLt where it is installed, else kernels of our own.
//!
//! | | cuBLASLt | our own |
//! |---|---|---|
//! | F32 | full F32 (no TF32) | a tiled kernel, full F32 |
//! | F16, BF16 | tensor cores, sums in F32 | tensor cores from compute capability 8.0 on, sums in F32; before, a tiled kernel |
//! | what follows a product ([`Tail`]) | a bias, and a residual, where nothing comes between; else one pass over the result | all of it, in the product |
//!
//! Both give the same bits each time they are given the same. What cuBLASLt refuses, our own kernels do.

mod blas;
mod own;
#[cfg(test)]
mod tests;

use std::sync::Mutex;

use super::gpu::lock;
use super::{Parameter, Precision, Stream};
use crate::error::{Error, Result};

/// Numbers of a matrix on the device: row-major, `leading` elements from row to row.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    /// Of the first element.
    pub address: u64,
    /// Their type.
    pub precision: Precision,
    /// From row to row.
    pub leading: usize,
    /// Whether the product takes its transpose.
    pub transposed: bool,
}

/// Many products of one shape.
#[derive(Debug, Clone, Copy)]
pub struct Batch {
    /// How many.
    pub count: usize,
    /// From one to the next in a, b and out, in elements.
    pub strides: [usize; 3],
}

/// `out[m, n] (+)= alpha op(a)[m, k] op(b)[k, n]`, then [`Tail`].
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Stored `[m, k]`, or `[k, m]` if it is transposed.
    pub a: Matrix,
    /// Stored `[k, n]`, or `[n, k]` if it is transposed; of the type of a.
    pub b: Matrix,
    /// Never transposed; of the type of a, or F32.
    pub out: Matrix,
    /// A factor.
    pub alpha: f32,
    /// Whether to add to what is in `out`.
    pub accumulate: bool,
    /// More than one product.
    pub batch: Option<Batch>,
    /// What follows: [`Tail::default`] is nothing.
    pub tail: Tail,
}

/// What follows a product, per element: `v = activation(v scale + bias) gain + residual`, then `v (1 + a) + b`. An
/// address of 0 is nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tail {
    /// F32 `[n]`.
    pub scale: u64,
    /// `[n]`, F32 or of the type of the result.
    pub bias: Option<(u64, Precision)>,
    /// As kernel.cuh numbers them, with the slope of a leaky ReLU.
    pub activation: (i32, f32),
    /// The factor before the residual.
    pub gain: f32,
    /// Laid out as the result is, and of its type.
    pub residual: u64,
    /// F32 `[samples, 2 n]`: a, then b.
    pub modulation: u64,
    /// Rows of the result that share a row of the modulation; 0 if all do.
    pub rows_per_sample: usize,
}

impl Default for Tail {
    fn default() -> Self {
        Tail {
            scale: 0,
            bias: None,
            activation: (0, 0.0),
            gain: 1.0,
            residual: 0,
            modulation: 0,
            rows_per_sample: 0,
        }
    }
}

impl Product {
    fn batches(&self) -> usize {
        self.batch.map_or(1, |batch| batch.count)
    }

    fn check(&self) -> Result<()> {
        let of_out = |precision| precision == self.out.precision || precision == Precision::F32;
        let fits = self.a.precision == self.b.precision
            && (self.out.precision == self.a.precision || self.out.precision == Precision::F32)
            && self.tail.bias.is_none_or(|(_, precision)| of_out(precision));
        if fits && !self.out.transposed {
            return Ok(());
        }
        Err(Error::internal("a matrix product", format!("types that do not go together: {self:?}")))
    }
}

/// Who computes products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// cuBLASLt if it is there.
    Best,
    /// Our own kernels.
    #[cfg_attr(not(test), expect(dead_code, reason = "chosen by tests"))]
    Own,
    /// Those of ours that need no tensor cores.
    Tiled,
}

/// What a stream computes products with.
pub(super) struct Products {
    state: Mutex<State>,
}

struct State {
    engine: Engine,
    /// Once it was looked for.
    blas: Option<Option<blas::Blas>>,
}

impl Default for Products {
    fn default() -> Self {
        Products { state: Mutex::new(State { engine: Engine::Best, blas: None }) }
    }
}

impl Stream {
    /// Computes a product. The call returns before it has run.
    ///
    /// # Safety
    /// The matrices and vectors lie at their addresses, on the stream's device, and stay there until the work is done;
    /// `out` overlaps neither factor.
    ///
    /// # Errors
    /// `Internal` for types that do not go together; `OutOfMemory`; `Device`.
    pub unsafe fn multiply(&self, product: &Product) -> Result<()> {
        product.check()?;
        if product.m == 0 || product.n == 0 || product.batches() == 0 {
            return Ok(());
        }
        let mut state = lock(&self.products().state);
        if state.engine == Engine::Best {
            if state.blas.is_none() {
                state.blas = Some(blas::Blas::open(self)?);
            }
            if let Some(Some(blas)) = &mut state.blas
                // SAFETY: by this function's contract.
                && let Some(rest) = unsafe { blas.multiply(self, product)? }
            {
                if rest == Tail::default() {
                    return Ok(());
                }
                // SAFETY: as above.
                return unsafe { own::follow(self, &Product { tail: rest, ..*product }) };
            }
        }
        // SAFETY: as above.
        unsafe { own::multiply(self, product, state.engine != Engine::Tiled) }
    }

    /// Chooses who computes products from now on.
    #[cfg(test)]
    pub(crate) fn prefer(&self, engine: Engine) {
        lock(&self.products().state).engine = engine;
    }
}

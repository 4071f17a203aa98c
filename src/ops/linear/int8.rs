//! Which products are computed in eight bits: those of a context that bears it, with weights of a mapped file.

use std::sync::Arc;

use super::{MAX_TERMS, Quantised};
use crate::device::Context;
use crate::device::gemm::Factors;
use crate::device::int8::{MAX_DEPTH, Packed, Source};
use crate::error::Result;
use crate::tensor::Tensor;

/// Fewer inputs or outputs than this are not worth it: too few numbers share a scale, and too little time is saved.
const LEAST_SIDE: usize = 64;

/// The terms of a sum that are computed in eight bits, with their weights.
#[derive(Default)]
pub(super) struct Weights<'a> {
    terms: [Option<(&'a [f32], Arc<Packed>)>; MAX_TERMS],
    count: usize,
}

impl<'a> Weights<'a> {
    /// Takes a term of a sum with `n` outputs, if it is to be computed in eight bits.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn take(&mut self, cx: &Context, weight: &Tensor, term: &Factors<'a>, n: usize) -> Result<bool> {
        let (Some(kept), Some(file)) = (cx.quantised(), weight.file()) else { return Ok(false) };
        if term.k.min(n) < LEAST_SIDE || term.k > MAX_DEPTH {
            return Ok(false);
        }
        let source = Source { matrix: term.b, n, k: term.k };
        let packed = kept.get(cx, &source, || {
            // From now on the copy is read.
            weight.advise_dont_need();
            file
        })?;
        let found = packed.is_some();
        if let (Some(packed), Some(place)) = (packed, self.terms.get_mut(self.count)) {
            *place = Some((term.a.values, packed));
            self.count += 1;
        }
        Ok(found)
    }

    /// Calls `body` with what was taken.
    pub fn with<T>(&self, body: impl FnOnce(&[Quantised]) -> T) -> T {
        let taken = || self.terms.iter().flatten();
        let Some((rows, weight)) = taken().next() else { return body(&[]) };
        let mut terms = [Quantised { rows, leading: weight.k(), weight }; MAX_TERMS];
        for (term, (rows, weight)) in terms.iter_mut().zip(taken()) {
            *term = Quantised { rows, leading: weight.k(), weight };
        }
        body(&terms[..self.count])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::ops::check;
    use crate::ops::linear::{Activation, Epilogue, Term, WeightLayout, linear, linear_sum};
    use crate::tensor::DType;

    /// The same numbers in a mapped file.
    fn mapped(tensor: &Tensor) -> Tensor {
        let mut file = tempfile();
        std::io::Write::write_all(&mut file, tensor.bytes().unwrap()).unwrap();
        // SAFETY: nobody else has the file.
        let map = Arc::new(unsafe { memmap2::Mmap::map(&file) }.unwrap());
        Tensor::mapped(&map, 0, tensor.dims(), tensor.dtype()).unwrap()
    }

    /// A file without a name.
    fn tempfile() -> std::fs::File {
        static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("wuerstchen-int8-{}-{number}", std::process::id()));
        let mut options = std::fs::File::options();
        let file = options.create(true).truncate(true).read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    fn context() -> Context {
        Context::new(&Device::cpu_in_eight_bits(2).unwrap())
    }

    fn bits(tensor: &Tensor) -> Vec<u32> {
        tensor.slice::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
    }

    fn norm(values: &[f32], from: &[f32]) -> f64 {
        values.iter().zip(from).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn a_layer_of_a_file_is_close_and_only_where_that_is_borne() {
        let (x, bias) = (check::random(&[2, 9, 70], 1), check::random(&[100], 2));
        let weight = check::random(&[100, 70], 3);
        let epilogue = Epilogue { bias: Some(&bias), activation: Activation::Gelu, ..Epilogue::default() };
        let exact = linear(&context(), &x, &weight, &epilogue).unwrap();
        let file = mapped(&weight);
        let same = |cx: &Context, x: &Tensor, weight: &Tensor| {
            let got = linear(cx, x, weight, &epilogue).unwrap();
            bits(&got) == bits(&exact)
        };
        assert!(same(&context(), &x, &file), "not asked for");
        assert!(same(&context().coarse(), &x, &weight), "not in a file");
        let plain = Context::new(&Device::cpu(2).unwrap());
        let [with, without] = [&plain.coarse(), &plain].map(|cx| linear(cx, &x, &file, &epilogue).unwrap());
        assert_eq!(bits(&with), bits(&without), "not a device that does");
        let cx = context().coarse();
        let coarse = linear(&cx, &x, &file, &epilogue).unwrap();
        let (got, want) = (coarse.slice::<f32>().unwrap(), exact.slice::<f32>().unwrap());
        let error = norm(got, want) / norm(want, &vec![0.0; want.len()]);
        assert!((1e-5..2e-2).contains(&error), "{error}");
        assert!(cx.device().quantised_weights().unwrap().bytes() > 0);
        for dtype in [DType::F16, DType::BF16] {
            let half = mapped(&check::cast(&weight, dtype));
            let got = linear(&cx, &x, &half, &epilogue).unwrap();
            let error = norm(got.slice().unwrap(), want) / norm(want, &vec![0.0; want.len()]);
            assert!((1e-5..3e-2).contains(&error), "{dtype}: {error}");
        }
    }

    #[test]
    fn training_computes_in_f32() {
        let device = context().device().for_training(crate::device::cuda::Precision::F32).unwrap();
        assert!(Context::new(&device).coarse().quantised().is_none());
    }

    #[test]
    fn small_layers_and_weights_that_are_no_numbers_are_left_alone() {
        let cx = context().coarse();
        for (inputs, outputs, bad) in [(63, 64, false), (64, 63, false), (64, 64, true)] {
            let x = check::random(&[3, inputs], 1);
            let mut weight = check::random(&[outputs, inputs], 2);
            if bad {
                weight.slice_mut::<f32>().unwrap()[100] = f32::INFINITY;
            }
            let exact = linear(&context(), &x, &weight, &Epilogue::default()).unwrap();
            let got = linear(&cx, &x, &mapped(&weight), &Epilogue::default()).unwrap();
            assert_eq!(bits(&got), bits(&exact), "{inputs} {outputs}");
            assert_eq!(bad, got.slice::<f32>().unwrap().iter().any(|v| !v.is_finite()));
        }
    }

    #[test]
    fn a_sum_may_have_terms_of_both_kinds() {
        let xs = [check::random(&[40, 70], 1), check::random(&[40, 16], 2), check::random(&[40, 90], 3)];
        let whole = check::random(&[80, 160], 4);
        let by_inputs = check::random(&[16, 80], 5);
        let sum = |cx: &Context, weight: &Tensor| {
            let part = |x, first_input| Term { x, weight, layout: WeightLayout::RowsAreOutputs, first_input };
            let injected =
                Term { x: &xs[1], weight: &by_inputs, layout: WeightLayout::RowsAreInputs, first_input: 0 };
            let epilogue = Epilogue { gain: 2.0, ..Epilogue::default() };
            linear_sum(cx, &[part(&xs[0], 0), injected, part(&xs[2], 70)], &epilogue).unwrap()
        };
        let exact = sum(&context(), &whole);
        let got = sum(&context().coarse(), &mapped(&whole));
        let (got, want) = (got.slice::<f32>().unwrap(), exact.slice::<f32>().unwrap());
        let error = norm(got, want) / norm(want, &vec![0.0; want.len()]);
        assert!((1e-5..2e-2).contains(&error), "{error}");
    }
}

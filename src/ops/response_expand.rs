//! The wide half of a ConvNeXt V2 block's MLP (Woo et al. 2023): dense layer, GELU, global response normalisation.

use crate::device::Context;
use crate::error::Result;
use crate::ops::linear::{Activation, Epilogue, Term, linear_sum};
use crate::ops::response_norm::{cuda, response_norm};
use crate::tensor::Tensor;
use crate::tensor::autograd::records;

/// The parameters of [`response_expand`].
#[derive(Debug, Clone, Copy)]
pub struct ResponseExpand<'a> {
    /// The inputs with their weights, `[O, K]` or `[K, O]`.
    pub terms: &'a [Term<'a>],
    /// `[O]` of any float type.
    pub bias: Option<&'a Tensor>,
    /// Of the response: O elements, in any shape and of any float type.
    pub gamma: &'a Tensor,
    /// As gamma.
    pub beta: &'a Tensor,
}

/// `GRN(GELU(sum over terms of x Wᵀ + bias))`.
///
/// The product applies the GELU where it is written. On a GPU that would cost it more than it costs the normalisation,
/// which waits for memory: there the GELU is computed in both passes over the product, and never stored.
///
/// # Shapes
/// every x `[N, .., I_i]` with the same outer dimensions -> `[N, .., O]`
///
/// # Errors
/// As [`linear_sum`] and [`response_norm`].
pub fn response_expand(cx: &Context, p: &ResponseExpand) -> Result<Tensor> {
    let _span = cx.op("response_expand");
    let plain = Epilogue { bias: p.bias, ..Epilogue::default() };
    let recorded = p.terms.iter().any(|term| records(cx, &[Some(term.x), Some(term.weight)]))
        || records(cx, &[p.bias, Some(p.gamma), Some(p.beta)]);
    if let Some(stream) = cx.cuda()?.filter(|_| !recorded) {
        let product = linear_sum(cx, p.terms, &plain)?;
        return cuda::normalize(cx, stream, product, (p.gamma, p.beta), true);
    }
    let hidden = linear_sum(cx, p.terms, &Epilogue { activation: Activation::Gelu, ..plain })?;
    response_norm(cx, hidden, p.gamma, p.beta)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;
    use crate::ops::linear::WeightLayout;

    fn of_all(cx: &Context, t: &[Tensor]) -> Result<Tensor> {
        let term = |x, weight, layout| Term { x, weight, layout, first_input: 0 };
        let terms = [
            term(&t[0], &t[1], WeightLayout::RowsAreOutputs),
            term(&t[2], &t[3], WeightLayout::RowsAreInputs),
        ];
        let p = ResponseExpand { terms: &terms, bias: Some(&t[4]), gamma: &t[5], beta: &t[6] };
        response_expand(cx, &p)
    }

    /// x, W, another x and Wᵀ, bias, gamma and beta.
    fn inputs(outer: &[usize], outputs: usize) -> Vec<Tensor> {
        let of = |inputs: usize| [outer, &[inputs]].concat();
        let dims =
            [of(7), vec![outputs, 7], of(3), vec![3, outputs], vec![outputs], vec![outputs], vec![outputs]];
        dims.iter().zip(1..).map(|(dims, seed)| check::random(dims, seed)).collect()
    }

    fn definition(t: &[Vec<f64>], samples: usize) -> Vec<f64> {
        let outputs = t[4].len();
        let rows = t[0].len() / 7;
        let mut hidden = vec![0.0; rows * outputs];
        for (i, v) in hidden.iter_mut().enumerate() {
            let (r, o) = (i / outputs, i % outputs);
            let first: f64 = (0..7).map(|k| t[0][r * 7 + k] * t[1][o * 7 + k]).sum();
            let second: f64 = (0..3).map(|k| t[2][r * 3 + k] * t[3][k * outputs + o]).sum();
            *v = check::activation(Activation::Gelu, first + second + t[4][o]);
        }
        let mut out = Vec::new();
        for sample in hidden.chunks(rows / samples * outputs) {
            let norm = |c: usize| sample.iter().skip(c).step_by(outputs).map(|v| v * v).sum::<f64>().sqrt();
            let norms: Vec<f64> = (0..outputs).map(norm).collect();
            let mean = norms.iter().sum::<f64>() / outputs as f64 + 1e-6;
            let of = |(i, v): (usize, &f64)| {
                let c = i % outputs;
                t[5][c] * v * norms[c] / mean + t[6][c] + v
            };
            out.extend(sample.iter().enumerate().map(of));
        }
        out
    }

    #[test]
    fn agrees_with_the_definition() {
        for (outer, outputs) in [(&[1usize, 1][..], 1), (&[2, 3, 5], 40), (&[3, 70], 33)] {
            let inputs = inputs(outer, outputs);
            let wide: Vec<Vec<f64>> = inputs.iter().map(check::wide).collect();
            let y = check::on_threads(|cx| of_all(cx, &inputs));
            check::close(&y, &[outer, &[outputs]].concat(), &definition(&wide, outer[0]), 5e-6);
        }
    }

    #[test]
    fn gradients() {
        check::gradients(&inputs(&[2, 3], 5), of_all, |t| definition(t, 2));
    }

    #[test]
    fn on_a_gpu() {
        for (outer, outputs) in [(&[2usize, 40][..], 5), (&[2, 3, 5], 40), (&[1, 70], 520)] {
            let inputs = inputs(outer, outputs);
            let tolerances = [(Precision::F32, 1e-5), (Precision::BF16, 2e-2), (Precision::F16, 4e-3)];
            check::on_device(&inputs.iter().collect::<Vec<_>>(), &tolerances, of_all);
        }
    }
}

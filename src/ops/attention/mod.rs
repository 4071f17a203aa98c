//! placeholder
use crate::device::Context;
use crate::error::Result;
use crate::tensor::{DType, Tensor};
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a> { pub tensor: &'a Tensor, pub start: usize }
#[derive(Clone, Copy, Debug)]
pub struct KeyValues<'a> { pub keys: Columns<'a>, pub values: Columns<'a>, pub index: Option<&'a [usize]> }
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a> { None, Causal, CausalWithLengths(&'a [usize]) }
pub fn attention(cx: &Context, q: Columns, width: usize, heads: usize, segments: &[KeyValues], mask: Mask) -> Result<Tensor> {
    let [n, t, s] = q.tensor.dims_of("q")?;
    let d = width / heads;
    let mut out = Tensor::new(cx, "att", &[n, t, width], DType::F32)?;
    let qs = q.tensor.slice::<f32>()?;
    let o = out.slice_mut::<f32>()?;
    for i in 0..n { for h in 0..heads { for r in 0..t {
        let qr = &qs[(i * t + r) * s + q.start + h * d..][..d];
        let mut logits = vec![]; let mut vals: Vec<&[f32]> = vec![];
        for g in segments {
            let [_, tk, sk] = g.keys.tensor.dims_of("k")?; let [_, _, sv] = g.values.tensor.dims_of("v")?;
            let e = g.index.map_or(i, |x| x[i]);
            for c in 0..tk {
                let ok = match mask { Mask::None => true, Mask::Causal => c <= r, Mask::CausalWithLengths(l) => c <= r && c < l[i] };
                if !ok { continue; }
                let k = &g.keys.tensor.slice::<f32>()?[(e * tk + c) * sk + g.keys.start + h * d..][..d];
                logits.push(qr.iter().zip(k).map(|(a, b)| a * b).sum::<f32>() / (d as f32).sqrt());
                vals.push(&g.values.tensor.slice::<f32>()?[(e * tk + c) * sv + g.values.start + h * d..][..d]);
            }
        }
        let m = logits.iter().fold(f32::MIN, |a, b| a.max(*b));
        let z: f32 = logits.iter().map(|l| (l - m).exp()).sum();
        let or = &mut o[(i * t + r) * width + h * d..][..d]; or.fill(0.0);
        for (l, v) in logits.iter().zip(vals) { let p = (l - m).exp() / z; for (a, b) in or.iter_mut().zip(v) { *a += p * b; } }
    }}}
    Ok(out)
}

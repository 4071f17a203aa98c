use std::collections::HashMap;

use super::*;
use crate::error::Error;
use crate::nn::Source;
use crate::ops::check;

/// A layer's tensors, and the adapter that its source announces.
struct Layer {
    tensors: HashMap<&'static str, Tensor>,
    adapter: Option<LowRank>,
}

impl Source for Layer {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.tensors.get(name).filter(|t| t.dims() == shape);
        tensor.cloned().ok_or_else(|| Error::format(name, format!("{shape:?}"), "another"))
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn adapter(&self, _layer: &str) -> Option<LowRank> {
        self.adapter
    }
}

const NAMES: [&str; 4] = ["weight", "bias", "lora.down", "lora.up"];

fn layer(tensors: &[Tensor], adapter: Option<LowRank>, inputs: usize, outputs: usize) -> AdaptedLinear {
    let tensors = NAMES.into_iter().zip(tensors.iter().cloned()).collect();
    AdaptedLinear::load(&Params::new(&Layer { tensors, adapter }), inputs, outputs).unwrap()
}

fn random(dims: [&[usize]; 4]) -> Vec<Tensor> {
    dims.iter().zip(1..).map(|(dims, seed)| check::random(dims, seed)).collect()
}

/// x Wᵀ + scale up down x + bias, by its definition.
fn definition(x: &[f64], weights: &[Vec<f64>], scale: f64, inputs: usize) -> Vec<f64> {
    let [weight, bias, down, up] = weights else { panic!("four weights") };
    let (outputs, rank) = (bias.len(), down.len() / inputs);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let row = |x: &[f64]| {
        let narrowed: Vec<f64> = down.chunks(inputs).map(|down| dot(down, x)).collect();
        let output = |o: usize| {
            let update = dot(&up[o * rank..][..rank], &narrowed);
            dot(&weight[o * inputs..][..inputs], x) + bias[o] + scale * update
        };
        (0..outputs).map(output).collect::<Vec<_>>()
    };
    x.chunks(inputs).flat_map(row).collect()
}

#[test]
fn an_adapter_adds_its_product() {
    for (inputs, outputs, rank, scale) in [(5, 7, 2, 0.5), (1, 1, 1, -3.0), (4, 6, 9, 1.25)] {
        let weights = random([&[outputs, inputs], &[outputs], &[rank, inputs], &[outputs, rank]]);
        let x = check::random(&[2, 3, inputs], 9);
        let adapted = layer(&weights, Some(LowRank { rank, scale }), inputs, outputs);
        let wide: Vec<Vec<f64>> = weights.iter().map(check::wide).collect();
        let expected = definition(&check::wide(&x), &wide, scale.into(), inputs);
        let y = check::on_threads(|cx| adapted.forward(cx, &x));
        check::close(&y, &[2, 3, outputs], &expected, 1e-5);
    }
}

#[test]
fn gradients_reach_everything() {
    for (inputs, outputs, rank) in [(5, 3, 2), (1, 1, 1), (2, 4, 3)] {
        let mut tensors = random([&[outputs, inputs], &[outputs], &[rank, inputs], &[outputs, rank]]);
        tensors.push(check::random(&[3, inputs], 9));
        let scale = 0.75;
        check::gradients(
            &tensors,
            |cx, t| layer(t, Some(LowRank { rank, scale }), inputs, outputs).forward(cx, &t[4]),
            |t| definition(&t[4], &t[..4], scale.into(), inputs),
        );
    }
}

#[test]
fn frozen_weights_cost_no_gradient() {
    let tensors = random([&[3, 5], &[3], &[2, 5], &[3, 2]]);
    let x = check::random(&[4, 5], 9);
    let adapter = Some(LowRank { rank: 2, scale: 1.5 });
    check::gradients(
        &tensors[2..],
        |cx, t| layer(&[&tensors[..2], t].concat(), adapter, 5, 3).forward(cx, &x),
        |t| {
            let weights = [check::wide(&tensors[0]), check::wide(&tensors[1]), t[0].clone(), t[1].clone()];
            definition(&check::wide(&x), &weights, 1.5, 5)
        },
    );
}

#[test]
fn without_an_adapter_it_is_the_base() {
    let (cx, weights) = (check::cx(), random([&[3, 5], &[3], &[2, 5], &[3, 2]]));
    let x = check::random(&[4, 5], 9);
    let base = Linear::from_parts(weights[0].clone(), Some(weights[1].clone()));
    let plain = layer(&weights, None, 5, 3).forward(&cx, &x).unwrap();
    assert_eq!(plain.bytes().unwrap(), base.forward(&cx, &x).unwrap().bytes().unwrap());
}

#[test]
fn other_shapes_are_refused() {
    let weights = random([&[3, 5], &[3], &[2, 5], &[3, 4]]);
    let tensors = NAMES.into_iter().zip(weights).collect();
    let source = Layer { tensors, adapter: Some(LowRank { rank: 2, scale: 1.0 }) };
    assert!(AdaptedLinear::load(&Params::new(&source), 5, 3).is_err());
}

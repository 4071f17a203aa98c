//! The decoder of v2 beyond parity: batches, guidance twins, stored halves, and what it refuses.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Case, context, fixtures, relative_error};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use wuerstchen::nn::{Params, Source};
use wuerstchen::ops::batch::concat;
use wuerstchen::pipeline::load;
use wuerstchen::stages::blocks::Conditioning;
use wuerstchen::stages::diffnext::{DiffNeXt, Injected};
use wuerstchen::weights::{Renamed, STEMS, Weights, v2};
use wuerstchen::{Context, DType, Error, Result, Tensor};

const DECODER: &str = "v2/model/decoder";

fn decoder() -> DiffNeXt {
    load::decoder(&fixtures().join(DECODER)).unwrap().network
}

/// The inputs of the recorded case's first call.
struct Inputs {
    x: Tensor,
    image: Tensor,
    text: Tensor,
    times: Vec<f32>,
}

impl Inputs {
    fn read(case: &Case) -> Self {
        Inputs {
            x: case.image("0.x"),
            image: case.image("0.effnet"),
            text: case.tensor("0.clip"),
            times: case.floats("0.r").to_vec(),
        }
    }

    fn noise(&self, cx: &Context, network: &DiffNeXt, x: &Tensor, injected: &Injected) -> Result<Tensor> {
        let attended = [network.attend_to_text(cx, &self.text)?];
        let modulations = network.modulations(cx, &self.times)?;
        network.forward(cx, x, Conditioning { modulations: &modulations, attended: &attended }, injected)
    }
}

/// What a batch computes for a sample is what the sample gets alone, to the bit: also for the twins that
/// guidance compares with, whose image embedding is zero.
#[test]
fn embeddings_are_selected_for_a_batch() {
    let (cx, network) = (context(), decoder());
    let inputs = Inputs::read(&Case::read("v2_decoder_forward"));
    let zero = Tensor::zeros(&cx, "twin", inputs.image.narrow(0, 1).unwrap().dims(), DType::F32).unwrap();
    let entries = concat(&cx, &[&inputs.image, &zero]).unwrap();
    let all = network.inject(&cx, &entries, (16, 16)).unwrap();
    let mut noises = Vec::new();
    for index in [[0, 1], [1, 2], [2, 2], [2, 0]] {
        let selected = all.select(&cx, &index).unwrap();
        let batch = inputs.noise(&cx, &network, &inputs.x, &selected).unwrap();
        let images = index.map(|i| entries.narrow(i, 1).unwrap());
        let apart = concat(&cx, &[&images[0], &images[1]]).unwrap();
        let apart = network.inject(&cx, &apart, (16, 16)).unwrap();
        let apart = inputs.noise(&cx, &network, &inputs.x, &apart).unwrap();
        assert_eq!(batch.slice::<f32>().unwrap(), apart.slice::<f32>().unwrap(), "{index:?}");
        noises.push(batch);
    }
    let same = all.select(&cx, &[0, 1, 2]).unwrap().select(&cx, &[2, 0]).unwrap();
    let again = inputs.noise(&cx, &network, &inputs.x, &same).unwrap();
    assert_eq!(again.slice::<f32>().unwrap(), noises[3].slice::<f32>().unwrap());
    // The embedding matters.
    assert!(relative_error(noises[2].slice().unwrap(), noises[0].slice().unwrap()) > 1e-3);
}

#[test]
fn wrong_inputs_are_named() {
    let (cx, network) = (context(), decoder());
    let inputs = Inputs::read(&Case::read("v2_decoder_forward"));
    let message = |result: Result<()>, parts: &[&str]| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
        let text = error.to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{parts:?}: {text}");
    };
    assert_eq!(network.config().grid_multiple(), 8);
    let inject = |image: &Tensor, grid| network.inject(&cx, image, grid);
    message(inject(&inputs.image, (16, 12)).map(drop), &["multiples of 8", "16 x 12"]);
    message(inject(&inputs.image, (0, 8)).map(drop), &["multiples of 8", "0 x 8"]);
    message(inject(&inputs.x, (16, 16)).map(drop), &["8]", "4]"]);
    let injected = inject(&inputs.image, (16, 16)).unwrap();
    message(injected.select(&cx, &[0, 2]).map(drop), &["below 2", "[0, 2]"]);
    message(injected.select(&cx, &[]).map(drop), &["below 2", "[]"]);

    let noise = |x: &Tensor, injected: &Injected| inputs.noise(&cx, &network, x, injected).map(drop);
    let other = inject(&inputs.image, (24, 16)).unwrap();
    message(noise(&inputs.x, &other), &["2 for latents of 16 x 16", "2 for 24 x 16"]);
    let one = injected.select(&cx, &[1]).unwrap();
    message(noise(&inputs.x, &one), &["2 for latents of 16 x 16", "1 for 16 x 16"]);
    let zeros = |dims: &[usize]| Tensor::zeros(&cx, "x", dims, DType::F32).unwrap();
    message(noise(&zeros(&[2, 16, 20, 4]), &injected), &["multiples of 8", "16 x 20"]);
    message(noise(&zeros(&[2, 16, 16, 3]), &injected), &["4]", "3]"]);
}

/// Weights rounded to another type, as a converted checkpoint has them.
struct Rounded<'a> {
    weights: Renamed<'a>,
    dtype: DType,
}

impl Source for Rounded<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.weights.tensor(name, shape)?;
        let values = tensor.slice::<f32>()?;
        match self.dtype {
            DType::F16 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                Tensor::from_slice(shape, &halves)
            }
            _ => {
                let mut halves = vec![bf16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                Tensor::from_slice(shape, &halves)
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        self.weights.has(name)
    }
}

#[test]
fn half_precision_weights() {
    let (cx, case) = (context(), Case::read("v2_decoder_forward"));
    let inputs = Inputs::read(&case);
    let config = decoder().config().clone();
    let blocks_up: Vec<usize> = config.levels.iter().rev().map(|l| l.letters.len() * l.repeats).collect();
    let weights = Weights::open(&fixtures().join(DECODER), STEMS).unwrap();
    for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let renamed = Renamed::new(&weights, |name| v2::decoder(name, &blocks_up));
        let source = Rounded { weights: renamed, dtype };
        let network = DiffNeXt::load(&Params::new(&source), config.clone()).unwrap();
        let injected = network.inject(&cx, &inputs.image, (16, 16)).unwrap();
        let noise = inputs.noise(&cx, &network, &inputs.x, &injected).unwrap();
        case.assert_image("0.noise", &noise, tolerance);
    }
}

//! The folded image embedding against the composition that it stands for.

use super::*;
use crate::error::Result;
use crate::nn::Source;
use crate::ops::check::{cast, cx, random, wide};
use crate::ops::depthwise_conv::{DepthwiseConv, Padding, Then, depthwise_conv};
use crate::ops::elementwise::modulate;
use crate::ops::linear::{Activation, Epilogue};
use crate::ops::response_norm::response_norm;

const CHANNELS: usize = 6;
const SKIP: usize = 5;
const IMAGE: usize = 3;
const CONDITION: usize = 7;
const TIME: usize = 4;
const GRID: [usize; 3] = [2, 4, 5];

/// Random weights of one type, the same ones for the same name.
struct Random(DType);

impl Source for Random {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let seed = name.bytes().fold(0u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)))
            % 1_000_003;
        Ok(cast(&random(shape, seed), self.0))
    }

    fn has(&self, _name: &str) -> bool {
        true
    }
}

/// Channels of several images in one.
fn join(parts: &[&Tensor]) -> Tensor {
    let rows = parts[0].shape().rows();
    let mut joined: Vec<f32> = Vec::new();
    for row in 0..rows {
        for part in parts {
            let channels = part.shape().channels();
            joined.extend(&part.slice::<f32>().unwrap()[row * channels..][..channels]);
        }
    }
    let dims = [GRID.as_slice(), &[joined.len() / rows]].concat();
    Tensor::from_slice(&dims, &joined).unwrap()
}

/// The block as the reference composes it: the image embedding mapped, then concatenated.
fn plain(p: &Params, x: &Tensor, joining: &[&Tensor], modulation: &Tensor) -> Tensor {
    let (cx, hidden) = (cx(), 4 * CHANNELS);
    let conv = DepthwiseConv {
        weight: &p.tensor("depthwise.weight", &[CHANNELS, 1, 3, 3]).unwrap(),
        bias: Some(&p.tensor("depthwise.bias", &[CHANNELS]).unwrap()),
        stride: 1,
        padding: Padding::Zero,
        then: Then::LayerNorm { eps: NORM_EPS },
    };
    let mixed = depthwise_conv(&cx, x, None, &conv).unwrap();
    let whole = join(&[&[&mixed], joining].concat());
    let expand = Linear::load(&p.sub("expand"), whole.shape().channels(), hidden).unwrap();
    let gelu = Epilogue { activation: Activation::Gelu, ..Epilogue::default() };
    let h = expand.forward_then(&cx, &whole, gelu).unwrap();
    let [gamma, beta] = ["gamma", "beta"].map(|n| p.sub("response").tensor(n, &[1, 1, 1, hidden]).unwrap());
    let h = response_norm(&cx, h, &gamma, &beta).unwrap();
    let project = Linear::load(&p.sub("project"), hidden, CHANNELS).unwrap();
    let then = Epilogue { residual: Some(x), ..Epilogue::default() };
    modulate(&cx, project.forward_then(&cx, &h, then).unwrap(), modulation).unwrap()
}

fn images(channels: usize, seed: u64) -> Tensor {
    random(&[GRID.as_slice(), &[channels]].concat(), seed)
}

#[test]
fn folded_images_are_mapped_and_concatenated_ones() {
    let cx = cx();
    let (x, skip) = (images(CHANNELS, 1), images(SKIP, 2));
    let zero = Tensor::zeros(&cx, "no image", images(IMAGE, 0).dims(), DType::F32).unwrap();
    for (dtype, image) in [
        (DType::F32, images(IMAGE, 3)),
        (DType::F32, zero),
        (DType::F16, images(IMAGE, 3)),
        (DType::BF16, images(IMAGE, 3)),
    ] {
        let source = Random(dtype);
        let p = Params::new(&source);
        let mapper = Linear::load_conv1x1(&p.sub("mapper"), IMAGE, CONDITION).unwrap();
        let mapped = mapper.forward(&cx, &image).unwrap();
        for (skips, injects) in [(false, false), (false, true), (true, false), (true, true)] {
            let run = RunConfig {
                letters: "CTC",
                repeats: 1,
                attn: AttnConfig {
                    channels: CHANNELS,
                    condition_width: CONDITION,
                    heads: 1,
                    self_attention: true,
                },
                time_width: TIME,
                kernel: 3,
                joining: Joining::AfterNorm { image_width: if injects { CONDITION } else { 0 } },
                skip_channels: if skips { SKIP } else { 0 },
                first: 0,
            };
            let mut invariants = Invariants::default();
            let blocks = Blocks::load(&p, &run, &mut invariants).unwrap();
            let modulations = invariants.modulations(&cx, &[0.3, 0.9], TIME).unwrap();
            let injection = blocks.inject(&cx, &mapper, image.clone());
            // A mapper of another width is refused: that of a run that takes no image is 0.
            assert_eq!(injection.is_ok(), injects);
            let injection = injection.ok();
            let joined = Joined { skip: skips.then_some(&skip), injection: injection.as_ref() };
            let conditioning = Conditioning { modulations: &modulations, attended: &[] };
            let found = blocks.forward(&cx, x.clone(), joined, conditioning).unwrap();

            let mut joining = Vec::new();
            joining.extend(skips.then_some(&skip));
            joining.extend(injects.then_some(&mapped));
            let expected = plain(&p.sub(0), &x, &joining, &modulations.0[0]);
            let still = Tensor::zeros(&cx, "no modulation", &[1, 2 * CHANNELS], DType::F32).unwrap();
            joining.retain(|joining| !std::ptr::eq(*joining, &skip));
            let expected = plain(&p.sub(2), &expected, &joining, &still);
            let (found, expected) = (wide(&found), wide(&expected));
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
            let error = norm(&mut found.iter().zip(&expected).map(|(f, e)| f - e));
            let error = error / norm(&mut expected.iter().copied());
            assert!(error < 2e-6, "{dtype:?}, skip {skips}, image {injects}: {error:.1e}");
        }
    }
}

#[test]
fn what_should_join_must() {
    let cx = cx();
    let source = Random(DType::F32);
    let p = Params::new(&source);
    let block = InjectedResBlock::load(&p, CHANNELS, SKIP, CONDITION, 3).unwrap();
    let mapper = Linear::load_conv1x1(&p.sub("mapper"), IMAGE, CONDITION).unwrap();
    let folded = block.fold(&cx, &residual::mapper_rows(&cx, &mapper).unwrap()).unwrap();
    let (x, skip, image) = (images(CHANNELS, 1), images(SKIP, 2), images(IMAGE, 3));
    let run = |skip, image| block.forward(&cx, &x, skip, image, None);
    assert!(run(Some(&skip), Some((&image, &folded))).is_ok());
    assert!(run(Some(&skip), None).unwrap_err().to_string().contains("none"));
    assert!(run(None, Some((&image, &folded))).unwrap_err().to_string().contains("5 channels"));
    let smaller = image.narrow(0, 1).unwrap();
    assert!(run(Some(&skip), Some((&smaller, &folded))).is_err());
    assert!(run(Some(&image), Some((&image, &folded))).is_err());
}

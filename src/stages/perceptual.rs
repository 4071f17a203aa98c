//! How different two pictures look: LPIPS (Zhang et al. 2018, arXiv:1801.03924) over the features of VGG16
//! (Simonyan and Zisserman 2014).

use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::Params;
use crate::ops::activation::Activation;
use crate::ops::conv2d::{Conv2d, conv2d};
use crate::ops::elementwise::affine_channels;
use crate::ops::feature_distance::feature_distance;
use crate::ops::linear::Epilogue;
use crate::ops::max_pool::max_pool;
use crate::ops::regression::weighted_sum;
use crate::tensor::Tensor;

/// Colours of a picture.
const COLOURS: usize = 3;
/// The convolutions of each block. A block ends in features that are compared; 2 x 2 pixels become one before the
/// next.
const BLOCKS: [usize; 5] = [2, 2, 3, 3, 3];
/// All of them.
pub const CONVOLUTIONS: usize = 13;
const KERNEL: usize = 3;
/// What the colours of a picture in -1..1 are normalised by.
const COLOUR_MEAN: [f32; COLOURS] = [-0.030, -0.088, -0.188];
const COLOUR_STD: [f32; COLOURS] = [0.458, 0.448, 0.450];
/// The smallest side: the last features must have a pixel.
const SIDE_MIN: usize = 1 << (BLOCKS.len() - 1);

/// The sizes. VGG16's: 64, 64, 128, 128, 256, 256, 256, then six times 512.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerceptualConfig {
    /// Channels of each convolution.
    pub channels: [usize; CONVOLUTIONS],
}

/// The convolutions of VGG16, and the weights that people's judgements gave their channels.
#[derive(Debug)]
pub struct Perceptual {
    blocks: Vec<Block>,
    colour_scale: Tensor,
    colour_shift: Tensor,
}

#[derive(Debug)]
struct Block {
    /// Weight and bias.
    convolutions: Vec<(Tensor, Tensor)>,
    /// `[C]`
    head: Tensor,
}

impl Perceptual {
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, config: PerceptualConfig) -> Result<Self> {
        let (mut blocks, mut number, mut inputs) = (Vec::new(), 0, COLOURS);
        for (i, count) in BLOCKS.into_iter().enumerate() {
            let mut convolutions = Vec::new();
            for _ in 0..count {
                let (p, outputs) = (p.sub("convolutions").sub(number), config.channels[number]);
                let weight = p.tensor("weight", &[outputs, inputs, KERNEL, KERNEL])?;
                convolutions.push((weight, p.tensor("bias", &[outputs])?));
                (number, inputs) = (number + 1, outputs);
            }
            let head = p.sub("heads").sub(i).tensor("weight", &[1, inputs, 1, 1])?.reshape(&[inputs])?;
            blocks.push(Block { convolutions, head });
        }
        // Pictures in 0..1 to -1..1 and on to what VGG16 knows, in one.
        let scale = COLOUR_STD.map(|std| 2.0 / std);
        let shift: [f32; COLOURS] = std::array::from_fn(|c| (-1.0 - COLOUR_MEAN[c]) / COLOUR_STD[c]);
        let [colour_scale, colour_shift] =
            [Tensor::from_slice(&[COLOURS], &scale)?, Tensor::from_slice(&[COLOURS], &shift)?];
        Ok(Perceptual { blocks, colour_scale, colour_shift })
    }

    /// The mean over samples of LPIPS(x, y): for each of five layers the mean over its pixels of the weighted squared
    /// distance of features of length 1, summed over the layers.
    ///
    /// # Shapes
    /// `x` and `y` `[N, H, W, 3]` in 0..1; the result `[1]`
    ///
    /// # Errors
    /// `InvalidArgument` for shapes that differ, or a side of less than 16 pixels; `OutOfMemory`; `Cancelled`.
    pub fn distance(&self, cx: &Context, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let [_, height, width, _] = x.dims_of("perceptual pictures")?;
        if height.min(width) < SIDE_MIN {
            let expected = format!("sides of at least {SIDE_MIN} pixels");
            return Err(Error::argument("perceptual pictures", expected, format!("{width} x {height}")));
        }
        let [mut x, mut y] = [self.normalised(cx, x)?, self.normalised(cx, y)?];
        let mut distances = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            if i > 0 {
                [x, y] = [max_pool(cx, &x)?, max_pool(cx, &y)?];
            }
            [x, y] = [block.forward(cx, x)?, block.forward(cx, y)?];
            distances.push(feature_distance(cx, &x, &y, &block.head)?);
        }
        let terms: Vec<(&Tensor, f32)> = distances.iter().map(|distance| (distance, 1.0)).collect();
        weighted_sum(cx, &terms)
    }

    fn normalised(&self, cx: &Context, pictures: &Tensor) -> Result<Tensor> {
        affine_channels(cx, pictures.clone(), &self.colour_scale, &self.colour_shift)
    }
}

impl Block {
    fn forward(&self, cx: &Context, mut x: Tensor) -> Result<Tensor> {
        for (weight, bias) in &self.convolutions {
            let epilogue = Epilogue { bias: Some(bias), activation: Activation::Relu, ..Epilogue::default() };
            x = conv2d(cx, &x, &Conv2d { weight, stride: 1, padding: KERNEL / 2, epilogue })?;
        }
        Ok(x)
    }
}

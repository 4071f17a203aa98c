//! The discriminator that Stage A is trained against: whether each patch of a picture is real (Isola et al. 2017,
//! section 3.2.2, as the authors of Würstchen built it).

use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::Params;
use crate::ops::activation::Activation;
use crate::ops::conv2d::{Conv2d, conv2d};
use crate::ops::elementwise::activate;
use crate::ops::embedding::embedding;
use crate::ops::instance_norm::instance_norm;
use crate::ops::linear::{Epilogue, Term, WeightLayout, linear_sum};
use crate::ops::spectral_norm::{Directions, power_iteration, spectral_norm};
use crate::tensor::{DType, Tensor};

/// Kernel, stride and padding of all convolutions but the last.
const KERNEL: usize = 3;
const STRIDE: usize = 2;
const PADDING: usize = 1;
/// Of the LeakyReLU.
const SLOPE: f32 = 0.2;
const INSTANCE_NORM_EPS: f32 = 1e-5;
/// Layers that do not widen: with fewer layers than one more the last would not have all channels.
const LAYERS_BEYOND_WIDENING: usize = 3;

/// The fewest layers of stride 2.
pub const DEPTH_MIN: usize = LAYERS_BEYOND_WIDENING + 1;

/// The sizes of a discriminator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscriminatorConfig {
    /// Channels of a picture.
    pub inputs: usize,
    /// Length of the vector that each picture's judgement depends on; 0 for none.
    pub condition: usize,
    /// Channels of the last layers; each of the first ones has half of the next.
    pub channels: usize,
    /// Layers of stride 2.
    pub depth: usize,
}

impl DiscriminatorConfig {
    /// How often the channels double.
    fn doublings(&self) -> usize {
        self.depth.saturating_sub(LAYERS_BEYOND_WIDENING).max(LAYERS_BEYOND_WIDENING)
    }

    /// Channels after layer `i`.
    fn channels_after(&self, i: usize) -> usize {
        self.channels >> self.doublings().saturating_sub(i)
    }

    /// # Errors
    /// `InvalidArgument` for fewer than four layers, or channels that cannot be halved as often as they double.
    pub fn check(&self) -> Result<()> {
        if self.depth < DEPTH_MIN {
            return Err(Error::argument("discriminator depth", format!("at least {DEPTH_MIN}"), self.depth));
        }
        let least = 1usize.checked_shl(self.doublings() as u32).unwrap_or(usize::MAX);
        if self.channels == 0 || !self.channels.is_multiple_of(least) {
            let expected = format!("a multiple of {least} for {} layers", self.depth);
            return Err(Error::argument("discriminator channels", expected, self.channels));
        }
        Ok(())
    }
}

/// Convolutions under spectral norm, InstanceNorm after all but the first, a judgement per patch.
#[derive(Debug, Clone)]
pub struct Discriminator {
    config: DiscriminatorConfig,
    layers: Vec<Layer>,
    out_weight: Tensor,
    out_bias: Tensor,
}

#[derive(Debug, Clone)]
struct Layer {
    name: String,
    weight: Tensor,
    bias: Tensor,
    directions: Directions,
}

impl Discriminator {
    /// # Errors
    /// As [`DiscriminatorConfig::check`]; `Format` for missing or misshapen weights.
    pub fn load(p: &Params, config: DiscriminatorConfig) -> Result<Self> {
        config.check()?;
        let mut layers = Vec::with_capacity(config.depth);
        let mut inputs = config.inputs;
        for i in 0..config.depth {
            let (p, outputs) = (p.sub("layers").sub(i), config.channels_after(i));
            let directions = Directions {
                u: p.tensor("weight_u", &[outputs])?,
                v: p.tensor("weight_v", &[inputs * KERNEL * KERNEL])?,
            };
            let weight = p.tensor("weight_orig", &[outputs, inputs, KERNEL, KERNEL])?;
            layers.push(Layer {
                name: p.prefix().into(),
                weight,
                bias: p.tensor("bias", &[outputs])?,
                directions,
            });
            inputs = outputs;
        }
        let judged = inputs + config.condition;
        let out = p.sub("out");
        Ok(Discriminator {
            config,
            layers,
            out_weight: out.tensor("weight", &[1, judged, 1, 1])?.reshape(&[1, judged])?,
            out_bias: out.tensor("bias", &[1])?,
        })
    }

    /// The sizes.
    pub fn config(&self) -> &DiscriminatorConfig {
        &self.config
    }

    /// One step of the power iteration in each layer, as training takes it before each pass over pictures.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn iterate(&mut self, cx: &Context) -> Result<()> {
        for layer in &mut self.layers {
            layer.directions = power_iteration(cx, &layer.weight, &layer.directions)?;
        }
        Ok(())
    }

    /// Where the power iterations stand: names as they were loaded, and vectors.
    pub fn directions(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.layers.iter().flat_map(|Layer { name, directions, .. }| {
            [(format!("{name}.weight_u"), &directions.u), (format!("{name}.weight_v"), &directions.v)]
        })
    }

    /// The same with weights that no tape knows of: for gradients by pictures alone.
    #[must_use]
    pub fn constant(&self) -> Self {
        let layers = self.layers.iter().map(|layer| Layer {
            weight: layer.weight.constant(),
            bias: layer.bias.constant(),
            ..layer.clone()
        });
        Discriminator {
            config: self.config,
            layers: layers.collect(),
            out_weight: self.out_weight.constant(),
            out_bias: self.out_bias.constant(),
        }
    }

    /// How real each patch is, between 0 and 1.
    ///
    /// # Shapes
    /// As [`Discriminator::logits`].
    ///
    /// # Errors
    /// As [`Discriminator::logits`].
    pub fn forward(&self, cx: &Context, pictures: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        activate(cx, self.logits(cx, pictures, condition)?, Activation::Sigmoid)
    }

    /// [`Discriminator::forward`] before its sigmoid.
    ///
    /// # Shapes
    /// pictures `[N, H, W, inputs]`, condition `[N, condition]` -> `[N, h, w, 1]`, sides halved once per layer,
    /// rounding up
    ///
    /// # Errors
    /// `InvalidArgument` for other shapes, pictures so small that the last layer has one pixel, whose InstanceNorm
    /// would be blind, or if the condition is missing or one too much; `OutOfMemory`; `Cancelled`.
    pub fn logits(&self, cx: &Context, pictures: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        let [_, height, width, _] = pictures.dims_of("discriminator pictures")?;
        let patches = |side: usize| (0..self.config.depth).fold(side, |side, _| side.div_ceil(STRIDE));
        if patches(height) * patches(width) < 2 {
            let expected = format!("a side of more than {} pixels", STRIDE.pow(self.config.depth as u32));
            return Err(Error::argument("discriminator pictures", expected, format!("{width} x {height}")));
        }
        let mut x = pictures.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(cx, &x)?;
            if i > 0 {
                x = instance_norm(cx, &x, INSTANCE_NORM_EPS)?;
            }
            x = activate(cx, x, Activation::LeakyRelu(SLOPE))?;
        }
        self.judge(cx, &x, condition)
    }

    /// The last layer, a 1x1 convolution over the features and, at each pixel alike, the condition.
    fn judge(&self, cx: &Context, features: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        let layout = WeightLayout::RowsAreOutputs;
        let epilogue = Epilogue { bias: Some(&self.out_bias), ..Epilogue::default() };
        let own = Term { x: features, weight: &self.out_weight, layout, first_input: 0 };
        let [samples, height, width, channels] = features.dims_of("discriminator features")?;
        match condition {
            None if self.config.condition == 0 => linear_sum(cx, &[own], &epilogue),
            Some(condition) if condition.dims() == [samples, self.config.condition] => {
                let spread = embedding(cx, &sample_numbers(cx, [samples, height, width])?, condition)?;
                let given = Term { x: &spread, first_input: channels, ..own };
                linear_sum(cx, &[own, given], &epilogue)
            }
            other => {
                let expected = format!("[{samples}, {}]", self.config.condition);
                let found = other.map_or("none".into(), |condition| condition.shape().to_string());
                Err(Error::argument("discriminator condition", expected, found))
            }
        }
    }
}

impl Layer {
    fn forward(&self, cx: &Context, x: &Tensor) -> Result<Tensor> {
        let weight = spectral_norm(cx, &self.weight, &self.directions)?;
        let epilogue = Epilogue { bias: Some(&self.bias), ..Epilogue::default() };
        conv2d(cx, x, &Conv2d { weight: &weight, stride: STRIDE, padding: PADDING, epilogue })
    }
}

/// The number of its sample at each pixel.
fn sample_numbers(cx: &Context, dims: [usize; 3]) -> Result<Tensor> {
    let mut numbers = Tensor::new(cx, "numbers of samples", &dims, DType::I64)?;
    let per_sample = dims[1] * dims[2];
    for (number, sample) in (0..).zip(numbers.slice_mut::<i64>()?.chunks_exact_mut(per_sample.max(1))) {
        sample.fill(number);
    }
    Ok(numbers)
}

//! How every tensor of every network begins, by its structural name.
//!
//! The lines are those of the authors' code (dome272/Wuerstchen, `modules.py` and `vqgan.py`), of torchtools'
//! `nn/vq.py`, of torchvision's `models/efficientnet.py` and of transformers' `models/clip/modeling_clip.py`. What they do
//! not initialise themselves begins as PyTorch's layers do: that includes transposed convolutions, which are no `Conv2d`.

use super::draw::Rule::{self, Constant, KaimingOut, Layer, Normal, Uniform, Xavier, XavierPacked};
use crate::stages::stage_a::StageAConfig;
use crate::stages::stage_b::StageBConfig;
use crate::stages::stage_c::StageCConfig;
use crate::stages::text_encoder::TextEncoderConfig;

/// Conditionings and inputs of the denoising networks, and CLIP's embeddings.
const SMALL: f64 = 0.02;

/// What PyTorch's attention keeps in one tensor: query, key and value.
const PACKED: usize = 3;

/// The rules of one network. The first whose pattern fits a name counts; `*` stands for anything.
pub(super) struct Rules {
    list: Vec<(&'static str, Rule)>,
    /// A tensor that begins as a copy of another.
    copy: Option<(&'static str, &'static str)>,
}

impl Rules {
    fn new(list: impl IntoIterator<Item = (&'static str, Rule)>) -> Self {
        Rules { list: list.into_iter().collect(), copy: None }
    }

    /// The rule for a tensor, and the name whose random numbers it takes.
    pub fn of<'a>(&self, name: &'a str) -> Option<(Rule, &'a str)> {
        let name = match self.copy {
            Some((copy, original)) if copy == name => original,
            _ => name,
        };
        let rule = self.list.iter().find(|(pattern, _)| fits(pattern, name))?.1;
        Some((rule, name))
    }
}

/// The blocks that Stage B and Stage C share. `blocks` is what the residual branches are scaled by the root of.
fn shared_blocks(blocks: usize) -> [(&'static str, Rule); 9] {
    [
        // GlobalResponseNorm: modules.py:20-21.
        ("*.response.gamma", Constant(0.0)),
        ("*.response.beta", Constant(0.0)),
        // The last Linear of every ResBlock and FeedForwardBlock: modules.py:410, :628.
        ("*.project.weight", Xavier((1.0 / blocks as f64).sqrt())),
        // TimestepBlock: modules.py:412, :630.
        ("*.mapper.weight", Constant(0.0)),
        // torch.nn.MultiheadAttention: in_proj_weight by xavier_uniform_ as a whole. Its out_proj is a Linear.
        ("*.query.weight", XavierPacked(PACKED)),
        ("*.key.weight", XavierPacked(PACKED)),
        ("*.value.weight", XavierPacked(PACKED)),
        // Every Conv2d and Linear: modules.py:414-418, :632-636.
        ("*bias", Constant(0.0)),
        ("*weight", Xavier(1.0)),
    ]
}

/// `Paella`: modules.py:396-418.
pub(super) fn stage_b(config: &StageBConfig) -> Rules {
    let blocks = config.levels.iter().map(|level| level.repeats).sum();
    let own = [
        ("text.weight", Normal(SMALL)),                                        // :399
        ("latents.weight", Normal(SMALL)),                                     // :400
        ("input.weight", Xavier(SMALL)),                                       // :401
        ("features.weight", Constant(0.0)),                                    // :402
        ("tokens.weight", Normal((1.0 / config.codebook_size as f64).sqrt())), // :403
        ("up.*.resample.*", Layer),                                            // :381, a ConvTranspose2d
    ];
    let copy = Some(("logits.weight", "tokens.weight")); // :404
    Rules { copy, ..Rules::new(own.into_iter().chain(shared_blocks(blocks))) }
}

/// `Prior`: modules.py:619-636.
pub(super) fn stage_c(config: &StageCConfig) -> Rules {
    let own = [
        ("input.weight", Normal(SMALL)),    // :620
        ("text.in.weight", Normal(SMALL)),  // :621
        ("text.out.weight", Normal(SMALL)), // :622
        ("output.weight", Constant(0.0)),   // :623
    ];
    Rules::new(own.into_iter().chain(shared_blocks(config.depth)))
}

/// `VQModel`: only its blocks initialise themselves, vqgan.py:27-35.
pub(super) fn stage_a(config: &StageAConfig) -> Rules {
    Rules::new([
        ("codebook.weight", Uniform(1.0 / config.codebook_size as f64)), // nn/vq.py:18
        ("*.gammas", Constant(0.0)),                                     // vqgan.py:27
        // BatchNorm2d.
        ("encoder.out.norm.weight", Constant(1.0)),
        ("encoder.out.norm.bias", Constant(0.0)),
        ("*.running_mean", Constant(0.0)),
        ("*.running_var", Constant(1.0)),
        // The first and last layers and those between levels.
        ("encoder.in.*", Layer),
        ("encoder.out.*", Layer),
        ("decoder.in.*", Layer),
        ("decoder.out.*", Layer),
        // The blocks: vqgan.py:30-35.
        ("*.depthwise.weight", Xavier(1.0)),
        ("*.expand.weight", Xavier(1.0)),
        ("*.project.weight", Xavier(1.0)),
        ("*.depthwise.bias", Constant(0.0)),
        ("*.expand.bias", Constant(0.0)),
        ("*.project.bias", Constant(0.0)),
        ("*", Layer),
    ])
}

/// `EfficientNetEncoder`: the authors begin from a backbone that has learnt ImageNet, modules.py:560; this is how that
/// one began.
pub(super) fn image_encoder() -> Rules {
    Rules::new([
        ("head.weight", Layer), // modules.py:565
        ("*norm.weight", Constant(1.0)),
        ("*.running_mean", Constant(0.0)),
        ("*.running_var", Constant(1.0)),
        ("*bias", Constant(0.0)),
        // Every Conv2d, also those of squeeze and excitation: models/efficientnet.py, the end of the constructor.
        ("*weight", KaimingOut),
    ])
}

/// `CLIPTextModel`: `_init_weights` of modeling_clip.py, times `factor`.
pub(super) fn text_encoder(config: &TextEncoderConfig, factor: f64) -> Rules {
    let width = config.width as f64;
    let by_width = factor / width.sqrt();
    let by_depth = by_width / (2.0 * config.layers as f64).sqrt();
    Rules::new([
        ("tokens.weight", Normal(SMALL * factor)),
        ("positions.weight", Normal(SMALL * factor)),
        ("*.attention.output.weight", Normal(by_width)),
        ("*.attention.*.weight", Normal(by_depth)),
        ("*.expand.weight", Normal(factor / (2.0 * width).sqrt())),
        ("*.project.weight", Normal(by_depth)),
        ("*bias", Constant(0.0)),
        // Every LayerNorm.
        ("*weight", Constant(1.0)),
    ])
}

/// Whether a name is what a pattern says.
fn fits(pattern: &str, name: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(head) else { return false };
    rest.char_indices().map(|(i, _)| i).chain([rest.len()]).any(|i| fits(tail, &rest[i..]))
}

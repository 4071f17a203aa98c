//! The checkpoint keys of the paper's model, as the authors' code and transformers write them.
//!
//! Layers ask for structural names (`blocks.0.expand.weight`); each function here turns those of one part into
//! keys (`blocks.0.channelwise.0.weight`).

use super::names::Key;

/// Replaces parts of a dotted name: `(ours, theirs)`, each whole parts.
pub(super) type Parts = &'static [(&'static str, &'static str)];

/// The blocks that Stage B and C share.
const SHARED_BLOCKS: Parts = &[
    ("expand", "channelwise.0"),
    ("response", "channelwise.2"),
    ("project", "channelwise.4"),
    ("condition_mapper", "kv_mapper.1"),
    ("output", "attention.attn.out_proj"),
];

/// The projections that PyTorch's attention keeps in one tensor, in their order there.
const PACKED: [&str; 3] = ["query", "key", "value"];

/// The layers of Stage C around its blocks.
pub(super) const STAGE_C_TOP: Parts = &[
    ("input", "projection"),
    ("text.in", "cond_mapper.0"),
    ("text.out", "cond_mapper.2"),
    ("output", "out.1"),
];

/// Replaces each of `parts` where it stands between dots.
pub(super) fn rename(name: &str, parts: Parts) -> String {
    let mut dotted = format!(".{name}.");
    for (ours, theirs) in parts {
        dotted = dotted.replace(&format!(".{ours}."), &format!(".{theirs}."));
    }
    dotted.trim_matches('.').to_owned()
}

/// The key of a weight of Stage B's or C's blocks.
fn block(name: &str) -> Key {
    let mut from_leaf = name.rsplitn(3, '.');
    if let (Some(leaf), Some(layer), Some(block)) = (from_leaf.next(), from_leaf.next(), from_leaf.next())
        && let Some(part) = PACKED.iter().position(|&packed| packed == layer)
    {
        let part = Some((part, PACKED.len()));
        return Key { name: format!("{block}.attention.attn.in_proj_{leaf}"), part };
    }
    rename(name, SHARED_BLOCKS).into()
}

/// Stage C, the authors' `Prior`.
pub fn stage_c(name: &str) -> Key {
    if name.starts_with("blocks.") { block(name) } else { rename(name, STAGE_C_TOP).into() }
}

/// Stage B, the authors' `Paella`. `blocks_per_up_level` counts the blocks of each level on the way up: the
/// layer that grows the grid is numbered after them.
pub fn stage_b(name: &str, blocks_per_up_level: &[usize]) -> Key {
    const TOP: Parts = &[
        ("tokens", "in_mapper.0"),
        ("input", "embedding.1"),
        ("latents", "effnet_mapper"),
        ("text", "byt5_mapper"),
        ("features", "clf.1"),
        ("logits", "out_mapper.1"),
    ];
    match unet_level(name, blocks_per_up_level) {
        Some(name) => block(&name),
        None => rename(name, TOP).into(),
    }
}

/// The name of a weight within a U-Net's levels as checkpoints number them, its block's own names as they were;
/// nothing for a weight outside the levels.
pub(super) fn unet_level(name: &str, blocks_per_up_level: &[usize]) -> Option<String> {
    let parts: Vec<&str> = name.splitn(3, '.').collect();
    match parts[..] {
        ["down", level, rest] => {
            let rest = match rest.strip_prefix("resample.") {
                Some(leaf) => format!("0.1.{leaf}"),
                // At all levels but the finest, number 0 is the layer that shrinks the grid.
                None if level == "0" => rest.to_owned(),
                None => increment_first(rest),
            };
            Some(format!("down_blocks.{level}.{rest}"))
        }
        ["up", level, rest] => {
            let count = level.parse().ok().and_then(|l: usize| blocks_per_up_level.get(l)).copied();
            let rest = match (rest.strip_prefix("resample."), count) {
                (Some(leaf), Some(count)) => format!("{count}.1.{leaf}"),
                _ => rest.to_owned(),
            };
            Some(format!("up_blocks.{level}.{rest}"))
        }
        _ => None,
    }
}

/// `3.rest` becomes `4.rest`.
fn increment_first(name: &str) -> String {
    let incremented = name
        .split_once('.')
        .and_then(|(number, rest)| Some(format!("{}.{rest}", number.parse::<usize>().ok()? + 1)));
    incremented.unwrap_or_else(|| name.to_owned())
}

/// Stage A, the authors' `VQModel`. `levels` says how many layers the encoder has before its last.
pub fn stage_a(name: &str, levels: usize) -> String {
    const BLOCK: Parts =
        &[("depthwise", "depthwise.1"), ("expand", "channelwise.0"), ("project", "channelwise.2")];
    // A block per level, and a convolution between each two.
    let encoder_layers = 2 * levels - 1;
    let parts: Vec<&str> = name.splitn(3, '.').collect();
    match parts[..] {
        ["encoder", "in", leaf] => format!("in_block.1.{leaf}"),
        ["encoder", "out", leaf] => {
            let leaf = leaf.replace("project.", "0.").replace("norm.", "1.");
            format!("down_blocks.{encoder_layers}.{leaf}")
        }
        ["encoder", layer, leaf] => rename(&format!("down_blocks.{layer}.{leaf}"), BLOCK),
        ["decoder", "in", leaf] => format!("up_blocks.0.0.{leaf}"),
        ["decoder", "out", leaf] => format!("out_block.0.{leaf}"),
        ["decoder", layer, leaf] => increment_decoder(layer, &rename(leaf, BLOCK)),
        _ => rename(name, &[("codebook", "vquantizer.codebook")]),
    }
}

/// The decoder's layers are numbered after its first, the 1x1 convolution.
fn increment_decoder(layer: &str, leaf: &str) -> String {
    format!("up_blocks.{}", increment_first(&format!("{layer}.{leaf}")))
}

/// The image encoder: torchvision's EfficientNetV2 `features` below `backbone`, the head below `mapper`.
/// `expanding` says for each stage whether its blocks have a layer that widens them.
pub fn image_encoder(name: &str, stages: &[EncoderStage]) -> String {
    let last = stages.len() + 1;
    let conv = |prefix: String, leaf: &str| match leaf.strip_prefix("norm.") {
        Some(norm) => format!("{prefix}.1.{norm}"),
        None => format!("{prefix}.0.{leaf}"),
    };
    let parts: Vec<&str> = name.splitn(5, '.').collect();
    match parts[..] {
        ["stem", ..] => conv("backbone.0".into(), &name["stem.".len()..]),
        ["features", ..] => conv(format!("backbone.{last}"), &name["features.".len()..]),
        ["head", ..] => conv("mapper".into(), &name["head.".len()..]),
        ["stages", stage, layer, layer_part, leaf] => {
            let number: usize = stage.parse().unwrap_or_default();
            let kind = stages.get(number).copied().unwrap_or_default();
            let prefix = format!("backbone.{}.{layer}.block", number + 1);
            let first = usize::from(kind.expands);
            match layer_part {
                "expand" => conv(format!("{prefix}.0"), leaf),
                "depthwise" => conv(format!("{prefix}.{first}"), leaf),
                "squeeze" => format!("{prefix}.{}.fc1.{leaf}", first + 1),
                "excite" => format!("{prefix}.{}.fc2.{leaf}", first + 1),
                _ if kind.fused => conv(format!("{prefix}.1"), leaf),
                _ => conv(format!("{prefix}.{}", first + 2), leaf),
            }
        }
        _ => name.to_owned(),
    }
}

/// The discriminator of Stage A, the authors' `Discriminator`: a LeakyReLU follows the first layer, an InstanceNorm and
/// a LeakyReLU each of the others.
pub fn discriminator(name: &str) -> String {
    let parts: Vec<&str> = name.splitn(3, '.').collect();
    match parts[..] {
        ["layers", layer, leaf] => {
            let number: usize = layer.parse().unwrap_or_default();
            format!("encoder.{}.{leaf}", (3 * number).saturating_sub(1))
        }
        _ => rename(name, &[("out", "shuffle")]),
    }
}

/// How the blocks of one stage of the image encoder are numbered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncoderStage {
    /// FusedMBConv rather than MBConv.
    pub fused: bool,
    /// Whether a layer widens the input first.
    pub expands: bool,
}

/// A CLIP text tower, as transformers writes it, without the `text_model.` of older files.
pub fn text_encoder(name: &str) -> String {
    const TOWER: Parts = &[
        ("tokens", "embeddings.token_embedding"),
        ("positions", "embeddings.position_embedding"),
        ("layers", "encoder.layers"),
        ("norm_attention", "layer_norm1"),
        ("norm_mlp", "layer_norm2"),
        ("attention.query", "self_attn.q_proj"),
        ("attention.key", "self_attn.k_proj"),
        ("attention.value", "self_attn.v_proj"),
        ("attention.output", "self_attn.out_proj"),
        ("expand", "mlp.fc1"),
        ("project", "mlp.fc2"),
        ("final_norm", "final_layer_norm"),
    ];
    rename(name, TOWER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_checkpoints() {
        let packed = Key { name: "blocks.2.attention.attn.in_proj_bias".into(), part: Some((1, 3)) };
        assert_eq!(stage_c("blocks.2.key.bias"), packed);
        assert_eq!(stage_c("blocks.2.output.bias").name, "blocks.2.attention.attn.out_proj.bias");
        assert_eq!(stage_c("output.weight"), Key::from("out.1.weight".to_owned()));
        assert_eq!(stage_b("down.1.0.depthwise.weight", &[]).name, "down_blocks.1.1.depthwise.weight");
        assert_eq!(stage_b("down.0.1.mapper.bias", &[]).name, "down_blocks.0.1.mapper.bias");
        assert_eq!(stage_b("up.0.resample.weight", &[6]).name, "up_blocks.0.6.1.weight");
        assert_eq!(stage_b("up.1.2.query.weight", &[6]).name, "up_blocks.1.2.attention.attn.in_proj_weight");
        assert_eq!(stage_a("decoder.0.depthwise.bias", 2), "up_blocks.1.depthwise.1.bias");
        assert_eq!(stage_a("encoder.out.norm.running_var", 2), "down_blocks.3.1.running_var");
        assert_eq!(text_encoder("layers.0.attention.key.weight"), "encoder.layers.0.self_attn.k_proj.weight");
        assert_eq!(discriminator("layers.0.weight_u"), "encoder.0.weight_u");
        assert_eq!(discriminator("layers.2.bias"), "encoder.5.bias");
        assert_eq!(discriminator("out.weight"), "shuffle.weight");
        let stages = [EncoderStage { fused: false, expands: true }];
        assert_eq!(image_encoder("stages.0.1.squeeze.bias", &stages), "backbone.1.1.block.2.fc1.bias");
    }
}

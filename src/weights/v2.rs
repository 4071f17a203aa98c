//! The checkpoint keys of v2's parts, as diffusers writes them. Text towers are as in [`super::v1`].

use super::v1::{self, Parts, rename, unet_level};

/// The blocks that the prior and the decoder share.
const SHARED_BLOCKS: Parts = &[
    ("expand", "channelwise.0"),
    ("response", "channelwise.2"),
    ("project", "channelwise.4"),
    ("condition_mapper", "kv_mapper.1"),
    ("query", "attention.to_q"),
    ("key", "attention.to_k"),
    ("value", "attention.to_v"),
    ("output", "attention.to_out.0"),
];

/// Stage C, diffusers' `WuerstchenPrior`.
pub fn prior(name: &str) -> String {
    rename(name, if name.starts_with("blocks.") { SHARED_BLOCKS } else { v1::STAGE_C_TOP })
}

/// The decoder, diffusers' `WuerstchenDiffNeXt`. `blocks_per_up_level` is as for [`v1::stage_b`].
pub fn decoder(name: &str, blocks_per_up_level: &[usize]) -> String {
    const TOP: Parts = &[
        ("input", "embedding.1"),
        ("images", "effnet_mappers"),
        ("text", "clip_mapper"),
        ("output", "clf.1"),
    ];
    match unet_level(name, blocks_per_up_level) {
        Some(name) => rename(&name, SHARED_BLOCKS),
        None => rename(name, TOP),
    }
}

/// Stage A, diffusers' `PaellaVQModel`. `levels` is as for [`v1::stage_a`].
pub fn vq_model(name: &str, levels: usize) -> String {
    match name.strip_prefix("codebook.") {
        Some(leaf) => format!("vquantizer.embedding.{leaf}"),
        None => v1::stage_a(name, levels),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_checkpoints() {
        assert_eq!(prior("blocks.2.query.bias"), "blocks.2.attention.to_q.bias");
        assert_eq!(prior("blocks.2.output.weight"), "blocks.2.attention.to_out.0.weight");
        assert_eq!(prior("text.out.weight"), "cond_mapper.2.weight");
        assert_eq!(prior("output.weight"), "out.1.weight");
        assert_eq!(decoder("down.1.0.expand.weight", &[]), "down_blocks.1.1.channelwise.0.weight");
        assert_eq!(decoder("up.0.resample.weight", &[6]), "up_blocks.0.6.1.weight");
        assert_eq!(decoder("up.1.2.value.weight", &[6]), "up_blocks.1.2.attention.to_v.weight");
        assert_eq!(decoder("images.5.bias", &[]), "effnet_mappers.5.bias");
        assert_eq!(decoder("output.bias", &[]), "clf.1.bias");
        assert_eq!(vq_model("codebook.weight", 2), "vquantizer.embedding.weight");
        assert_eq!(vq_model("decoder.out.bias", 2), "out_block.0.bias");
    }
}

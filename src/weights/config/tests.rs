use super::*;
use std::path::Path;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
const EMOJI: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/emoji-v1");

fn folder_with(name: &str, content: &str) -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("wst-config-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(CONFIG_FILE), content).unwrap();
    folder
}

#[test]
fn every_config_of_the_fixtures_is_read() {
    for model in [format!("{FIXTURES}/model"), EMOJI.to_owned()] {
        let model = Path::new(&model);
        let index = ModelIndex::read(model).unwrap();
        assert_eq!(index.pipeline.generation(), 1);
        StageAConfig::read(&model.join("stage_a")).unwrap();
        StageBConfig::read(&model.join("stage_b")).unwrap();
        StageCConfig::read(&model.join("stage_c")).unwrap();
        ImageEncoderConfig::read(&model.join("image_encoder")).unwrap();
        TextEncoderConfig::read(&model.join("text_encoder")).unwrap();
    }
    let extra = Path::new(FIXTURES).join("extra");
    assert_eq!(StageAConfig::read(&extra.join("stage_a_levels3")).unwrap().levels, 3);
    let alt = StageBConfig::read(&extra.join("stage_b_alt")).unwrap();
    assert_eq!((alt.unet.nhead[0], alt.unet.nhead[2], alt.self_attn), (None, Some(3), false));
    assert_eq!(alt.unet.level_config, ["CTF", "CATF", "CTA"]);
    let legacy = TextEncoderConfig::read(&extra.join("text_encoder_legacy")).unwrap();
    assert_eq!((legacy.eos_token_id, legacy.hidden_act), (2, HiddenAct::Gelu));
    let quick = TextEncoderConfig::read(&extra.join("text_encoder_quick_gelu")).unwrap();
    assert_eq!(quick.hidden_act, HiddenAct::QuickGelu);
    TextEncoderConfig::read(&extra.join("text_encoder_bigg")).unwrap();
}

#[test]
fn the_index_of_the_bundled_model() {
    let index = ModelIndex::read(Path::new(EMOJI)).unwrap();
    assert_eq!((index.image_size, index.image_encoder_size, index.text_length), (128, 96, Some(32)));
    assert!(!index.text_attention_mask);
    assert_eq!(index.defaults.stage_b_temperature, Some((0.7, 0.3)));
    assert_eq!(index.defaults.stage_c_sampler.as_deref(), Some("ddpm"));
    assert!(ModelIndex::read(&Path::new(FIXTURES).join("model")).unwrap().text_attention_mask);
}

#[test]
fn absent_fields_are_the_references_defaults() {
    let folder = folder_with("empty", "{}");
    let b = StageBConfig::read(&folder).unwrap();
    assert_eq!((b.unet.c_hidden.as_slice(), b.byt5_embd), ([640, 1280, 1280].as_slice(), 1536));
    assert_eq!((b.unet.kernel_size, b.unet.patch_size, b.unet.c_r, b.unet.dropout.len()), (3, 2, 64, 3));
    let c = StageCConfig::read(&folder).unwrap();
    assert_eq!((c.c, c.depth, c.nhead, c.latent_size), (1280, 16, 16, [12, 12]));
    assert_eq!(StageAConfig::read(&folder).unwrap().codebook_size, 8192);
}

#[test]
fn errors_name_the_file_and_the_field() {
    let b = |content: &str| StageBConfig::read(&folder_with("wrong", content)).unwrap_err().to_string();
    for (content, parts) in [
        (r#"{"c_in": -1}"#, ["config.json: c_in", "-1"]),
        (r#"{"c_in": 70000}"#, ["1 to 65536", "70000"]),
        (r#"{"_class_name": "Prior"}"#, ["_class_name", "Paella"]),
        (r#"{"blocks": [1, 2]}"#, ["blocks", "3 elements"]),
        (r#"{"nhead": [-1, 16, 7]}"#, ["nhead", "divisor of 1280"]),
        (r#"{"nhead": [-1, -1, 16]}"#, ["nhead", "-1"]),
        (r#"{"level_config": ["CT", "CTX", "C"]}"#, ["level_config", "CTX"]),
        (r#"{"dropout": [0.1, 2, 0]}"#, ["dropout", "0 to 1"]),
        (r#"{"dropout": "x"}"#, ["dropout", "\"x\""]),
        (r#"{"kernel_size": 4}"#, ["kernel_size", "odd"]),
        (r#"{"c_out": 3}"#, ["c_out", "as c_in"]),
        (r#"{"c_hidden": []}"#, ["c_hidden", "at least one"]),
        (r#"{"c_r": 2}"#, ["c_r", "4 to"]),
        ("[]", ["config.json", "object"]),
        ("{", ["config.json", "JSON"]),
    ] {
        let message = b(content);
        assert!(parts.iter().all(|part| message.contains(part)), "{content}: {message}");
    }
    let deep = format!("{{\"a\":{}", "[".repeat(500_000));
    assert!(b(&deep).contains("recursion"), "{}", b(&deep));
    assert!(b(&" ".repeat(2 << 20)).contains("1048576 bytes"));
}

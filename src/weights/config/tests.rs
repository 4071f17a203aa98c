use super::*;
use crate::error::Result;
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
    let cond = DiscriminatorConfig::read(&extra.join("discriminator_cond")).unwrap();
    assert_eq!(cond, DiscriminatorConfig { c_in: 3, c_cond: 6, c_hidden: 32, depth: 4 });
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
fn every_config_of_v2_is_read() {
    let v2 = Path::new(FIXTURES).join("v2");
    for (model, parts, index) in [
        (
            "model",
            ["prior_prior", "prior_scheduler", "decoder", "scheduler", "vqgan"].as_slice(),
            Pipeline::V2Combined,
        ),
        ("prior", &["prior", "scheduler"], Pipeline::V2Prior),
        ("decoder", &["decoder", "scheduler", "vqgan"], Pipeline::V2Decoder),
    ] {
        let model = v2.join(model);
        let read = ModelIndex::read(&model).unwrap();
        assert_eq!((read.pipeline, read.image_size, read.v2), (index, 1024, V2Settings::default()));
        for part in parts {
            let folder = model.join(part);
            match part.trim_start_matches("prior_") {
                "prior" => assert_eq!(StageCConfig::read_v2(&folder).unwrap().c, 28),
                "vqgan" => assert_eq!(StageAConfig::read_v2(&folder).unwrap().c_hidden, 16),
                "decoder" => {
                    let decoder = DiffNeXtConfig::read(&folder).unwrap();
                    assert_eq!((decoder.unet.nhead[0], decoder.clip_embd), (None, 15));
                    assert_eq!(decoder.inject_effnet, [false, true, true]);
                }
                _ => assert_eq!(SchedulerConfig::read(&folder).unwrap().scaler, 1.0),
            }
        }
    }
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
    // v2's have the same but for the decoder, which has its own.
    assert_eq!(StageCConfig::read_v2(&folder).unwrap(), c);
    assert_eq!(StageAConfig::read_v2(&folder).unwrap(), StageAConfig::read(&folder).unwrap());
    let decoder = DiffNeXtConfig::read(&folder).unwrap();
    assert_eq!((decoder.unet.c_in, decoder.unet.c_hidden.as_slice()), (4, [320, 640, 1280, 1280].as_slice()));
    assert_eq!(decoder.unet.nhead, [None, Some(10), Some(20), Some(20)]);
    assert_eq!((decoder.unet.blocks.as_slice(), decoder.clip_embd), ([4, 4, 14, 4].as_slice(), 1024));
    assert_eq!(decoder.inject_effnet, [false, true, true, true]);
    std::fs::write(folder.join(SchedulerConfig::FILE), "{}").unwrap();
    assert_eq!(SchedulerConfig::read(&folder).unwrap(), SchedulerConfig { scaler: 1.0, s: 0.008 });
}

/// Checks that each content is refused, with all parts in the message.
fn expect_errors<T>(read: impl Fn(&Path) -> Result<T>, file: &str, cases: &[(&str, &[&str])]) {
    for (content, parts) in cases {
        let folder = folder_with(&format!("refused-{file}"), "{}");
        std::fs::write(folder.join(file), content).unwrap();
        let message = read(&folder).err().unwrap_or_else(|| panic!("{content} was read")).to_string();
        assert!(message.contains(file), "{content}: {message}");
        assert!(parts.iter().all(|part| message.contains(part)), "{content}: {message}");
    }
}

#[test]
fn wrong_fields_of_v2_are_named() {
    expect_errors(
        DiffNeXtConfig::read,
        CONFIG_FILE,
        &[
            (r#"{"_class_name": "Paella"}"#, &["_class_name", "WuerstchenDiffNeXt"]),
            (r#"{"inject_effnet": [false, true, true]}"#, &["inject_effnet", "4 elements"]),
            (r#"{"inject_effnet": [false, true, 1, true]}"#, &["inject_effnet", "true or false"]),
            (r#"{"inject_effnet": true}"#, &["inject_effnet", "a list"]),
            (r#"{"c_out": 8}"#, &["c_out", "as c_in"]),
            (r#"{"nhead": [-1, 10, 20, 7]}"#, &["nhead", "divisor of 1280", "level 3"]),
            (
                r#"{"level_config": ["CT", "CTA", "CTA", "CTF"]}"#,
                &["level_config", "letters C, T and A", "CTF"],
            ),
            (r#"{"blocks": [4, 4, 0, 4]}"#, &["blocks", "1 to"]),
            (r#"{"kernel_size": 2}"#, &["kernel_size", "odd"]),
            (r#"{"patch_size": 0}"#, &["patch_size", "1 to"]),
            (r#"{"clip_embd": 0}"#, &["clip_embd", "1 to"]),
            (r#"{"effnet_embd": -3}"#, &["effnet_embd", "-3"]),
        ],
    );
    expect_errors(
        StageCConfig::read_v2,
        CONFIG_FILE,
        &[
            (r#"{"_class_name": "Prior"}"#, &["_class_name", "WuerstchenPrior"]),
            (r#"{"nhead": 7}"#, &["nhead", "divisor of c, 1280"]),
        ],
    );
    expect_errors(
        StageAConfig::read_v2,
        CONFIG_FILE,
        &[
            (r#"{"_class_name": "VQModel"}"#, &["_class_name", "PaellaVQModel"]),
            (r#"{"in_channels": 4}"#, &["in_channels", "expected 3", "4"]),
            (r#"{"out_channels": 1}"#, &["out_channels", "expected 3"]),
            (r#"{"up_down_scale_factor": 4}"#, &["up_down_scale_factor", "expected 2"]),
            (r#"{"embed_dim": 383}"#, &["embed_dim", "multiple of 2"]),
            (r#"{"num_vq_embeddings": 0}"#, &["num_vq_embeddings", "1 to"]),
            (r#"{"latent_channels": "x"}"#, &["latent_channels"]),
        ],
    );
    expect_errors(
        SchedulerConfig::read,
        SchedulerConfig::FILE,
        &[
            (r#"{"_class_name": "DDPMScheduler"}"#, &["_class_name", "DDPMWuerstchenScheduler"]),
            (r#"{"scaler": 0}"#, &["scaler", "0"]),
            (r#"{"s": -0.008}"#, &["s:", "-0.008"]),
        ],
    );
}

#[test]
fn the_index_of_v2() {
    let read = |content: &str| {
        let folder = folder_with("index", "{}");
        std::fs::write(folder.join(ModelIndex::FILE), content).unwrap();
        ModelIndex::read(&folder)
    };
    let own = read(
        r#"{"_class_name": "WuerstchenPriorPipeline", "latent_mean": 2, "latent_std": 0.5,
            "resolution_multiple": 32, "latent_dim_scale": 8.5}"#,
    );
    let v2 = own.unwrap().v2;
    assert_eq!((v2.latent_mean, v2.latent_std), (2.0, 0.5));
    assert_eq!((v2.resolution_multiple, v2.latent_dim_scale), (32.0, 8.5));
    // Other generations do not look.
    let v1 = read(r#"{"_class_name": "WuerstchenV1Pipeline", "latent_mean": "x"}"#).unwrap();
    assert_eq!((v1.image_size, v1.v2), (512, V2Settings::default()));
    for field in [
        "\"latent_mean\": 0",
        "\"latent_std\": 1e9",
        "\"resolution_multiple\": 0.5",
        "\"latent_dim_scale\": \"x\"",
    ] {
        let error =
            read(&format!("{{\"_class_name\": \"WuerstchenCombinedPipeline\", {field}}}")).unwrap_err();
        let name = field.split('"').nth(1).unwrap();
        assert!(error.to_string().contains(name), "{field}: {error}");
    }
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

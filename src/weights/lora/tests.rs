use super::*;
use crate::weights::write_safetensors;

#[test]
fn every_spelling_is_the_same_tensor() {
    let module = "blocks.2.attention.";
    for (leaf, role) in [("lora_A.weight", Role::Down), ("lora_B.weight", Role::Up), ("alpha", Role::Alpha)] {
        for prefix in ["prior.", "unet.", ""] {
            let named = |projection: &str| parse(&format!("{prefix}{module}{projection}.{leaf}"));
            assert_eq!(named("to_q"), Some(("blocks.2.query".into(), role)));
            assert_eq!(named("to_k"), Some(("blocks.2.key".into(), role)));
            assert_eq!(named("to_v"), Some(("blocks.2.value".into(), role)));
            assert_eq!(named("to_out.0"), Some(("blocks.2.output".into(), role)));
        }
    }
    let query = |role| Some(("blocks.2.query".to_owned(), role));
    assert_eq!(parse("unet.blocks.2.attention.to_q.lora.down.weight"), query(Role::Down));
    assert_eq!(parse("unet.blocks.2.attention.to_q.lora.up.weight"), query(Role::Up));
    assert_eq!(parse("blocks.2.attention.processor.to_q_lora.down.weight"), query(Role::Down));
    assert_eq!(parse("blocks.2.attention.to_q_lora.up.weight"), query(Role::Up));
    let output = parse("unet.blocks.11.attention.processor.to_out_lora.up.weight");
    assert_eq!(output, Some(("blocks.11.output".into(), Role::Up)));
}

#[test]
fn other_names_are_none() {
    for name in [
        "text_encoder.layers.0.to_q.lora_A.weight",
        "prior.blocks.2.attention.to_q.lora_A.bias",
        "prior.blocks.2.attention.to_q.weight",
        "prior.blocks.02.attention.to_q.lora_A.weight",
        "prior.blocks.+2.attention.to_q.lora_A.weight",
        "prior.blocks.x.attention.to_q.lora_A.weight",
        "prior.blocks.2.attention.to_qq.lora_A.weight",
        "prior.blocks.2.attention.add_k_proj.lora_A.weight",
        "prior.blocks.2.kv_mapper.1.lora_A.weight",
        "prior.blocks.2.attention.to_q.lora_magnitude_vector.weight",
        "prior.unet.blocks.2.attention.to_q.lora_A.weight",
        "",
    ] {
        assert_eq!(parse(name), None, "{name}");
    }
}

#[test]
fn what_is_written_is_read() {
    for (_, _, projection) in PROJECTIONS {
        let layer = format!("blocks.5.{projection}");
        let [down, up] = adapter_keys(&layer);
        assert_eq!(parse(&down), Some((layer.clone(), Role::Down)));
        assert_eq!(parse(&up), Some((layer, Role::Up)));
    }
    let keys = [
        "prior.blocks.5.attention.to_out.0.lora_A.weight",
        "prior.blocks.5.attention.to_out.0.lora_B.weight",
    ];
    assert_eq!(adapter_keys("blocks.5.output"), keys);
}

#[test]
fn modules_are_those_of_the_settings() {
    assert_eq!(module_of("prior.blocks.2.attention.to_out.0.lora_A.weight"), "blocks.2.attention.to_out.0");
    assert_eq!(module_of("blocks.2.attention.to_q.lora.down.weight"), "blocks.2.attention.to_q");
    assert_eq!(
        module_of("unet.blocks.2.attention.processor.to_q_lora.down.weight"),
        "blocks.2.attention.to_q"
    );
}

/// A file with these tensors, opened.
fn opened(test: &str, tensors: &[(&str, &[usize])]) -> Result<Adapter> {
    let path = std::env::temp_dir().join(format!("adapter-{test}-{}.safetensors", std::process::id()));
    let made: Vec<_> = tensors
        .iter()
        .map(|(name, dims)| {
            (format!("prior.{name}"), Tensor::from_slice(dims, &vec![3f32; dims.iter().product()]).unwrap())
        })
        .collect();
    write_safetensors(&path, made.iter().map(|(name, tensor)| (name.clone(), tensor))).unwrap();
    let adapter = Adapter::open(&path);
    std::fs::remove_file(path).unwrap();
    adapter
}

/// A test's name, the tensors of its file, and what the error says.
type Refused = (&'static str, &'static [(&'static str, &'static [usize])], &'static [&'static str]);

const A: &str = "blocks.2.attention.to_q.lora_A.weight";
const B: &str = "blocks.2.attention.to_q.lora_B.weight";

#[test]
fn alpha_is_divided_by_the_rank() {
    let scale = |adapter: Adapter| adapter.layers["blocks.2.query"].scale;
    let plain = opened("plain", &[(A, &[2, 4]), (B, &[4, 2])]).unwrap();
    assert_eq!(scale(plain), 1.0);
    let alpha = ("blocks.2.attention.to_q.alpha", [].as_slice());
    let scaled = opened("alpha", &[(A, &[2, 4]), (B, &[4, 2]), alpha]).unwrap();
    assert_eq!(scale(scaled), 1.5);
}

#[test]
fn errors_name_the_tensor() {
    let cases: [Refused; 7] = [
        ("empty", &[], &["the tensors of an adapter"]),
        ("half", &[(A, &[2, 4])], &[A, "other half"]),
        ("flat", &[(A, &[8]), (B, &[4, 2])], &[A, "[rank, inputs]", "[8]"]),
        ("none", &[(A, &[0, 4]), (B, &[4, 0])], &[A, "rank 1 or more", "[0, 4]"]),
        (
            "other",
            &[("blocks.0.depthwise.weight", &[1])],
            &["blocks.0.depthwise.weight", "attention projection"],
        ),
        ("scale", &[("blocks.2.attention.to_q.alpha", &[])], &["to_q.alpha", "the matrices"]),
        (
            "twice",
            &[(A, &[2, 4]), (B, &[4, 2]), ("blocks.2.attention.to_q_lora.down.weight", &[2, 4])],
            &[A, "one spelling"],
        ),
    ];
    for (test, tensors, said) in cases {
        let message = opened(test, tensors).map(drop).unwrap_err().to_string();
        let missing = said.iter().find(|part| !message.contains(**part));
        assert_eq!(missing, None, "{test}: {message}");
    }
}

#[test]
fn alphas_of_the_header_are_those_of_modules() {
    let of = |json: &str| {
        let json = serde_json::from_str(json).unwrap();
        Settings::of(&json, "file")
    };
    let settings =
        of(r#"{"prior.lora_alpha": 8, "prior.alpha_pattern": {"^blocks.2.attention.to_q": 2, "to_v": 1.5},
        "prior.use_dora": false, "prior.use_rslora": false, "prior.r": 4}"#)
        .unwrap();
    assert_eq!(settings.alpha("blocks.2.attention.to_q"), Some(2.0));
    assert_eq!(settings.alpha("blocks.2.attention.to_v"), Some(1.5));
    assert_eq!(settings.alpha("blocks.5.attention.to_k"), Some(8.0));
    assert_eq!(settings.scale(8.0, 4), 2.0);
    assert_eq!(of(r#"{"lora_alpha": 6, "use_rslora": true}"#).unwrap().scale(6.0, 4), 3.0);
    assert_eq!(of("{}").unwrap().alpha("blocks.2.attention.to_q"), None);
    for refused in [
        r#"{"use_dora": true}"#,
        r#"{"lora_alpha": "much"}"#,
        r#"{"alpha_pattern": [1]}"#,
        r#"{"alpha_pattern": {"blocks\\.[0-9]+": 1}}"#,
        r#"{"alpha_pattern": {"to_q": null}}"#,
    ] {
        assert!(of(refused).is_err(), "{refused}");
    }
}

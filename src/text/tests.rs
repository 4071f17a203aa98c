use super::*;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

fn folder(name: &str) -> PathBuf {
    Path::new(FIXTURES).join(name)
}

/// Compares all prompts of a case; a null stands for a prompt at which the reference fails.
fn check_case(case: &str, tokenizer: &Tokenizer) -> (usize, usize) {
    let text = std::fs::read_to_string(folder("cases").join(format!("{case}.json"))).unwrap();
    let case: Value = serde_json::from_str(&text).unwrap();
    let length = case["max_length"].as_u64().unwrap() as usize;
    let (mut equal, mut refused) = (0, 0);
    for prompt in case["prompts"].as_array().unwrap() {
        let text = prompt["text"].as_str().unwrap();
        let result = tokenizer.encode(text, length);
        let Some(want) = prompt["ids"].as_array() else {
            let error = result.expect_err(text);
            assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
            refused += 1;
            continue;
        };
        let got = result.unwrap();
        let want: Vec<i64> = want.iter().map(|id| id.as_i64().unwrap()).collect();
        assert_eq!(got.ids, want, "{text:?}");
        let mask = prompt["attention_mask"].as_array().unwrap();
        assert_eq!(got.tokens_used, mask.iter().filter(|m| m.as_i64() == Some(1)).count(), "{text:?}");
        equal += 1;
    }
    (equal, refused)
}

#[test]
fn ids_are_the_references() {
    let incomplete = Tokenizer::open(&folder("model/tokenizer")).unwrap();
    let (equal, refused) = check_case("tokenizer", &incomplete);
    assert!(equal > 5 && refused > 5, "{equal} equal, {refused} refused");
    let full = Tokenizer::open(&folder("extra/tokenizer_full")).unwrap();
    assert_eq!(full.largest_id(), 2049);
    assert_eq!(check_case("tokenizer_full", &full).1, 0);
    let legacy = Tokenizer::open(&folder("extra/tokenizer_legacy")).unwrap();
    assert_eq!(check_case("v2_tokenizer", &legacy).1, 0);
}

#[test]
fn an_error_names_the_piece() {
    let tokenizer = Tokenizer::open(&folder("model/tokenizer")).unwrap();
    let message = tokenizer.encode("a cat 名前 sleeps", 77).unwrap_err().to_string();
    assert!(message.contains("名前") && message.contains("prompt"), "{message}");
    assert!(tokenizer.encode("a", 1).is_err());
    assert!(tokenizer.encode(&"a".repeat(PROMPT_MAX_BYTES + 1), 77).is_err());
}

#[test]
fn long_prompts_are_cut() {
    let tokenizer = Tokenizer::open(&folder("extra/tokenizer_full")).unwrap();
    for text in ["word ".repeat(2000), "x".repeat(10_000), "\u{1F600}".repeat(10_000), "é ".repeat(300_000)]
    {
        let tokens = tokenizer.encode(&text, 77).unwrap();
        assert_eq!((tokens.ids.len(), tokens.tokens_used), (77, 77));
        assert_eq!(tokens.ids[76], 2049);
    }
}

#[test]
fn special_ids_come_from_the_files_then_from_the_caller() {
    let full = folder("extra/tokenizer_full/tokenizer.json");
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(full).unwrap()).unwrap();
    let temp = std::env::temp_dir().join(format!("wst-specials-{}", std::process::id()));
    std::fs::create_dir_all(&temp).unwrap();
    let write = |name: &str, json: &Value| std::fs::write(temp.join(name), json.to_string()).unwrap();
    json["post_processor"] = Value::Null;
    json["added_tokens"] = Value::Array(vec![]);
    write("tokenizer.json", &json);
    let message = Tokenizer::open(&temp).unwrap_err().to_string();
    assert!(message.contains("beginning of prompts"), "{message}");
    let ids = SpecialIds { bos: Some(7), eos: Some(8), pad: None };
    let tokenizer = Tokenizer::open_with(&temp, ids).unwrap();
    assert_eq!(tokenizer.special_ids(), SpecialIds { pad: Some(8), ..ids });
    write("special_tokens_map.json", &serde_json::json!({"pad_token": {"content": "!"}}));
    let tokenizer = Tokenizer::open_with(&temp, ids).unwrap();
    assert_eq!(tokenizer.special_ids().pad, tokenizer.inner.token_to_id("!"));
    json["padding"] = serde_json::json!({"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": null,
        "pad_id": 3, "pad_type_id": 0, "pad_token": "x"});
    json["truncation"] = serde_json::json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst",
        "stride": 0});
    json["model"]["dropout"] = serde_json::json!(0.9);
    write("tokenizer.json", &json);
    let tokenizer = Tokenizer::open_with(&temp, ids).unwrap();
    let first = tokenizer.encode("a photograph of a mountain", 20).unwrap();
    assert!(first.tokens_used > 5);
    assert_eq!(first, tokenizer.encode("a photograph of a mountain", 20).unwrap());
    std::fs::remove_dir_all(temp).unwrap();
}

//! Files that are damaged or made to harm: every one must end in an error that names the file, never in a panic.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/folder.rs"]
mod folder;
#[path = "common/fuzz.rs"]
mod fuzz;

use std::path::{Path, PathBuf};
use std::time::Instant;

use wuerstchen::text::Tokenizer;
use wuerstchen::weights::config::{ModelIndex, StageCConfig};
use wuerstchen::weights::{STEMS, WeightFile, Weights};
use wuerstchen::{DType, Error, GenerateOptions};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

/// A folder that is removed at the end of a test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("wst-hostile-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.0.join(name), content).unwrap();
    }

    fn weights(&self, content: impl AsRef<[u8]>) -> wuerstchen::Result<Weights> {
        self.write("model.safetensors", content);
        Weights::open(&self.0, STEMS)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0x3F);
    bytes
}

#[test]
fn weights_of_a_stage() {
    let folder = Path::new(FIXTURES).join("model/stage_c");
    let weights = Weights::open(&folder, STEMS).unwrap();
    assert_eq!(
        weights.tensor_shaped("blocks.0.depthwise.weight", &[24, 1, 3, 3]).unwrap().dtype(),
        DType::F32
    );
    let message = weights.tensor_shaped("blocks.0.depthwise.weight", &[24, 3, 3]).unwrap_err().to_string();
    let want = "stage_c/model.safetensors: blocks.0.depthwise.weight: expected shape [24, 3, 3], found [24, 1, 3, 3]";
    assert!(message.ends_with(want), "{message}");
    let message = weights.tensor_shaped("none", &[1]).unwrap_err().to_string();
    assert!(message.contains("none: expected a tensor of shape [1], found none of this name"), "{message}");
    assert_eq!(weights.names().len(), 40);
    assert_eq!(weights.find_not_finite(), None);
    let before = weights.tensor("projection.weight").unwrap();
    let values = before.slice::<f32>().unwrap().to_vec();
    weights.advise_dont_need();
    assert_eq!(before.slice::<f32>().unwrap(), values);
    let parameters: usize = weights.names().iter().map(|n| weights.tensor(n).unwrap().elements()).sum();
    assert_eq!(weights.parameters(), parameters as u64);
    drop(weights);
    assert_eq!(before.slice::<f32>().unwrap(), values, "a tensor keeps its mapping");
}

#[test]
fn shards_stay_in_their_folder() {
    let folder = Folder::new("shards");
    let index = |shard: &str, name: &str| format!(r#"{{"weight_map": {{"{name}": "{shard}"}}}}"#);
    let open = |text: String| {
        folder.write("model.safetensors.index.json", text);
        Weights::open(&folder.0, STEMS)
    };
    folder.write("part.safetensors", fuzz::small_safetensors());
    let weights = open(index("part.safetensors", "a.weight")).unwrap();
    assert_eq!((weights.names(), weights.parameters()), (vec!["a.weight".to_owned()], 6));
    assert!(!weights.has("b"));
    let absolute = folder.0.join("part.safetensors").display().to_string();
    let shards = [
        "../x.safetensors",
        "a/part.safetensors",
        "",
        ".",
        "..",
        "./part.safetensors",
        "config.json",
        &absolute,
    ];
    for shard in shards {
        let message = open(index(shard, "a.weight")).unwrap_err().to_string();
        assert!(message.contains("weight_map.a.weight") && message.contains("in this folder"), "{message}");
    }
    assert!(matches!(open(index("none.safetensors", "a.weight")), Err(Error::Io { .. })));
    let message = open(index("part.safetensors", "zzz")).unwrap_err().to_string();
    assert!(message.contains("part.safetensors: zzz"), "{message}");
    assert!(open("{}".into()).is_err() && open("[".repeat(100_000)).is_err());
}

#[test]
fn missing_weights_say_what_was_looked_for() {
    let folder = Folder::new("missing");
    let message = Weights::open(&folder.0, STEMS).unwrap_err().to_string();
    for name in
        ["model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.safetensors.index.json"]
    {
        assert!(message.contains(name), "{message}");
    }
    folder.write("diffusion_pytorch_model.fp16.safetensors", fuzz::small_safetensors());
    assert!(Weights::open(&folder.0, STEMS).unwrap().has("b"));
    assert!(matches!(Weights::open(&folder.0.join("none"), STEMS), Err(Error::Io { .. })));
    std::fs::create_dir(folder.0.join("model.safetensors")).unwrap();
    assert!(Weights::open(&folder.0, STEMS).unwrap_err().to_string().contains("folder"));
}

#[test]
fn tensors_of_every_type() {
    let folder = Folder::new("types");
    let weights = folder.weights(fuzz::small_safetensors()).unwrap();
    // The header's length leaves some of the data unaligned: those are copied, and equal.
    let file = WeightFile::open(&folder.0.join("model.safetensors")).unwrap();
    let bytes: Vec<u8> = (0..48u8).map(|i| i.wrapping_mul(37)).collect();
    for (name, range) in [("a.weight", 0..24), ("b", 24..30), ("c", 30..38), ("d", 38..38), ("e", 38..40)] {
        let tensor = weights.tensor(name).unwrap();
        assert_eq!(tensor.bytes().unwrap(), &bytes[range], "{name}");
        assert_eq!(tensor.dims(), file.shape(name).unwrap());
    }
    let message = weights.tensor("f").unwrap_err().to_string();
    assert!(message.contains("f: expected elements of type F32") && message.contains("F64"), "{message}");
    assert!(weights.tensor_shaped("c", &[]).unwrap_err().to_string().contains("I64"));
    assert!(weights.tensor_shaped("d", &[1, 0, 7]).is_ok());
}

#[test]
fn weights_that_are_not_finite_are_found() {
    let folder = Folder::new("nan");
    let header = r#"{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"y":{"dtype":"F16","shape":[2],"data_offsets":[12,16]}}"#;
    let mut bytes = safetensors(header, 0);
    for value in [1.0, 2.0, 3.0f32] {
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend([0x00, 0x3C, 0x00, 0x7C]);
    assert_eq!(folder.weights(&bytes).unwrap().find_not_finite(), Some(("y".into(), 1)));
    let at = bytes.len() - 16;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    bytes[at + 8..at + 12].copy_from_slice(&f32::INFINITY.to_le_bytes());
    assert_eq!(folder.weights(&bytes).unwrap().find_not_finite(), Some(("x".into(), 2)));
}

#[test]
fn every_cut_and_every_bit_of_a_small_file() {
    let folder = Folder::new("bits");
    let good = fuzz::small_safetensors();
    for len in 0..good.len() {
        let error = folder.weights(&good[..len]).unwrap_err();
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
    let header = good.len() - 48;
    for bit in 0..header * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(weights) = folder.weights(&bytes) {
            for name in weights.names() {
                drop(weights.tensor(&name));
            }
        }
    }
    let mut longer = good.clone();
    longer.push(0);
    assert!(folder.weights(&longer).is_err());
}

#[test]
fn headers_made_to_harm() {
    let folder = Folder::new("headers");
    let tensor = |shape: &str, from: u64, to: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let one = tensor("[2]", 0, 8);
    for (what, header, data) in [
        ("overlapping", format!(r#"{{"a":{one},"b":{}}}"#, tensor("[2]", 4, 12)), 12),
        ("the same place", format!(r#"{{"a":{one},"b":{one}}}"#), 8),
        ("a gap", format!(r#"{{"a":{one},"b":{}}}"#, tensor("[2]", 12, 20)), 20),
        ("beyond the end", format!(r#"{{"a":{}}}"#, tensor("[4]", 0, 16)), 8),
        ("backwards", format!(r#"{{"a":{}}}"#, tensor("[2]", 8, 0)), 8),
        ("another size", format!(r#"{{"a":{}}}"#, tensor("[3]", 0, 8)), 8),
        ("an overflow", format!(r#"{{"a":{}}}"#, tensor("[4611686018427387904,4]", 0, 8)), 8),
        ("offsets that overflow", format!(r#"{{"a":{}}}"#, tensor("[2]", u64::MAX - 7, u64::MAX)), 8),
        ("a negative side", format!(r#"{{"a":{}}}"#, tensor("[-2]", 0, 8)), 8),
        ("no type", r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#.into(), 8),
        ("a list", "[]".into(), 0),
        ("half a header", r#"{"a":{"#.into(), 0),
        ("nesting", format!("{{\"a\":{}", "[".repeat(200_000)), 0),
        ("a null byte", "{\0}".into(), 0),
    ] {
        let error = folder.weights(safetensors(&header, data)).expect_err(what).to_string();
        assert!(error.contains("model.safetensors"), "{what}: {error}");
    }
    // Too many dimensions, or a size that wraps only when zeros are left out: an error when it is asked for.
    for shape in ["[1,1,1,1,1,1,1,2]", "[0,4611686018427387904,16]"] {
        let size = if shape.starts_with("[0") { 0 } else { 8 };
        let weights =
            folder.weights(safetensors(&format!(r#"{{"a":{}}}"#, tensor(shape, 0, size)), size as usize));
        if let Ok(weights) = weights {
            drop(weights.tensor("a"));
            drop((weights.parameters(), weights.find_not_finite()));
        }
    }
    // Twice the same name: the last one counts, or the file is refused.
    drop(folder.weights(safetensors(&format!(r#"{{"a":{one},"a":{one}}}"#), 8)));
    let mut bytes = safetensors(&format!(r#"{{"a":{one}}}"#), 8);
    bytes[9] = 0xFF;
    assert!(folder.weights(&bytes).is_err(), "not UTF-8");
    for length in [u64::MAX, 100_000_001, 1 << 40, 9] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend([b' '; 8]);
        assert!(folder.weights(&bytes).is_err(), "a header of {length} bytes");
    }
    assert!(folder.weights([]).is_err());
}

#[test]
fn opening_does_not_read_the_weights() {
    let folder = Folder::new("sparse");
    let size = 64u64 << 30;
    let header = format!(r#"{{"a":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{size}]}}}}"#, size / 4);
    folder.write("model.safetensors", safetensors(&header, 0));
    let file = std::fs::OpenOptions::new().write(true).open(folder.0.join("model.safetensors")).unwrap();
    file.set_len(8 + header.len() as u64 + size).unwrap();
    let start = Instant::now();
    let weights = Weights::open(&folder.0, STEMS).unwrap();
    assert!(start.elapsed().as_millis() < 1000);
    assert_eq!(weights.parameters(), size / 4);
    assert_eq!(weights.bytes_mapped() as u64, 8 + header.len() as u64 + size);
}

#[test]
fn configurations_made_to_harm() {
    let folder = Folder::new("config");
    let read = |content: &[u8]| {
        folder.write("config.json", content);
        folder.write("model_index.json", content);
        (StageCConfig::read(&folder.0), ModelIndex::read(&folder.0))
    };
    let deep = [b"{\"c\":".as_slice(), &b"[".repeat(500_000)].concat();
    for content in
        [b"".as_slice(), b"\xff\xfe", b"{\"c\":\"\xff\"}", b"{", b"null", b"3", &deep, &b" ".repeat(1 << 21)]
    {
        let (config, index) = read(content);
        assert!(config.unwrap_err().to_string().contains("config.json"));
        assert!(index.unwrap_err().to_string().contains("model_index.json"));
    }
    let (_, index) = read(br#"{"_class_name": "StableDiffusionPipeline"}"#);
    assert!(index.unwrap_err().to_string().contains("WuerstchenV1Pipeline"));
    let (_, index) = read(br#"{"_class_name": "WuerstchenV1Pipeline", "format_version": 2}"#);
    assert!(matches!(index, Err(Error::Unsupported { .. })));
    assert!(matches!(StageCConfig::read(Path::new("/dev")), Err(Error::Io { .. })));
}

#[test]
fn tokenizers_made_to_harm() {
    let folder = Folder::new("tokenizer");
    let open = |content: &[u8]| {
        folder.write("tokenizer.json", content);
        let start = Instant::now();
        let result = Tokenizer::open(&folder.0);
        assert!(start.elapsed().as_secs() < 10, "{result:?}");
        result
    };
    for content in [b"".as_slice(), b"\xff", b"{}", b"[]", &b"[".repeat(500_000)] {
        assert!(open(content).unwrap_err().to_string().contains("tokenizer.json"));
    }
    let good = std::fs::read(Path::new(FIXTURES).join("extra/tokenizer_full/tokenizer.json")).unwrap();
    let good: serde_json::Value = serde_json::from_slice(&good).unwrap();
    let with = |pointer: &str, value: serde_json::Value| {
        let mut json = good.clone();
        *json.pointer_mut(pointer).unwrap() = value;
        open(json.to_string().as_bytes())
    };
    let regex = "/pre_tokenizer/pretokenizers/0/pattern/Regex";
    for pattern in ["(".repeat(100_000) + &")".repeat(100_000), "(?:a|".repeat(40), "x".repeat(10_000)] {
        assert!(with(regex, pattern.into()).unwrap_err().to_string().contains("pre_tokenizer"));
    }
    for pattern in ["(", "[", "(a+)+$", "\\p{Nothing}", "((a{1000}){1000}){1000}", ""] {
        if let Ok(tokenizer) = with(regex, pattern.into()) {
            drop(tokenizer.encode(&"a".repeat(3000), 77));
        }
    }
    let nested = (0..100).fold(
        serde_json::json!({"type": "NFC"}),
        |inner, _| serde_json::json!({"type": "Sequence", "normalizers": [inner]}),
    );
    assert!(with("/normalizer", nested).is_err());
    assert!(with("/model/continuing_subword_prefix", "##".into()).is_err());
    for merges in [serde_json::json!([["zz", "yy"]]), serde_json::json!(["a"]), serde_json::json!([1])] {
        assert!(with("/model/merges", merges).is_err());
    }
    for (pointer, value) in [
        ("/model/vocab", serde_json::json!({"a": -1})),
        ("/model/vocab", serde_json::json!({"a": 4_294_967_296u64})),
        ("/model/type", "Nothing".into()),
        ("/added_tokens", serde_json::json!([{"id": 1}])),
    ] {
        assert!(with(pointer, value).is_err(), "{pointer}");
    }
    drop(with("/post_processor", serde_json::Value::Null).unwrap());
}

#[test]
fn legacy_tokenizers_made_to_harm() {
    let folder = Folder::new("legacy");
    let message = Tokenizer::open(&folder.0).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json") && message.contains("merges.txt"), "{message}");
    folder.write("vocab.json", r#"{"a": 0, "b": 1, "ab": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}"#);
    assert!(matches!(Tokenizer::open(&folder.0), Err(Error::Io { .. })), "no merges.txt");
    for (merges, part) in [
        ("a b c\n", "line 1"),
        ("#version: 0.2\na\n", "line 2"),
        ("a x\n", "`x`"),
        ("\u{e9}".repeat(99).as_str(), "line 1"),
    ] {
        folder.write("merges.txt", merges);
        let message = Tokenizer::open(&folder.0).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    folder.write("merges.txt", "#version: 0.2\na b\n");
    Tokenizer::open(&folder.0).unwrap();
    folder.write("special_tokens_map.json", "[");
    assert!(Tokenizer::open(&folder.0).unwrap_err().to_string().contains("special_tokens_map.json"));
    folder.write(
        "special_tokens_map.json",
        r#"{"bos_token": 7, "eos_token": "", "pad_token": {"content": "never"}}"#,
    );
    drop(Tokenizer::open(&folder.0));
}

#[test]
fn prompts_of_any_characters() {
    let full = Tokenizer::open(&Path::new(FIXTURES).join("extra/tokenizer_full")).unwrap();
    let legacy = Tokenizer::open(&Path::new(FIXTURES).join("extra/tokenizer_legacy")).unwrap();
    let special = [
        "<|startoftext|>",
        "<|endoftext|>",
        "'s",
        "'S",
        "\u{301}",
        "\u{212B}",
        "\u{130}",
        "\u{df}",
        "\0",
        "\u{3000}",
    ];
    let mut random = fuzz::Random(11);
    for _ in 0..3000 {
        let mut text = String::new();
        for _ in 0..random.below(40) {
            match random.below(4) {
                0 => text.push_str(special[random.below(special.len())]),
                1 => text.push(char::from(random.below(128) as u8)),
                2 => text.push(char::from_u32(random.below(0x2_0000) as u32).unwrap_or(' ')),
                _ => text.push(char::from_u32(random.below(0x11_0000) as u32).unwrap_or('x')),
            }
        }
        for tokenizer in [&full, &legacy] {
            let tokens = tokenizer.encode(&text, 77).unwrap();
            assert_eq!(tokens.ids.len(), 77);
            assert!(tokens.ids.iter().all(|&id| id >= 0 && id <= i64::from(tokenizer.largest_id())));
        }
    }
}

#[test]
fn a_pipe_is_refused() {
    let folder = Folder::new("pipe");
    let status = std::process::Command::new("mkfifo").arg(folder.0.join("config.json")).status();
    if status.is_ok_and(|status| status.success()) {
        assert!(StageCConfig::read(&folder.0).unwrap_err().to_string().contains("pipe"));
    }
}

#[test]
fn mutated_files() {
    let report = fuzz::fuzz_files(4000, 7);
    assert_eq!(report.panics, Vec::<String>::new());
    assert!(report.accepted > 100 && report.refused > 1000, "{report:?}");
}

/// Any file of a whole v2 model: what opens makes a picture or says what is wrong.
#[test]
fn mutated_models_of_v2() {
    let mut files = vec!["model_index.json".to_owned()];
    for part in folder::V2_PARTS {
        files.extend([format!("{part}/config.json"), folder::weights_of(&folder::v2("model"), part)]);
    }
    for part in ["prior_scheduler", "scheduler"] {
        files.push(format!("{part}/scheduler_config.json"));
    }
    for part in ["prior_tokenizer", "tokenizer"] {
        files.extend([format!("{part}/tokenizer.json"), format!("{part}/tokenizer_config.json")]);
    }
    let model = folder::Folder::of(&folder::v2("model"));
    let originals: Vec<Vec<u8>> = files.iter().map(|name| model.read(name)).collect();
    let (mut opened, mut refused, mut pictures) = (0, 0, 0);
    for case in 0..600 {
        let mut random = fuzz::Random(case * 7919 + 3);
        let chosen = random.below(files.len());
        let (name, original) = (&files[chosen], &originals[chosen]);
        let mut bytes = original.clone();
        if name.ends_with(".safetensors") {
            // Of the weights only the header: numbers have no form that can be wrong.
            let end = 8 + u64::from_le_bytes(original[..8].try_into().unwrap()) as usize;
            let mut header = original[8..end].to_vec();
            fuzz::mutate(&mut random, &mut header);
            let change = header.len() as isize - (end - 8) as isize;
            bytes = [&original[..8], &header, &original[end..]].concat();
            fuzz::mend_safetensors(&mut bytes, change);
        } else {
            fuzz::mutate(&mut random, &mut bytes);
        }
        model.write(name, &bytes);
        match folder::open(model.path()) {
            Err(error) => {
                let text = error.to_string();
                assert!(!text.contains("internal error"), "case {case}, {name}: {text}");
                refused += 1;
            }
            Ok(model) => {
                opened += 1;
                let mut options = GenerateOptions::new(&model).unwrap();
                options.add_prompt("a cat", None).unwrap();
                options.set_stage_c(1, 2.0).unwrap();
                options.set_stage_b(1, 2.0).unwrap();
                if options.set_size(128, 128).is_ok() {
                    match model.generate(&options) {
                        Ok(_) => pictures += 1,
                        Err(error @ Error::Internal { .. }) => panic!("case {case}, {name}: {error}"),
                        Err(_) => {}
                    }
                }
            }
        }
        model.write(name, original);
    }
    assert!(
        opened > 15 && refused > 200 && pictures > 15,
        "{opened} opened, {refused} refused, {pictures} pictures"
    );
}

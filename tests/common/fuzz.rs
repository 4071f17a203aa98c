//! Mutated files for every loader: each must give a value or an error, and never panic.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use wuerstchen::Image;
use wuerstchen::text::Tokenizer;
use wuerstchen::training::data::{DataOptions, Loader, MetadataFilter, Passes};
use wuerstchen::weights::config::{
    DiffNeXtConfig, ImageEncoderConfig, ModelIndex, SchedulerConfig, StageAConfig, StageBConfig,
    StageCConfig, TextEncoderConfig,
};
use wuerstchen::weights::{STEMS, Weights};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// SplitMix64: small, seeded, the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// What became of the cases.
#[derive(Debug, Default)]
pub struct Report {
    pub cases: u64,
    pub accepted: u64,
    pub refused: u64,
    /// Panics inside the tokenizers and image crates that became errors.
    pub caught: Vec<String>,
    /// Panics that reached the caller: kind and number of the case.
    pub panics: Vec<String>,
}

type Load = fn(&Path) -> wuerstchen::Result<()>;

/// One kind of file: files that are complete, of which one is mutated, and the loader.
struct Seed {
    name: &'static str,
    files: Vec<(&'static str, Vec<u8>)>,
    load: Load,
}

fn load_weights(folder: &Path) -> wuerstchen::Result<()> {
    let weights = Weights::open(folder, STEMS)?;
    for name in weights.names() {
        if let Ok(tensor) = weights.tensor(&name) {
            std::hint::black_box(
                tensor.bytes().unwrap().iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            );
        }
        let shape = weights.shape(&name).map(<[usize]>::to_vec).unwrap_or_default();
        std::hint::black_box(weights.tensor_shaped(&name, &shape).is_ok());
    }
    std::hint::black_box((weights.parameters(), weights.find_not_finite(), weights.bytes_mapped()));
    weights.advise_dont_need();
    Ok(())
}

fn load_tokenizer(folder: &Path) -> wuerstchen::Result<()> {
    let tokenizer = Tokenizer::open(folder)?;
    for text in ["", "A photo of a cat's hat, 42!", "<|endoftext|> \u{e9}\u{301} 名 \u{1F600}"] {
        if let Ok(tokens) = tokenizer.encode(text, 16) {
            assert_eq!(tokens.ids.len(), 16);
        }
    }
    Ok(())
}

fn load_image(folder: &Path) -> wuerstchen::Result<()> {
    let image = Image::read(folder.join("picture"))?;
    assert_eq!(image.data().len(), image.width() as usize * image.height() as usize * 3);
    Ok(())
}

fn load_data(folder: &Path) -> wuerstchen::Result<()> {
    let mut options = DataOptions::new(folder);
    options.set_side(4)?;
    options.set_passes(Passes::One);
    options.set_filter(MetadataFilter { max_pwatermark: Some(0.5), ..Default::default() })?;
    let mut loader = Loader::new(&options)?;
    while loader.next_batch()?.is_some() {}
    Ok(())
}

/// A shard of two records, one with a long name and one with extended headers.
fn small_shard(picture: &[u8]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for key in ["long/".repeat(30), "short".to_owned()] {
        for (kind, content) in [("jpg", picture), ("txt", b"a caption"), ("json", br#"{"pwatermark": 0.1}"#)]
        {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            archive.append_pax_extensions([("mtime", b"1700000000.5".as_slice())]).unwrap();
            archive.append_data(&mut header, format!("{key}x.{kind}"), content).unwrap();
        }
    }
    archive.into_inner().unwrap()
}

/// A safetensors file of a few small tensors of several types.
pub fn small_safetensors() -> Vec<u8> {
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"#,
        r#""b":{"dtype":"F16","shape":[3],"data_offsets":[24,30]},"c":{"dtype":"I64","shape":[],"#,
        r#""data_offsets":[30,38]},"d":{"dtype":"BF16","shape":[1,0,7],"data_offsets":[38,38]},"#,
        r#""e":{"dtype":"U8","shape":[2],"data_offsets":[38,40]},"f":{"dtype":"F64","shape":[1],"data_offsets":[40,48]}}"#
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..48u8).map(|i| i.wrapping_mul(37)));
    bytes
}

fn small_tokenizer() -> Vec<u8> {
    let full = std::fs::read_to_string(format!("{ROOT}/tests/fixtures/extra/tokenizer_full/tokenizer.json"));
    let mut json: serde_json::Value = serde_json::from_str(&full.unwrap()).unwrap();
    let letters = "abcdefghijklmnopqrstuvwxyz0123456789,.!'";
    let mut tokens: Vec<String> = letters.chars().flat_map(|c| [c.to_string(), format!("{c}</w>")]).collect();
    tokens.extend(["ph", "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"].map(str::to_owned));
    let ids = tokens.iter().enumerate().map(|(id, token)| (token.clone(), serde_json::json!(id)));
    json["model"]["vocab"] = serde_json::Value::Object(ids.collect());
    json["model"]["merges"] = serde_json::json!([["p", "h"], ["c", "a"], ["ca", "t</w>"]]);
    for (i, name) in ["<|startoftext|>", "<|endoftext|>"].into_iter().enumerate() {
        json["added_tokens"][i]["id"] = serde_json::json!(tokens.len() - 2 + i);
        json["post_processor"]["special_tokens"][name]["ids"] = serde_json::json!([tokens.len() - 2 + i]);
    }
    json.to_string().into_bytes()
}

fn pictures() -> Vec<Seed> {
    use image::{ExtendedColorType, ImageEncoder, codecs};
    let data: Vec<u8> = (0..40 * 24 * 4).map(|i| (i * 31 % 256) as u8).collect();
    let png = |colour, bytes: usize| {
        let mut out = Vec::new();
        codecs::png::PngEncoder::new(&mut out).write_image(&data[..20 * 12 * bytes], 20, 12, colour).unwrap();
        out
    };
    let jpeg = |colour, bytes: usize| {
        let mut out = Vec::new();
        let mut encoder = codecs::jpeg::JpegEncoder::new_with_quality(&mut out, 70);
        encoder.encode(&data[..40 * 24 * bytes], 40, 24, colour).unwrap();
        out
    };
    let webp = |name: &str| std::fs::read(format!("{ROOT}/tests/fixtures/pictures/{name}.webp")).unwrap();
    let lossless = |colour, bytes: usize| {
        let mut out = Vec::new();
        let encoder = codecs::webp::WebPEncoder::new_lossless(&mut out);
        encoder.write_image(&data[..20 * 12 * bytes], 20, 12, colour).unwrap();
        out
    };
    let shard = small_shard(&jpeg(ExtendedColorType::L8, 1));
    let line = br#"{"file_name": "0.png", "text": "a caption", "pwatermark": 0.1}"#.to_vec();
    let listed = vec![("captions.jsonl", line), ("0.png", png(ExtendedColorType::L8, 1))];
    let mut seeds = vec![
        Seed { name: "shard", files: vec![("0.tar", shard)], load: load_data },
        Seed { name: "listed pictures", files: listed, load: load_data },
    ];
    let files = [
        ("webp lossy", webp("lossy")),
        ("webp with alpha", webp("alpha")),
        ("webp rgb", lossless(ExtendedColorType::Rgb8, 3)),
        ("webp rgba", lossless(ExtendedColorType::Rgba8, 4)),
        ("png rgb8", png(ExtendedColorType::Rgb8, 3)),
        ("png rgba16", png(ExtendedColorType::Rgba16, 8)),
        ("png grey", png(ExtendedColorType::L8, 1)),
        ("jpeg rgb", jpeg(ExtendedColorType::Rgb8, 3)),
        ("jpeg grey", jpeg(ExtendedColorType::L8, 1)),
    ];
    let picture = |(name, content)| Seed { name, files: vec![("picture", content)], load: load_image };
    seeds.extend(files.into_iter().map(picture));
    seeds
}

fn corpus() -> Vec<Seed> {
    let read = |path: &str| std::fs::read(format!("{ROOT}/{path}")).unwrap();
    let config = |name, path: &str, load: Load| Seed { name, files: vec![("config.json", read(path))], load };
    let (model, v2) = ("tests/fixtures/model", "tests/fixtures/v2/model");
    let mut seeds = vec![
        Seed { name: "safetensors", files: vec![("model.safetensors", small_safetensors())], load: load_weights },
        Seed {
            name: "safetensors of stage C",
            files: vec![("model.safetensors", read("tests/fixtures/model/stage_c/model.safetensors"))],
            load: load_weights,
        },
        Seed {
            name: "shards",
            files: vec![
                ("model.safetensors.index.json", br#"{"metadata":{"total_size":9},"weight_map":{"b":"x.safetensors","a.weight":"x.safetensors"}}"#.to_vec()),
                ("x.safetensors", small_safetensors()),
            ],
            load: load_weights,
        },
        config("stage A", &format!("{model}/stage_a/config.json"), |f| StageAConfig::read(f).map(drop)),
        config("stage B", &format!("{model}/stage_b/config.json"), |f| StageBConfig::read(f).map(drop)),
        config("stage C", &format!("{model}/stage_c/config.json"), |f| StageCConfig::read(f).map(drop)),
        config("image encoder", &format!("{model}/image_encoder/config.json"), |f| ImageEncoderConfig::read(f).map(drop)),
        config("text encoder", &format!("{model}/text_encoder/config.json"), |f| TextEncoderConfig::read(f).map(drop)),
        Seed {
            name: "model index",
            files: vec![("model_index.json", read("examples/models/emoji-v1/model_index.json"))],
            load: |f| ModelIndex::read(f).map(drop),
        },
        config("v2's prior", &format!("{v2}/prior_prior/config.json"), |f| StageCConfig::read_v2(f).map(drop)),
        config("v2's decoder", &format!("{v2}/decoder/config.json"), |f| DiffNeXtConfig::read(f).map(drop)),
        config("v2's VQGAN", &format!("{v2}/vqgan/config.json"), |f| StageAConfig::read_v2(f).map(drop)),
        Seed {
            name: "v2's scheduler",
            files: vec![("scheduler_config.json", read(&format!("{v2}/scheduler/scheduler_config.json")))],
            load: |f| SchedulerConfig::read(f).map(drop),
        },
        Seed {
            name: "v2's index",
            files: vec![("model_index.json", read("tests/fixtures/v2/prior/model_index.json"))],
            load: |f| ModelIndex::read(f).map(drop),
        },
        Seed { name: "tokenizer.json", files: vec![("tokenizer.json", small_tokenizer())], load: load_tokenizer },
    ];
    let legacy = "tests/fixtures/extra/tokenizer_legacy";
    let names = ["vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"];
    let files = names.map(|name| (name, read(&format!("{legacy}/{name}")))).to_vec();
    seeds.push(Seed { name: "legacy tokenizer", files, load: load_tokenizer });
    seeds.extend(pictures());
    seeds
}

/// Pieces that parsers stumble over.
const TOKENS: &[&[u8]] = &[
    b"[[[[[[[[",
    b"{\"a\":{\"a\":",
    b"]",
    b"}",
    b"-1",
    b"0",
    b"1e999",
    b"null",
    b"true",
    b"18446744073709551615",
    b"9223372036854775808",
    b"4294967296",
    b"65537",
    b"\"\"",
    b"\"F8_E4M3\"",
    b"\"BOOL\"",
    b"\\u0000",
    b"\\ud800",
    b",",
    b":",
    b"../",
    b"(?:(",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\0",
    b"\xff\xda",
    b"\xff\xd9",
    b"\xff\xc4",
    b"\xff\xdb",
    b"\xff\xc2",
    b"IDAT",
];

/// Damages a file in a few places.
pub fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len());
        let len = (1 + random.below(16)).min(bytes.len() - at);
        match random.below(9) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7F, 0x80, 0xFF, b'0', b'9', b'"'][random.below(8)],
            2 => drop(bytes.drain(at..at + len)),
            3 => {
                let part = bytes[at..at + len].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, part);
            }
            4 => drop(bytes.splice(at..at + len, TOKENS[random.below(TOKENS.len())].iter().copied())),
            5 => drop(bytes.splice(at..at, TOKENS[random.below(TOKENS.len())].iter().copied())),
            6 if random.below(4) == 0 => bytes.truncate(at),
            7 => replace_number(random, bytes, at),
            _ if !bytes.is_empty() => bytes[at] = random.next() as u8,
            _ => {}
        }
    }
}

/// Puts another number in the place of the first one from `at` on.
fn replace_number(random: &mut Random, bytes: &mut Vec<u8>, at: usize) {
    let Some(start) = bytes[at..].iter().position(u8::is_ascii_digit).map(|i| i + at) else { return };
    let len = bytes[start..].iter().take_while(|b| b.is_ascii_digit()).count();
    let number = match random.below(4) {
        0 => random.next().to_string(),
        1 => random.below(100).to_string(),
        2 => (1u64 << random.below(64)).to_string(),
        _ => format!("-{}", random.below(1000)),
    };
    bytes.splice(start..start + len, number.into_bytes());
}

/// Makes the checksums of a PNG right again, so that the mutation gets past them.
fn mend_png(bytes: &mut [u8]) {
    let mut at = 8;
    while let Some(head) = bytes.get(at..at + 8) {
        let len = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let end = at + 8 + len;
        if len > bytes.len() || end + 4 > bytes.len() {
            return;
        }
        let crc = !bytes[at + 4..end].iter().fold(!0u32, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 * (crc & 1)))
        });
        bytes[end..end + 4].copy_from_slice(&crc.to_be_bytes());
        at = end + 4;
    }
}

/// Makes the length of a safetensors header right again.
pub fn mend_safetensors(bytes: &mut [u8], change: isize) {
    if let Some(head) = bytes.first_chunk_mut::<8>() {
        *head = u64::from_le_bytes(*head).wrapping_add_signed(change as i64).to_le_bytes();
    }
}

/// Makes the sums of all headers right, so that the fields behind them are reached.
fn mend_tar(bytes: &mut [u8]) {
    for header in bytes.as_chunks_mut::<512>().0.iter_mut().filter(|block| block[257..].starts_with(b"ustar"))
    {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

/// Runs `cases` cases; the same seed gives the same cases.
pub fn fuzz_files(cases: u64, seed: u64) -> Report {
    let seeds = corpus();
    let base = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    let root = base.join(format!("wuerstchen-fuzz-{}-{seed}", std::process::id()));
    let folders: Vec<PathBuf> = (0..seeds.len()).map(|i| root.join(i.to_string())).collect();
    for (seed, folder) in seeds.iter().zip(&folders) {
        std::fs::create_dir_all(folder).unwrap();
        for (name, content) in &seed.files {
            std::fs::write(folder.join(name), content).unwrap();
        }
        (seed.load)(folder).unwrap_or_else(|error| panic!("{}: the original is refused: {error}", seed.name));
    }
    let mut report = Report::default();
    for case in 0..cases {
        let mut random = Random(seed.wrapping_mul(0x2545_F491_4F6C_DD1D) ^ case);
        let kind = random.below(seeds.len());
        let (source, folder) = (&seeds[kind], &folders[kind]);
        let (name, original) = &source.files[random.below(source.files.len())];
        let mut bytes = original.clone();
        mutate(&mut random, &mut bytes);
        match random.below(4) {
            0 => {}
            _ if bytes.starts_with(b"\x89PNG") => mend_png(&mut bytes),
            _ if name.ends_with(".safetensors") => {
                let change = bytes.len() as isize - original.len() as isize;
                mend_safetensors(&mut bytes, change);
            }
            _ if name.ends_with(".tar") => mend_tar(&mut bytes),
            _ => {}
        }
        std::fs::write(folder.join(name), &bytes).unwrap();
        match catch_unwind(AssertUnwindSafe(|| (source.load)(folder))) {
            Ok(Ok(())) => report.accepted += 1,
            Ok(Err(error)) => {
                report.refused += 1;
                let message = error.to_string();
                if message.contains("its parser cannot take") || message.starts_with("internal error") {
                    let kept = folder.with_extension(format!("caught-{case}"));
                    std::fs::write(&kept, &bytes).unwrap();
                    report.caught.push(format!("{}, seed {seed}, case {case}: {message}", source.name));
                }
            }
            Err(payload) => {
                std::mem::forget(payload);
                report.panics.push(format!("{}, seed {seed}, case {case}", source.name));
            }
        }
        std::fs::write(folder.join(name), original).unwrap();
        report.cases += 1;
    }
    if report.panics.is_empty() && report.caught.is_empty() {
        std::fs::remove_dir_all(root).unwrap();
    }
    report
}

//! The real checkpoints' tensors, by name and shape: each network asks for all of them and for nothing else.
//!
//! The lists in `tests/fixtures/shapes*` come from the reference's constructors. The weight files made of them here
//! are sparse: gigabytes by their headers, nothing on the disk.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use wuerstchen::pipeline::load;

/// A part's folder, removed when the test is over.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A part with the tensors of a list, `left_out` excepted, under the file name that its makers give it.
fn part(list: &str, class: &str, left_out: Option<&str>) -> Part {
    let diffusers = list.contains("v2_");
    let file = if diffusers { "diffusion_pytorch_model.safetensors" } else { "model.safetensors" };
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let text = std::fs::read_to_string(fixtures.join(list).with_extension("json")).unwrap();
    let shapes: Value = serde_json::from_str(&text).unwrap();
    let (mut header, mut end) = (Map::new(), 0u64);
    for tensor in shapes["tensors"].as_array().unwrap() {
        let name = tensor[0].as_str().unwrap();
        if left_out == Some(name) {
            continue;
        }
        let elements: u64 = tensor[1].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product();
        let begin = end;
        end += elements * if tensor[2] == "I64" { 8 } else { 4 };
        let entry = json!({ "dtype": tensor[2], "shape": tensor[1], "data_offsets": [begin, end] });
        header.insert(name.to_owned(), entry);
    }
    let case = format!("{}-{}-{}", list.replace('/', "-"), left_out.is_some(), std::process::id());
    let folder = std::env::temp_dir().join(format!("wuerstchen-names-{case}"));
    std::fs::create_dir_all(&folder).unwrap();
    let mut header = Value::Object(header).to_string();
    // Data that starts at a whole number is used where it lies; anything else would be copied.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = std::fs::File::create(folder.join(file)).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
    let mut config = shapes["config"].clone();
    config["_class_name"] = class.into();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    Part(folder)
}

/// Loads the whole list, which fails on a tensor that is missing, misshapen or that no layer asks for; then the
/// list without `left_out`, which must fail and name it.
fn check<T>(list: &str, class: &str, left_out: &str, load: impl Fn(&Path) -> wuerstchen::Result<T>) {
    let whole = part(list, class, None);
    load(&whole.0).unwrap_or_else(|error| panic!("{list}: {error}"));
    let lacking = part(list, class, Some(left_out));
    let error = load(&lacking.0).err().expect("a tensor is missing").to_string();
    assert!(error.contains(left_out), "{list}: {error}");
}

#[test]
fn image_encoders() {
    for list in ["shapes/efficientnet_v2_l", "shapes/efficientnet_v2_s"] {
        check(list, "EfficientNetEncoder", "backbone.4.0.block.2.fc1.weight", load::image_encoder);
    }
}

#[test]
fn stages() {
    check("shapes_full/v1_stage_a", "VQModel", "up_blocks.13.weight", load::stage_a);
    check("shapes_full/v1_stage_b", "Paella", "up_blocks.1.36.1.weight", load::stage_b);
    check("shapes_full/v1_stage_c", "Prior", "blocks.95.attention.attn.in_proj_weight", load::stage_c);
}

#[test]
fn parts_of_v2() {
    let decoder = "up_blocks.1.0.channelwise.0.weight";
    check("shapes_full/v2_prior", "WuerstchenPrior", "blocks.95.attention.to_k.weight", load::prior);
    check("shapes_full/v2_decoder", "WuerstchenDiffNeXt", decoder, load::decoder);
    check("shapes_full/v2_vqgan", "PaellaVQModel", "vquantizer.embedding.weight", load::vq_model);
}

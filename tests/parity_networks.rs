//! Every network against the authors' own code, in f32: first v1's, then v2's.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Case, NETWORK_TOLERANCE, context, fixtures};
use wuerstchen::nn::Mode;
use wuerstchen::nn::{Linear, Params};
use wuerstchen::ops::embedding::embedding;
use wuerstchen::ops::linear::{Activation, Epilogue};
use wuerstchen::ops::resize::{Corners, Filter, resize};
use wuerstchen::pipeline::load;
use wuerstchen::stages::blocks::{
    AttnConfig, Blocks, Conditioning, Invariants, Joined, Joining, RunConfig, attend, timestep_embedding,
};
use wuerstchen::stages::stage_c::StageC;
use wuerstchen::weights::{Renamed, STEMS, Weights, v2};
use wuerstchen::{Context, DType, Tensor};

fn ids_and_lengths(case: &Case) -> (Tensor, Vec<usize>) {
    let mask = case.integers("attention_mask");
    let length = case.shape("ids")[1];
    let lengths = mask.chunks_exact(length).map(|row| row.iter().sum::<i64>() as usize);
    (case.tokens("ids"), lengths.collect())
}

fn check_text_encoder(case: &str, folder: &str) {
    let (cx, case) = (context(), Case::read(case));
    let part = load::text_encoder(&fixtures().join(folder)).unwrap();
    let (ids, lengths) = ids_and_lengths(&case);
    let masked = part.network.forward(&cx, &ids, Some(&lengths)).unwrap();
    case.assert_tensor("last_hidden_state", &masked, NETWORK_TOLERANCE);
    let unmasked = part.network.forward(&cx, &ids, None).unwrap();
    case.assert_tensor("nomask.last_hidden_state", &unmasked, NETWORK_TOLERANCE);
    for layer in 0..=part.network.config().layers {
        let hidden = part.network.hidden(&cx, &ids, Some(&lengths), layer).unwrap();
        case.assert_tensor(&format!("hidden_states.{layer}"), &hidden, NETWORK_TOLERANCE);
    }
}

#[test]
fn text_encoder() {
    check_text_encoder("text_encoder", "model/text_encoder");
}

#[test]
fn text_encoder_with_quick_gelu() {
    check_text_encoder("text_encoder_quick_gelu", "extra/text_encoder_quick_gelu");
}

#[test]
fn text_encoder_with_projection() {
    check_text_encoder("text_encoder_bigg", "extra/text_encoder_bigg");
}

#[test]
fn text_encoder_of_transformers_4() {
    check_text_encoder("text_encoder_legacy", "extra/text_encoder_legacy");
}

#[test]
fn image_encoder() {
    let (cx, case) = (context(), Case::read("image_encoder"));
    let part = load::image_encoder(&fixtures().join("model/image_encoder")).unwrap().encoder;
    let pixels = case.image("x");
    let features = part.network.features(&cx, &pixels, Mode::Inference).unwrap();
    case.assert_image("features", &features, NETWORK_TOLERANCE);
    case.assert_image(
        "out",
        &part.network.forward(&cx, &pixels, Mode::Inference).unwrap(),
        NETWORK_TOLERANCE,
    );
}

fn check_stage_a(case: &str, folder: &str) {
    let (cx, case) = (context(), Case::read(case));
    let network = load::stage_a(&fixtures().join(folder)).unwrap().network;
    let encoded = network.encode(&cx, &case.image("image"), Mode::Inference).unwrap();
    case.assert_image("pre_scale_latents", &encoded, NETWORK_TOLERANCE);
    let tokens = network.quantize(&cx, &encoded).unwrap();
    case.assert_tokens("indices", &tokens);
    for (latents, decoded) in [("quantised", "decoded_quantised"), ("latents", "decoded_latents")] {
        let pixels = network.decode_latents(&cx, &case.image(latents)).unwrap();
        case.assert_image(decoded, &pixels, NETWORK_TOLERANCE);
    }
    let pixels = network.decode_tokens(&cx, &case.tokens("rand_indices")).unwrap();
    case.assert_image("decoded_indices", &pixels, NETWORK_TOLERANCE);
}

#[test]
fn stage_a() {
    check_stage_a("stage_a", "model/stage_a");
}

#[test]
fn stage_a_with_three_levels() {
    check_stage_a("stage_a_levels3", "extra/stage_a_levels3");
}

/// The embedding of times as the networks see it, against the recorded one.
fn check_time_embedding(cx: &Context, case: &Case, prefix: &str, times: &[f32]) {
    let width = case.shape(&format!("{prefix}r_embed"))[1];
    let embedded = timestep_embedding(cx, times, width).unwrap();
    case.assert_tensor(&format!("{prefix}r_embed"), &embedded, 1e-6);
}

fn check_stage_b(case: &str, folder: &str, inputs: usize) {
    let (cx, case) = (context(), Case::read(case));
    let network = load::stage_b(&fixtures().join(folder)).unwrap().network;
    for i in 0..inputs {
        let name = |tensor: &str| format!("{i}.{tensor}");
        let times = case.floats(&name("r"));
        check_time_embedding(&cx, &case, &name(""), times);
        let attended = [
            network.attend_to_latents(&cx, &case.image(&name("effnet"))).unwrap(),
            network.attend_to_text(&cx, &case.tensor(&name("byt5"))).unwrap(),
        ];
        let modulations = network.modulations(&cx, times).unwrap();
        let conditioning = Conditioning { modulations: &modulations, attended: &attended };
        let features = network.features(&cx, &case.tokens(&name("tokens")), conditioning).unwrap();
        let logits = network.logits(&cx, &features).unwrap();
        case.assert_image(&name("logits"), &logits, NETWORK_TOLERANCE);
    }
}

#[test]
fn stage_b() {
    check_stage_b("stage_b_forward", "model/stage_b", 2);
}

#[test]
fn stage_b_with_other_options() {
    check_stage_b("stage_b_alt_forward", "extra/stage_b_alt", 1);
}

fn check_stage_c(case: &str, network: &StageC) {
    let (cx, case) = (context(), Case::read(case));
    for i in 0..2 {
        let name = |tensor: &str| format!("{i}.{tensor}");
        let times = case.floats(&name("r"));
        check_time_embedding(&cx, &case, &name(""), times);
        let attended = [network.attend_to_text(&cx, &case.tensor(&name("c"))).unwrap()];
        let modulations = network.modulations(&cx, times).unwrap();
        let conditioning = Conditioning { modulations: &modulations, attended: &attended };
        let noise = network.forward(&cx, &case.image(&name("x")), conditioning).unwrap();
        case.assert_image(&name("noise"), &noise, NETWORK_TOLERANCE);
    }
}

#[test]
fn stage_c() {
    check_stage_c("stage_c_forward", &load::stage_c(&fixtures().join("model/stage_c")).unwrap().network);
}

/// Half-precision weights: the network over stored halves against the one over the same values widened.
#[test]
fn half_precision_weights_are_used_as_stored() {
    let cx = context();
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/emoji-v1");
    let part = load::stage_c(&model.join("stage_c")).unwrap();
    let weight = part.weights.tensor("blocks.0.channelwise.0.weight").unwrap();
    assert_eq!(weight.dtype(), DType::F16, "the bundled model stores halves");
    let widened = wuerstchen::ops::widen::widen(&cx, &weight).unwrap();
    let x: Vec<f32> = (0..3 * weight.dims()[1]).map(|i| (i as f32 * 0.37).sin()).collect();
    let x = Tensor::from_slice(&[3, weight.dims()[1]], &x).unwrap();
    let then = wuerstchen::ops::linear::Epilogue::default();
    let stored = wuerstchen::ops::linear::linear(&cx, &x, &weight, &then).unwrap();
    let wide = wuerstchen::ops::linear::linear(&cx, &x, &widened, &then).unwrap();
    assert_eq!(stored.slice::<f32>().unwrap(), wide.slice::<f32>().unwrap());
}

#[test]
fn v2_text_encoders() {
    let (cx, case) = (context(), Case::read("v2_text_encoder"));
    let (ids, lengths) = ids_and_lengths(&case);
    for (folder, name) in [("prior_text_encoder", "prior"), ("text_encoder", "decoder")] {
        let part = load::text_encoder(&fixtures().join("v2/model").join(folder)).unwrap();
        let hidden = part.network.forward(&cx, &ids, Some(&lengths)).unwrap();
        case.assert_tensor(&format!("{name}.last_hidden_state"), &hidden, NETWORK_TOLERANCE);
    }
}

#[test]
fn v2_prior() {
    check_stage_c(
        "v2_prior_forward",
        &load::prior(&fixtures().join("v2/model/prior_prior")).unwrap().network,
    );
}

/// The prior block by block: runs of its first 1 to 6 blocks.
#[test]
fn v2_prior_blocks() {
    let (cx, case) = (context(), Case::read("v2_prior_forward"));
    let folder = fixtures().join("v2/model/prior_prior");
    let sizes = *load::prior(&folder).unwrap().network.config();
    let weights = Weights::open(&folder, STEMS).unwrap();
    let source = Renamed::new(&weights, v2::prior);
    let p = Params::new(&source);
    let layer = |name: &str, inputs| Linear::load(&p.sub(name), inputs, sizes.channels).unwrap();
    let (text_in, text_out) = (layer("text.in", sizes.text_width), layer("text.out", sizes.channels));
    let input = Linear::load_conv1x1(&p.sub("input"), sizes.latent_channels, sizes.channels).unwrap();
    let leaky = Epilogue { activation: Activation::LeakyRelu(0.2), ..Epilogue::default() };
    for i in 0..2 {
        let name = |tensor: &str| format!("{i}.{tensor}");
        let text = text_in.forward_then(&cx, &case.tensor(&name("c")), leaky).unwrap();
        let text = text_out.forward(&cx, &text).unwrap();
        for count in 1..=6 {
            let run = RunConfig {
                letters: &"CTACTA"[..count],
                repeats: 1,
                attn: AttnConfig {
                    channels: sizes.channels,
                    condition_width: sizes.channels,
                    heads: sizes.heads,
                    self_attention: true,
                },
                time_width: sizes.time_width,
                kernel: 3,
                joining: Joining::BeforeConvolution,
                skip_channels: 0,
                first: 0,
            };
            let mut invariants = Invariants::default();
            let blocks = Blocks::load(&p.sub("blocks"), &run, &mut invariants).unwrap();
            let times = case.floats(&name("r"));
            let modulations = invariants.modulations(&cx, times, sizes.time_width).unwrap();
            let attended = [attend(&cx, std::iter::once(&blocks), &text).unwrap()];
            let conditioning = Conditioning { modulations: &modulations, attended: &attended };
            let x = input.forward(&cx, &case.image(&name("x"))).unwrap();
            let x = blocks.forward(&cx, x, Joined::default(), conditioning).unwrap();
            case.assert_image(&name(&format!("block.{}", count - 1)), &x, NETWORK_TOLERANCE);
        }
    }
}

#[test]
fn v2_decoder() {
    let (cx, case) = (context(), Case::read("v2_decoder_forward"));
    let network = load::decoder(&fixtures().join("v2/model/decoder")).unwrap().network;
    for i in 0..2 {
        let name = |tensor: &str| format!("{i}.{tensor}");
        let times = case.floats(&name("r"));
        check_time_embedding(&cx, &case, &name(""), times);
        let (x, image) = (case.image(&name("x")), case.image(&name("effnet")));
        for level in 1..3 {
            let resized = name(&format!("effnet_resized.{level}"));
            let [_, _, h, w] = case.shape(&resized).try_into().unwrap();
            let found = resize(&cx, &image, [h, w], Filter::Bicubic, Corners::Centres).unwrap();
            case.assert_image(&resized, &found, NETWORK_TOLERANCE);
        }
        let [_, h, w, _] = x.dims_of("latents").unwrap();
        let injected = network.inject(&cx, &image, (h, w)).unwrap();
        let attended = [network.attend_to_text(&cx, &case.tensor(&name("clip"))).unwrap()];
        let modulations = network.modulations(&cx, times).unwrap();
        let conditioning = Conditioning { modulations: &modulations, attended: &attended };
        let noise = network.forward(&cx, &x, conditioning, &injected).unwrap();
        case.assert_image(&name("noise"), &noise, NETWORK_TOLERANCE);
    }
}

#[test]
fn v2_vq_model() {
    let (cx, case) = (context(), Case::read("v2_vqgan"));
    let network = load::vq_model(&fixtures().join("v2/model/vqgan")).unwrap().network;
    // The reference decodes what the scale factor is in already.
    let decode = |latents: &Tensor| {
        let scale = network.config().scale_factor;
        let unscaled: Vec<f32> = latents.slice::<f32>().unwrap().iter().map(|v| v / scale).collect();
        network.decode_latents(&cx, &Tensor::from_slice(latents.dims(), &unscaled).unwrap()).unwrap()
    };
    let encoded = network.encode(&cx, &case.image("image"), Mode::Inference).unwrap();
    case.assert_image("encoded", &encoded, NETWORK_TOLERANCE);
    case.assert_image("roundtrip", &decode(&encoded), NETWORK_TOLERANCE);
    let latents = case.image("latents");
    case.assert_image("decoded", &decode(&latents), NETWORK_TOLERANCE);
    let tokens = network.quantize(&cx, &latents).unwrap();
    case.assert_tokens("indices", &tokens.reshape(&[tokens.elements()]).unwrap());
    case.assert_image("quantised", &embedding(&cx, &tokens, network.codebook()).unwrap(), NETWORK_TOLERANCE);
    case.assert_image("decoded_quantised", &network.decode_tokens(&cx, &tokens).unwrap(), NETWORK_TOLERANCE);
}

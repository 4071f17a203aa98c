//! The networks on a GPU in half precision, against the reference's f32: activations and factors of products are
//! rounded, sums are not.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Case, devices, fixtures};
use wuerstchen::device::cuda::Precision;
use wuerstchen::nn::Mode;
use wuerstchen::ops::widen::widen;
use wuerstchen::pipeline::load;
use wuerstchen::stages::blocks::Conditioning;
use wuerstchen::{Context, Tensor};

/// The largest relative error of a network's output: some dozens of roundings of 2^-9 and of 2^-12, which random weights
/// do not average out.
const PRECISIONS: [(Precision, f64); 2] = [(Precision::BF16, 4e-2), (Precision::F16, 6e-3)];

/// Runs `check` in each precision, if there is a GPU.
fn in_half(check: impl Fn(&Context, f64)) {
    if !devices::on_gpu() {
        return;
    }
    for (precision, tolerance) in PRECISIONS {
        check(&Context::new(&devices::device(precision)), tolerance);
    }
}

fn wide(cx: &Context, x: &Tensor) -> Tensor {
    widen(cx, x).unwrap()
}

#[test]
fn text_encoder() {
    let case = Case::read("text_encoder");
    let part = load::text_encoder(&fixtures().join("model/text_encoder")).unwrap();
    in_half(|cx, tolerance| {
        let hidden = part.network.forward(cx, &case.tokens("ids"), None).unwrap();
        case.assert_tensor("nomask.last_hidden_state", &wide(cx, &hidden), tolerance);
    });
}

#[test]
fn image_encoder() {
    let case = Case::read("image_encoder");
    let part = load::image_encoder(&fixtures().join("model/image_encoder")).unwrap().encoder;
    in_half(|cx, tolerance| {
        let latents = part.network.forward(cx, &case.image("x"), Mode::Inference).unwrap();
        case.assert_image("out", &wide(cx, &latents), tolerance);
    });
}

#[test]
fn stage_a() {
    let case = Case::read("stage_a");
    let network = load::stage_a(&fixtures().join("model/stage_a")).unwrap().network;
    in_half(|cx, tolerance| {
        let encoded = network.encode(cx, &case.image("image"), Mode::Inference).unwrap();
        case.assert_image("pre_scale_latents", &wide(cx, &encoded), tolerance);
        let pixels = network.decode_tokens(cx, &case.tokens("rand_indices")).unwrap();
        // Pixels are F32 whatever they are computed in.
        case.assert_image("decoded_indices", &pixels, tolerance);
    });
}

#[test]
fn stage_b() {
    let case = Case::read("stage_b_forward");
    let network = load::stage_b(&fixtures().join("model/stage_b")).unwrap().network;
    in_half(|cx, tolerance| {
        let times = case.floats("0.r");
        let attended = [
            network.attend_to_latents(cx, &case.image("0.effnet")).unwrap(),
            network.attend_to_text(cx, &case.tensor("0.byt5")).unwrap(),
        ];
        let modulations = network.modulations(cx, times).unwrap();
        let conditioning = Conditioning { modulations: &modulations, attended: &attended };
        let features = network.features(cx, &case.tokens("0.tokens"), conditioning).unwrap();
        let logits = network.logits(cx, &features).unwrap();
        case.assert_image("0.logits", &wide(cx, &logits), tolerance);
    });
}

#[test]
fn stage_c() {
    for (case, folder) in [("stage_c_forward", "model/stage_c"), ("v2_prior_forward", "v2/model/prior_prior")]
    {
        let case = Case::read(case);
        let network = match folder.starts_with("v2") {
            true => load::prior(&fixtures().join(folder)).unwrap().network,
            false => load::stage_c(&fixtures().join(folder)).unwrap().network,
        };
        in_half(|cx, tolerance| {
            let attended = [network.attend_to_text(cx, &case.tensor("0.c")).unwrap()];
            let modulations = network.modulations(cx, case.floats("0.r")).unwrap();
            let conditioning = Conditioning { modulations: &modulations, attended: &attended };
            let noise = network.forward(cx, &case.image("0.x"), conditioning).unwrap();
            case.assert_image("0.noise", &noise, tolerance);
        });
    }
}

#[test]
fn decoder_of_v2() {
    let case = Case::read("v2_decoder_forward");
    let network = load::decoder(&fixtures().join("v2/model/decoder")).unwrap().network;
    in_half(|cx, tolerance| {
        let (x, image) = (case.image("0.x"), case.image("0.effnet"));
        let [_, h, w, _] = x.dims_of("latents").unwrap();
        let injected = network.inject(cx, &image, (h, w)).unwrap();
        let attended = [network.attend_to_text(cx, &case.tensor("0.clip")).unwrap()];
        let modulations = network.modulations(cx, case.floats("0.r")).unwrap();
        let conditioning = Conditioning { modulations: &modulations, attended: &attended };
        let noise = network.forward(cx, &x, conditioning, &injected).unwrap();
        case.assert_image("0.noise", &noise, tolerance);
    });
}

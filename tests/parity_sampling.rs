//! Schedules, samplers and whole pictures against the authors' own code, with the random numbers it drew.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Case, NETWORK_TOLERANCE, RecordedNoise, channels_last, context, fixtures, relative_error};
use wuerstchen::diffusion::guidance::guide;
use wuerstchen::diffusion::latents::{Kept, LatentSampling, Sampler, ddim_step, ddpm_step, diffuse};
use wuerstchen::diffusion::noise::Draw;
use wuerstchen::diffusion::schedule::{CosineSchedule, DEFAULT_OFFSET, linspace};
use wuerstchen::diffusion::tokens::{Choice, TokenSampling};
use wuerstchen::ops::sampler_step::{Random, renoise};
use wuerstchen::ops::token_choice::{TokenChoice, choose_tokens};
use wuerstchen::pipeline::load;
use wuerstchen::stages::blocks::Conditioning;
use wuerstchen::{Context, GenerateOptions, Model, Result, Tensor};

#[test]
fn schedule() {
    let case = Case::read("diffuzz_schedule");
    let check = |name: &str, schedule: CosineSchedule| {
        for (t, expected) in case.floats("t").iter().zip(case.floats(name)) {
            let found = schedule.alpha_bar(*t);
            assert!((found - expected).abs() <= 1e-6, "{name} at {t}: {found} instead of {expected}");
        }
    };
    check("alpha_cumprod", CosineSchedule::default());
    check("alpha_cumprod_scaler2", CosineSchedule::new(DEFAULT_OFFSET, 2.0));
    check("alpha_cumprod_scaler05", CosineSchedule::new(DEFAULT_OFFSET, 0.5));
}

#[test]
fn single_sampler_steps() {
    let case = Case::read("diffuzz_schedule");
    let schedule = CosineSchedule::default();
    let (x, noise, fresh) = (case.floats("x"), case.floats("noise"), case.floats("noise2"));
    for (k, times) in case.settings["steps"].as_array().unwrap().iter().enumerate() {
        let [t, next] = [0, 1].map(|i| schedule.alpha_bar(times[i].as_f64().unwrap() as f32));
        let last = times[1].as_f64() == Some(0.0);
        let mut ddpm = x.to_vec();
        ddpm_step(&mut ddpm, noise, (!last).then_some(fresh), t, next);
        assert!(relative_error(&ddpm, case.floats(&format!("ddpm.step.{k}"))) < 2e-6, "DDPM {k}");
        let mut ddim = x.to_vec();
        ddim_step(&mut ddim, noise, t, next);
        assert!(relative_error(&ddim, case.floats(&format!("ddim.step.{k}"))) < 2e-6, "DDIM {k}");
    }
    let mut diffused = x.to_vec();
    let samples = diffused.chunks_exact_mut(x.len() / 4).zip(noise.chunks_exact(x.len() / 4));
    for ((sample, noise), t) in samples.zip(&case.floats("t")[20..24]) {
        diffuse(sample, noise, schedule.alpha_bar(*t));
    }
    assert!(relative_error(&diffused, case.floats("diffused")) < 1e-6);
}

/// A whole walk of Stage C with what the reference drew, compared after every step.
fn check_latent_walk(name: &str) {
    let (cx, case) = (context(), Case::read(name));
    let number = |key: &str, default: f64| case.settings[key].as_f64().unwrap_or(default) as f32;
    let steps = case.settings["timesteps"].as_u64().unwrap() as usize;
    let network = load::stage_c(&fixtures().join("model/stage_c")).unwrap().network;
    let times = linspace(number("t_start", 1.0), number("t_end", 0.0), steps);
    assert_eq!(times, case.floats("t_list"));
    let guidance = case.settings["cfg"].as_f64().map(|w| w as f32);

    let text = network.attend_to_text(&cx, &case.tensor("c")).unwrap();
    // Where no unconditional text is recorded, the reference took zeros.
    let zeros = || Tensor::zeros(&cx, "text", case.shape("c"), wuerstchen::DType::F32).unwrap();
    let unconditional = || if case.has("uncond_c") { case.tensor("uncond_c") } else { zeros() };
    let negative = guidance.map(|_| network.attend_to_text(&cx, &unconditional()).unwrap());
    let modulations = network.modulations(&cx, &times).unwrap();
    let predict = |x: &Tensor, step: usize| -> Result<Tensor> {
        let modulations = modulations.at(step)?;
        let forward = |attended| {
            let attended = std::slice::from_ref(attended);
            network.forward(&cx, x, Conditioning { modulations: &modulations, attended })
        };
        let mut predicted = forward(&text)?;
        if let (Some(weight), Some(negative)) = (guidance, &negative) {
            guide(predicted.slice_mut()?, forward(negative)?.slice()?, weight);
        }
        case.assert_image(&format!("pred.{step}"), &predicted, NETWORK_TOLERANCE);
        Ok(predicted)
    };
    let kept = case.has("mask").then(|| Kept { latents: case.image("x_init"), mask: case.image("mask") });
    let start = if case.has("init_noise") { "init_noise" } else { "x_init" };
    let sampler = if case.settings["sampler"] == "ddim" { Sampler::Ddim } else { Sampler::Ddpm };
    let names = [(Draw::LatentStep, "step_noise.{}"), (Draw::LatentKept, "mask_noise.{}")];
    let mut noise = RecordedNoise { case: &case, names: &names };
    let fresh = Draw::LatentStep;
    let sampling = LatentSampling { schedule: CosineSchedule::default(), times, sampler, fresh, kept };
    let after_step = |step: wuerstchen::diffusion::latents::LatentStep| {
        case.assert_image(&format!("x.{}", step.done), step.x, NETWORK_TOLERANCE);
        Ok(())
    };
    sampling.run(&cx, case.image(start), &mut noise, predict, after_step).unwrap();
}

#[test]
fn stage_c_ddpm() {
    check_latent_walk("stage_c_sample_ddpm");
}

#[test]
fn stage_c_ddim() {
    check_latent_walk("stage_c_sample_ddim");
}

#[test]
fn stage_c_without_guidance() {
    check_latent_walk("stage_c_sample_nocfg");
}

#[test]
fn stage_c_from_a_picture() {
    check_latent_walk("stage_c_sample_img2img");
}

#[test]
fn stage_c_around_a_kept_region() {
    check_latent_walk("stage_c_sample_inpaint");
}

/// The settings of a recorded walk of Stage B.
fn token_sampling(case: &Case) -> TokenSampling {
    let settings = &case.settings;
    let pair = |key: &str| [0, 1].map(|i| settings[key][i].as_f64().unwrap() as f32).into();
    let number = |key: &str, default: f64| settings[key].as_f64().unwrap_or(default) as f32;
    let count = |key: &str, default: usize| settings[key].as_u64().map_or(default, |n| n as usize);
    let steps = count("steps", 0);
    let choice = match settings["mode"].as_str() {
        Some("argmax") => Choice::Argmax,
        Some("quant") => Choice::Quant,
        _ => Choice::Multinomial,
    };
    TokenSampling {
        steps,
        times: (number("t_start", 1.0), number("t_end", 0.0)),
        guidance: pair("cfg"),
        temperature: pair("temperature"),
        choice,
        renoise_steps: count("renoise_steps", steps - 1),
        quant_from: count("sampling_quant_steps", usize::MAX),
    }
}

/// Logits' two feature tensors for the recorded conditioning: conditional and unconditional, `[R, C]`.
fn features(cx: &Context, case: &Case, tokens: &Tensor, step: usize, times: &[f32]) -> Result<[Tensor; 2]> {
    let network = load::stage_b(&fixtures().join("model/stage_b"))?.network;
    let modulations = network.modulations(cx, times)?.at(step)?;
    let forward = |latents: &str, text: &str| -> Result<Tensor> {
        let attended = [
            network.attend_to_latents(cx, &case.image(latents))?,
            network.attend_to_text(cx, &case.tensor(text))?,
        ];
        let conditioning = Conditioning { modulations: &modulations, attended: &attended };
        let features = network.features(cx, tokens, conditioning)?;
        features.reshape(&[features.shape().rows(), features.shape().channels()])
    };
    Ok([forward("effnet", "byt5")?, forward("uncond_effnet", "uncond_byt5")?])
}

fn check_token_walk(name: &str) {
    let (cx, case) = (context(), Case::read(name));
    let network = load::stage_b(&fixtures().join("model/stage_b")).unwrap().network;
    let stage_a = load::stage_a(&fixtures().join("model/stage_a")).unwrap().network;
    let sampling = token_sampling(&case);
    let times = sampling.times();
    assert_eq!(times, case.floats("t_list"));
    let choose = |tokens: &Tensor, step: wuerstchen::diffusion::tokens::TokenStep, _: Option<&Tensor>| {
        case.assert_tokens(&format!("step.{}.input_tokens", step.step), tokens);
        assert!((step.guidance - case.floats("cfgs")[step.step]).abs() < 1e-6);
        assert!((step.temperature - case.floats("temperatures")[step.step]).abs() < 1e-6);
        let [conditional, unconditional] = features(&cx, &case, tokens, step.step, &times)?;
        let choice = match step.choice {
            Choice::Quant => TokenChoice::Quant { codebook: stage_a.codebook() },
            _ => TokenChoice::Argmax,
        };
        let chosen = choose_tokens(
            &cx,
            &conditional,
            Some(&unconditional),
            network.logits_weight(),
            step.guidance,
            step.temperature,
            choice,
        )?;
        chosen.reshape(tokens.dims())
    };
    let after_step = |done: usize, tokens: &Tensor| {
        case.assert_tokens(&format!("step.{}.tokens", done - 1), tokens);
        Ok(())
    };
    let start = case.tokens("init_noise");
    let first = if case.has("init_x") { case.tokens("init_x") } else { start.clone() };
    let names = [(Draw::TokenRenoise, "renoise_u.{}")];
    let mut noise = RecordedNoise { case: &case, names: &names };
    let tokens = sampling.run(&cx, &start, first, &mut noise, choose, after_step).unwrap();
    case.assert_tokens("final", &tokens);
}

#[test]
fn stage_b_argmax() {
    check_token_walk("stage_b_sample_argmax");
}

#[test]
fn stage_b_quant() {
    check_token_walk("stage_b_sample_quant");
}

#[test]
fn stage_b_with_every_option() {
    check_token_walk("stage_b_sample_opts");
}

/// Draws for one recorded step many times and holds the counts to the recorded distribution.
#[test]
fn stage_b_multinomial_follows_its_distribution() {
    const DRAWS: usize = 2000;
    let (cx, case) = (context(), Case::read("stage_b_sample_multinomial"));
    let network = load::stage_b(&fixtures().join("model/stage_b")).unwrap().network;
    let sampling = token_sampling(&case);
    let shape = case.shape("step.0.probs").to_vec();
    for step in 0..sampling.steps {
        let tokens = case.tokens(&format!("step.{step}.input_tokens"));
        let [conditional, unconditional] = features(&cx, &case, &tokens, step, &sampling.times()).unwrap();
        let (_, probabilities) = channels_last(&shape, case.floats(&format!("step.{step}.probs")));
        let labels = shape[1];
        let sites = probabilities.len() / labels;
        let mut counts = vec![0u32; probabilities.len()];
        let generator = wuerstchen::tensor::rng::Philox::new(7, step as u64);
        for draw in 0..DRAWS {
            let uniforms: Vec<f32> =
                (0..sites).map(|i| generator.uniform((draw * sites + i) as u64)).collect();
            let uniforms = Tensor::from_slice(&[sites], &uniforms).unwrap();
            let chosen = choose_tokens(
                &cx,
                &conditional,
                Some(&unconditional),
                network.logits_weight(),
                case.floats("cfgs")[step],
                case.floats("temperatures")[step],
                TokenChoice::Multinomial { uniforms: &uniforms },
            )
            .unwrap();
            for (site, token) in chosen.slice::<i64>().unwrap().iter().enumerate() {
                counts[site * labels + *token as usize] += 1;
            }
        }
        assert_chi_square(&counts, &probabilities, labels, DRAWS);
    }
}

/// Pearson's statistic summed over all sites, classes of less than five expected draws pooled, within five
/// standard deviations of its mean.
fn assert_chi_square(counts: &[u32], probabilities: &[f32], labels: usize, draws: usize) {
    let (mut statistic, mut freedom) = (0.0, 0.0);
    for (counts, probabilities) in counts.chunks(labels).zip(probabilities.chunks(labels)) {
        let (mut rare, mut rare_expected, mut classes) = (0.0, 0.0, 0.0);
        for (count, p) in counts.iter().zip(probabilities) {
            let expected = f64::from(*p) * draws as f64;
            if expected < 5.0 {
                rare += f64::from(*count);
                rare_expected += expected;
            } else {
                statistic += (f64::from(*count) - expected).powi(2) / expected;
                classes += 1.0;
            }
        }
        if rare_expected >= 5.0 {
            statistic += (rare - rare_expected).powi(2) / rare_expected;
            classes += 1.0;
        }
        freedom += f64::max(classes - 1.0, 0.0);
    }
    let deviations = (statistic - freedom) / (2.0 * freedom).sqrt();
    assert!(freedom > 50.0, "the distribution is too sharp to test");
    assert!(deviations.abs() < 5.0, "chi-square {statistic:.0} at {freedom} degrees of freedom");
}

#[test]
fn renoising_puts_tokens_back() {
    let (cx, case) = (context(), Case::read("stage_b_sample_argmax"));
    let times = case.floats("t_list");
    for step in 0..4 {
        let uniforms = Random::Given(case.tensor(&format!("renoise_u.{step}")));
        let tokens = case.tokens(&format!("step.{step}.tokens"));
        let noised = renoise(&cx, &tokens, &case.tokens("init_noise"), &uniforms, times[step + 1]).unwrap();
        case.assert_tokens(&format!("step.{step}.renoised"), &noised);
    }
}

/// Text to picture through the opened model, with the reference's random numbers.
fn check_pipeline(name: &str, folder: &std::path::Path) {
    let (cx, case) = (context(), Case::read(name));
    let settings = &case.settings;
    let model = Model::open(folder, &common::options()).unwrap();
    let prompts: Vec<&str> =
        settings["prompts"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
    let negative = settings["negative_prompt"].as_str().unwrap();
    let number = |key: &str| settings[key].as_u64().unwrap() as u32;
    let mut options = GenerateOptions::new(&model).unwrap();
    options.set_size(number("image_width"), number("image_height")).unwrap();
    options.set_stage_c(number("c_steps"), settings["c_cfg"].as_f64().unwrap() as f32).unwrap();

    use wuerstchen::Stage;
    for (i, prompt) in prompts.iter().enumerate() {
        let length = case.shape("ids")[1];
        let ids = model.tokenize(Stage::C, prompt).unwrap();
        assert_eq!(ids.slice::<i64>().unwrap(), &case.integers("ids")[i * length..(i + 1) * length]);
    }
    let text = model.encode_text(Stage::C, &prompts).unwrap();
    case.assert_tensor("text", &text, NETWORK_TOLERANCE);
    let uncond = model.encode_text(Stage::C, &vec![negative; prompts.len()]).unwrap();
    case.assert_tensor("uncond_text", &uncond, NETWORK_TOLERANCE);

    let names =
        [(Draw::LatentStep, "c_noise.{}"), (Draw::TokenStart, "b_init"), (Draw::TokenRenoise, "b_u.{}")];
    let mut noise = RecordedNoise { case: &case, names: &names };
    let start = case.image("c_init");
    let latents =
        model.stage_c_sample_with(&text, Some(&uncond), Some(&start), &options, &mut noise).unwrap();
    case.assert_image(&format!("c.x.{}", number("c_steps")), &latents, NETWORK_TOLERANCE);

    // The guidance of the recorded walks changes over the steps, which the options do not offer: the walk is
    // put together from the same parts.
    let tokens = walk_tokens(&cx, &case, &mut noise, [&latents, &text, &uncond]);
    case.assert_tokens("tokens", &tokens);
    let pixels = model.stage_a_decode(&tokens).unwrap();
    case.assert_image("image", &pixels, NETWORK_TOLERANCE);
    for (i, expected) in case
        .integers("image_u8")
        .chunks(number("image_width") as usize * number("image_height") as usize * 3)
        .enumerate()
    {
        let image = wuerstchen::image::from_pixels(&pixels.narrow(i, 1).unwrap()).unwrap();
        let worst = image.data().iter().zip(expected).map(|(f, e)| (i64::from(*f) - e).abs()).max();
        assert!(worst <= Some(1), "{name}: picture {i} is off by {worst:?}");
    }
}

fn walk_tokens(cx: &Context, case: &Case, noise: &mut RecordedNoise, inputs: [&Tensor; 3]) -> Tensor {
    let [latents, text, uncond] = inputs;
    let network = load::stage_b(&fixtures().join("model/stage_b")).unwrap().network;
    let pair: (f32, f32) = [0, 1].map(|i| case.settings["b_cfg"][i].as_f64().unwrap() as f32).into();
    let steps = case.settings["b_steps"].as_u64().unwrap() as usize;
    let sampling = TokenSampling { guidance: pair, ..TokenSampling::new(steps, 0.0, Choice::Argmax) };
    let modulations = network.modulations(cx, &sampling.times()).unwrap();
    let zeros = Tensor::zeros(cx, "latents", latents.dims(), wuerstchen::DType::F32).unwrap();
    let condition = |latents: &Tensor, text: &Tensor| {
        [network.attend_to_latents(cx, latents).unwrap(), network.attend_to_text(cx, text).unwrap()]
    };
    let (with, without) = (condition(latents, text), condition(&zeros, uncond));
    let start = case.tokens("b_init");
    let choose = |tokens: &Tensor, step: wuerstchen::diffusion::tokens::TokenStep, _: Option<&Tensor>| {
        let modulations = modulations.at(step.step)?;
        let features = |attended| -> Result<Tensor> {
            let f = network.features(cx, tokens, Conditioning { modulations: &modulations, attended })?;
            f.reshape(&[f.shape().rows(), f.shape().channels()])
        };
        let (c, u) = (features(&with)?, features(&without)?);
        let weight = network.logits_weight();
        choose_tokens(cx, &c, Some(&u), weight, step.guidance, step.temperature, TokenChoice::Argmax)?
            .reshape(tokens.dims())
    };
    sampling.run(cx, &start, start.clone(), noise, choose, |_, _| Ok(())).unwrap()
}

#[test]
fn pipeline() {
    check_pipeline("pipeline", &fixtures().join("model"));
}

#[test]
fn pipeline_of_two_prompts() {
    check_pipeline("pipeline_batch", &fixtures().join("model"));
}

/// The folder that says the padding is not masked, made from the one that does not.
#[test]
fn pipeline_without_a_padding_mask() {
    let folder = std::env::temp_dir().join(format!("wuerstchen-nomask-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for part in ["tokenizer", "text_encoder", "image_encoder", "stage_a", "stage_b", "stage_c"] {
        let link = folder.join(part);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(fixtures().join("model").join(part), link).unwrap();
    }
    let index = std::fs::read_to_string(fixtures().join("model/model_index.json")).unwrap();
    let index = index.replace('{', "{\"text_attention_mask\": false,");
    std::fs::write(folder.join("model_index.json"), index).unwrap();
    check_pipeline("pipeline_nomask", &folder);
    std::fs::remove_dir_all(&folder).unwrap();
}

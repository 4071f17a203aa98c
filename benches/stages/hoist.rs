//! What computing once per picture gains in v2's decoder.

use std::path::Path;

use serde_json::{Value, json};
use wuerstchen::Tensor;
use wuerstchen::device::{Context, Device};
use wuerstchen::ops::linear::{Epilogue, Term, WeightLayout, linear_sum};
use wuerstchen::pipeline::{Stage, load};
use wuerstchen::stages::blocks::Conditioning;
use wuerstchen::stages::diffnext::DiffNeXt;

use super::{Arguments, Bench, Outcome, Random, in_turn, keep, median};

/// v2: a step of the decoder, and the parts that it would repeat if they were not computed once.
pub fn hoist(path: &Path, arguments: &Arguments) -> Outcome<Value> {
    let bench = Bench::open(path, arguments)?;
    if bench.is_v1() {
        return Err("hoist: a v2 model is needed".into());
    }
    let device = match arguments.threads {
        0 => Device::cpu(std::thread::available_parallelism()?.get())?,
        threads => Device::cpu(threads as usize)?,
    };
    let cx = Context::new(&device);
    let part = load::decoder(&path.join("decoder"))?;
    let network = &part.network;
    let mut random = Random(4);
    let layers = JoinedLayers::new(&part, bench.grid(), &mut random)?;
    let text = bench.text(&mut random, Stage::B, 1)?;
    let image = bench.image_embedding(&mut random)?;
    let x = bench.grid_latents(&mut random)?;

    let once = (network.modulations(&cx, &[0.5])?, network.attend_to_text(&cx, &text)?);
    let injected = network.inject(&cx, &image, bench.grid())?;
    let seconds = in_turn(
        arguments.repeats,
        &[
            &|| {
                let conditioning =
                    Conditioning { modulations: &once.0, attended: std::slice::from_ref(&once.1) };
                keep(network.forward(&cx, &x, conditioning, &injected)?)
            },
            &|| {
                let modulations = network.modulations(&cx, &[0.5])?;
                let attended = [network.attend_to_text(&cx, &text)?];
                let injected = network.inject(&cx, &image, bench.grid())?;
                let conditioning = Conditioning { modulations: &modulations, attended: &attended };
                keep(network.forward(&cx, &x, conditioning, &injected)?)
            },
            &|| keep(network.modulations(&cx, &[0.5])?),
            &|| keep(network.attend_to_text(&cx, &text)?),
            &|| keep(network.inject(&cx, &image, bench.grid())?),
            &|| layers.run(&cx, true),
            &|| layers.run(&cx, false),
        ],
    )?;
    let more = json!({
        "whole_s": median(&seconds[1][1..]),
        "modulations_s": median(&seconds[2][1..]),
        "text_s": median(&seconds[3][1..]),
        "injection_s": median(&seconds[4][1..]),
        "layers_folded_s": median(&seconds[5][1..]),
        "layers_unfolded_s": median(&seconds[6][1..]),
    });
    Ok(bench.report("hoist", &seconds[0], more))
}

/// The first layers of the decoder's blocks that the image embedding joins.
struct JoinedLayers {
    layers: Vec<JoinedLayer>,
}

/// One of them with random inputs: its own, and the embedding as it is kept and as diffusers maps it in every step.
struct JoinedLayer {
    weight: Tensor,
    own: Tensor,
    image: Tensor,
    folded: Tensor,
    mapped: Tensor,
}

impl JoinedLayers {
    fn new(part: &load::Part<DiffNeXt>, grid: (usize, usize), random: &mut Random) -> Outcome<Self> {
        let config = part.network.config();
        let mut layers = Vec::new();
        for name in part.weights.names() {
            let parts: Vec<&str> = name.split('.').collect();
            let [way @ ("down_blocks" | "up_blocks"), level, _, "channelwise", "0", "weight"] = parts[..]
            else {
                continue;
            };
            let level: usize = level.parse()?;
            let level = if way == "down_blocks" { level } else { config.levels.len() - 1 - level };
            if !config.injects[level] {
                continue;
            }
            let weight = part.weights.tensor(&name)?;
            let [hidden, inputs] = weight.dims_of("a first layer")?;
            let side = |side: usize| (side / config.patch_size) >> level;
            let mut map = |channels: usize| random.normal(&[1, side(grid.0), side(grid.1), channels]);
            layers.push(JoinedLayer {
                own: map(inputs - config.condition_width)?,
                image: map(config.image_channels)?,
                mapped: map(config.condition_width)?,
                folded: random.normal(&[config.image_channels, hidden])?,
                weight,
            });
        }
        Ok(JoinedLayers { layers })
    }

    fn run(&self, cx: &Context, folded: bool) -> Outcome<()> {
        for layer in &self.layers {
            let layout = WeightLayout::RowsAreOutputs;
            let own = Term { x: &layer.own, weight: &layer.weight, layout, first_input: 0 };
            let image = match folded {
                true => {
                    let layout = WeightLayout::RowsAreInputs;
                    Term { x: &layer.image, weight: &layer.folded, layout, first_input: 0 }
                }
                false => Term { x: &layer.mapped, first_input: layer.own.shape().channels(), ..own },
            };
            keep(linear_sum(cx, &[own, image], &Epilogue::default())?)?;
        }
        Ok(())
    }
}

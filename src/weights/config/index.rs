//! `model_index.json`: which generation of the family a folder holds, and its recommended settings.

use std::path::Path;

use super::fields::Fields;
use crate::error::{Error, Result};

/// The version of native folders that this library reads.
const FORMAT_VERSION: usize = 1;

/// The largest picture side in pixels.
const SIDE_MAX_PX: usize = 4096;

/// The most denoising steps.
const STEPS_MAX: usize = 10_000;

/// The strongest guidance.
const GUIDANCE_MAX: f64 = 1000.0;

/// The longest prompt in tokens.
const TEXT_LENGTH_MAX: usize = 65_536;

/// The most pixels or latents that one latent stands for, per side.
const SCALE_MAX: f64 = 1024.0;

/// The side of the pictures that the generations were trained on, where the file does not say.
const V1_SIDE_PX: usize = 512;
const LATER_SIDE_PX: usize = 1024;

/// What a folder holds, by its `_class_name`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pipeline {
    /// The paper's three stages in this library's own layout.
    V1,
    /// v2, both halves, as diffusers saves them.
    V2Combined,
    /// v2, text to latents.
    V2Prior,
    /// v2, latents to pixels.
    V2Decoder,
    /// Stable Cascade, both halves.
    V3Combined,
    /// Stable Cascade, text to latents.
    V3Prior,
    /// Stable Cascade, latents to pixels.
    V3Decoder,
}

impl Pipeline {
    const NAMES: &'static [(&'static str, Pipeline)] = &[
        ("WuerstchenV1Pipeline", Pipeline::V1),
        ("WuerstchenCombinedPipeline", Pipeline::V2Combined),
        ("WuerstchenPriorPipeline", Pipeline::V2Prior),
        ("WuerstchenDecoderPipeline", Pipeline::V2Decoder),
        ("StableCascadeCombinedPipeline", Pipeline::V3Combined),
        ("StableCascadePriorPipeline", Pipeline::V3Prior),
        ("StableCascadeDecoderPipeline", Pipeline::V3Decoder),
    ];

    /// All that a folder may hold.
    pub fn all() -> impl Iterator<Item = Pipeline> {
        Self::NAMES.iter().map(|(_, pipeline)| *pipeline)
    }

    /// The name in the file.
    pub fn class_name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, pipeline)| *pipeline == self).map_or("", |(name, _)| name)
    }

    /// Whether the folder holds the half from text to latents.
    pub fn has_prior(self) -> bool {
        !matches!(self, Pipeline::V2Decoder | Pipeline::V3Decoder)
    }

    /// Whether the folder holds the half from latents to pixels.
    pub fn has_decoder(self) -> bool {
        !matches!(self, Pipeline::V2Prior | Pipeline::V3Prior)
    }

    /// The generation of the family: 1, 2 or 3.
    pub fn generation(self) -> u32 {
        match self {
            Pipeline::V1 => 1,
            Pipeline::V2Combined | Pipeline::V2Prior | Pipeline::V2Decoder => 2,
            Pipeline::V3Combined | Pipeline::V3Prior | Pipeline::V3Decoder => 3,
        }
    }
}

/// The settings that a model's makers recommend. Absent ones are up to the pipeline.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Denoising steps of Stage C.
    pub stage_c_steps: Option<u32>,
    /// Guidance of Stage C.
    pub stage_c_guidance: Option<f32>,
    /// `"ddpm"` or `"ddim"`.
    pub stage_c_sampler: Option<String>,
    /// Sampling steps of Stage B.
    pub stage_b_steps: Option<u32>,
    /// Guidance of Stage B.
    pub stage_b_guidance: Option<f32>,
    /// Temperature of Stage B in its first and last step.
    pub stage_b_temperature: Option<(f32, f32)>,
    /// `"multinomial"`, `"argmax"` or `"quant"`.
    pub stage_b_choice: Option<String>,
}

/// How v2's pipelines go from pixels to latents and between the two kinds of latents. The defaults are the
/// published models'; other generations have them too, unused.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct V2Settings {
    /// The decoder's image embedding is Stage C's latents times this …
    pub latent_mean: f32,
    /// … less this.
    pub latent_std: f32,
    /// Pixels per latent of Stage C and side, rounded up.
    pub resolution_multiple: f64,
    /// Latents of Stage A per latent of Stage C and side, rounded down.
    pub latent_dim_scale: f64,
}

impl Default for V2Settings {
    fn default() -> Self {
        V2Settings { latent_mean: 42.0, latent_std: 1.0, resolution_multiple: 42.67, latent_dim_scale: 10.67 }
    }
}

impl V2Settings {
    fn from_fields(fields: &Fields) -> Result<Self> {
        let default = V2Settings::default();
        let number =
            |name, default: f32, range| Ok::<_, Error>(fields.number(name, default.into(), range)? as f32);
        let scale = |name, default| fields.number(name, default, 1.0..=SCALE_MAX);
        Ok(V2Settings {
            latent_mean: number("latent_mean", default.latent_mean, 1e-6..=1e6)?,
            latent_std: number("latent_std", default.latent_std, -1e6..=1e6)?,
            resolution_multiple: scale("resolution_multiple", default.resolution_multiple)?,
            latent_dim_scale: scale("latent_dim_scale", default.latent_dim_scale)?,
        })
    }
}

/// The content of `model_index.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelIndex {
    /// What the folder holds.
    pub pipeline: Pipeline,
    /// The side of the pictures that the model was trained on, in pixels.
    pub image_size: usize,
    /// The side to which the image encoder's pictures are resized, in pixels.
    pub image_encoder_size: usize,
    /// The length of a prompt in tokens. Absent: the text encoder's `max_position_embeddings`.
    pub text_length: Option<usize>,
    /// Whether the text encoder masks padding.
    pub text_attention_mask: bool,
    /// Recommended settings.
    pub defaults: GenerationDefaults,
    /// What only v2 has.
    pub v2: V2Settings,
}

impl ModelIndex {
    /// The name of the file.
    pub const FILE: &'static str = "model_index.json";

    /// Reads `folder/model_index.json`.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field; `Unsupported` for a later version of the layout.
    pub fn read(folder: &Path) -> Result<Self> {
        let fields = Fields::read(&folder.join(Self::FILE))?;
        let class = fields.text("_class_name")?;
        let known = Pipeline::NAMES.iter().find(|(name, _)| Some(*name) == class);
        let Some(&(_, pipeline)) = known else {
            let names: Vec<&str> = Pipeline::NAMES.iter().map(|(name, _)| *name).collect();
            return Err(fields.error("_class_name", format!("one of {}", names.join(", "))));
        };
        let version = fields.count("format_version", Some(FORMAT_VERSION), 1..=usize::MAX)?;
        if version != FORMAT_VERSION {
            let what = format!("{}: format_version {version}", folder.join(Self::FILE).display());
            return Err(Error::unsupported(what, format!("this library reads version {FORMAT_VERSION}")));
        }
        let side = if pipeline == Pipeline::V1 { V1_SIDE_PX } else { LATER_SIDE_PX };
        Ok(ModelIndex {
            pipeline,
            image_size: fields.count("image_size", Some(side), 1..=SIDE_MAX_PX)?,
            image_encoder_size: fields.count("image_encoder_size", Some(384), 1..=SIDE_MAX_PX)?,
            // Two tokens are the marks at the beginning and the end.
            text_length: fields.optional_count("text_length", 2..=TEXT_LENGTH_MAX)?,
            text_attention_mask: fields.flag("text_attention_mask", true)?,
            defaults: match fields.object("defaults")? {
                Some(fields) => GenerationDefaults::from_fields(&fields)?,
                None => GenerationDefaults::default(),
            },
            v2: match pipeline.generation() {
                2 => V2Settings::from_fields(&fields)?,
                _ => V2Settings::default(),
            },
        })
    }
}

impl GenerationDefaults {
    fn from_fields(fields: &Fields) -> Result<Self> {
        let steps = |name| Ok(fields.optional_count(name, 1..=STEPS_MAX)?.map(|n| n as u32));
        let guidance =
            |name| Ok(fields.optional_number(name, -GUIDANCE_MAX..=GUIDANCE_MAX)?.map(|n| n as f32));
        Ok(GenerationDefaults {
            stage_c_steps: steps("stage_c_steps")?,
            stage_c_guidance: guidance("stage_c_guidance")?,
            stage_c_sampler: one_of(fields, "stage_c_sampler", &["ddpm", "ddim"])?,
            stage_b_steps: steps("stage_b_steps")?,
            stage_b_guidance: guidance("stage_b_guidance")?,
            stage_b_temperature: fields
                .numbers::<2>("stage_b_temperature", 1e-6..=1e6)?
                .map(|[start, end]| (start as f32, end as f32)),
            stage_b_choice: one_of(fields, "stage_b_choice", &["multinomial", "argmax", "quant"])?,
        })
    }
}

fn one_of(fields: &Fields, name: &str, names: &[&str]) -> Result<Option<String>> {
    match fields.text(name)? {
        Some(text) if !names.contains(&text) => {
            Err(fields.error(name, format!("one of {}", names.join(", "))))
        }
        text => Ok(text.map(str::to_owned)),
    }
}

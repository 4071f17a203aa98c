//! The two halves of a model: text to latents (Stage C), and latents to pixels (Stage B and Stage A). A v1 folder
//! holds both with one text tower; v2 has a tower per half, in one folder or two.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::load::{self, ImagePart, Part, TextPart};
use super::options::ModelOptions;
use crate::device::Context;
use crate::diffusion::schedule::CosineSchedule;
use crate::error::{Error, Result};
use crate::nn::Params;
use crate::stages::diffnext::DiffNeXt;
use crate::stages::stage_a::StageA;
use crate::stages::stage_b::StageB;
use crate::stages::stage_c::StageC;
use crate::tensor::{DType, Tensor};
use crate::weights::Weights;
use crate::weights::config::{CONFIG_FILE, GenerationDefaults, ModelIndex, Pipeline};
use crate::weights::lora::{Adapted, Adapter, ScaledAdapter};

/// Text to latents.
pub(super) struct Prior {
    pub text: Arc<TextPart>,
    pub stage_c: Part<StageC>,
    pub schedule: CosineSchedule,
    pub scaling: LatentScaling,
    /// What Stage C's network has beside its weights.
    pub adapters: Vec<ScaledAdapter>,
}

impl Prior {
    /// Loads Stage C anew, with the adapters in these files.
    ///
    /// # Errors
    /// Those of [`Adapter::open`]; `Format`, naming the file and the tensor, for adapters of another model.
    fn adapt(&mut self, files: &[(PathBuf, f32)]) -> Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let open = |(path, scale): &(PathBuf, f32)| {
            Ok(ScaledAdapter { adapter: Adapter::open(path)?, scale: *scale })
        };
        let adapters = files.iter().map(open).collect::<Result<Vec<_>>>()?;
        let Part { network, weights, keys } = &mut self.stage_c;
        let base = keys.source(weights);
        let source = Adapted::new(&base, &adapters);
        *network = StageC::load(&Params::new(&source), *network.config())?;
        source.expect_all_used()?;
        drop(source);
        drop(base);
        self.adapters = adapters;
        Ok(())
    }

    /// The files that Stage C computes with.
    pub fn stage_c_weights(&self) -> impl Iterator<Item = &Weights> {
        let adapters = self.adapters.iter().map(|scaled| scaled.adapter.weights());
        std::iter::once(&self.stage_c.weights).chain(adapters)
    }
}

/// Latents to pixels.
pub(super) struct Decoder {
    pub text: Arc<TextPart>,
    pub stage_b: StageBPart,
    pub stage_a: Part<StageA>,
}

impl Decoder {
    /// Stage A's pixels of tokens (`I64 [N, h, w]`) or of latents (`F32 [N, h, w, 4]`), not clamped.
    ///
    /// # Errors
    /// `InvalidArgument` for other shapes or tokens that are not in the codebook; `OutOfMemory`; `Cancelled`.
    pub fn pixels(&self, cx: &Context, tokens_or_latents: &Tensor) -> Result<Tensor> {
        let _span = cx.span("stage_a");
        match tokens_or_latents.dtype() {
            DType::I64 => self.stage_a.network.decode_tokens(cx, tokens_or_latents),
            _ => self.stage_a.network.decode_latents(cx, tokens_or_latents),
        }
    }
}

impl TextPart {
    fn width(&self) -> Field<'_> {
        Field::of(&self.tower.weights, "hidden_size", self.tower.network.config().width)
    }
}

/// Stage B of either generation.
// A model has one: boxing it would save nothing that matters.
#[allow(clippy::large_enum_variant)]
pub(super) enum StageBPart {
    /// v1: predicts tokens.
    Tokens(Part<StageB>),
    /// v2: predicts the noise in Stage A's latents.
    Latents(Part<DiffNeXt>, CosineSchedule),
}

impl StageBPart {
    pub fn weights(&self) -> &Weights {
        match self {
            StageBPart::Tokens(part) => &part.weights,
            StageBPart::Latents(part, _) => &part.weights,
        }
    }

    /// Channels of the latents that it takes from Stage C.
    pub fn latent_channels(&self) -> usize {
        match self {
            StageBPart::Tokens(part) => part.network.config().latent_channels,
            StageBPart::Latents(part, _) => part.network.config().image_channels,
        }
    }

    /// Its grid is a multiple of this in both directions.
    pub fn grid_multiple(&self) -> usize {
        match self {
            StageBPart::Tokens(part) => part.network.config().grid_multiple(),
            StageBPart::Latents(part, _) => part.network.config().grid_multiple(),
        }
    }

    fn text_width(&self) -> Field<'_> {
        let (name, width) = match self {
            StageBPart::Tokens(part) => ("byt5_embd", part.network.config().text_width),
            StageBPart::Latents(part, _) => ("clip_embd", part.network.config().text_width),
        };
        Field::of(self.weights(), name, width)
    }
}

/// How Stage C's own latents become those that Stage B takes: latents * mean - std. In v1 they are the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LatentScaling {
    pub mean: f32,
    pub std: f32,
}

impl LatentScaling {
    pub const NONE: Self = LatentScaling { mean: 1.0, std: 0.0 };

    pub fn apply(self, latents: &mut [f32]) {
        latents.iter_mut().for_each(|x| *x = *x * self.mean - self.std);
    }

    pub fn undo(self, latents: &mut [f32]) {
        latents.iter_mut().for_each(|x| *x = (*x + self.std) / self.mean);
    }
}

/// Everything that was found in the folders of a model.
pub(super) struct Halves {
    pub index: ModelIndex,
    pub prior: Option<Prior>,
    pub decoder: Option<Decoder>,
    pub image: Option<ImagePart>,
}

impl Halves {
    /// # Errors
    /// As [`super::Model::open`].
    pub fn open(path: &Path, options: &ModelOptions) -> Result<Self> {
        let index = ModelIndex::read(path)?;
        let mut halves = match index.pipeline.generation() {
            1 => Self::open_v1(path, options, index)?,
            2 => Self::open_v2(path, options, index)?,
            generation => {
                let (file, class) = (path.join(ModelIndex::FILE), index.pipeline.class_name());
                let what = format!("{}: a {class}, generation {generation}", file.display());
                return Err(Error::unsupported(what, "this version runs generations 1, the paper's, and 2"));
            }
        };
        halves.check_fit()?;
        match &mut halves.prior {
            Some(prior) => prior.adapt(&options.lora)?,
            None if options.lora.is_empty() => {}
            None => {
                let expected = format!("none: {} holds no Stage C", path.display());
                return Err(Error::argument("lora", expected, options.lora[0].0.display()));
            }
        }
        Ok(halves)
    }

    fn open_v1(path: &Path, options: &ModelOptions, index: ModelIndex) -> Result<Self> {
        for (name, other) in [("prior_path", &options.prior_path), ("decoder_path", &options.decoder_path)] {
            if let Some(other) = other {
                let expected = format!("nothing: {} is a v1 model, which is whole", path.display());
                return Err(Error::argument(name, expected, other.display()));
            }
        }
        let text = Arc::new(load::text_v1(path, &index)?);
        let decoder = Decoder {
            text: text.clone(),
            stage_b: StageBPart::Tokens(load::stage_b(&path.join("stage_b"))?),
            stage_a: load::stage_a(&path.join("stage_a"))?,
        };
        let prior = Prior {
            text,
            stage_c: load::stage_c(&path.join("stage_c"))?,
            schedule: CosineSchedule::default(),
            scaling: LatentScaling::NONE,
            adapters: Vec::new(),
        };
        let image = image_encoder(path)?;
        Ok(Halves { index, prior: Some(prior), decoder: Some(decoder), image })
    }

    /// Each half comes from the folder that the options name for it, else from `path`.
    fn open_v2(path: &Path, options: &ModelOptions, mut index: ModelIndex) -> Result<Self> {
        let prior_from = half_folder(path, &index, &options.prior_path, "prior_path", Pipeline::has_prior)?;
        let decoder_from =
            half_folder(path, &index, &options.decoder_path, "decoder_path", Pipeline::has_decoder)?;
        let uses_path = [&prior_from, &decoder_from].into_iter().flatten().any(|(folder, _)| folder == path);
        if !uses_path {
            let expected = "a folder with the half that neither prior_path nor decoder_path gives";
            return Err(Error::argument("path", expected, path.display()));
        }
        let image = match &prior_from {
            Some((folder, _)) => image_encoder(folder)?,
            None => None,
        };
        // Each half's own file says how it is sized, scaled and best run.
        if let Some((_, own)) = &prior_from {
            index.v2.latent_mean = own.v2.latent_mean;
            index.v2.latent_std = own.v2.latent_std;
            index.v2.resolution_multiple = own.v2.resolution_multiple;
            index.defaults = GenerationDefaults {
                stage_b_steps: index.defaults.stage_b_steps,
                stage_b_guidance: index.defaults.stage_b_guidance,
                ..own.defaults.clone()
            };
        }
        if let Some((_, own)) = &decoder_from {
            index.v2.latent_dim_scale = own.v2.latent_dim_scale;
            index.defaults.stage_b_steps = own.defaults.stage_b_steps;
            index.defaults.stage_b_guidance = own.defaults.stage_b_guidance;
        }
        let prior = prior_from.map(|(folder, own)| open_prior(&folder, &own)).transpose()?;
        let decoder = decoder_from.map(|(folder, _)| open_decoder(&folder)).transpose()?;
        Ok(Halves { index, prior, decoder, image })
    }

    /// # Errors
    /// `Format` if the sizes of one part contradict another's.
    fn check_fit(&self) -> Result<()> {
        let latents = self.prior.as_ref().map(|prior| {
            Field::of(&prior.stage_c.weights, "c_in", prior.stage_c.network.config().latent_channels)
        });
        if let Some(Decoder { text, stage_b, stage_a }) = &self.decoder {
            stage_b.text_width().expect(&text.width())?;
            if let Some(latents) = &latents {
                Field::of(stage_b.weights(), "effnet_embd", stage_b.latent_channels()).expect(latents)?;
            }
            let (a, field) = (stage_a.network.config(), |name, size| Field::of(&stage_a.weights, name, size));
            match stage_b {
                StageBPart::Tokens(part) => {
                    let tokens = part.network.config().codebook_size;
                    let codes = field("codebook_size", a.codebook_size);
                    Field::of(&part.weights, "num_labels", tokens).expect(&codes)?;
                }
                StageBPart::Latents(part, _) => {
                    let channels = part.network.config().latent_channels;
                    let expected = field("latent_channels", a.latent_channels);
                    Field::of(&part.weights, "c_in", channels).expect(&expected)?;
                }
            }
        }
        if let Some(Prior { text, stage_c, .. }) = &self.prior {
            let width = stage_c.network.config().text_width;
            Field::of(&stage_c.weights, "c_cond", width).expect(&text.width())?;
        }
        if let (Some(latents), Some(image)) = (&latents, &self.image) {
            let encoded = image.encoder.network.config().latent_channels;
            latents.expect(&Field::of(&image.encoder.weights, "c_latent", encoded))?;
        }
        Ok(())
    }
}

/// A size that a part's configuration gives, and where.
struct Field<'a> {
    folder: &'a Path,
    name: &'static str,
    size: usize,
}

impl<'a> Field<'a> {
    /// A size of the part that has these weights.
    fn of(weights: &'a Weights, name: &'static str, size: usize) -> Self {
        Field { folder: weights.path().parent().unwrap_or(weights.path()), name, size }
    }

    /// # Errors
    /// `Format`, naming both, if the other part has another size.
    fn expect(&self, other: &Field) -> Result<()> {
        if self.size == other.size {
            return Ok(());
        }
        // The other half may lie elsewhere: then its name alone would not do.
        let beside = self.folder.parent().and_then(|root| other.folder.strip_prefix(root).ok());
        let place = format!("{}: {}", self.folder.join(CONFIG_FILE).display(), self.name);
        let other_folder = beside.unwrap_or(other.folder).display();
        let expected = format!("{}, as {other_folder}: {} says", other.size, other.name);
        Err(Error::format(place, expected, self.size))
    }
}

/// The folder of one half, with its index, if there is one.
///
/// # Errors
/// `InvalidArgument` if the named folder does not hold the half; `Io`; `Format`.
fn half_folder(
    path: &Path,
    index: &ModelIndex,
    named: &Option<PathBuf>,
    option: &str,
    has_half: fn(Pipeline) -> bool,
) -> Result<Option<(PathBuf, ModelIndex)>> {
    let Some(folder) = named else {
        return Ok(has_half(index.pipeline).then(|| (path.to_owned(), index.clone())));
    };
    let own = ModelIndex::read(folder)?;
    if own.pipeline.generation() != index.pipeline.generation() || !has_half(own.pipeline) {
        let same = |pipeline: &Pipeline| pipeline.generation() == index.pipeline.generation();
        let fitting = Pipeline::all().filter(|pipeline| same(pipeline) && has_half(*pipeline));
        let names: Vec<_> = fitting.map(Pipeline::class_name).collect();
        let expected = format!("the folder of a {}", names.join(" or "));
        let found = format!("{}, a {}", folder.display(), own.pipeline.class_name());
        return Err(Error::argument(option, expected, found));
    }
    Ok(Some((folder.clone(), own)))
}

/// A half of v2 from its own folder or from a combined one, where the names of the prior's parts have a prefix.
fn open_prior(folder: &Path, index: &ModelIndex) -> Result<Prior> {
    let prefix = if index.pipeline == Pipeline::V2Combined { "prior_" } else { "" };
    let part = |name: &str| folder.join(format!("{prefix}{name}"));
    Ok(Prior {
        text: Arc::new(load::text_v2(&part("text_encoder"), &part("tokenizer"))?),
        stage_c: load::prior(&part("prior"))?,
        schedule: load::scheduler(&part("scheduler"))?,
        scaling: LatentScaling { mean: index.v2.latent_mean, std: index.v2.latent_std },
        adapters: Vec::new(),
    })
}

fn open_decoder(folder: &Path) -> Result<Decoder> {
    let schedule = load::scheduler(&folder.join("scheduler"))?;
    Ok(Decoder {
        text: Arc::new(load::text_v2(&folder.join("text_encoder"), &folder.join("tokenizer"))?),
        stage_b: StageBPart::Latents(load::decoder(&folder.join("decoder"))?, schedule),
        stage_a: load::vq_model(&folder.join("vqgan"))?,
    })
}

/// Text to image does without one, and v2's published folders have none.
fn image_encoder(root: &Path) -> Result<Option<ImagePart>> {
    match root.join("image_encoder") {
        folder if is_absent(&folder) => Ok(None),
        folder => load::image_encoder(&folder).map(Some),
    }
}

/// Whether there is nothing of this name. What is there but cannot be reached, as a link to nowhere, is not absent.
fn is_absent(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

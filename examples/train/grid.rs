//! What the model draws, as it learns.

use std::path::Path;

use wuerstchen::training::Goal;
use wuerstchen::{GenerateOptions, Image, Model, ModelOptions};

use crate::Outcome;
use crate::dataset::Dataset;

/// Always the same, so that two grids can be compared.
const PROMPTS: [&str; 16] = [
    "a red apple",
    "a smiling cat",
    "a blue car",
    "a slice of pizza",
    "green tree",
    "a rocket",
    "a yellow smiling face",
    "a dog face",
    "a red heart",
    "a purple alien",
    "house with garden",
    "full moon face",
    "a cup of coffee",
    "a snowman",
    "a soccer ball",
    "a panda",
];
const COLUMNS: usize = 8;

/// Draws a grid with the model in `folder`: pictures of the data through Stage A; from the encoder's latents through
/// Stage B; from the prompts through all stages.
pub fn draw(folder: &Path, goal: Goal, data: &Dataset, path: &Path) -> Outcome<()> {
    let model = Model::open(folder, &ModelOptions::default())?;
    let pictures = match goal {
        Goal::StageC => {
            let mut options = GenerateOptions::new(&model)?;
            for prompt in PROMPTS {
                options.add_prompt(prompt, None)?;
            }
            model.generate(&options)?
        }
        _ => rebuilt(&model, goal, data)?,
    };
    tiled(&pictures)?.write_png(path)?;
    Ok(())
}

/// Pictures spread over the data, as a stage gives them back.
fn rebuilt(model: &Model, goal: Goal, data: &Dataset) -> Outcome<Vec<Image>> {
    let mut pictures = Vec::new();
    for i in 0..PROMPTS.len() {
        let place = i * data.len() / PROMPTS.len();
        let image = &data.images[place];
        if goal == Goal::StageA {
            let pixels = model.stage_a_decode(&model.stage_a_encode(&[image])?)?;
            pictures.push(wuerstchen::image::to_image(image.width(), image.height(), pixels.slice()?)?);
            continue;
        }
        // A variation of strength 0: the latents as they are, Stage B and A after them.
        let mut options = GenerateOptions::new(model)?;
        options.add_prompt(&data.caption(place, 0.0), None)?;
        options.set_init_image(image, 0.0)?;
        pictures.extend(model.generate(&options)?);
    }
    Ok(pictures)
}

/// Pictures of one size side by side.
fn tiled(pictures: &[Image]) -> Outcome<Image> {
    let (width, height) = (pictures[0].width() as usize, pictures[0].height() as usize);
    let rows = pictures.len().div_ceil(COLUMNS);
    let (all_width, all_height) = (width * COLUMNS, height * rows);
    let tiled = Image::build(all_width as u32, all_height as u32, |bytes| {
        bytes.fill(255);
        for (i, picture) in pictures.iter().enumerate() {
            let (column, row) = (i % COLUMNS, i / COLUMNS);
            for (y, line) in picture.data().chunks_exact(3 * width).enumerate() {
                let start = ((row * height + y) * all_width + column * width) * 3;
                bytes[start..start + line.len()].copy_from_slice(line);
            }
        }
    });
    Ok(tiled?)
}

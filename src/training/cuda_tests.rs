//! What a training step reads back from a GPU: the loss, the accuracy, the norm; nothing that grows with the model.

use std::path::Path;

use super::{Goal, TrainOptions, Trainer};
use crate::DType;
use crate::image::Image;
use crate::pipeline::{Model, ModelOptions};

/// Reads that a step may make: the loss, how many tokens were found, the norm, the texts of the step.
const READS_PER_STEP: u64 = 5;

fn image(model: &Model, number: usize) -> Image {
    let info = model.info();
    Image::build(info.default_width, info.default_height, |bytes| {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = ((i * (7 + 2 * number)) ^ (i >> 5)) as u8;
        }
    })
    .unwrap()
}

#[test]
fn a_step_reads_a_few_numbers_back() {
    let real = std::env::var("WST_TEST_CUDA").is_ok_and(|value| value == "real");
    if !real && cuda_emulation::load().is_err() {
        return;
    }
    let mut on_gpu = ModelOptions::default();
    on_gpu.set_device("cuda").unwrap();
    on_gpu.set_compute_dtype(DType::F32).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/model");
    let model = Model::open(&folder, &on_gpu).unwrap();
    for (goal, dtype) in [(Goal::StageC, DType::F32), (Goal::StageC, DType::BF16), (Goal::StageB, DType::F32)]
    {
        let mut options = TrainOptions::new(goal);
        options.set_compute_dtype(dtype).unwrap();
        let mut trainer = Trainer::new(&model, &options).unwrap();
        let images = [image(&model, 0), image(&model, 1)];
        let samples = trainer.prepare(&[&images[0], &images[1]], &["a cat", "the sea"]).unwrap();
        let samples: Vec<_> = samples.iter().collect();
        trainer.step_over(&samples).unwrap();
        let reads = |trainer: &Trainer| trainer.stream().unwrap().downloads();
        let before = reads(&trainer);
        trainer.step_over(&samples).unwrap();
        let found = reads(&trainer) - before;
        assert!(found <= READS_PER_STEP, "{goal:?}, {dtype}: {found} reads in a step");
    }
}

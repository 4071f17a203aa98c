//! What a step of a walk costs beside the network: on a GPU nothing is read back, and the network is one launch.

use std::path::{Path, PathBuf};

use super::*;
use crate::DType;

fn fixtures(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(folder)
}

/// A model on a GPU, if there is one: an emulated one, unless the environment asks for the real one.
fn open(folder: &str, dtype: DType) -> Option<Model> {
    let real = std::env::var("WST_TEST_CUDA").is_ok_and(|value| value == "real");
    if !real && cuda_emulation::load().is_err() {
        return None;
    }
    let mut options = ModelOptions::default();
    options.set_device("cuda").unwrap();
    options.set_compute_dtype(dtype).unwrap();
    Some(Model::open(&fixtures(folder), &options).unwrap())
}

/// Kernels launched and reads by the host for a picture with so many steps of Stage C and of Stage B.
fn traffic(model: &Model, [c, b]: [u32; 2]) -> (u64, u64) {
    let accelerator = model.inner.device.accelerator().unwrap();
    let mut options = GenerateOptions::new(model).unwrap();
    options.add_prompt("a red apple", None).unwrap();
    options.set_size(128, 128).unwrap();
    options.set_stage_c(c, 4.0).unwrap();
    options.set_stage_b(b, 2.0).unwrap();
    let before = accelerator.traffic();
    model.generate(&options).unwrap();
    let after = accelerator.traffic();
    (after.0 - before.0, after.1 - before.1)
}

/// Launches of a step beside that of the recorded network: inputs, guidance, the sampler's step, noise, tokens.
const LAUNCHES_PER_STEP: u64 = 16;

fn check_steps(folder: &str) {
    for dtype in [DType::F32, DType::BF16] {
        let Some(model) = open(folder, dtype) else { return };
        let few = traffic(&model, [4, 4]);
        for more in [[9, 4], [4, 9]] {
            let many = traffic(&model, more);
            assert_eq!(many.1, few.1, "{folder}, {dtype}, steps {more:?}: the host reads in each step");
            let per_step = (many.0 - few.0) / 5;
            assert!(
                per_step <= LAUNCHES_PER_STEP,
                "{folder}, {dtype}, steps {more:?}: {per_step} launches a step"
            );
        }
    }
}

#[test]
fn a_step_reads_nothing_back_and_is_one_launch() {
    check_steps("model");
}

#[test]
fn a_step_of_v2_reads_nothing_back_and_is_one_launch() {
    check_steps("v2/model");
}

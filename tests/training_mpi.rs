//! Processes that `mpirun` starts train as one does with the whole batch. `tests/training_ranks.rs` says the same of
//! threads, without MPI.
//!
//! `cargo build --features mpi --example train_ranks && cargo test --features mpi --test training_mpi`

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::fixtures;
use common::ranks::{EPS_ABOVE_NOISE, Named, assert_same_losses, assert_same_weights};

const RATE: f64 = 1e-3;

/// The example, which cargo has built beside the tests.
fn program() -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let program = here.parent().unwrap().with_file_name("examples").join("train_ranks");
    assert!(program.exists(), "build it first: cargo build --features mpi --example train_ranks");
    program
}

/// Runs the example on `count` processes of one thread each.
fn mpirun(count: usize, arguments: &[&str]) -> Output {
    // As many processes as wanted on as few cores as there are, also for root, as in a container.
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "-n", &count.to_string()]);
    command.arg(program()).arg("--model").arg(fixtures().join("model"));
    command.args(["--threads", "1", "--size", "64"]).args(arguments);
    command.output().expect("mpirun is not there")
}

fn trained(count: usize, stage: &str) -> (Vec<f64>, Vec<Named>) {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ranks-{stage}-{count}.safetensors"));
    let settings =
        [format!("learning_rate={RATE}"), "warmup_steps=0".into(), format!("adam_eps={EPS_ABOVE_NOISE}")];
    let mut arguments =
        vec!["--stage", stage, "--steps", "5", "--batch", "8", "--out", out.to_str().unwrap()];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    let output = mpirun(count, &arguments);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let line =
        |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap();
    (said.lines().map(line).collect(), read(&out))
}

fn read(path: &Path) -> Vec<Named> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers =
        |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let mut tensors: Vec<Named> =
        file.iter().map(|(name, view)| (name.into(), numbers(view.data()))).collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

fn check(stage: &str) {
    let (losses, expected) = trained(1, stage);
    assert_eq!(losses.len(), 5);
    for count in [2, 4] {
        let what = format!("stage {stage} on {count} processes");
        let (losses_found, found) = trained(count, stage);
        assert_same_losses(&what, &losses_found, &losses);
        assert_same_weights(&what, &found, &expected, RATE);
    }
}

#[test]
fn processes_train_stage_c_as_one_does() {
    check("c");
}

/// With the encoder's BatchNorms over the batches of all processes.
#[test]
fn processes_train_stage_b_as_one_does() {
    check("b");
}

/// An error in a process ends all of them, with its words, instead of leaving them waiting.
#[test]
fn an_error_ends_all_processes() {
    let output = mpirun(2, &["--stage", "c", "--batch", "3"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("3 samples do not divide by 2"), "{said}");
}

//! A training process that is killed at random moments, again and again: it always goes on, and goes on the same.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::fixtures;
use wuerstchen::tensor::rng::Philox;
use wuerstchen::training::{Ema, Goal, Sample, TrainOptions, Trainer};
use wuerstchen::{Image, Model};

/// How often the process is killed.
const KILLS: u64 = 200;
/// The longest life of a process, in milliseconds; its start alone takes some ten.
const LONGEST_LIFE_MS: u32 = 250;
/// Names the folder that a killed process works in.
const FOLDER: &str = "WUERSTCHEN_TEST_KILL_FOLDER";

fn trainer() -> Trainer {
    let mut model = common::options();
    model.set_threads(1).unwrap();
    let mut options = TrainOptions::new(Goal::StageC);
    options.set_warmup_steps(5);
    options.set_ema(Ema { decay: 0.5, start: 3, every: 2 }).unwrap();
    Trainer::new(&Model::open(&fixtures().join("model"), &model).unwrap(), &options).unwrap()
}

fn samples(trainer: &Trainer) -> Vec<Sample> {
    let side = Model::open(&fixtures().join("model"), &common::options()).unwrap().info().default_width;
    let image = Image::build(side, side, |bytes| {
        bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 31 % 251) as u8);
    });
    let image = image.unwrap();
    trainer.prepare(&[&image, &image], &["a cat", "a dog"]).unwrap()
}

fn step(trainer: &mut Trainer, samples: &[Sample]) -> (u64, u32) {
    let metrics = trainer.step_over(&samples.iter().collect::<Vec<_>>()).unwrap();
    (metrics.step, metrics.loss.to_bits())
}

/// The process that is killed: step, note the loss, save, for ever. Without the folder this is no test.
#[test]
fn train_until_killed() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let checkpoint = folder.join("checkpoint");
    let mut trainer = trainer();
    if checkpoint.exists() {
        trainer.load(&checkpoint).unwrap();
    }
    let samples = samples(&trainer);
    let mut log = OpenOptions::new().create(true).append(true).open(folder.join("losses")).unwrap();
    loop {
        let (step, loss) = step(&mut trainer, &samples);
        // One write: a line is there or not.
        log.write_all(format!("{step} {loss}\n").as_bytes()).unwrap();
        trainer.save(&checkpoint).unwrap();
    }
}

#[test]
fn a_killed_run_goes_on_the_same() {
    let folder = std::env::temp_dir().join(format!("wuerstchen-kill-{}", std::process::id()));
    drop(std::fs::remove_dir_all(&folder));
    std::fs::create_dir_all(&folder).unwrap();
    let lives = Philox::new(7, 0);
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "train_until_killed", "--nocapture"])
            .env(FOLDER, &folder)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(lives.below(kill, LONGEST_LIFE_MS).into()));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(!complaint.contains("panicked"), "after {kill} kills: {complaint}");
    }
    let losses = read(&folder.join("losses"));
    let last = losses.iter().map(|(step, _)| *step).max().unwrap();
    assert!(last > 20, "{KILLS} processes took {last} steps in all");

    let mut uninterrupted = trainer();
    let samples = samples(&uninterrupted);
    let expected: Vec<u32> = (0..last).map(|_| step(&mut uninterrupted, &samples).1).collect();
    for (step, loss) in losses {
        assert_eq!(loss, expected[step as usize - 1], "the loss of step {step}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

fn read(path: &Path) -> Vec<(u64, u32)> {
    let numbers = |line: &str| {
        let (step, loss) = line.split_once(' ').unwrap();
        (step.parse().unwrap(), loss.parse().unwrap())
    };
    std::fs::read_to_string(path).unwrap().lines().map(numbers).collect()
}

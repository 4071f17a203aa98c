//! A batch that is cut up, over time or over ranks, trains as a whole one does. The ranks are threads here;
//! `tests/training_mpi.rs` says the same of processes.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;

use common::fixtures;
use common::ranks::{EPS_ABOVE_NOISE, Links, Named, ThreadRank, assert_same_losses, assert_same_weights};
use wuerstchen::device::Reduce;
use wuerstchen::training::{Goal, TrainOptions, Trainer};
use wuerstchen::{Error, Image, Model, Result};

const RATE: f64 = 1e-3;
const BATCH: usize = 8;
const STEPS: usize = 5;
const SIZE: u32 = 64;

/// Options that make steps of full size from the first.
fn options(goal: Goal, settings: &[(&str, &str)]) -> TrainOptions {
    let mut options = TrainOptions::new(goal);
    let rate = RATE.to_string();
    let always = [("learning_rate", rate.as_str()), ("warmup_steps", "0"), ("adam_eps", EPS_ABOVE_NOISE)];
    for (key, value) in always.iter().chain(settings) {
        options.set(key, value).unwrap();
    }
    options
}

fn trainer(options: &TrainOptions) -> Trainer {
    let mut model_options = common::options();
    model_options.set_threads(1).unwrap();
    let model = Model::open(&fixtures().join("model"), &model_options).unwrap();
    Trainer::new(&model, options).unwrap()
}

/// Picture and caption `number`: stripes of its own.
fn sample(number: usize) -> (Image, String) {
    let image = Image::build(SIZE, SIZE, |rgb| {
        for (i, value) in rgb.iter_mut().enumerate() {
            *value = (i * (2 * number + 3) / 7 % 251) as u8;
        }
    });
    (image.unwrap(), format!("stripes of kind {number}"))
}

/// The losses of some steps over samples `first .. first + count` of each batch, and the weights they lead to.
fn train(mut trainer: Trainer, first: usize, count: usize) -> Result<(Vec<f64>, Vec<Named>)> {
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let from = step * BATCH + first;
        let samples: Vec<(Image, String)> = (from..from + count).map(sample).collect();
        let images: Vec<&Image> = samples.iter().map(|sample| &sample.0).collect();
        let captions: Vec<&str> = samples.iter().map(|sample| sample.1.as_str()).collect();
        let metrics = trainer.step(&images, &captions)?;
        assert!(!metrics.skipped);
        losses.push(metrics.loss.into());
    }
    Ok((losses, weights(&trainer)))
}

fn weights(trainer: &Trainer) -> Vec<Named> {
    let list = trainer.parameters().list().iter();
    list.map(|p| (p.name.clone(), p.master().slice::<f32>().unwrap().to_vec())).collect()
}

/// Trains on `count` threads, each with its part of every batch in order.
fn train_together(options: &TrainOptions, count: usize, links: Links) -> Vec<(Vec<f64>, Vec<Named>)> {
    let share = BATCH / count;
    std::thread::scope(|scope| {
        let running: Vec<_> = ThreadRank::all(count, links)
            .into_iter()
            .map(|reduce| {
                scope.spawn(move || {
                    let (mut trainer, rank) = (trainer(options), reduce.rank());
                    trainer.set_reduce(reduce);
                    train(trainer, rank * share, share).unwrap()
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn check_ranks(goal: Goal, settings: &[(&str, &str)]) {
    let options = options(goal, settings);
    let (losses, expected) = train(trainer(&options), 0, BATCH).unwrap();
    let start = weights(&trainer(&options));
    let moved = start.iter().zip(&expected).filter(|(before, after)| before.1 != after.1).count();
    assert!(moved > start.len() / 2, "{moved} of {} tensors were trained", start.len());
    for (count, links) in [(2, Links::One), (2, Links::Two), (4, Links::Two)] {
        let what = format!("{goal:?} on {count} ranks, {links:?}");
        let found = train_together(&options, count, links);
        for (losses_found, found) in &found {
            assert_same_losses(&what, losses_found, &losses);
            assert_same_weights(&what, found, &expected, RATE);
        }
        assert!(found.iter().all(|one| *one == found[0]), "{what}: the ranks differ from each other");
    }
}

#[test]
fn ranks_train_stage_c_as_one_does() {
    check_ranks(Goal::StageC, &[]);
}

#[test]
fn ranks_that_recompute_train_stage_c_as_one_does() {
    check_ranks(Goal::StageC, &[("recompute", "true")]);
}

/// With the encoder's BatchNorms over the whole batch.
#[test]
fn ranks_train_stage_b_as_one_does() {
    check_ranks(Goal::StageB, &[]);
}

fn check_accumulation(goal: Goal, settings: &[(&str, &str)]) {
    let whole = options(goal, settings);
    let mut parts = whole.clone();
    parts.set_grad_accumulation(4).unwrap();
    let (losses, expected) = train(trainer(&whole), 0, BATCH).unwrap();
    let (losses_found, found) = train(trainer(&parts), 0, BATCH).unwrap();
    assert_same_losses("four parts", &losses_found, &losses);
    assert_same_weights("four parts", &found, &expected, RATE);
}

#[test]
fn parts_train_stage_c_as_the_whole_does() {
    check_accumulation(Goal::StageC, &[]);
}

/// Without the encoder, whose BatchNorms see one part at a time.
#[test]
fn parts_train_stage_b_as_the_whole_does() {
    check_accumulation(Goal::StageB, &[("train_encoder", "false")]);
}

#[test]
fn ranks_with_parts_of_different_sizes_are_refused() {
    let options = options(Goal::StageC, &[]);
    std::thread::scope(|scope| {
        for reduce in ThreadRank::all(2, Links::One) {
            let options = &options;
            scope.spawn(move || {
                let (mut trainer, rank) = (trainer(options), reduce.rank());
                trainer.set_reduce(reduce);
                let error = train(trainer, 0, 1 + rank).unwrap_err();
                assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
            });
        }
    });
}

/// A link to a rank that has ended.
#[derive(Debug)]
struct Broken {
    concurrent: bool,
}

impl Reduce for Broken {
    fn ranks(&self) -> usize {
        2
    }

    fn rank(&self) -> usize {
        0
    }

    fn sum_f64(&self, _: &mut [f64]) -> Result<()> {
        Err(Error::internal("test", "the other rank is gone"))
    }

    fn sum_f32(&self, _: &mut [f32]) -> Result<()> {
        Err(Error::internal("test", "the other rank is gone"))
    }

    fn concurrent(&self) -> bool {
        self.concurrent
    }
}

#[test]
fn a_lost_rank_is_an_error_that_changes_nothing() {
    for (goal, concurrent) in [(Goal::StageC, false), (Goal::StageC, true), (Goal::StageB, true)] {
        let mut trainer = trainer(&options(goal, &[]));
        let before = (weights(&trainer), trainer.progress());
        trainer.set_reduce(Arc::new(Broken { concurrent }));
        let (image, caption) = sample(0);
        let error = trainer.step(&[&image], &[&caption]).unwrap_err();
        assert!(error.to_string().contains("the other rank is gone"), "{error}");
        assert!((weights(&trainer), trainer.progress()) == before, "{goal:?}");
    }
}

//! A checkpoint that does not fit on the disk. Alone in its process, whose limit it lowers.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::fixtures;
use wuerstchen::training::{Goal, TrainOptions, Trainer};
use wuerstchen::{Error, Image, Model};

/// Writing beyond this fails as on a full disk: enough for some files of a checkpoint, not for all.
const LIMIT_BYTES: libc::rlim_t = 64 << 10;

fn limit_files(bytes: libc::rlim_t) {
    // SAFETY: plain calls with a struct that lives through them.
    unsafe {
        // Else the first write beyond the limit would end the process.
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let mut limit = std::mem::zeroed::<libc::rlimit>();
        assert_eq!(libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit), 0);
        limit.rlim_cur = bytes.min(limit.rlim_max);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
}

#[test]
fn the_old_checkpoint_stays() {
    let root = std::env::temp_dir().join(format!("wuerstchen-disk-{}", std::process::id()));
    drop(std::fs::remove_dir_all(&root));
    std::fs::create_dir_all(&root).unwrap();
    let path = root.join("checkpoint");
    let model = Model::open(&fixtures().join("model"), &common::options()).unwrap();
    let new = || Trainer::new(&model, &TrainOptions::new(Goal::StageC)).unwrap();
    let mut trainer = new();
    let side = model.info().default_width;
    let image = Image::build(side, side, |bytes| bytes.fill(9)).unwrap();
    trainer.step(&[&image], &["a cat"]).unwrap();
    trainer.save(&path).unwrap();

    trainer.step(&[&image], &["a cat"]).unwrap();
    limit_files(LIMIT_BYTES);
    let failed = trainer.save(&path);
    let exported = trainer.export(&root.join("model"));
    limit_files(libc::RLIM_INFINITY);
    for error in [failed.unwrap_err(), exported.unwrap_err()] {
        assert!(matches!(&error, Error::Io { .. }), "{error}");
        assert!(error.to_string().contains("wuerstchen-disk"), "names the file: {error}");
    }

    let mut resumed = new();
    resumed.load(&path).unwrap();
    assert_eq!(resumed.progress().step, 1, "the old checkpoint");
    assert_eq!(std::fs::read_dir(&root).unwrap().count(), 1, "nothing is left beside it");
    // There is room again.
    trainer.save(&path).unwrap();
    resumed.load(&path).unwrap();
    assert_eq!(resumed.progress().step, 2);
    std::fs::remove_dir_all(root).unwrap();
}

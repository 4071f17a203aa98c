//! Whichever call of CUDA's libraries fails: an error that says so, nothing lost, and the next picture is right.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/folder.rs"]
mod folder;

use std::collections::BTreeMap;
use std::path::Path;

use cuda_emulation::{calls_by_name, fail_call, fail_call_of, fail_no_call, live, set_memory};
use emulated::{MEMORY, alone, current_context, in_child, is_child};
use folder::{open, picture, short, tiny, v2};
use wuerstchen::{Error, Image, Model, Result};

/// As the driver numbers them: out of memory, a kernel that failed, an invalid argument.
const CODES: [i32; 3] = [2, INVALID_VALUE, 719];
/// Without the argument, which is how the driver says that a kernel has no more parameters.
const OTHER_CODES: [i32; 3] = [2, 700, 719];
const INVALID_VALUE: i32 = 1;

/// Threads of the CPU are no matter here.
fn open_cuda(path: &Path) -> Result<Model> {
    folder::open_on(path, 1)
}

/// A model's whole life.
fn life(path: &Path) -> Result<Image> {
    let model = open_cuda(path)?;
    let mut images = model.generate(&short(&model, "a cat"))?;
    Ok(images.remove(0))
}

/// A life in which the call that `fail` names fails.
fn check(path: &Path, expected: &Image, what: &str, fail: impl FnOnce()) -> Option<Error> {
    let context = current_context();
    fail();
    let result = life(path);
    fail_no_call();
    assert_eq!(live(None), 0, "{what}: left over after {result:?}");
    assert_eq!(current_context(), context, "{what}");
    match result {
        Ok(image) => {
            assert!(image.data() == expected.data(), "{what}: another picture");
            None
        }
        Err(error) => {
            let text = error.to_string();
            match &error {
                Error::Device { device, .. } => assert!(device.starts_with("cuda"), "{what}: {text}"),
                Error::OutOfMemory { .. } => assert!(text.contains("out of memory"), "{what}: {text}"),
                Error::Unsupported { .. } => assert!(text.contains("cuda"), "{what}: {text}"),
                _ => panic!("{what}: {error:?}"),
            }
            Some(error)
        }
    }
}

/// The calls of one life by their names.
fn calls_of_a_life(path: &Path) -> BTreeMap<String, u64> {
    let before = calls_by_name();
    life(path).unwrap();
    let after = calls_by_name().into_iter();
    let made = after.map(|(name, count)| (count - before.get(&name).unwrap_or(&0), name));
    made.filter(|(count, _)| *count > 0).map(|(count, name)| (name, count)).collect()
}

/// No folder can be made there: kernels are compiled in each life, and not read from the disk.
const NO_CACHE: &str = "/dev/null/cache";

#[test]
fn each_kind_of_call_may_fail() {
    let Some(_alone) = alone() else { return };
    if !is_child() {
        in_child("each_kind_of_call_may_fail", &[("XDG_CACHE_HOME", Path::new(NO_CACHE))]);
        return;
    }
    let path = tiny();
    let expected = life(&path).unwrap();
    let calls = calls_of_a_life(&path);
    assert!(calls.contains_key("cuGraphLaunch") || calls.contains_key("cuLaunchKernel"), "{calls:?}");
    assert!(calls.contains_key("nvrtcCompileProgram"), "{calls:?}");
    let mut survived = Vec::new();
    for (number, (name, &count)) in calls.iter().enumerate() {
        for (i, n) in [1, count.div_ceil(2), count].into_iter().enumerate() {
            let codes = if name == "cuFuncGetParamInfo" { OTHER_CODES } else { CODES };
            let code = codes[(number + i) % 3];
            let what = format!("call {n} of {count} of {name} gives {code}");
            match check(&path, &expected, &what, || fail_call_of(name, n as u32, code)) {
                None => survived.push(what),
                Some(error) => println!("{what}: {error}"),
            }
        }
        if number % 4 == 0 {
            assert!(life(&path).unwrap().data() == expected.data(), "after {name} failed");
        }
    }
    assert!(life(&path).unwrap().data() == expected.data());
    println!("survived: {survived:#?}");
}

/// Calls spread over a life, whatever they are.
fn check_spread(path: &Path, runs: u64) {
    let expected = life(path).unwrap();
    let count: u64 = calls_of_a_life(path).values().sum();
    for i in 0..runs {
        // Each run moves a little beyond an even stride, so that loops are not met at one place.
        let n = 1 + (i * count / runs + i * 7 % 13).min(count - 1);
        let code = OTHER_CODES[(i % 3) as usize];
        let what = format!("call {n} of {count} gives {code}");
        check(path, &expected, &what, || fail_call(n as u32, code));
    }
    assert!(life(path).unwrap().data() == expected.data());
}

#[test]
fn any_call_may_fail() {
    let Some(_alone) = alone() else { return };
    check_spread(&tiny(), 40);
}

#[test]
fn any_call_of_v2_may_fail() {
    let Some(_alone) = alone() else { return };
    check_spread(&v2("model"), 10);
}

#[test]
fn a_model_outlives_a_call_that_failed() {
    let Some(_alone) = alone() else { return };
    let model = open_cuda(&tiny()).unwrap();
    let options = short(&model, "a cat");
    let expected = picture(&model, &options);
    let count: u64 = calls_of_a_life(&tiny()).values().sum();
    for i in 0..20 {
        fail_call(1 + (i * count / 20) as u32, OTHER_CODES[(i % 3) as usize]);
        match model.generate(&options) {
            Ok(images) => assert!(images[0].data() == expected.data()),
            Err(Error::Device { .. } | Error::OutOfMemory { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
        fail_no_call();
        assert!(picture(&model, &options).data() == expected.data(), "after call {i} failed");
    }
    drop((options, model));
    assert_eq!(live(None), 0);
}

#[test]
fn memory_may_run_out_at_any_time() {
    let Some(_alone) = alone() else { return };
    for path in [tiny(), v2("model")] {
        let model = open_cuda(&path).unwrap();
        let opened = live(Some("bytes"));
        let expected = picture(&model, &short(&model, "a cat"));
        let most = live(Some("bytes"));
        drop(model);
        let (mut failed, parts) = (0, 8);
        for part in 0..parts {
            let model = open_cuda(&path).unwrap();
            let options = short(&model, "a cat");
            set_memory((opened + (most - opened) * part / parts) as usize);
            match model.generate(&options) {
                // It gave back what it did not need.
                Ok(images) => assert!(images[0].data() == expected.data(), "part {part}"),
                Err(Error::OutOfMemory { what, bytes }) => {
                    assert!(!what.is_empty() && bytes > 0, "{what}: {bytes}");
                    failed += 1;
                }
                Err(other) => panic!("part {part}: {other}"),
            }
            set_memory(MEMORY);
            assert!(picture(&model, &options).data() == expected.data(), "part {part}, with more memory");
            drop((options, model));
            assert_eq!(live(None), 0, "part {part}");
        }
        assert!(failed > 0, "of {most} bytes");
    }
}

#[test]
fn what_others_keep_for_reuse_is_freed_first() {
    let Some(_alone) = alone() else { return };
    let keeper = open(&tiny()).unwrap();
    let small = short(&keeper, "a cat");
    picture(&keeper, &small);
    let little = live(Some("bytes"));
    let mut large = small.clone();
    large.set_size(256, 256).unwrap();
    let first = picture(&keeper, &large);
    let kept = live(Some("bytes"));
    assert!(kept > little);
    let model = open(&tiny()).unwrap();
    let options = short(&model, "a cat");
    let expected = picture(&model, &options);
    let needed = live(Some("bytes")) - kept;
    drop((options, model));
    // Not enough for the second model, unless the first one gives some of that back.
    set_memory((kept + needed - (kept - little) / 2) as usize);
    let model = open(&tiny()).unwrap();
    assert!(picture(&model, &short(&model, "a cat")).data() == expected.data());
    set_memory(MEMORY);
    assert!(picture(&keeper, &large).data() == first.data());
}

/// Threads that run out of memory free what others keep for reuse, while those record and launch their steps.
#[test]
fn threads_that_run_out_of_memory_do_not_harm_each_other() {
    let Some(_alone) = alone() else { return };
    let path = tiny();
    let expected = life(&path).unwrap();
    let model = open_cuda(&path).unwrap();
    picture(&model, &short(&model, "a cat"));
    let one = live(Some("bytes"));
    drop(model);
    let (mut made, mut failed) = (0, 0);
    for tenths in [11, 13, 22, 32] {
        let model = open_cuda(&path).unwrap();
        let options = short(&model, "a cat");
        set_memory((one * tenths / 10) as usize);
        let results: Vec<Result<Vec<Image>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| model.generate(&options))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        set_memory(MEMORY);
        for result in results {
            match result {
                Ok(images) => {
                    assert!(images[0].data() == expected.data());
                    made += 1;
                }
                Err(Error::OutOfMemory { .. }) => failed += 1,
                Err(other) => panic!("{other}"),
            }
        }
        assert!(picture(&model, &options).data() == expected.data());
        drop((options, model));
    }
    println!("{made} made, {failed} failed");
    assert_eq!(live(None), 0);
}

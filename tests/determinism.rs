//! One seed, one picture: whatever the threads, the batch, the neighbours and what the model did before.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/folder.rs"]
mod folder;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use folder::{bare, emoji, open, open_on, picture, short, tiny, v2};
use wuerstchen::image::from_pixels;
use wuerstchen::{
    CancelToken, Choice, DType, Error, GenerateOptions, Image, Job, Model, Progress, Sampler, Stage, Tensor,
};

/// A picture's number, for comparisons that print little.
fn assert_same(found: &Image, expected: &Image, what: &str) {
    assert_eq!((found.width(), found.height()), (expected.width(), expected.height()), "{what}");
    let differing = found.data().iter().zip(expected.data()).filter(|(f, e)| f != e).count();
    assert_eq!(differing, 0, "{what}: bytes that differ of {}", expected.data().len());
}

/// One model of each kind: untrained, trained, and v2.
fn models() -> [PathBuf; 3] {
    [tiny(), emoji(), v2("model")]
}

fn differ(a: &Image, b: &Image) -> bool {
    a.data() != b.data()
}

/// Options that go through every random draw: DDPM, renoising, multinomial choice.
fn options_for(model: &Model, prompt: &str) -> GenerateOptions {
    let mut options = short(model, prompt);
    options.set_stage_c(6, 3.0).unwrap();
    options
}

#[test]
fn threads_do_not_change_a_picture() {
    for path in models() {
        let mut expected: Option<Vec<Image>> = None;
        for threads in [1, 2, 4, 7] {
            let model = open_on(&path, threads).unwrap();
            let mut options = bare(&model);
            options.set_stage_c(5, 3.0).unwrap();
            options.add_prompt("a red apple", None).unwrap();
            options.add_prompt("a cat", Some("a dog")).unwrap();
            let found = model.generate(&options).unwrap();
            let expected = expected.get_or_insert_with(|| found.clone());
            for (found, expected) in found.iter().zip(expected) {
                assert_same(found, expected, &format!("{} on {threads} threads", path.display()));
            }
        }
    }
}

/// Prompts with and without negatives, one of them twice.
const PROMPTS: [(&str, Option<&str>); 4] =
    [("a red apple", None), ("a cat", Some("a dog")), ("a red apple", Some("a cat")), ("", Some(""))];

/// Every picture of a call against the picture of a call of its own.
fn check_batch(model: &Model, change: impl Fn(&mut GenerateOptions)) {
    let mut together = bare(model);
    change(&mut together);
    together.set_images_per_prompt(2).unwrap();
    together.set_seed(u64::MAX - 2).unwrap();
    for (prompt, negative) in PROMPTS {
        together.add_prompt(prompt, negative).unwrap();
    }
    let images = model.generate(&together).unwrap();
    assert_eq!((images.len(), together.image_count()), (8, 8));
    for (k, image) in images.iter().enumerate() {
        let (prompt, negative) = PROMPTS[k / 2];
        let mut alone = bare(model);
        change(&mut alone);
        alone.set_seed((u64::MAX - 2).wrapping_add(k as u64)).unwrap();
        alone.add_prompt(prompt, negative).unwrap();
        assert_same(image, &picture(model, &alone), &format!("picture {k}"));
    }
    for (i, k) in (0..8).flat_map(|k| (0..k).map(move |i| (i, k))) {
        assert!(differ(&images[i], &images[k]), "pictures {i} and {k} are the same");
    }
}

#[test]
fn a_picture_does_not_depend_on_its_batch() {
    let model = open(&emoji()).unwrap();
    check_batch(&model, |_| {});
    // Stage B takes fewer than eight of this size at once.
    check_batch(&model, |options| {
        options.set_size(208, 192).unwrap();
        options.set_stage_b(2, 2.0).unwrap();
    });
}

#[test]
fn a_picture_does_not_depend_on_its_batch_whatever_the_options() {
    let model = open(&tiny()).unwrap();
    check_batch(&model, |options| options.set_stage_c(3, 1.0).unwrap());
    check_batch(&model, |options| {
        options.set_stage_b(3, 1.0).unwrap();
        options.set_stage_c_sampler(Sampler::Ddim).unwrap();
    });
    check_batch(&model, |options| options.set_size(192, 256).unwrap());
    check_batch(&model, |options| options.set_stage_b_choice(Choice::Quant).unwrap());
    check_batch(&model, |options| options.set_stage_b_choice(Choice::Argmax).unwrap());
    let sketch = stripes(64, 48);
    check_batch(&model, |options| options.set_init_image(&sketch, 0.7).unwrap());
    check_batch(&model, |options| {
        options.set_init_image(&sketch, 1.0).unwrap();
        options.set_mask(&stripes(16, 16)).unwrap();
    });
}

#[test]
fn a_picture_of_v2_does_not_depend_on_its_batch() {
    let model = open(&v2("model")).unwrap();
    check_batch(&model, |_| {});
    check_batch(&model, |options| options.set_stage_b(3, 0.0).unwrap());
    check_batch(&model, |options| options.set_stage_c(3, 1.0).unwrap());
    check_batch(&model, |options| options.set_stage_c_sampler(Sampler::Ddim).unwrap());
    // Stage B takes fewer than eight of this size at once.
    check_batch(&model, |options| options.set_size(384, 256).unwrap());
    let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
    let latents = model.stage_c_sample(&text, None, None, &bare(&model)).unwrap();
    check_batch(&model, |options| options.set_init_latents(&latents, 0.5).unwrap());
    check_batch(&model, |options| {
        options.set_init_latents(&latents, 1.0).unwrap();
        options.set_mask(&stripes(16, 16)).unwrap();
    });
}

/// A picture with something in it.
fn stripes(width: u32, height: u32) -> Image {
    Image::build(width, height, |rgb| {
        rgb.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 37 % 251) as u8);
    })
    .unwrap()
}

#[test]
fn nothing_is_left_behind_by_a_call() {
    check_nothing_is_left_behind(emoji(), (64, 192));
    check_nothing_is_left_behind(v2("model"), (128, 256));
}

fn check_nothing_is_left_behind(path: PathBuf, (width, height): (u32, u32)) {
    let model = open(&path).unwrap();
    let options = options_for(&model, "a red apple");
    let first = picture(&model, &options);
    assert_same(&picture(&model, &options), &first, "the second call");
    // Another size and other options in between, whose memory is used again.
    let mut other = options_for(&model, "a blue car");
    other.set_size(width, height).unwrap();
    other.set_preview(1).unwrap();
    picture(&model, &other);
    assert_same(&picture(&model, &options), &first, "after another size");
    let mut heard = options.clone();
    heard.set_progress(Some(Arc::new(|_: &Progress| {}))).unwrap();
    heard.set_preview(1).unwrap();
    assert_same(&picture(&model, &heard), &first, "with previews");
    let again = open(&path).unwrap();
    assert_same(&picture(&again, &options_for(&again, "a red apple")), &first, "a second model");
}

#[test]
fn a_job_makes_what_generate_makes() {
    models().into_iter().for_each(check_jobs);
}

fn check_jobs(path: PathBuf) {
    let model = open(&path).unwrap();
    let options = options_for(&model, "a red apple");
    let job = Job::start(&model, &options).unwrap();
    let twin = Job::start(&model, &options).unwrap();
    let expected = picture(&model, &options);
    for job in [job, twin] {
        assert!(job.wait(Duration::from_secs(60)));
        let images = job.images().unwrap();
        assert_eq!(images.len(), 1);
        assert_same(&images[0], &expected, "a job");
        let (progress, done) = job.poll();
        assert!(done && progress.is_some_and(|p| p.stage == Stage::A && p.step == p.steps));
    }
}

#[test]
fn threads_of_the_caller_do_not_disturb_each_other() {
    check_callers(emoji(), (96, 64));
    check_callers(v2("model"), (256, 128));
}

fn check_callers(path: PathBuf, (width, height): (u32, u32)) {
    let model = open(&path).unwrap();
    let options: Vec<GenerateOptions> = (0..8)
        .map(|i| {
            let mut options = short(&model, ["a cat", "a red apple", "a star"][i % 3]);
            options.set_seed(i as u64).unwrap();
            if i % 2 == 1 {
                options.set_size(width, height).unwrap();
            }
            options
        })
        .collect();
    let expected: Vec<Image> = options.iter().map(|options| picture(&model, options)).collect();
    let found: Vec<Image> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            options.iter().map(|options| scope.spawn(|| picture(&model, options))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_same(found, expected, &format!("thread {i}"));
    }
}

#[test]
fn seeds_and_samplers_differ() {
    check_seeds_and_samplers(emoji());
    check_seeds_and_samplers(v2("model"));
}

fn check_seeds_and_samplers(path: PathBuf) {
    let model = open(&path).unwrap();
    for sampler in [Sampler::Ddpm, Sampler::Ddim] {
        let with = |seed: u64| {
            let mut options = options_for(&model, "a red apple");
            options.set_stage_c_sampler(sampler).unwrap();
            options.set_seed(seed).unwrap();
            picture(&model, &options)
        };
        let first = with(1);
        assert_same(&with(1), &first, "the same seed");
        for seed in [0, 2, 1 << 32 | 1, 1 << 63 | 1, u64::MAX] {
            assert!(differ(&with(seed), &first), "{sampler:?}: seed {seed} gives the picture of seed 1");
        }
    }
    let mut ddim = options_for(&model, "a red apple");
    let ddpm = picture(&model, &ddim);
    ddim.set_stage_c_sampler(Sampler::Ddim).unwrap();
    assert!(differ(&picture(&model, &ddim), &ddpm), "the samplers make the same picture");
}

#[test]
fn a_cancelled_generation_leaves_nothing_behind() {
    // A call hears its reports beside the run, which may be ahead by some steps: here a step takes long enough.
    check_cancelling(emoji(), &[0, 1, 4, 6, 8], |model, options| model.generate(options));
    // A job hears them in the run itself: each is the last one.
    for path in models() {
        check_cancelling(path, &[0, 1, 4, 6, 7, 8, 9], |model, options| {
            let job = Job::start(model, options)?;
            assert!(job.wait(Duration::from_secs(60)));
            job.images()
        });
    }
}

type Generate = fn(&Model, &GenerateOptions) -> wuerstchen::Result<Vec<Image>>;

fn check_cancelling(path: PathBuf, stops: &[usize], generate: Generate) {
    let model = open(&path).unwrap();
    let options = options_for(&model, "a red apple");
    let expected = picture(&model, &options);
    // The reports of one picture: 6 steps of Stage C, 3 of B, 1 of A.
    for &stop_at in stops {
        let token = CancelToken::new();
        let mut stopped = options.clone();
        stopped.set_cancel(Some(&token)).unwrap();
        let (seen, canceller) = (Arc::new(AtomicUsize::new(0)), token.clone());
        let counter = seen.clone();
        if stop_at == 0 {
            token.cancel();
        }
        let listen = move |_: &Progress| {
            if counter.fetch_add(1, Ordering::Relaxed) + 1 == stop_at {
                canceller.cancel();
            }
        };
        stopped.set_progress(Some(Arc::new(listen))).unwrap();
        let what = format!("{}, stopped at report {stop_at}", path.display());
        assert!(matches!(generate(&model, &stopped), Err(Error::Cancelled)), "{what}");
        if stop_at == 0 {
            assert_eq!(seen.load(Ordering::Relaxed), 0, "a cancel before the start counts");
        }
        assert_same(&picture(&model, &options), &expected, "after a cancelled call");
        token.reset();
        assert_same(&picture(&model, &stopped), &expected, "the same options, token reset");
    }
    for _ in 0..3 {
        let job = Job::start(&model, &options).unwrap();
        job.cancel();
        assert!(job.wait(Duration::from_secs(60)));
        assert!(matches!(job.images(), Err(Error::Cancelled) | Ok(_)));
        drop(Job::start(&model, &options).unwrap());
    }
    assert_same(&picture(&model, &options), &expected, "after cancelled jobs");
}

fn entry(tensor: &Tensor, i: usize) -> Tensor {
    let part = tensor.narrow(i, 1).unwrap();
    Tensor::from_slice(part.dims(), part.slice::<f32>().unwrap()).unwrap()
}

#[test]
fn latents_of_one_text_or_of_many() {
    for path in models() {
        let model = open(&path).unwrap();
        let texts = ["a red apple", "a cat", "a blue car on the moon"];
        let together = model.encode_text(Stage::C, &texts).unwrap();
        let negative = model.encode_text(Stage::C, &["a dog"]).unwrap();
        let together_b = model.encode_text(Stage::B, &texts).unwrap();
        let negative_b = model.encode_text(Stage::B, &["a dog"]).unwrap();
        let mut options = bare(&model);
        options.set_seed(5).unwrap();
        let all = model.stage_c_sample(&together, Some(&negative), None, &options).unwrap();
        let tokens = model.stage_b_sample(&all, &together_b, Some(&negative_b), &options).unwrap();
        for (i, text) in texts.iter().enumerate() {
            let alone = model.encode_text(Stage::C, &[text]).unwrap();
            assert_eq!(alone.bytes().unwrap(), entry(&together, i).bytes().unwrap(), "text {i}");
            options.set_seed(5 + i as u64).unwrap();
            let latents = model.stage_c_sample(&alone, Some(&negative), None, &options).unwrap();
            assert_eq!(latents.bytes().unwrap(), entry(&all, i).bytes().unwrap(), "latents {i}");
            let alone = model.encode_text(Stage::B, &[text]).unwrap();
            let own = model.stage_b_sample(&latents, &alone, Some(&negative_b), &options).unwrap();
            assert_eq!(own.bytes().unwrap(), tokens.narrow(i, 1).unwrap().bytes().unwrap(), "tokens {i}");
        }
        // v1's Stage B makes tokens, v2's Stage A's latents.
        let expected = if model.info().generation == 1 { DType::I64 } else { DType::F32 };
        assert_eq!((all.dtype(), tokens.dtype()), (DType::F32, expected));
    }
}

/// The stages one after the other make the picture that a whole generation makes.
#[test]
fn stages_compose_to_a_generation() {
    for path in models() {
        let model = open(&path).unwrap();
        let v1 = model.info().generation == 1;
        let settings: [&dyn Fn(&mut GenerateOptions); 5] = [
            &|_| {},
            &|options| options.set_stage_c_sampler(Sampler::Ddim).unwrap(),
            &|options| {
                options.set_stage_c(2, 1.0).unwrap();
                options.set_stage_b(2, 1.0).unwrap();
            },
            &|options| options.set_stage_c_timesteps(&[0.9, 0.4, 0.1]).unwrap(),
            &|options| match v1 {
                true => {
                    options.set_size(48, 80).unwrap();
                    options.set_stage_b_choice(Choice::Quant).unwrap();
                }
                false => options.set_size(256, 128).unwrap(),
            },
        ];
        for (number, change) in settings.into_iter().enumerate() {
            let mut options = bare(&model);
            change(&mut options);
            let prompts = [("a red apple", "a cat"), ("a star", "")];
            for (prompt, negative) in prompts {
                options.add_prompt(prompt, if negative.is_empty() { None } else { Some(negative) }).unwrap();
            }
            let expected = model.generate(&options).unwrap();
            let text = model.encode_text(Stage::C, &prompts.map(|p| p.0)).unwrap();
            let negative = model.encode_text(Stage::C, &prompts.map(|p| p.1)).unwrap();
            let latents = model.stage_c_sample(&text, Some(&negative), None, &options).unwrap();
            let text = model.encode_text(Stage::B, &prompts.map(|p| p.0)).unwrap();
            let negative = model.encode_text(Stage::B, &prompts.map(|p| p.1)).unwrap();
            let tokens = model.stage_b_sample(&latents, &text, Some(&negative), &options).unwrap();
            let pixels = model.stage_a_decode(&tokens).unwrap();
            for (i, expected) in expected.iter().enumerate() {
                let found = from_pixels(&pixels.narrow(i, 1).unwrap()).unwrap();
                assert_same(&found, expected, &format!("{}: settings {number}", path.display()));
            }
        }
        // Without a negative text both mean the empty prompt.
        let options = short(&model, "a cat");
        let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
        let latents = model.stage_c_sample(&text, None, None, &options).unwrap();
        let text = model.encode_text(Stage::B, &["a cat"]).unwrap();
        let tokens = model.stage_b_sample(&latents, &text, None, &options).unwrap();
        let pixels = model.stage_a_decode(&tokens).unwrap();
        assert_same(&from_pixels(&pixels).unwrap(), &picture(&model, &options), "no negative text");
    }
}

/// Freed activations are used again: memory does not grow from picture to picture.
#[test]
fn memory_does_not_grow() {
    for path in models() {
        let model = open(&path).unwrap();
        assert_eq!(model.info().bytes_host, 0);
        let mut options = short(&model, "a red apple");
        options.set_images_per_prompt(2).unwrap();
        let (mut held, mut images) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            images = model.generate(&options).unwrap();
            held.push(model.info().bytes_host);
        }
        assert!(held[0] > 0 && held[1..].iter().all(|&bytes| bytes == held[1]), "bytes held: {held:?}");
        // A thousand floats for each pixel and picture would be too much.
        let (width, height) = (images[0].width(), images[0].height());
        let bound = 2 * u64::from(width * height) * 4 * 1000 + (16 << 20);
        assert!(held[4] < bound, "{} bytes held, more than {bound}", held[4]);
    }
}

/// Pictures of many sizes leave no more behind than a few of the largest.
#[test]
fn memory_of_many_sizes_is_bounded() {
    check_many_sizes(tiny(), 384, 16);
    check_many_sizes(v2("model"), 512, 128);
}

fn check_many_sizes(path: PathBuf, greatest: u32, multiple: usize) {
    let model = open(&path).unwrap();
    let sized = |width: u32, height: u32| {
        let mut options = short(&model, "a red apple");
        options.set_stage_c(1, 3.0).unwrap();
        options.set_stage_b(1, 2.0).unwrap();
        options.set_size(width, height).unwrap();
        model.generate(&options).unwrap();
        model.info().bytes_host
    };
    let largest = sized(greatest, greatest);
    let mut most = largest;
    for side in (multiple as u32..=greatest).step_by(multiple) {
        most = most.max(sized(side, greatest)).max(sized(greatest, side));
    }
    assert!(most <= 4 * largest, "{most} bytes held after many sizes, {largest} after the largest");
}

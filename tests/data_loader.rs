//! The data loader of training: what it reads, in which order, and that it goes on where it stood.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/data.rs"]
mod data;

use std::collections::BTreeSet;

use data::*;
use wuerstchen::Error;
use wuerstchen::training::data::{
    Crop, DataOptions, Loader, MetadataFilter, Passes, Position, Reason, Skipped,
};

#[test]
fn folders_are_read_in_order() {
    let folder = Folder::new();
    folder.write("b/2.jpg", jpeg(2));
    folder.write("b/2.txt", "  picture 2 \n");
    folder.write("a.v2.WEBP", webp(1));
    folder.write("a.v2.txt", "\u{FEFF}picture 1");
    folder.write("b/c/3.jpeg", jpeg(3));
    folder.write("b/c/3.txt", "picture 3");
    folder.write("0.png", png(0));
    folder.write("0.txt", "picture 0");
    folder.write("notes.md", "nothing to see");
    folder.write(".hidden.png", "nothing to see");
    folder.write(".git/x.png", "nothing to see");
    // A link that leads in a circle.
    std::os::unix::fs::symlink(&folder.0, folder.0.join("b/circle")).unwrap();
    let mut options = plain(&folder.0);
    options.set_batch_size(3).unwrap();
    let mut loader = Loader::new(&options).unwrap();
    let first = loader.next_batch().unwrap().unwrap();
    assert_eq!(first.keys, ["0.png", "a.v2.WEBP", "b/2.jpg"]);
    assert_eq!((first.images[0].width(), first.images[0].height()), (8, 8));
    let second = loader.next_batch().unwrap().unwrap();
    assert_eq!(second.keys, ["b/c/3.jpeg"]);
    assert!(loader.next_batch().unwrap().is_none() && loader.next_batch().unwrap().is_none());
    assert_eq!(loader.skipped(), Skipped::default());
    assert_eq!(numbers_of(&[first, second]), [0, 1, 2, 3]);
    // Two folders make one set.
    options.add_path(folder.0.join("b/c"));
    assert_eq!(numbers(&options), [0, 1, 2, 3, 3]);
}

#[test]
fn lists_of_captions() {
    let folder = Folder::new();
    folder.write("a/1.png", png(1));
    folder.write("2.png", png(2));
    folder.write("unlisted.png", png(9));
    folder.write("unlisted.txt", "picture 9");
    folder.write("0.tar", "not looked at");
    let lines = concat!(
        "{\"file_name\": \"2.png\", \"text\": \"picture 2\", \"pwatermark\": 0.1}\n\r\n",
        "{\"text\": \"picture 1\", \"file_name\": \"./a/1.png\", \"pwatermark\": NaN}\n",
        "{\"file_name\": \"../x.png\", \"text\": \"outside\"}\n",
        "{\"file_name\": \"/etc/passwd\", \"text\": \"outside\"}\n",
        "{\"file_name\": \"2.png\"}\n",
        "{\"file_name\": \"none.png\", \"text\": \"not there\"}\n",
        "rubbish",
    );
    folder.write("metadata.jsonl", lines);
    let (keys, skipped, heard) = with_log(plain(&folder.0));
    assert_eq!(keys, ["2.png", "./a/1.png"]);
    assert_eq!(skipped, Skipped { unreadable: 4, no_caption: 1, ..Default::default() });
    assert_eq!(heard.len(), 5);
    assert_eq!((heard[2].key.as_str(), heard[2].reason), ("2.png", Reason::NoCaption));
    assert!(heard[0].message.contains("metadata.jsonl, record 3"), "{}", heard[0].message);
    assert_eq!(heard[4].key, "metadata.jsonl:7");
    let mut options = plain(&folder.0);
    options.set_filter(MetadataFilter { max_pwatermark: Some(0.5), ..Default::default() }).unwrap();
    assert_eq!(numbers(&options), [2]);
    folder.write("captions.jsonl", "\u{FEFF}{\"file_name\": \"a/1.png\", \"text\": \"picture 1\"}");
    assert_eq!(numbers(&plain(&folder.0)), [1], "captions.jsonl comes first");
}

#[test]
fn shards_are_read_in_order() {
    let folder = Folder::shards(&[3, 0, 2]);
    assert_eq!(numbers(&plain(&folder.0)), [0, 1, 2, 3, 4]);
    assert_eq!(numbers(&plain(folder.0.join("{0..2}.tar"))), [0, 1, 2, 3, 4]);
    assert_eq!(numbers(&plain(folder.0.join("{2,0}.tar"))), [3, 4, 0, 1, 2]);
    let mut options = plain(folder.0.join("2.tar"));
    options.add_path(folder.0.join("0.tar"));
    let batches = batches(&options, usize::MAX);
    assert_eq!(batches[0].keys, ["2.tar/0003", "2.tar/0004", "0.tar/0000", "0.tar/0001"]);
    // A file whose name looks like a pattern is itself.
    let mut shard = Tar::new();
    shard.record(7);
    let path = folder.write("{0..2}.tar", shard.end());
    assert_eq!(numbers(&plain(path)), [7]);
}

#[test]
fn members_are_grouped_by_key() {
    let folder = Folder::new();
    let mut shard = Tar::new();
    let long = "long/".repeat(60);
    shard
        .add("dir.d/a.png", png(1))
        .add("dir.d/a.txt", "picture 1")
        .add("dir.d/a.json", "{}")
        .add("dir.d/a.cls", "3");
    shard.add("index.txt", "no record").add("._b.png", "resource fork");
    shard
        .add("b.seg.png", "another kind")
        .add("b.TXT", "picture 2")
        .add("b.JPG", jpeg(2))
        .add("b.png", png(9));
    shard.add("c.jpg", jpeg(3)).add("d.txt", "of another key");
    shard.add(&format!("{long}e.webp"), webp(4)).add(&format!("{long}e.txt"), "picture 4");
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    shard.0.append_link(&mut link, "f.png", "/etc/passwd").unwrap();
    folder.write("a.tar", shard.end());
    let (keys, skipped, heard) = with_log(plain(&folder.0));
    assert_eq!(keys, ["a.tar/dir.d/a".to_owned(), "a.tar/b".to_owned(), format!("a.tar/{long}e")]);
    assert_eq!(skipped, Skipped { no_caption: 1, ..Default::default() });
    assert_eq!(heard[0].key, "a.tar/c");
    assert_eq!(numbers(&plain(&folder.0)), [1, 2, 4]);
}

#[test]
fn shuffling_is_a_permutation_of_its_own_in_every_epoch() {
    for folder in [Folder::pictures(30), Folder::shards(&[10, 5, 15])] {
        let all: Vec<u8> = (0..30).collect();
        let mut orders = BTreeSet::new();
        for seed in 0..3 {
            let mut options = shuffled(&folder.0, seed);
            options.set_batch_size(30).unwrap();
            options.set_passes(Passes::Endless);
            for batch in batches(&options, 3) {
                let order = numbers_of(&[batch]);
                assert_eq!(
                    order.iter().copied().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>(),
                    all
                );
                orders.insert(order);
            }
        }
        assert_eq!(orders.len(), 9, "every seed and epoch has an order of its own");
    }
    // A buffer of 1 keeps the records of a shard together, in an order of chance.
    let folder = Folder::shards(&[6; 5]);
    let mut options = shuffled(&folder.0, 1);
    options.set_shuffle_buffer(1).unwrap();
    let order = numbers(&options);
    assert_eq!(order.len(), 30);
    assert!(order.chunks(6).all(|part| part.iter().all(|n| n / 6 == part[0] / 6)), "{order:?}");
    assert_ne!(order, (0..30).collect::<Vec<_>>());
    options.set_shuffle_buffer(7).unwrap();
    let order = numbers(&options);
    let shards_of = |part: &[u8]| part.iter().map(|n| n / 6).collect::<BTreeSet<_>>().len();
    assert_eq!(order.chunks(12).map(shards_of).collect::<Vec<_>>(), [2, 2, 1]);
}

#[test]
fn batches_of_endless_passes_are_full() {
    let folder = Folder::pictures(3);
    let mut options = plain(&folder.0);
    options.set_passes(Passes::Endless);
    let batches = batches(&options, 4);
    assert_eq!(numbers_of(&batches), [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0]);
    let mut loader = Loader::new(&options).unwrap();
    take(&mut loader, 4);
    assert_eq!((loader.position().epoch, loader.position().taken), (5, 1));
}

/// Sources with things to skip in the middle of everything.
fn difficult() -> [Folder; 2] {
    let folder = Folder::pictures(21);
    let shards = Folder::shards(&[5, 7, 0, 6, 3]);
    folder.write("003.png", "broken");
    folder.write("020.png", "broken");
    std::fs::remove_file(folder.0.join("011.txt")).unwrap();
    let mut shard = Tar::new();
    shard.record(100).add("x.png", "broken").add("x.txt", "broken").record(101);
    shards.write("3.tar", shard.cut());
    [folder, shards]
}

#[test]
fn a_killed_run_goes_on_with_the_same_bits() {
    for folder in difficult() {
        for (passes, buffer) in [(Passes::Endless, 8), (Passes::One, 1), (Passes::One, 100)] {
            let mut options = shuffled(&folder.0, 9);
            options.set_passes(passes);
            options.set_shuffle_buffer(buffer).unwrap();
            options.set_batch_size(3).unwrap();
            let mut loader = Loader::new(&options).unwrap();
            let (mut positions, mut all) = (vec![loader.position()], Vec::new());
            while let Some(batch) = loader.next_batch().unwrap().filter(|_| all.len() < 15) {
                all.push(batch);
                positions.push(loader.position());
            }
            for (i, position) in positions.iter().enumerate() {
                let saved = serde_json::to_string(position).unwrap();
                let position: Position = serde_json::from_str(&saved).unwrap();
                let mut resumed = Loader::resume(&options, &position).unwrap();
                assert_eq!(resumed.position(), position);
                let rest = take(&mut resumed, all.len() - i);
                assert_eq!(content(&rest), content(&all[i..]), "from batch {i}");
                if passes == Passes::One {
                    assert!(resumed.next_batch().unwrap().is_none());
                }
            }
        }
    }
}

#[test]
fn positions_of_something_else_are_refused() {
    let folder = Folder::pictures(8);
    let options = shuffled(&folder.0, 1);
    let mut loader = Loader::new(&options).unwrap();
    loader.next_batch().unwrap();
    let position = loader.position();
    let refused = |options: &DataOptions, position: &Position| {
        let error = error(Loader::resume(options, position));
        assert!(
            matches!(error, Error::InvalidArgument { .. }) && error.to_string().contains("position"),
            "{error}"
        );
    };
    refused(&shuffled(&folder.0, 2), &position);
    refused(&plain(&folder.0), &position);
    let mut other = options.clone();
    other.set_rank(1, 2).unwrap();
    refused(&other, &position);
    for (shard, taken) in [(0, 9), (0, u64::MAX), (1, 1), (2, 0), (u64::MAX, 0)] {
        refused(&options, &Position { shard, taken, ..position.clone() });
    }
    // Neither the number of threads nor the batch size decides the order, and the data may move.
    let mut other = options.clone();
    other.set_batch_size(1).unwrap();
    other.set_threads(3).unwrap();
    let rest = take(&mut Loader::resume(&other, &position).unwrap(), 9);
    let next = take(&mut loader, 1);
    assert_eq!(content(&rest), content(&next));
    folder.write("zzz.png", png(8));
    refused(&options, &position);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for folder in difficult() {
        let run = |threads: usize, prefetch: usize| {
            let mut options = shuffled(&folder.0, 5);
            options.set_passes(Passes::Endless);
            options.set_threads(threads).unwrap();
            options.set_prefetch(prefetch).unwrap();
            let mut loader = Loader::new(&options).unwrap();
            let batches = take(&mut loader, 12);
            (content(&batches), loader.position(), loader.skipped())
        };
        let one = run(1, 1);
        assert!(one.2.unreadable > 0);
        for (threads, prefetch) in [(2, 1), (5, 3), (16, 1)] {
            assert!(run(threads, prefetch) == one, "{threads} threads");
        }
    }
}

#[test]
fn ranks_share_the_records() {
    for folder in [Folder::pictures(23), Folder::shards(&[9, 4, 0, 7, 3])] {
        for ranks in [2, 3, 30] {
            let mut seen = Vec::new();
            let mut sizes = Vec::new();
            for rank in 0..ranks {
                let mut options = shuffled(&folder.0, 3);
                options.set_rank(rank, ranks).unwrap();
                let mut loader = Loader::new(&options).unwrap();
                let mut size = 0;
                let outcome = loop {
                    match loader.next_batch() {
                        Ok(Some(batch)) => {
                            size += batch.keys.len();
                            seen.extend(batch.keys);
                        }
                        other => break other.map(drop),
                    }
                };
                assert_eq!(outcome.is_err(), size == 0, "a share of nothing is an error");
                sizes.push(size);
            }
            assert_eq!(seen.len(), 23);
            assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 23, "disjoint");
            assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
        }
    }
}

#[test]
fn loaders_end_when_they_are_dropped() {
    let folder = Folder::pictures(40);
    for taken in [0, 1, 3] {
        let mut options = shuffled(&folder.0, 1);
        options.set_passes(Passes::Endless);
        options.set_threads(4).unwrap();
        let mut loader = Loader::new(&options).unwrap();
        take(&mut loader, taken);
        drop(loader);
    }
}

#[test]
fn crops_and_flips_follow_the_seed() {
    let folder = Folder::pictures(40);
    let columns = |options: &DataOptions| -> Vec<(u8, bool)> {
        let mut options = options.clone();
        options.set_side(12).unwrap();
        let batches = batches(&options, usize::MAX);
        let images = batches.iter().flat_map(|batch| &batch.images);
        // Blue grows from left to right: it tells where the square lies and whether it is mirrored.
        images
            .map(|image| {
                (image.data()[2].min(image.data()[11 * 3 + 2]), image.data()[2] > image.data()[11 * 3 + 2])
            })
            .collect()
    };
    assert!(columns(&plain(&folder.0)).iter().all(|column| *column == (32, false)));
    let mut options = plain(&folder.0);
    options.set_crop(Crop::Random);
    options.set_flip(0.5).unwrap();
    let some = columns(&options);
    assert_eq!(some, columns(&options));
    let starts: BTreeSet<u8> = some.iter().map(|column| column.0).collect();
    assert_eq!(starts, (0..=8).map(|x| x * 8).collect(), "every place of the square");
    assert!((8..32).contains(&some.iter().filter(|column| column.1).count()));
    options.set_seed(1);
    assert_ne!(some, columns(&options));
}

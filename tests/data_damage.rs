//! What the data loader of training skips, and what it refuses: damaged files, files made to harm, nothing at all.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/data.rs"]
mod data;

use data::*;
use wuerstchen::Error;
use wuerstchen::training::data::{DataOptions, Loader, MetadataFilter, Passes, Reason, Skipped};

#[test]
fn what_cannot_be_used_is_skipped_and_named() {
    let folder = Folder::pictures(6);
    folder.write("000.png", b"");
    folder.write("001.png", &png(1)[..60]);
    folder.write("002.txt", b"caf\xE9");
    std::fs::remove_file(folder.0.join("003.txt")).unwrap();
    folder.write("005.txt", "");
    folder.write("006.png", png(6));
    folder.write("006.txt", "x".repeat(70_000));
    // A picture of 16384 x 16384 pixels, which it does not have.
    let mut bomb = png(7);
    bomb[16..24].copy_from_slice(&[0, 0, 0x40, 0, 0, 0, 0x40, 0]);
    let crc = png_crc(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.to_be_bytes());
    folder.write("007.png", bomb);
    folder.write("007.txt", "a bomb");
    std::os::unix::fs::symlink("/dev/zero", folder.0.join("008.png")).unwrap();
    folder.write("008.txt", "endless");
    std::os::unix::fs::symlink("nowhere", folder.0.join("009.png")).unwrap();
    folder.write("009.txt", "not there");
    let (keys, skipped, heard) = with_log(plain(&folder.0));
    assert_eq!(keys, ["004.png", "005.png"]);
    assert_eq!(skipped, Skipped { unreadable: 7, no_caption: 1, ..Default::default() });
    let heard: Vec<_> =
        heard.iter().map(|skip| (skip.key.as_str(), skip.reason, skip.message.as_str())).collect();
    let said = |key: &str, reason: Reason, word: &str| {
        let found = heard.iter().find(|skip| skip.0 == key).unwrap();
        assert!(found.1 == reason && found.2.contains(word), "{found:?}");
    };
    said("000.png", Reason::Unreadable, "000.png");
    said("002.png", Reason::Unreadable, "not UTF-8 at byte 3");
    said("003.png", Reason::NoCaption, "caption");
    said("006.png", Reason::Unreadable, "65536");
    said("007.png", Reason::Unreadable, "67108864 pixels, found 16384 x 16384");
    said("008.png", Reason::Unreadable, "device");
}

fn png_crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 * (crc & 1)))
    })
}

#[test]
fn filters_look_at_metadata() {
    let good = r#"{"original_width": 800, "original_height": 600, "pwatermark": 0.1, "AESTHETIC_SCORE": 5.5, "punsafe": 0}"#;
    let folder = Folder::pictures(4);
    let shards = Folder::new();
    let mut shard = Tar::new();
    let metadata = [Some(good.to_owned()), Some(good.replace("0.1", "0.9")), None, Some("rubbish".into())];
    for (i, metadata) in metadata.iter().enumerate() {
        shard.record(i as u8);
        if let Some(metadata) = metadata {
            folder.write(&format!("{i:03}.json"), metadata);
            shard.add(&format!("{i:04}.json"), metadata);
        }
    }
    shards.write("0.tar", shard.end());
    for path in [&folder.0, &shards.0] {
        assert_eq!(numbers(&plain(path)), [0, 1, 2, 3], "no filter, no need of metadata");
        let mut options = plain(path);
        options.set_filter(MetadataFilter::authors()).unwrap();
        let (keys, skipped, heard) = with_log(options);
        assert_eq!((keys.len(), skipped), (1, Skipped { filtered: 3, ..Default::default() }));
        assert!(heard[0].message.contains("pwatermark: expected at most 0.5, found 0.9"), "{:?}", heard[0]);
        assert!(heard[1].message.contains("no metadata"), "{:?}", heard[1]);
    }
}

#[test]
fn damaged_shards_are_used_up_to_the_damage() {
    let whole = {
        let mut shard = Tar::new();
        for i in 0..4 {
            shard.record(i);
        }
        shard.end()
    };
    let folder = Folder::new();
    let mut other = Tar::new();
    other.record(9);
    folder.write("1.tar", other.end());
    let record = (whole.len() - 1024) / 4;
    for len in 0..whole.len() {
        // All places would take long: those around the edges of blocks, and some within.
        if len % 512 > 2 && len % 512 < 510 && len % 97 != 0 {
            continue;
        }
        folder.write("0.tar", &whole[..len]);
        let (keys, skipped, heard) = with_log(plain(&folder.0));
        assert!(keys.last().unwrap() == "1.tar/0009");
        let used = keys.len() - 1;
        // The caption's padding may be missing.
        let expected = (len.max(512) / record).min(4);
        assert!(
            used == expected || (used == expected + 1 && len % record > record - 512),
            "{used} records of {len} bytes"
        );
        // One block of zeros is an end.
        let intact = len >= whole.len() - 512;
        assert_eq!(skipped.damaged_shards, u64::from(!intact), "{len} bytes: {heard:?}");
        assert!(
            intact || heard.iter().any(|skip| skip.key == "0.tar" && skip.reason == Reason::DamagedShard)
        );
        assert_eq!(skipped.unreadable, 0);
    }
    // A header that is overwritten.
    let mut bytes = whole.clone();
    bytes[2 * record + 3] ^= 1;
    folder.write("0.tar", bytes);
    let (keys, skipped, heard) = with_log(plain(&folder.0));
    assert_eq!((keys.len(), skipped.damaged_shards), (3, 1));
    assert!(
        heard[0].message.contains("after 1 records") || heard[0].message.contains("after 2 records"),
        "{heard:?}"
    );
    // What is no archive at all.
    folder.write("0.tar", [0x1F, 0x8B].repeat(5000));
    let (keys, skipped, _) = with_log(plain(&folder.0));
    assert_eq!((keys.len(), skipped.damaged_shards), (1, 1));
}

#[test]
fn archives_made_to_harm() {
    let folder = Folder::new();
    let mut good = Tar::new();
    good.record(9);
    folder.write("1.tar", good.end());
    let header = |name: &str, size: u64, kind: tar::EntryType| {
        let mut header = tar::Header::new_gnu();
        header.set_path(name).unwrap();
        header.set_size(size);
        header.set_entry_type(kind);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let padded = |mut bytes: Vec<u8>| {
        bytes.resize(bytes.len().next_multiple_of(512), b'x');
        bytes
    };
    let pax = |text: &str| {
        let mut bytes = header("x", text.len() as u64, tar::EntryType::XHeader);
        bytes.extend(padded(text.into()));
        bytes
    };
    use tar::EntryType::{GNULongName, GNUSparse, Regular, XHeader};
    let long_name =
        [header("x", 8 << 20, GNULongName), vec![b'n'; 8 << 20], header("a", 0, Regular)].concat();
    let archives: Vec<(&str, Vec<u8>)> = vec![
        ("a size beyond the file", header("a.png", 1 << 40, Regular)),
        ("a size beyond everything", header("a.png", u64::MAX, Regular)),
        ("a size that overflows with its block", header("a.png", u64::MAX - 511, Regular)),
        ("a name of 8 MiB", long_name),
        ("a name that is not there", header("x", 1 << 50, GNULongName)),
        ("an extended header that is not there", header("x", u64::MAX / 2, XHeader)),
        (
            "a size in an extended header",
            [pax("28 size=9223372036854775807\n"), header("a.png", 3, Regular)].concat(),
        ),
        ("an extended header of an extended header", [pax("9 size=1\n"), pax("9 size=2\n")].concat()),
        ("a sparse file", [header("a.png", 512, GNUSparse), vec![0; 512]].concat()),
    ];
    for (what, mut bytes) in archives {
        bytes.extend(vec![0; 1024]);
        folder.write("0.tar", bytes);
        let (keys, skipped, heard) = with_log(plain(&folder.0));
        assert_eq!(keys, ["1.tar/0009"], "{what}");
        assert_eq!(skipped.damaged_shards, 1, "{what}: {heard:?}");
    }
    // Every bit of the headers of a small archive.
    let mut small = Tar::new();
    small.add("a.png", png(1)).add("a.txt", "picture 1");
    let small = small.end();
    let second = 512 + png(1).len().next_multiple_of(512);
    for bit in (0..512 * 8).step_by(3).flat_map(|bit| [bit, second * 8 + bit]) {
        let mut bytes = small.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        folder.write("0.tar", bytes);
        let (keys, ..) = with_log(plain(&folder.0));
        assert_eq!(keys.last().unwrap(), "1.tar/0009", "bit {bit}");
    }
}

#[test]
fn nothing_to_train_with_is_an_error_that_names_the_path() {
    let folder = Folder::new();
    let empty = folder.0.join("empty");
    std::fs::create_dir(&empty).unwrap();
    let message = error(Loader::new(&plain(&empty))).to_string();
    assert!(
        message.contains("empty") && message.contains(".webp") && message.contains("found none"),
        "{message}"
    );
    let message = error(Loader::new(&plain(folder.0.join("no/such")))).to_string();
    assert!(message.contains("no/such"), "{message}");
    let file = folder.write("x.zip", "x");
    assert!(error(Loader::new(&plain(file))).to_string().contains(".tar"));
    folder.write("0.tar", Tar::new().end());
    folder.write("2.tar", Tar::new().end());
    let error_of = |options: &DataOptions| Loader::new(options).unwrap().next_batch().unwrap_err();
    for passes in [Passes::One, Passes::Endless] {
        let mut options = plain(folder.0.join("{0,2}.tar"));
        options.set_passes(passes);
        let message = error_of(&options).to_string();
        assert!(message.contains("{0,2}.tar: expected at least one record"), "{message}");
    }
    let message = error(Loader::new(&plain(folder.0.join("{0..2}.tar")))).to_string();
    assert!(message.contains("1.tar"), "a shard that is missing: {message}");
    let pictures = Folder::pictures(3);
    let mut options = plain(&pictures.0);
    options.add_path(folder.0.join("0.tar"));
    assert!(error(Loader::new(&options)).to_string().contains("either folders"));
    // Endless passes over nothing usable end as well, and the error stays.
    let mut options = plain(&pictures.0);
    options.set_passes(Passes::Endless);
    options.set_filter(MetadataFilter::authors()).unwrap();
    let mut loader = Loader::new(&options).unwrap();
    for _ in 0..2 {
        let message = loader.next_batch().unwrap_err().to_string();
        assert!(message.contains("3 filtered"), "{message}");
    }
}

#[test]
fn a_shard_that_goes_away_is_an_error() {
    let folder = Folder::shards(&[4, 4]);
    let mut options = plain(&folder.0);
    options.set_prefetch(1).unwrap();
    options.set_passes(Passes::Endless);
    let mut loader = Loader::new(&options).unwrap();
    loader.next_batch().unwrap();
    let position = loader.position();
    std::fs::remove_file(folder.0.join("1.tar")).unwrap();
    let outcome = (0..4).find_map(|_| loader.next_batch().err());
    let error = outcome.unwrap();
    assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("1.tar")), "{error}");
    assert!(loader.next_batch().is_err());
    assert!(loader.position().epoch <= 1 && position.taken == 4);
}

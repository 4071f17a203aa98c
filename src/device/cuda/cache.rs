//! Compiled kernels on the disk: one file for each source, compiler and architecture. A cache that cannot be read or
//! written costs time, and nothing else.

use std::fs;
use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// What a file begins with; the numbers after it tell whether the rest is whole.
const MAGIC: &[u8; 8] = b"WSTCUBIN";

/// The folder of compiled kernels.
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// That of the user who runs the process: `$XDG_CACHE_HOME/wuerstchen`, or `~/.cache/wuerstchen`.
    pub fn of_user() -> Self {
        let of = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        let caches = of("XDG_CACHE_HOME").filter(|path| path.is_absolute());
        let caches = caches.or_else(|| of("HOME").map(|home| home.join(".cache")));
        Cache { folder: caches.map(|caches| caches.join("wuerstchen")) }
    }

    fn path(&self, key: &[u8]) -> Option<PathBuf> {
        let name = format!("{:016x}{:016x}.cubin", digest(0, key), digest(1, key));
        self.folder.as_ref().map(|folder| folder.join(name))
    }

    /// What was written under `key`, if it is whole.
    pub fn read(&self, key: &[u8]) -> Option<Vec<u8>> {
        let mut content = fs::read(self.path(key)?).ok()?;
        let header: [u8; 24] = content.get(..24)?.try_into().ok()?;
        let body = content.split_off(24);
        (header == self::header(key, &body)).then_some(body)
    }

    /// Keeps `image` under `key`: written beside and renamed, so that no reader sees a part.
    pub fn write(&self, key: &[u8], image: &[u8]) {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let Some((path, folder)) = self.path(key).zip(self.folder.as_ref()) else { return };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let beside = path.with_extension(format!("{}-{number}", std::process::id()));
        let written = fs::create_dir_all(folder)
            .and_then(|()| fs::write(&beside, [&header(key, image), image].concat()))
            .and_then(|()| fs::rename(&beside, &path));
        if written.is_err() {
            let _ = fs::remove_file(&beside);
        }
    }
}

fn header(key: &[u8], image: &[u8]) -> [u8; 24] {
    let mut header = [0; 24];
    header[..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&digest(key.len() as u64, image).to_le_bytes());
    header[16..].copy_from_slice(&(image.len() as u64).to_le_bytes());
    header
}

/// Of this build of the library alone: a later one may compute another, and compile again.
fn digest(salt: u64, bytes: &[u8]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    salt.hash(&mut hasher);
    bytes.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_damaged_is_not_read() {
        let folder = std::env::temp_dir().join(format!("wuerstchen-cache-{}", std::process::id()));
        let cache = Cache { folder: Some(folder.join("deep")) };
        assert!(cache.read(b"key").is_none());
        cache.write(b"key", b"an image");
        assert_eq!(cache.read(b"key").unwrap(), b"an image");
        assert!(cache.read(b"another").is_none());
        let path = cache.path(b"key").unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(cache.read(b"key").is_none(), "{length} bytes");
        }
        let mut other = whole;
        other[30] ^= 1;
        fs::write(&path, other).unwrap();
        assert!(cache.read(b"key").is_none());
        fs::remove_dir_all(folder).unwrap();
        Cache { folder: None }.write(b"key", b"nowhere");
    }
}

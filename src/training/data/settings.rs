//! Options of a data loader by name.

use super::filter::MetadataFilter;
use super::options::{Crop, DataOptions, Passes, Shuffle};
use crate::error::{Error, Result};

/// All names, for the message about one that is none.
const KEYS: &str = "one of side, crop, flip, batch_size, shuffle, shuffle_buffer, seed, passes, threads, prefetch, rank, \
                    filter, min_size, max_size, max_pwatermark, min_aesthetic, max_unsafe";

impl DataOptions {
    /// Any option by name, for configuration files: those that have a setter, with `crop` `centre` or `random`,
    /// `shuffle` `true` or `false`, `passes` `one` or `endless`, `rank` as in `0/4`; `filter` `authors` or `none`; and
    /// each bound of a [`MetadataFilter`].
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown key or a value that does not fit.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "side" => self.set_side(parsed(key, value)?)?,
            "crop" => {
                self.set_crop(named(key, value, &[("centre", Crop::Centre), ("random", Crop::Random)])?)
            }
            "flip" => self.set_flip(parsed(key, value)?)?,
            "batch_size" => self.set_batch_size(parsed(key, value)?)?,
            "shuffle" => {
                self.set_shuffle(named(key, value, &[("true", Shuffle::On), ("false", Shuffle::Off)])?);
            }
            "shuffle_buffer" => self.set_shuffle_buffer(parsed(key, value)?)?,
            "seed" => self.set_seed(parsed(key, value)?),
            "passes" => {
                self.set_passes(named(key, value, &[("one", Passes::One), ("endless", Passes::Endless)])?);
            }
            "threads" => self.set_threads(parsed(key, value)?)?,
            "prefetch" => self.set_prefetch(parsed(key, value)?)?,
            "rank" => {
                let (rank, ranks) = value.split_once('/').unwrap_or((value, ""));
                self.set_rank(parsed(key, rank)?, parsed(key, ranks)?)?;
            }
            "filter" => {
                let known = [("authors", MetadataFilter::authors()), ("none", MetadataFilter::default())];
                self.set_filter(named(key, value, &known)?)?;
            }
            _ => return self.set_bound(key, value),
        }
        Ok(())
    }

    /// One bound of the filter.
    fn set_bound(&mut self, key: &str, value: &str) -> Result<()> {
        let mut filter = self.filter;
        let bound = match key {
            "min_size" => &mut filter.min_size,
            "max_size" => &mut filter.max_size,
            "max_pwatermark" => &mut filter.max_pwatermark,
            "min_aesthetic" => &mut filter.min_aesthetic,
            "max_unsafe" => &mut filter.max_unsafe,
            _ => return Err(Error::argument("data option", KEYS, format!("{key:?}"))),
        };
        *bound = Some(parsed(key, value)?);
        self.set_filter(filter)
    }
}

fn parsed<T: std::str::FromStr>(key: &str, value: &str) -> Result<T> {
    let expected = format!("a value of type {}", std::any::type_name::<T>());
    value.trim().parse().map_err(|_| Error::argument(key, expected, format!("{value:?}")))
}

fn named<T: Copy>(key: &str, value: &str, known: &[(&str, T)]) -> Result<T> {
    let found = known.iter().find(|(name, _)| *name == value.trim());
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<String> = known.iter().map(|(name, _)| format!("{name:?}")).collect();
        Error::argument(key, names.join(" or "), format!("{value:?}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_listed_and_set() {
        let values = [
            "96", "centre", "0.5", "4", "false", "100", "7", "one", "3", "5", "1/2", "authors", "64", "512",
            "0.5", "4.5", "0.9",
        ];
        let keys: Vec<&str> = KEYS.trim_start_matches("one of ").split(", ").map(str::trim).collect();
        assert_eq!(keys.len(), values.len());
        let mut options = DataOptions::new("x");
        for (key, value) in keys.iter().zip(values) {
            options.set(key, value).unwrap();
            assert!(options.set(key, "?").unwrap_err().to_string().starts_with(key), "{key}");
        }
        assert!(options.side == 96 && options.crop == Crop::Centre && options.batch_size == 4);
        assert!(options.plan.shuffle == Shuffle::Off && options.plan.rank == 1 && options.plan.ranks == 2);
        assert!(options.filter.max_size == Some(512.0) && options.filter.max_unsafe == Some(0.9));
        options.set("filter", "none").unwrap();
        assert!(!options.filter.is_on());
        let message = options.set("flavour", "sweet").unwrap_err().to_string();
        assert!(message.starts_with("data option: expected one of side, crop"), "{message}");
    }
}

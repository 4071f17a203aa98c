//! The weights of LPIPS, from one file.

use std::path::Path;

use super::{Keys, Part};
use crate::error::{Error, Result};
use crate::nn::Params;
use crate::stages::perceptual::{CONVOLUTIONS, Perceptual, PerceptualConfig};
use crate::weights::Weights;
use crate::weights::lpips::{Prefix, key};

/// LPIPS over VGG16 from a safetensors file with torchvision's `features.N.weight` and `.bias` (below `net.` or not, or
/// below `net.sliceK.` as the `lpips` package writes them) and that package's `lin0.model.1.weight` to
/// `lin4.model.1.weight`. The widths are those of the file; other tensors are left alone.
///
/// # Errors
/// `Io` and `Format`, naming the file and the tensor.
pub fn perceptual(file: &Path) -> Result<Part<Perceptual>> {
    let weights = Weights::open_file(file)?;
    let first = "convolutions.0.weight";
    let found = Prefix::ALL.into_iter().find(|&prefix| weights.has(&key(first, prefix)));
    let prefix = found.unwrap_or(Prefix::Features);
    let mut channels = [0; CONVOLUTIONS];
    for (i, channels) in channels.iter_mut().enumerate() {
        let name = key(&format!("convolutions.{i}.weight"), prefix);
        let weight = weights.tensor(&name)?;
        let [outputs, ..] = weight.dims_of::<4>(&name).map_err(|_| {
            let place = format!("{}: {name}", file.display());
            Error::format(place, "shape [outputs, inputs, 3, 3]", weight.shape())
        })?;
        *channels = outputs;
    }
    let keys = Keys::new(move |name| key(name, prefix));
    let network = Perceptual::load(&Params::new(&keys.source(&weights)), PerceptualConfig { channels })?;
    Ok(Part { network, weights, keys })
}

//! The names of LPIPS weights: VGG16's convolutions as torchvision numbers them, the heads as the `lpips` package
//! calls them.

/// How many convolutions each block of VGG16 has. Numbers count the ReLU after each, and a pooling after each block.
const BLOCKS: [usize; 5] = [2, 2, 3, 3, 3];

/// What stands before the number of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefix {
    /// `features.N`: torchvision's VGG16.
    Features,
    /// `net.features.N`.
    NetFeatures,
    /// `net.sliceK.N`: a whole `lpips.LPIPS(net="vgg")`.
    Slices,
}

impl Prefix {
    /// All of them.
    pub const ALL: [Prefix; 3] = [Prefix::Features, Prefix::NetFeatures, Prefix::Slices];
}

/// The key of `convolutions.I.LEAF` or `heads.I.LEAF`.
pub fn key(name: &str, prefix: Prefix) -> String {
    let parts: Vec<&str> = name.splitn(3, '.').collect();
    match parts[..] {
        ["convolutions", number, leaf] => {
            let (block, number) = place(number.parse().unwrap_or_default());
            match prefix {
                Prefix::Features => format!("features.{number}.{leaf}"),
                Prefix::NetFeatures => format!("net.features.{number}.{leaf}"),
                Prefix::Slices => format!("net.slice{}.{number}.{leaf}", block + 1),
            }
        }
        ["heads", number, leaf] => format!("lin{number}.model.1.{leaf}"),
        _ => name.to_owned(),
    }
}

/// The block of a convolution, and its number among the layers of VGG16.
fn place(convolution: usize) -> (usize, usize) {
    let mut first = 0;
    for (block, &count) in BLOCKS.iter().enumerate() {
        if convolution < first + count {
            return (block, 2 * convolution + block);
        }
        first += count;
    }
    (BLOCKS.len() - 1, 2 * convolution + BLOCKS.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn convolutions_are_numbered_as_torchvision_does() {
        let numbers: Vec<usize> = (0..13).map(|i| place(i).1).collect();
        assert_eq!(numbers, [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]);
        assert_eq!(key("convolutions.2.bias", Prefix::Slices), "net.slice2.5.bias");
        assert_eq!(key("convolutions.12.weight", Prefix::Features), "features.28.weight");
        assert_eq!(key("heads.4.weight", Prefix::NetFeatures), "lin4.model.1.weight");
    }
}

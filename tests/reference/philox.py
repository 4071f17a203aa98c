"""The library's random numbers, from their definition: Philox 4x32-10 (Salmon et al., SC 2011) and Box and Muller.

Element e of the stream (seed, stream) is lane e % 4 of the cipher of the counter (e / 4, stream) under the key `seed`,
each as two words, the lower first. The words (a, b) of a pair make the normals r cos(2 pi v) and r sin(2 pi v) with
r = sqrt(-2 ln u), u = (a + 1/2) / 2^32, v = b / 2^32, in f64, rounded to f32. `python3 tests/reference/philox.py` holds
it to the published known answers.
"""

import numpy as np

ROUNDS = 10
MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
MASK, WORD = np.uint64(0xFFFFFFFF), np.uint64(32)

# What numbers are drawn for: the upper half of the stream's number. The lower half is the step.
LATENT_START, LATENT_STEP = 0, 1
DECODER_START, DECODER_STEP = 6, 7


def words(value):
    """The lower and the upper word of a 64-bit number, as 64-bit numbers."""
    return np.array([value & 0xFFFFFFFF, value >> 32], np.uint64)


def cipher(key, counter):
    """Philox of counters [n, 4] under one key [2], all words in 64 bits."""
    x, key = [counter[:, i] for i in range(4)], key.copy()
    for _ in range(ROUNDS):
        first, second = x[0] * MULTIPLIERS[0], x[2] * MULTIPLIERS[1]
        x = [(second >> WORD) ^ x[1] ^ key[0], second & MASK, (first >> WORD) ^ x[3] ^ key[1], first & MASK]
        key = (key + WEYL) & MASK
    return np.stack(x, 1)


def normals(seed, stream, count):
    """The first `count` elements of the stream of standard normals, F32."""
    blocks = -(-count // 4)
    counter = np.empty((blocks, 4), np.uint64)
    counter[:, 0], counter[:, 1] = np.arange(blocks), 0
    counter[:, 2:] = words(stream)
    pairs = cipher(words(seed), counter).reshape(-1, 2).astype(np.float64) / 2**32
    radius = np.sqrt(-2 * np.log(pairs[:, 0] + 0.5 / 2**32))
    angle = 2 * np.pi * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count].astype(np.float32)


def noise(seeds, draw, step, shape):
    """Noise [N, C, H, W] with one seed per sample. The elements of a sample are counted with the channels last."""
    n, channels, height, width = shape
    assert n == len(seeds)
    samples = [normals(seed, draw << 32 | step, channels * height * width) for seed in seeds]
    return np.stack(samples).reshape(n, height, width, channels).transpose(0, 3, 1, 2).copy()


def check_known_answers():
    """The vectors that Random123 publishes for philox4x32-10."""
    for key, counter, want in [
        ([0, 0], [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 2, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0xA4093822, 0x299F31D0],
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]:
        got = cipher(np.array(key, np.uint64), np.array([counter], np.uint64))
        assert got[0].tolist() == want, f"Philox of {counter} under {key}: {got[0].tolist()}"


if __name__ == "__main__":
    check_known_answers()
    print("the known answers of Philox 4x32-10 are met")

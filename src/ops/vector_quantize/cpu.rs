//! The nearest code on the CPU: distances to a block of codes at a time, the best of each lane kept apart.

use crate::ops::kernels::{mul_add, per_cpu};

/// Codes whose distances are computed side by side.
pub const BLOCK: usize = 64;

#[inline(always)]
fn body<const FMA: bool>(vector: &[f32], table: &[f32], row: usize) -> i64 {
    let (mut best, mut index) = ([f32::INFINITY; BLOCK], [0u32; BLOCK]);
    for first in (0..row).step_by(BLOCK) {
        let mut distance = [0f32; BLOCK];
        for (d, x) in vector.iter().enumerate() {
            for (sum, code) in distance.iter_mut().zip(&table[d * row + first..][..BLOCK]) {
                let difference = x - code;
                *sum = mul_add::<FMA>(difference, difference, *sum);
            }
        }
        for i in 0..BLOCK {
            let closer = distance[i] < best[i];
            best[i] = if closer { distance[i] } else { best[i] };
            index[i] = if closer { first as u32 } else { index[i] };
        }
    }
    let (mut nearest, mut least) = (0, f32::INFINITY);
    for i in 0..BLOCK {
        let id = i64::from(index[i]) + i as i64;
        if best[i] < least || (best[i] == least && id < nearest && least < f32::INFINITY) {
            (nearest, least) = (id, best[i]);
        }
    }
    nearest
}

per_cpu! {
    /// The number of the code nearest to `vector`; `table` is `[D, row]`. 0 if every distance is NaN or infinite.
    pub fn nearest(vector: &[f32], table: &[f32], row: usize) -> i64 = body
}

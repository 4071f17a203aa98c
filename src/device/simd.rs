//! The vector instructions of this processor, and elementary functions that compile to them.
//!
//! [`simd_dispatch!`](crate::simd_dispatch) compiles one plain loop for every [`Level`] and picks at run time.
//! The functions below are branch-free scalar code: inside such a loop the compiler turns them into vector
//! code. They round identically in a vector and alone, so a result never depends on where in a slice, in which
//! batch or on which thread its element lies.

use std::sync::atomic::{AtomicU8, Ordering};

/// Instruction sets that kernels are compiled for, poorest first. No processor has all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the target always has: SSE2 on x86-64. No fused multiply-add.
    Baseline = 1,
    /// NEON, which every 64-bit Arm processor has, fused multiply-add included.
    Neon = 2,
    /// AVX2, FMA and F16C.
    Avx2 = 3,
    /// AVX-512 F, VL, BW and DQ beside [`Level::Avx2`].
    Avx512 = 4,
}

/// The levels of this kind of processor, poorest first.
#[cfg(target_arch = "x86_64")]
const LEVELS: &[Level] = &[Level::Baseline, Level::Avx2, Level::Avx512];
#[cfg(target_arch = "aarch64")]
const LEVELS: &[Level] = &[Level::Baseline, Level::Neon];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const LEVELS: &[Level] = &[Level::Baseline];

impl Level {
    /// Every level that this processor has.
    pub fn available() -> impl Iterator<Item = Level> {
        let best = detect();
        LEVELS.iter().copied().filter(move |&level| level <= best)
    }
}

/// What [`level`] answers; 0 before the first call.
static LEVEL: AtomicU8 = AtomicU8::new(0);

/// The level that kernels run at: the best of this processor, unless [`limit`] lowered it.
pub fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = tests::forced() {
        return level;
    }
    match LEVEL.load(Ordering::Relaxed) {
        1 => Level::Baseline,
        2 => Level::Neon,
        3 => Level::Avx2,
        4 => Level::Avx512,
        _ => {
            let level = detect();
            LEVEL.store(level as u8, Ordering::Relaxed);
            level
        }
    }
}

/// Whether the processor has AVX-512 BF16 and multiplies bf16 faster with it than f32. AMD's do, at twice the rate. By their
/// published throughput Intel's do not: what is fast there is AMX, which stable Rust cannot reach.
#[cfg(target_arch = "x86_64")]
pub(super) fn fast_bf16() -> bool {
    // Asking costs a virtual machine a trip to its host.
    static FAST: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *FAST.get_or_init(|| {
        let vendor = std::arch::x86_64::__cpuid(0);
        let words = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        is_x86_feature_detected!("avx512bf16") && words.as_flattened() == b"AuthenticAMD"
    })
}

/// Lowers the level of the whole process to the best that is not above `most`, for benchmarks and tests. Call it
/// between runs only.
#[doc(hidden)]
pub fn limit(most: Level) {
    let level = Level::available().take_while(|&level| level <= most).last().unwrap_or(Level::Baseline);
    LEVEL.store(level as u8, Ordering::Relaxed);
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq");
    match (avx2, avx512) {
        (true, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        _ => Level::Baseline,
    }
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Level {
    Level::Neon
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Level {
    Level::Baseline
}

/// Defines a function whose body is compiled once per [`Level`] and dispatched at run time.
///
/// The constant after the name is true where [`fma`] is one instruction; hand it to the functions of this
/// module. Loops in the body vectorise if they have no branches and no order that vectors would change.
///
/// ```
/// wuerstchen::simd_dispatch! {
///     /// x <- x * sigmoid(x)
///     fn silu_all<const FMA: bool>(x: &mut [f32]) {
///         for v in x {
///             *v = wuerstchen::device::simd::silu::<FMA>(*v);
///         }
///     }
/// }
/// let mut x = [0.0, 1.0];
/// silu_all(&mut x);
/// assert!((x[1] - 0.7310586).abs() < 1e-6);
/// ```
#[macro_export]
macro_rules! simd_dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<const $fma:ident: bool>(
        $($arg:ident: $ty:ty),* $(,)?
    ) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn dispatched<const $fma: bool>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                dispatched::<true>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                dispatched::<true>($($arg),*)
            }
            match $crate::device::simd::level() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `level` answers only what the processor has.
                $crate::device::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::device::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "aarch64")]
                $crate::device::simd::Level::Neon => dispatched::<true>($($arg),*),
                _ => dispatched::<false>($($arg),*),
            }
        }
    };
}

/// a * b + c: one rounding if `FMA` (only where the processor has the instruction), two if not.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// The polynomial with these coefficients, lowest power first, by Horner's rule.
#[inline(always)]
fn polynomial<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[N - 1];
    for i in (0..N - 1).rev() {
        sum = fma::<FMA>(sum, x, coefficients[i]);
    }
    sum
}

/// Adding this to a number of magnitude below 2^22 rounds it to an integer, which is then in the low bits.
const ROUNDER: f32 = 12_582_912.0;
/// ln 2 in two parts: the first has few enough bits that its small multiples are exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// e^r for |r| <= ln(2) / 2: 1 + r + r^2 q(r) with a minimax fit of q; relative error 3.2e-9.
#[allow(clippy::excessive_precision)]
const EXP: [f32; 7] = [1.0, 1.0, 0.5, 1.666_651_859e-1, 4.166_620_509e-2, 8.368_918_805e-3, 1.395_053_864e-3];
/// Below this e^x is less than the smallest positive number.
const EXP_LEAST: f32 = -103.98;
/// Above this e^x overflows.
const EXP_MOST: f32 = 88.722_84;

/// e^x. Relative error below 2e-7 for normal results; 0 for -inf, inf where it overflows, NaN for NaN.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    let clamped = if x < EXP_LEAST { EXP_LEAST } else { x };
    let clamped = if clamped > EXP_MOST { EXP_MOST } else { clamped };
    let rounded = fma::<FMA>(clamped, std::f32::consts::LOG2_E, ROUNDER);
    let n = rounded - ROUNDER;
    let r = fma::<FMA>(n, -LN_2_LOW, fma::<FMA>(n, -LN_2_HIGH, clamped));
    let power = (rounded.to_bits() as i32).wrapping_sub(ROUNDER.to_bits() as i32);
    // 2^n in two factors, since one alone may overflow or be subnormal where the product is not.
    let half = power >> 1;
    let low = f32::from_bits((half.wrapping_add(127) as u32) << 23);
    let high = f32::from_bits((power.wrapping_sub(half).wrapping_add(127) as u32) << 23);
    let value = polynomial::<FMA, 7>(r, EXP) * low * high;
    let value = if x < EXP_LEAST { 0.0 } else { value };
    if x > EXP_MOST { f32::INFINITY } else { value }
}

/// Minimax fit of erf(x)/x for |x| < 3.92, as a quotient of polynomials in x^2; relative error 5.3e-8.
#[allow(clippy::excessive_precision)]
const ERF_ABOVE: [f32; 6] = [
    1.128_379_225_7,
    1.879_488_825_8e-1,
    5.237_885_937_1e-2,
    3.651_642_240_6e-3,
    2.808_837_452_9e-4,
    2.048_031_774_4e-6,
];
#[allow(clippy::excessive_precision)]
const ERF_BELOW: [f32; 6] =
    [1.0, 4.998_984_932_9e-1, 1.130_537_986_8e-1, 1.473_719_999_2e-2, 1.132_507_459_3e-3, 3.786_564_411_7e-5];
/// From here on erf rounds to 1.
const ERF_ONE: f32 = 3.92;

/// The number itself between `-limit` and `limit`, the nearer of them elsewhere; NaN for NaN.
#[inline(always)]
fn limited(x: f32, limit: f32) -> f32 {
    let x = if x > limit { limit } else { x };
    if x < -limit { -limit } else { x }
}

/// erf(x) = 2/sqrt(pi) * integral of e^(-t^2) from 0 to x. Relative error below 5e-7.
#[inline(always)]
pub fn erf<const FMA: bool>(x: f32) -> f32 {
    let x = limited(x, ERF_ONE);
    let square = x * x;
    let quotient = polynomial::<FMA, 6>(square, ERF_ABOVE) / polynomial::<FMA, 6>(square, ERF_BELOW);
    limited(x * quotient, 1.0)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// Minimax fit of (tanh(x)/x - 1) / x^2 in x^2 for |x| < 0.625; relative error of tanh 5.9e-10.
#[allow(clippy::excessive_precision)]
const TANH_SMALL: [f32; 6] = [
    -3.333_333_318e-1,
    1.333_330_498e-1,
    -5.395_955_016e-2,
    2.177_099_491e-2,
    -8.350_005_658e-3,
    2.298_939_019e-3,
];
const TANH_SPLIT: f32 = 0.625;

/// tanh(x) = x + x^3 p(x^2) near zero, else 1 - 2 / (1 + e^2x).
#[inline(always)]
pub fn tanh<const FMA: bool>(x: f32) -> f32 {
    let size = x.abs();
    let square = x * x;
    let small = fma::<FMA>(x * square, polynomial::<FMA, 6>(square, TANH_SMALL), x);
    let large = (1.0 - 2.0 / (1.0 + exp::<FMA>(size + size))).copysign(x);
    if size < TANH_SPLIT { small } else { large }
}

/// GELU, exact: 0.5 x (1 + erf(x / sqrt 2)).
#[inline(always)]
pub fn gelu<const FMA: bool>(x: f32) -> f32 {
    0.5 * x * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// GELU as CLIP's text encoder has it: x * sigmoid(1.702 x).
#[inline(always)]
pub fn quick_gelu<const FMA: bool>(x: f32) -> f32 {
    x * sigmoid::<FMA>(1.702 * x)
}

/// SiLU: x * sigmoid(x).
#[inline(always)]
pub fn silu<const FMA: bool>(x: f32) -> f32 {
    x * sigmoid::<FMA>(x)
}

/// 1 / sqrt(2 pi): the density of the normal distribution at 0.
const NORMAL_DENSITY: f32 = 0.398_942_3;

/// erfc(z) e^(z^2) for z >= 0 is about t times this polynomial in t = 1 / (1 + 0.3275911 z): Abramowitz and Stegun,
/// 7.1.26; the error of erfc is below 1.5e-7.
#[allow(clippy::excessive_precision)]
const ERFC_SCALED: [f32; 5] = [0.254_829_592, -0.284_496_736, 1.421_413_741, -1.453_152_027, 1.061_405_429];
const ERFC_SCALE: f32 = 0.327_591_1;

/// The derivative of [`gelu`], to within 3e-7: Phi(x) + x phi(x). Both terms are made of the same exponential.
#[inline(always)]
pub fn gelu_gradient<const FMA: bool>(x: f32) -> f32 {
    let density = exp::<FMA>(-0.5 * x * x);
    let t = 1.0 / fma::<FMA>(ERFC_SCALE * std::f32::consts::FRAC_1_SQRT_2, x.abs(), 1.0);
    let tail = 0.5 * t * polynomial::<FMA, 5>(t, ERFC_SCALED) * density;
    let distribution = if x < 0.0 { tail } else { 1.0 - tail };
    fma::<FMA>(x * NORMAL_DENSITY, density, distribution)
}

/// The derivative of x * sigmoid(`rate` * x).
#[inline(always)]
fn gated_gradient<const FMA: bool>(x: f32, rate: f32) -> f32 {
    // From here on the gate is 0 or 1, and the product with it must not meet an infinity.
    let x = (rate * x).clamp(-EXP_MOST, EXP_MOST);
    let gate = sigmoid::<FMA>(x);
    gate * fma::<FMA>(x, 1.0 - gate, 1.0)
}

/// The derivative of [`quick_gelu`].
#[inline(always)]
pub fn quick_gelu_gradient<const FMA: bool>(x: f32) -> f32 {
    gated_gradient::<FMA>(x, 1.702)
}

/// The derivative of [`silu`]: s (1 + x (1 - s)) with s = sigmoid(x).
#[inline(always)]
pub fn silu_gradient<const FMA: bool>(x: f32) -> f32 {
    gated_gradient::<FMA>(x, 1.0)
}

/// The derivative of [`sigmoid`]: s (1 - s) with s = sigmoid(x).
#[inline(always)]
pub fn sigmoid_gradient<const FMA: bool>(x: f32) -> f32 {
    let gate = sigmoid::<FMA>(x);
    gate * (1.0 - gate)
}

/// x if positive, else `slope` * x.
#[inline(always)]
pub fn leaky_relu(x: f32, slope: f32) -> f32 {
    if x > 0.0 { x } else { slope * x }
}

/// Asks for the cache line at `address` ahead of its use. Any address will do.
#[inline(always)]
pub fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults and changes nothing but caches; SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch never faults and changes nothing but caches.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// Asks for the cache line at `address` ahead of a write. Any address will do.
#[inline(always)]
pub fn prefetch_to_write<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as in `prefetch`.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_ET0>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as in `prefetch`.
    unsafe {
        std::arch::asm!("prfm pstl1keep, [{}]", in(reg) address, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// Runs `steps` rounds of 384 multiply-adds that never leave the registers, for benchmarks: the processor's peak.
#[doc(hidden)]
pub fn multiply_add_rounds(steps: usize) {
    match level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected.
        Level::Avx512 => unsafe { rounds_avx512(steps) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected.
        Level::Avx2 => unsafe { rounds_avx2(steps) },
        #[cfg(target_arch = "aarch64")]
        Level::Neon => rounds_neon(steps),
        _ => {
            let mut sums = [1f32; 32];
            for _ in 0..steps * 12 {
                sums.iter_mut().for_each(|v| *v = *v * 0.999 + 1e-6);
            }
            std::hint::black_box(sums);
        }
    }
}

/// As [`multiply_add_rounds`], of 768 multiply-adds of factors in bf16.
///
/// # Panics
/// If the processor has no instructions for them.
#[doc(hidden)]
pub fn multiply_add_bf16_rounds(steps: usize) {
    assert!(super::gemm::multiplies_bf16());
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instructions were detected.
    unsafe {
        rounds_bf16(steps)
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = steps;
}

/// Processor time that all threads of the process have used, in seconds, for benchmarks on busy machines.
#[doc(hidden)]
pub fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to a local; on failure it stays zero.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn rounds_avx512(steps: usize) {
    use std::arch::x86_64::*;
    let (factor, term) = (_mm512_set1_ps(std::hint::black_box(0.999)), _mm512_set1_ps(1e-6));
    let mut sums = [factor; 24];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, term);
        }
    }
    std::hint::black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounds_bf16(steps: usize) {
    use std::arch::x86_64::*;
    let factor = _mm512_set1_ps(std::hint::black_box(0.5));
    let factor = _mm512_cvtne2ps_pbh(factor, factor);
    let mut sums = [_mm512_setzero_ps(); 24];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, factor, factor);
        }
    }
    std::hint::black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn rounds_avx2(steps: usize) {
    use std::arch::x86_64::*;
    let (factor, term) = (_mm256_set1_ps(std::hint::black_box(0.999)), _mm256_set1_ps(1e-6));
    let mut sums = [factor; 12];
    for _ in 0..steps * 4 {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, term);
        }
    }
    std::hint::black_box(sums);
}

#[cfg(target_arch = "aarch64")]
fn rounds_neon(steps: usize) {
    use std::arch::aarch64::*;
    // SAFETY: NEON is part of the target.
    unsafe {
        let (factor, term) = (vdupq_n_f32(std::hint::black_box(0.999)), vdupq_n_f32(1e-6));
        let mut sums = [factor; 24];
        for _ in 0..steps * 4 {
            for sum in &mut sums {
                *sum = vfmaq_f32(term, *sum, factor);
            }
        }
        std::hint::black_box(sums);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local!(static FORCED: Cell<Option<Level>> = const { Cell::new(None) });

    pub(super) fn forced() -> Option<Level> {
        FORCED.get()
    }

    /// Runs `body` with [`level`] answering `level` on this thread (helper threads keep theirs).
    pub(crate) fn at_level<T>(level: Level, body: impl FnOnce() -> T) -> T {
        let before = FORCED.replace(Some(level));
        let result = body();
        FORCED.set(before);
        result
    }

    simd_dispatch! {
        fn all<const FMA: bool>(x: &[f32], out: &mut [[f32; 7]]) {
            for (x, out) in x.iter().zip(out) {
                let x = *x;
                *out = [
                    exp::<FMA>(x),
                    erf::<FMA>(x),
                    sigmoid::<FMA>(x),
                    tanh::<FMA>(x),
                    gelu::<FMA>(x),
                    quick_gelu::<FMA>(x),
                    silu::<FMA>(x),
                ];
            }
        }
    }

    simd_dispatch! {
        fn gelu_all<const FMA: bool>(x: &mut [f32]) {
            for x in x {
                *x = gelu::<FMA>(*x);
            }
        }
    }

    /// erf in f64: its Taylor series below 3, one beyond 6, the continued fraction of erfc between.
    fn erf_f64(x: f64) -> f64 {
        let a = x.abs();
        let value = if a < 3.0 {
            let (mut term, mut sum) = (a, a);
            for n in 1..120 {
                term *= -a * a / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        } else {
            let tail = (1..80).rev().fold(0.0, |f, k| k as f64 / 2.0 / (a + f));
            1.0 - (-a * a).exp() / (a + tail) / std::f64::consts::PI.sqrt()
        };
        value.copysign(x)
    }

    /// `WST_TEST_LEVEL` is set where an emulator stands for another processor: it must be one.
    #[test]
    fn the_level_is_that_of_the_processor() {
        let levels: Vec<_> = Level::available().collect();
        assert!(levels.is_sorted() && levels.first() == Some(&Level::Baseline));
        assert_eq!(levels.last(), Some(&detect()));
        if let Ok(expected) = std::env::var("WST_TEST_LEVEL") {
            assert_eq!(format!("{:?}", level()), expected);
        }
    }

    #[test]
    fn functions_are_accurate_at_every_level() {
        let x: Vec<f32> = (-40_000..40_000).map(|i| i as f32 * 0.0005 + 1e-5).collect();
        let mut out = vec![[0.0; 7]; x.len()];
        for level in Level::available() {
            at_level(level, || all(&x, &mut out));
            for (&x, got) in x.iter().zip(&out) {
                let d = x as f64;
                let s = |v: f64| 1.0 / (1.0 + (-v).exp());
                let gelu = 0.5 * d * (1.0 + erf_f64(d / 2f64.sqrt()));
                let relative = [(d.exp(), got[0]), (erf_f64(d), got[1]), (s(d), got[2]), (d.tanh(), got[3])];
                for (i, (want, got)) in relative.into_iter().enumerate() {
                    let error = ((got as f64 - want) / want).abs();
                    let bound = if i == 1 { 5e-7 } else { 2.5e-7 };
                    assert!(error < bound, "{level:?} function {i} of {x}: {got} for {want}, {error:e}");
                }
                let absolute = [(gelu, got[4]), (d * s(1.702 * d), got[5]), (d * s(d), got[6])];
                for (i, (want, got)) in absolute.into_iter().enumerate() {
                    let error = (got as f64 - want).abs() / d.abs().max(1.0);
                    assert!(error < 6e-7, "{level:?} gated {i} of {x}: {got} for {want}, {error:e}");
                }
            }
        }
    }

    #[test]
    fn extremes() {
        let x = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 0.0, -0.0, 1e30, -1e30, 88.7, -100.0, -1e-30];
        let mut out = [[0.0; 7]; 10];
        for level in Level::available() {
            at_level(level, || all(&x, &mut out));
            assert_eq!(out[0][..4], [0.0, -1.0, 0.0, -1.0]);
            assert_eq!(out[1][..4], [f32::INFINITY, 1.0, 1.0, 1.0]);
            assert!(out[2].iter().all(|v| v.is_nan()));
            assert_eq!(out[3], [1.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0]);
            assert_eq!(out[6][..4], [0.0, -1.0, 0.0, -1.0]);
            assert_eq!(out[5][4..], [1e30; 3]);
            assert!((out[7][0] / 88.7f32.exp() - 1.0).abs() < 1e-6);
            assert!((out[8][0] - (-100f32).exp()).abs() < 3e-45, "subnormal {:e}", out[8][0]);
            assert!((out[9][1] / -1.128_379_2e-30 - 1.0).abs() < 2e-7);
        }
        assert_eq!((leaky_relu(-2.0, 0.5), leaky_relu(2.0, 0.5)), (-1.0, 2.0));
    }

    #[test]
    fn a_value_does_not_depend_on_its_place() {
        let whole: Vec<f32> = (0..97).map(|i| (i as f32 * 0.37).sin() * 5.0).collect();
        for level in Level::available() {
            at_level(level, || {
                let mut all = whole.clone();
                gelu_all(&mut all);
                for start in 0..whole.len() {
                    let mut tail = whole[start..].to_vec();
                    gelu_all(&mut tail);
                    assert_eq!(tail, all[start..]);
                }
            });
        }
    }
}

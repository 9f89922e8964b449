//! Compiles inner loops for the machine they run on, though the crate is built for any.

/// Instruction sets that loops are compiled for.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    Baseline,
    Avx2,
    Avx512,
}

/// The best instruction set that this machine has.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn level() -> Level {
    use std::arch::is_x86_feature_detected as has;
    if has!("avx512f") && has!("avx512vl") && has!("avx512bw") && has!("avx512dq") {
        Level::Avx512
    } else if has!("avx2") {
        Level::Avx2
    } else {
        Level::Baseline
    }
}

/// Defines a function whose body is compiled once for each [`Level`] and picked at run time.
///
/// What the body calls has to be `#[inline(always)]`, or it stays at the baseline. No fused
/// multiply-adds are used, so that every level gives the same bits.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$t:ident>($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name<$t: $crate::ops::float::Float>($($arg: $ty),*) {
            #[inline(always)]
            fn body<$t: $crate::ops::float::Float>($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2<$t: $crate::ops::float::Float>($($arg: $ty),*) {
                    body($($arg),*);
                }
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
                fn avx512<$t: $crate::ops::float::Float>($($arg: $ty),*) {
                    body($($arg),*);
                }
                #[allow(unsafe_code, reason = "instructions that not every machine has")]
                match $crate::ops::simd::level() {
                    // SAFETY: the machine has the instructions, `level` has just said so.
                    $crate::ops::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::ops::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::ops::simd::Level::Baseline => {}
                }
            }
            body($($arg),*);
        }
    };
}
pub(super) use vectorised;

//! The products for each width of vectors and type of weights.

use std::ops::Range;

use super::{Out, Step, Weight, panels, rows};
use crate::products::Isa;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Simd};

/// A type of weights.
pub(super) trait Stored: Copy {
    /// `S::LANES` numbers.
    ///
    /// # Safety
    /// They are there, and the CPU has the features of `S`.
    unsafe fn load<S: Simd>(from: *const u16) -> S::V;
}

/// bf16.
#[derive(Clone, Copy)]
struct Brain;

/// f16.
#[derive(Clone, Copy)]
struct Half;

impl Stored for Brain {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(from) }
    }
}

impl Stored for Half {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(from) }
    }
}

/// The first `count < S::LANES` numbers, zeros behind them; nothing beyond is read.
///
/// # Safety
/// As for [`Stored::load`] with `count` numbers.
#[inline(always)]
pub(super) unsafe fn load_first<S: Simd, W: Stored>(from: *const u16, count: usize) -> S::V {
    let mut numbers = [0_u16; 16];
    for (at, number) in numbers.iter_mut().take(count).enumerate() {
        // SAFETY: the caller's promise.
        *number = unsafe { from.add(at).read() };
    }
    // SAFETY: sixteen numbers are enough for any width.
    unsafe { W::load::<S>(numbers.as_ptr()) }
}

/// The two products.
///
/// # Safety
/// Both: the CPU has the features of the width, rows and tokens are the step's, `out` is of its shape, and no other thread puts
/// anything there.
#[derive(Clone, Copy)]
pub(super) struct Products {
    /// Some rows times all tokens, which are few.
    pub(super) rows: unsafe fn(&Step<'_>, Range<usize>, &Out<'_>),
    /// The rows of a panel, or of the last one what there is, times some tokens, which are many.
    pub(super) panel: unsafe fn(&Step<'_>, Range<usize>, Range<usize>, &Out<'_>),
    /// Rows of a panel.
    pub(super) width: usize,
}

impl Products {
    pub(super) fn of(isa: Isa, weight: &Weight<'_>) -> Self {
        let [brain, half] = match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::PRODUCTS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::PRODUCTS,
            _ => portable::PRODUCTS,
        };
        match weight {
            Weight::Bf16(_) => brain,
            Weight::F16(_) => half,
        }
    }
}

/// One module per width, whose functions enable the CPU's features for everything inlined into them.
macro_rules! width {
    ($name:ident, $simd:ty $(, $feature:literal)?) => {
        mod $name {
            use super::*;

            /// For bf16 and for f16.
            pub(super) const PRODUCTS: [Products; 2] = [of::<Brain>(), of::<Half>()];

            const fn of<W: Stored>() -> Products {
                Products {
                    rows: rows_of::<W>,
                    panel: panel_of::<W>,
                    width: panels::rows::<$simd>(),
                }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn rows_of<W: Stored>(step: &Step<'_>, rows: Range<usize>, out: &Out<'_>) {
                // SAFETY: the caller's promise.
                unsafe { rows::all::<$simd, W>(step, rows, out) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn panel_of<W: Stored>(
                step: &Step<'_>,
                rows: Range<usize>,
                tokens: Range<usize>,
                out: &Out<'_>,
            ) {
                // SAFETY: the caller's promise.
                unsafe { panels::one::<$simd, W>(step, rows, tokens, out) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
width!(avx512, Avx512, "avx512f,avx512vl,avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
width!(avx2, Avx2, "avx2,fma,f16c");
width!(portable, Portable);

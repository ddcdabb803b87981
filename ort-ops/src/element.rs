//! The types of cached numbers.

use std::any::Any;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A type of cached numbers; all arithmetic is in f32.
pub trait Element: Copy + Send + Sync + Any {
    /// Zero.
    const ZERO: Self;

    /// The numbers themselves, where they are f32 already.
    fn as_f32(numbers: &[Self]) -> Option<&[f32]>;

    /// To f32, which is exact.
    fn widen(from: &[Self], to: &mut [f32]);

    /// To the nearest number of the type.
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Element for f32 {
    const ZERO: Self = 0.0;

    fn as_f32(numbers: &[Self]) -> Option<&[f32]> {
        Some(numbers)
    }

    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
}

impl Element for f16 {
    const ZERO: Self = Self::ZERO;

    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

impl Element for bf16 {
    const ZERO: Self = Self::ZERO;

    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn widen(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

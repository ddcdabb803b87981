//! How fast two threads read memory, to compare with what reads weights.

use std::hint::black_box;
use std::thread;

/// Bytes that are read, far beyond any cache.
pub const BYTES: usize = 512 << 20;

/// A buffer of [`BYTES`].
pub fn buffer() -> Vec<u64> {
    vec![1; BYTES / 8]
}

/// Reads every number once, by two threads.
pub fn read(numbers: &[u64]) {
    thread::scope(|scope| {
        for half in numbers.chunks(numbers.len() / 2) {
            scope.spawn(move || black_box(half.iter().fold(0_u64, |sum, x| sum ^ x)));
        }
    });
}

//! Shared-memory layouts that wgmma and TMA agree on: the 128-byte swizzle and the matrix descriptors.
//!
//! A tile is 64 columns of 2 bytes (rows of 128 bytes), any number of rows, beginning at a multiple of 1024 bytes. TMA with
//! `SWIZZLE_128B` writes byte `b` of it to `swizzle(b)`; wgmma with layout type 1 reads it back the same way (PTX ISA, "Matrix
//! Descriptor Format" and "Swizzling Modes").

/// Bytes of a row of a tile.
pub const ROW_BYTES: u32 = 128;
/// Bytes after which the swizzle repeats: 8 rows.
pub const ATOM_BYTES: u32 = 1024;
/// Bytes of a tile of 64 tokens.
pub const TILE_BYTES: u32 = 64 * ROW_BYTES;

/// Where byte `offset` of a tile lies: bits 4 to 6 (the 16-byte piece of the row) are xored with bits 7 to 9 (the row).
pub const fn swizzle(offset: u32) -> u32 {
    offset ^ ((offset >> 3) & 0x70)
}

/// The parts of a wgmma matrix descriptor that do not depend on the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Leading dimension byte offset. With a swizzle: rows along M or N (MN-major) 64 elements apart; unused when K-major.
    pub leading: u32,
    /// Stride dimension byte offset: from one group of 8 rows (K-major: of M or N; MN-major: of K) to the next.
    pub stride: u32,
}

impl Descriptor {
    /// Queries and keys: the multiplied dimension is contiguous.
    pub const K_MAJOR: Self = Self {
        leading: 16,
        stride: ATOM_BYTES,
    };

    /// Values: the output's columns are contiguous; 64 of them are one tile, the next 64 the next tile.
    pub const MN_MAJOR: Self = Self {
        leading: TILE_BYTES,
        stride: ATOM_BYTES,
    };

    /// The 64 bits with address zero: leading in bits 16 to 29, stride in bits 32 to 45, both in units of 16 bytes;
    /// layout type 1 (128-byte swizzle) in bits 62 and 63; base offset 0, because tiles begin at multiples of 1024.
    pub const fn bits(self) -> u64 {
        (1 << 62) | ((self.stride as u64 >> 4) << 32) | ((self.leading as u64 >> 4) << 16)
    }
}

/// Byte, within the tiles of a row block, of element `(row, column)` as the K-major descriptor reads it when it begins at the tile
/// of `column` and advances by 32 bytes for 16 columns.
pub const fn k_major(row: u32, column: u32) -> u32 {
    column / 64 * TILE_BYTES + swizzle(row * ROW_BYTES + column % 64 * 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the hardware does with a descriptor, from the PTX ISA's canonical layouts in units of elements of 2 bytes:
    /// K-major `((8, m), (8, 2)) : ((64, stride), (1, 8))`, MN-major `((8, 8, m), (8, k)) : ((1, 8, leading), (64, stride))`,
    /// then the swizzle on the byte address.
    fn read(bits: u64, address: u32, transposed: bool, mn: u32, k: u32) -> u32 {
        let leading = (bits >> 16 & 0x3fff) as u32 * 16;
        let stride = (bits >> 32 & 0x3fff) as u32 * 16;
        assert_eq!(bits >> 62, 1, "128-byte swizzle");
        assert_eq!(bits >> 49 & 7, 0, "base offset");
        let start = (bits & 0x3fff) as u32 * 16 + address;
        swizzle(if transposed {
            start + mn % 64 * 2 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride
        } else {
            start + mn % 8 * 128 + mn / 8 * stride + k * 2
        })
    }

    #[test]
    fn the_swizzle_is_a_permutation_of_each_row_and_spreads_columns_over_banks() {
        for row in 0..64 {
            let mut seen: Vec<u32> = (0..8).map(|c| swizzle(row * 128 + c * 16)).collect();
            assert!(seen.iter().all(|at| at / 128 == row));
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 8);
        }
        for column in 0..8 {
            let mut banks: Vec<u32> = (0..8)
                .map(|row| swizzle(row * 128 + column * 16) / 16 % 8)
                .collect();
            banks.sort_unstable();
            assert_eq!(
                banks,
                (0..8).collect::<Vec<_>>(),
                "eight rows of one column"
            );
        }
        assert!((0..8192).all(|b| swizzle(swizzle(b)) == b));
    }

    #[test]
    fn descriptors_read_what_tma_wrote() {
        // TMA puts element (token, column) of a cache row at k_major(token, column).
        let rank = 256;
        for step in 0..rank / 16 {
            let begin = step / 4 * TILE_BYTES + step % 4 * 32; // as `multiply_scores` advances
            for token in 0..64 {
                for k in 0..16 {
                    assert_eq!(
                        read(Descriptor::K_MAJOR.bits(), begin, false, token, k),
                        k_major(token, step * 16 + k)
                    );
                }
            }
        }
        for step in 0..4 {
            let begin = step * 2048; // as `multiply_values` advances: 16 tokens
            for column in 0..rank {
                for k in 0..16 {
                    assert_eq!(
                        read(Descriptor::MN_MAJOR.bits(), begin, true, column, k),
                        k_major(step * 16 + k, column)
                    );
                }
            }
        }
    }

    #[test]
    fn the_bits_are_those_of_the_isa() {
        assert_eq!(Descriptor::K_MAJOR.bits(), 0x4000_0040_0001_0000);
        assert_eq!(Descriptor::MN_MAJOR.bits(), 0x4000_0040_0200_0000);
    }
}

//! A dense product of bf16 matrices, `out = a * transposed b`: what a GPU multiplies at best, measured by `gpu-check` in the same run as the
//! attention kernels. It is a yardstick of our own, so that the check needs nothing but a driver; `cuda/matmul_sm90.cuh` and
//! `cuda/matmul_mma.cuh` are the kernels.

use std::fmt::Write as _;

use mlac_model::Refusal;

use crate::Arch;
use crate::config::Expected;
use crate::desc::Dtype;
use crate::launch::Region;
use crate::layout::{Descriptor, TILE_BYTES};
use crate::params::MatmulParams;
use crate::problem::{Random, bits, from_bits};
use crate::source::{Source, wgmma_scores};

/// The tiles of the product on an architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matmul {
    /// The GPU.
    pub arch: Arch,
    /// Rows of a tile of the output.
    pub rows: u32,
    /// Columns of a tile of the output.
    pub columns: u32,
    /// Numbers of a row that a stage of shared memory holds.
    pub depth: u32,
    /// Stages.
    pub stages: u32,
    /// Threads of a CTA.
    pub threads: u32,
    /// Dynamic shared memory of a CTA in bytes.
    pub shared_bytes: u32,
}

impl Matmul {
    /// Its one function.
    pub const FUNCTION: &'static str = "mlac_matmul";

    /// The choice for an architecture.
    pub const fn of(arch: Arch) -> Self {
        let stages = 4;
        if arch.has_wgmma() {
            let (rows, columns) = (128, 256);
            Self {
                arch,
                rows,
                columns,
                depth: 64,
                stages,
                threads: 384,
                // The stages, and two mbarriers for each.
                shared_bytes: stages * ((rows + columns) / 64 * TILE_BYTES + 16),
            }
        } else {
            let (rows, columns, depth) = (128, 128, 32);
            Self {
                arch,
                rows,
                columns,
                depth,
                stages,
                threads: 256,
                shared_bytes: stages * (rows + columns) * (depth + 8) * 2,
            }
        }
    }

    /// What multiplies.
    pub const fn instruction(&self) -> &'static str {
        if self.arch.has_wgmma() {
            "wgmma m64n256k16"
        } else {
            "mma.sync m16n8k16"
        }
    }

    /// What the compiler gets.
    pub fn source(&self) -> Source {
        let (major, minor) = self.arch.capability();
        let mut text = format!(
            "#define MLAC_ARCH {}\n#define MLAC_F16 0\n#define MLAC_FP8 0\n",
            major * 100 + minor * 10
        );
        for (name, value) in [
            ("kRows", self.rows),
            ("kColumns", self.columns),
            ("kDepth", self.depth),
            ("kStages", self.stages),
        ] {
            let _ = writeln!(text, "constexpr int {name} = {value};");
        }
        if self.arch.has_wgmma() {
            let _ = writeln!(
                text,
                "constexpr unsigned long long kDescriptorK = {:#x}ull;\n#include \"hopper.cuh\"\n",
                Descriptor::K_MAJOR.bits()
            );
            text.push_str(&wgmma_scores(Dtype::Bf16, self.columns));
        }
        let _ = writeln!(text, "#include \"{}\"", self.file());
        Source {
            text,
            functions: vec![Self::FUNCTION],
        }
    }

    /// Its file in `cuda/`.
    pub const fn file(&self) -> &'static str {
        if self.arch.has_wgmma() {
            "matmul_sm90.cuh"
        } else {
            "matmul_mma.cuh"
        }
    }

    /// Instructions of its cubin.
    pub const fn expected_instructions(&self) -> Expected {
        if self.arch.has_wgmma() {
            Expected {
                hgmma: self.depth / 16,
                utmaldg: (self.rows + self.columns) / 64,
                ublkcp: 0,
                hmma: 0,
            }
        } else {
            Expected {
                hgmma: 0,
                utmaldg: 0,
                ublkcp: 0,
                hmma: self.depth / 16 * 16,
            }
        }
    }

    /// The arguments of a product, and its tiles.
    ///
    /// # Errors
    /// When the matrices are not whole tiles.
    pub fn params(
        &self,
        [a, b, out]: [Region; 3],
        [rows, columns, depth]: [u32; 3],
    ) -> Result<(MatmulParams, u32), Refusal> {
        let refuse = |name: &str, expected: String, found: String, fix: &str| {
            let subject = format!("dense product on {}: {name}", self.arch);
            Err(Refusal::new(subject, expected, found, fix))
        };
        for (name, size, unit) in [
            ("rows", rows, self.rows),
            ("columns", columns, self.columns),
            ("depth", depth, self.depth),
        ] {
            if size == 0 || size % unit != 0 || i32::try_from(size).is_err() {
                let expected = format!("a multiple of {unit}");
                return refuse(name, expected, size.to_string(), "multiply whole tiles");
            }
        }
        for (name, region, height, width) in [
            ("a", a, rows, depth),
            ("b", b, columns, depth),
            ("out", out, rows, columns),
        ] {
            let bytes = u64::from(height) * u64::from(width) * 2;
            if region.bytes() < bytes || region.address() == 0 || region.address() % 16 != 0 {
                let expected = format!("{bytes} bytes at a multiple of 16");
                let found = format!("{} bytes at {:#x}", region.bytes(), region.address());
                return refuse(name, expected, found, "allocate the whole matrix");
            }
        }
        let params = MatmulParams {
            a: a.address(),
            b: b.address(),
            out: out.address(),
            rows: rows as i32,
            columns: columns as i32,
            depth: depth as i32,
        };
        Ok((params, rows / self.rows * (columns / self.columns)))
    }
}

/// A matrix that repeats a pattern of eighths, so that its numbers can be uploaded once and known everywhere.
#[derive(Debug, Clone)]
pub struct Operand {
    pattern: Vec<u16>,
}

impl Operand {
    /// A pattern of prime length: no two rows of a matrix of ours begin at the same place of it.
    const LENGTH: usize = 1_048_573;

    /// A pattern of its own for every seed.
    pub fn random(seed: u64) -> Self {
        let mut random = Random::new(seed);
        Self {
            pattern: (0..Self::LENGTH)
                .map(|_| bits(Dtype::Bf16, random.eighth()))
                .collect(),
        }
    }

    /// The bits of one repetition.
    pub fn pattern(&self) -> &[u16] {
        &self.pattern
    }

    /// The bits of the number at a place of the dense matrix.
    pub fn at(&self, place: u64) -> u16 {
        self.pattern[(place % self.pattern.len() as u64) as usize]
    }

    fn value(&self, place: u64) -> f64 {
        f64::from(from_bits(Dtype::Bf16, self.at(place)))
    }
}

/// The bits of `out[row, column]`: the f64 sum, rounded once. Sums of up to `2^18` products of eighths are exact in f32 in any
/// order, so a kernel must have these bits.
pub fn entry(a: &Operand, b: &Operand, row: u64, column: u64, depth: u32) -> u16 {
    let depth = u64::from(depth);
    let sum: f64 = (0..depth)
        .map(|k| a.value(row * depth + k) * b.value(column * depth + k))
        .sum();
    bits(Dtype::Bf16, sum as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_fits_and_parts_of_tiles_are_refused() {
        for arch in Arch::ALL {
            let matmul = Matmul::of(arch);
            assert!(matmul.shared_bytes <= arch.shared_memory(), "{arch}");
            let regions = [16, 32, 48].map(|at| Region::of(at, 512 * 1024 * 2));
            let (params, tiles) = matmul.params(regions, [512, 1024, 128]).unwrap();
            assert_eq!((params.out, params.columns), (48, 1024));
            assert_eq!(tiles, 4 * 1024 / matmul.columns);
            for size in [
                [64, 1024, 128],
                [512, 64, 128],
                [512, 1024, 16],
                [0, 256, 64],
            ] {
                let error = matmul.params(regions, size).unwrap_err().to_string();
                assert!(error.contains("expected a multiple of"), "{error}");
            }
            for (at, region) in [(2, Region::of(48, 7)), (0, Region::of(8, 1 << 20))] {
                let mut other = regions;
                other[at] = region;
                let error = matmul.params(other, [512, 1024, 128]).unwrap_err();
                assert!(error.to_string().contains("at a multiple of 16"), "{error}");
            }
        }
    }

    #[test]
    fn an_entry_is_the_rounded_sum() {
        let (a, b) = (Operand::random(1), Operand::random(2));
        let value = |operand: &Operand, at| f64::from(from_bits(Dtype::Bf16, operand.at(at)));
        let sum: f64 = (0..3).map(|k| value(&a, 6 + k) * value(&b, 3 + k)).sum();
        assert_eq!(entry(&a, &b, 2, 1, 3), bits(Dtype::Bf16, sum as f32));
        // Past the pattern's end it begins again.
        assert_eq!(a.at(Operand::LENGTH as u64 + 5), a.pattern()[5]);
    }
}

//! The bytes of the attribute `kernels`: recipes with their cubins in the frame that `kernels/src/bundle.rs` documents.

use std::ops::Range;

use super::recipe::Kernel;
use crate::refusal::{Refusal, refuse};

const MAGIC: &[u8] = b"mlac.trt";
const VERSION: u32 = 1;
const HEADER: usize = 32;
const MOST_KERNELS: u32 = 64;

/// Kernels of one layer, one for each number of query tokens.
#[derive(Debug)]
pub(crate) struct Bundle {
    bytes: Vec<u8>,
    kernels: Vec<(Kernel, Range<usize>)>,
}

fn damaged(expected: impl Into<String>, found: impl Into<String>) -> Refusal {
    refuse(
        "attribute `kernels`",
        expected,
        found,
        "bundle the kernels again: the bytes are damaged or cut short",
    )
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// FNV-1a, 64 bits.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// A cubin is a 64-bit ELF file of machine 190 whose flags hold the architecture: in bits 8 to 15 since CUDA 13, before in 0 to 7.
fn check_cubin(kernel: &Kernel, cubin: &[u8]) -> Result<(), Refusal> {
    if cubin.len() < 64 || !cubin.starts_with(b"\x7fELF\x02\x01") || cubin[18..20] != [190, 0] {
        let found = format!("{} bytes that are no ELF file of CUDA", cubin.len());
        return Err(damaged(format!("a cubin for {}", kernel.name), found));
    }
    let flags = u32_at(cubin, 48);
    let (newer, older) = (flags >> 8 & 0xff, flags & 0xff);
    let wanted = kernel.capability.0 * 10 + kernel.capability.1;
    if newer != wanted && older != wanted {
        let found = format!("sm_{}", if newer == 0 { older } else { newer });
        let expected = format!("a cubin of sm_{wanted} for {}", kernel.name);
        return Err(damaged(expected, found));
    }
    Ok(())
}

impl Bundle {
    /// Reads and checks everything.
    pub(crate) fn read(bytes: Vec<u8>) -> Result<Self, Refusal> {
        if bytes.len() < HEADER || !bytes.starts_with(MAGIC) {
            let found = format!("{} bytes of something else", bytes.len());
            return Err(damaged("kernels that mlac bundled", found));
        }
        let (version, count) = (u32_at(&bytes, 8), u32_at(&bytes, 12));
        if version != VERSION {
            return Err(refuse(
                "attribute `kernels`",
                format!("form {VERSION}"),
                format!("form {version}"),
                "use the libmlac_ort.so of the mlac that made the kernels",
            ));
        }
        let total = u64_at(&bytes, 16);
        if total != bytes.len() as u64 {
            return Err(damaged(
                format!("{total} bytes"),
                format!("{} bytes", bytes.len()),
            ));
        }
        if checksum(&bytes[HEADER..]) != u64_at(&bytes, 24) {
            return Err(damaged(
                "bytes with the checksum in their header",
                "other bytes",
            ));
        }
        if !(1..=MOST_KERNELS).contains(&count) {
            let expected = format!("1 to {MOST_KERNELS} kernels");
            return Err(damaged(expected, count.to_string()));
        }
        let mut kernels: Vec<(Kernel, Range<usize>)> = Vec::new();
        let mut at = HEADER;
        for i in 0..count {
            let left = bytes.len() - at;
            if left < 16 {
                return Err(damaged(format!("{count} kernels"), i.to_string()));
            }
            let (text, cubin) = (u64_at(&bytes, at), u64_at(&bytes, at + 8));
            let left = left as u64 - 16;
            if text > left || cubin > left - text {
                let found = format!("lengths of {text} and {cubin} where {left} bytes are left");
                return Err(damaged("a recipe and a cubin", found));
            }
            let begin = at + 16 + text as usize;
            at = begin + cubin as usize;
            let text = std::str::from_utf8(&bytes[begin - text as usize..begin])
                .map_err(|error| damaged("a recipe", error.to_string()))?;
            let kernel = Kernel::read(text)?;
            check_cubin(&kernel, &bytes[begin..at])?;
            for (other, _) in &kernels {
                if other.query_tokens == kernel.query_tokens || !other.is_of_layer(&kernel) {
                    let found = format!("{} and {}", other.name, kernel.name);
                    return Err(damaged(
                        "kernels that differ in their query tokens only",
                        found,
                    ));
                }
            }
            kernels.push((kernel, begin..at));
        }
        if at != bytes.len() {
            let found = format!("{} bytes", bytes.len() - at);
            return Err(damaged("nothing behind the last kernel", found));
        }
        Ok(Self { bytes, kernels })
    }

    /// What all kernels have in common can be asked of the first.
    pub(crate) fn first(&self) -> &Kernel {
        &self.kernels[0].0
    }

    /// Place and kernel for a number of query tokens.
    pub(crate) fn for_tokens(&self, tokens: usize) -> Result<(usize, &Kernel), Refusal> {
        let found = self
            .kernels
            .iter()
            .position(|(kernel, _)| kernel.query_tokens == tokens);
        found.map(|i| (i, &self.kernels[i].0)).ok_or_else(|| {
            let there: Vec<String> = self
                .kernels
                .iter()
                .map(|(kernel, _)| kernel.query_tokens.to_string())
                .collect();
            refuse(
                "query_tokens",
                format!("{}, which the node has kernels for", there.join(" or ")),
                tokens.to_string(),
                "run pieces of that many tokens, or bundle a kernel for this number",
            )
        })
    }

    /// The cubin of a kernel by its place.
    pub(super) fn cubin(&self, place: usize) -> &[u8] {
        &self.bytes[self.kernels[place].1.clone()]
    }

    /// A kernel by its place.
    pub(super) fn kernel(&self, place: usize) -> &Kernel {
        &self.kernels[place].0
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.kernels.len()
    }
}

#[cfg(test)]
mod tests {
    use mlac_kernels::bundle::bundle;
    use mlac_kernels::launch::Recipe;
    use mlac_kernels::{Arch, AttentionConfig, AttentionDesc};

    use super::*;

    fn desc(query_tokens: u32) -> AttentionDesc {
        AttentionDesc {
            query_tokens,
            sinks: true,
            ..AttentionDesc::latent(9, 192, 64, Arch::Sm90a)
        }
    }

    /// A real recipe with an ELF header for a cubin.
    fn kernel(query_tokens: u32) -> (Recipe, Vec<u8>) {
        let desc = desc(query_tokens);
        let config = AttentionConfig::choose(&desc).unwrap();
        let mut cubin = vec![0_u8; 64];
        cubin[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (cubin[18], cubin[49]) = (190, 90);
        (Recipe::of(&desc, &config, 7).unwrap(), cubin)
    }

    fn bytes() -> Vec<u8> {
        bundle(&[kernel(1), kernel(4)]).unwrap()
    }

    /// The checksum made right again.
    fn signed(mut bytes: Vec<u8>) -> Vec<u8> {
        if bytes.len() >= HEADER {
            let sum = checksum(&bytes[HEADER..]);
            bytes[24..32].copy_from_slice(&sum.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn what_was_bundled_is_read() {
        let found = Bundle::read(bytes()).unwrap();
        let first = found.first();
        assert_eq!(first.name, desc(1).slug());
        assert_eq!(
            (first.capability, first.heads, first.row()),
            ((9, 0), 9, 256)
        );
        assert!(first.sinks && !first.tree && !first.f16 && first.window == 0);
        assert_eq!(found.for_tokens(4).unwrap().0, 1);
        assert_eq!(found.cubin(1), kernel(4).1);
        let error = found.for_tokens(2).unwrap_err().to_string();
        assert!(error.contains("expected 1 or 4, which"), "{error}");
    }

    #[test]
    fn every_cut_is_refused() {
        let whole = bytes();
        for length in 0..whole.len() {
            assert!(Bundle::read(whole[..length].to_vec()).is_err(), "{length}");
            let mut cut = whole[..length].to_vec();
            if length >= HEADER {
                cut[16..24].copy_from_slice(&(length as u64).to_le_bytes());
            }
            assert!(Bundle::read(signed(cut)).is_err(), "{length}");
        }
    }

    #[test]
    fn changed_bytes_are_refused_or_another_recipe_and_never_a_panic() {
        let whole = bytes();
        for at in 0..whole.len() {
            for change in [1, 0x20, 0xff] {
                let mut other = whole.clone();
                other[at] ^= change;
                assert!(Bundle::read(other.clone()).is_err(), "{at}");
                let _ = Bundle::read(signed(other));
            }
        }
    }

    #[test]
    fn wrong_lines_are_named() {
        let text = kernel(1).0.text().to_owned();
        for (from, to, expected) in [
            ("mlac-recipe 1", "mlac-recipe 2", "a number from 1 to 1"),
            ("heads 9", "heads 0", "a number from 1 to 1024"),
            ("heads 9", "heads +9", "a number from 1 to 1024"),
            ("heads 9\n", "", "`heads` here"),
            ("dtype bf16", "dtype f32", "bf16 or f16"),
            ("sinks 1", "sinks 1 1", "the end of the line"),
            ("region lengths", "regions lengths", "region, launch, block"),
            ("pointer 0 new_rows", "pointer 0 rows", "a tensor of mlac"),
            (
                "pointer 0 new_rows",
                "pointer 60 new_rows",
                "within the block",
            ),
            ("number 48 batch", "number 48 batches", "batch, page_stride"),
        ] {
            assert!(text.contains(from), "{from}");
            let error = Kernel::read(&text.replacen(from, to, 1)).unwrap_err();
            assert!(error.to_string().contains(expected), "{to}: {error}");
        }
        let head: Vec<&str> = text.lines().take(12).collect();
        let error = Kernel::read(&head.join("\n")).unwrap_err().to_string();
        assert!(error.contains("found no launch"), "{error}");
    }
}

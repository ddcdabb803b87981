//! Recipes with their cubins as one row of bytes: what a TensorRT engine carries for every node of `mlac::LatentAttention`.
//!
//! Little-endian, without padding:
//!
//! | bytes | |
//! |---|---|
//! | 8 | `mlac.trt` |
//! | 4 | version of this form: 1 |
//! | 4 | kernels |
//! | 8 | bytes in all |
//! | 8 | FNV-1a of everything that follows, 64 bits |
//! | for each kernel: 8, 8 | bytes of its recipe, bytes of its cubin |
//! | | the recipe ([`Recipe`]'s text), the cubin |

use mlac_model::Refusal;

use crate::launch::Recipe;

/// The first eight bytes.
pub const MAGIC: [u8; 8] = *b"mlac.trt";
/// Version of the form.
pub const VERSION: u32 = 1;
const HEADER: usize = 32;

/// FNV-1a, 64 bits: finds damage, not forgery.
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The bytes of kernels that differ in their number of query tokens only.
///
/// # Errors
/// Without kernels, or when two are for the same number of query tokens.
pub fn bundle(kernels: &[(Recipe, Vec<u8>)]) -> Result<Vec<u8>, Refusal> {
    let mut tokens: Vec<u32> = kernels.iter().map(|(r, _)| r.desc().query_tokens).collect();
    tokens.sort_unstable();
    let whole = tokens.len();
    tokens.dedup();
    let other = kernels.iter().find(|(recipe, _)| {
        let first = kernels[0].0.desc();
        let mut desc = *recipe.desc();
        desc.query_tokens = first.query_tokens;
        desc != *first
    });
    if tokens.is_empty() || tokens.len() != whole || other.is_some() {
        let slugs: Vec<String> = kernels.iter().map(|(r, _)| r.desc().slug()).collect();
        return Err(Refusal::new(
            "kernels of a plugin",
            "one or more that differ in their query tokens only",
            if slugs.is_empty() {
                "none".to_owned()
            } else {
                slugs.join(", ")
            },
            "bundle the kernels of one layer",
        ));
    }
    let mut body = Vec::new();
    for (recipe, cubin) in kernels {
        body.extend((recipe.text().len() as u64).to_le_bytes());
        body.extend((cubin.len() as u64).to_le_bytes());
        body.extend(recipe.text().as_bytes());
        body.extend(cubin);
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((kernels.len() as u32).to_le_bytes());
    bytes.extend(((HEADER + body.len()) as u64).to_le_bytes());
    bytes.extend(checksum(&body).to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arch, AttentionConfig, AttentionDesc};

    fn kernel(query_tokens: u32, rank: u32) -> (Recipe, Vec<u8>) {
        let desc = AttentionDesc {
            query_tokens,
            ..AttentionDesc::latent(64, rank, 64, Arch::Sm90a)
        };
        let config = AttentionConfig::choose(&desc).unwrap();
        (Recipe::of(&desc, &config, 4).unwrap(), vec![7; 11])
    }

    #[test]
    fn the_form_is_the_documented_one() {
        // FNV's own test vectors.
        assert_eq!(checksum(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(checksum(b"foobar"), 0x8594_4171_f739_67e8);
        let kernels = [kernel(1, 192), kernel(4, 192)];
        let bytes = bundle(&kernels).unwrap();
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(&bytes[..8], b"mlac.trt");
        assert_eq!(number(8), 1 | 2 << 32);
        assert_eq!(number(16), bytes.len() as u64);
        assert_eq!(number(24), checksum(&bytes[32..]));
        let text = kernels[0].0.text();
        assert_eq!((number(32), number(40)), (text.len() as u64, 11));
        assert!(bytes[48..].starts_with(text.as_bytes()));
    }

    #[test]
    fn kernels_of_two_layers_are_refused() {
        for kernels in [
            vec![],
            vec![kernel(1, 192), kernel(1, 192)],
            vec![kernel(1, 192), kernel(2, 128)],
        ] {
            let error = bundle(&kernels).unwrap_err().to_string();
            assert!(
                error.contains("differ in their query tokens only"),
                "{error}"
            );
        }
    }
}

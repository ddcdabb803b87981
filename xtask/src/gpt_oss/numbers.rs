//! Seeded random tensors: the same seed gives the same bytes, whatever the order and the threads.

use mlac_model::TensorInfo;

/// What the elements of a tensor look like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    /// BF16, normally distributed.
    Normal { mean: f64, deviation: f64 },
    /// Any byte: two FP4 codes.
    Codes,
    /// Scale bytes 118 to 121: with random codes the weights deviate by about 1 / sqrt(2880).
    Scales,
}

impl Kind {
    /// By the tensor's name. Weights have the deviation 1 / sqrt(inputs), so that a forward pass
    /// keeps its size.
    pub(crate) fn of(info: &TensorInfo) -> Self {
        let name = info.name.as_str();
        let normal = |mean: f64, deviation: f64| Self::Normal { mean, deviation };
        if name.ends_with("_blocks") {
            Self::Codes
        } else if name.ends_with("_scales") {
            Self::Scales
        } else if name.ends_with("norm.weight") {
            normal(1.0, 0.1)
        } else if name.ends_with("sinks") {
            normal(1.0, 1.0)
        } else if name.ends_with("embed_tokens.weight") {
            normal(0.0, 1.0)
        } else if name.ends_with("bias") {
            // Those of queries, keys and values are large in trained models.
            let attention = name.contains("self_attn") && !name.contains("o_proj");
            normal(0.0, if attention { 0.5 } else { 0.1 })
        } else {
            let inputs = info.shape.last().copied().unwrap_or(1);
            normal(0.0, (inputs as f64).powf(-0.5))
        }
    }
}

/// Normally distributed numbers, one for each value of 16 random bits: Box-Muller on a grid of 256
/// radii and 256 angles.
pub(crate) struct Bell(Vec<f64>);

impl Bell {
    pub(crate) fn new() -> Self {
        let at = |i: u32| (f64::from(i) + 0.5) / 256.0;
        let numbers = (0..256).flat_map(|i| {
            let radius = (-2.0 * at(i).ln()).sqrt();
            (0..256).map(move |j| radius * (std::f64::consts::TAU * at(j)).cos())
        });
        Self(numbers.collect())
    }
}

/// The random elements of one tensor, in any order of chunks.
pub(crate) struct Source {
    seed: u64,
    kind: Kind,
    /// BF16 bits for each 16 random bits.
    table: Vec<u16>,
}

impl Source {
    pub(crate) fn new(seed: u64, info: &TensorInfo, bell: &Bell) -> Self {
        let kind = Kind::of(info);
        let table = match kind {
            Kind::Normal { mean, deviation } => {
                bell.0.iter().map(|x| bf16(mean + deviation * x)).collect()
            }
            Kind::Codes | Kind::Scales => Vec::new(),
        };
        // FNV-1a of the name.
        let name = info.name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self {
            seed: mix(seed ^ mix(name)),
            kind,
            table,
        }
    }

    /// Fills `bytes`, which lie at `offset` (a multiple of 8) in the tensor.
    pub(crate) fn fill(&self, offset: usize, bytes: &mut [u8]) {
        let mut counter = offset as u64 / 8;
        let mut next = || {
            let word = mix(self.seed.wrapping_add(counter.wrapping_mul(GOLDEN)));
            counter += 1;
            self.shape(word).to_le_bytes()
        };
        let (words, rest) = bytes.as_chunks_mut::<8>();
        for word in words {
            *word = next();
        }
        if !rest.is_empty() {
            rest.copy_from_slice(&next()[..rest.len()]);
        }
    }

    /// Turns 64 random bits into eight bytes of elements.
    fn shape(&self, word: u64) -> u64 {
        match self.kind {
            Kind::Codes => word,
            // Two random bits in each byte; 118 = 0x76 and no sum of them leaves its byte.
            Kind::Scales => 0x7676_7676_7676_7676 + (word & 0x0303_0303_0303_0303),
            Kind::Normal { .. } => (0..4).fold(0, |bits, lane| {
                let index = (word >> (16 * lane)) as usize & 0xffff;
                bits | u64::from(self.table[index]) << (16 * lane)
            }),
        }
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finalizer.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The nearest BF16, ties to even.
fn bf16(x: f64) -> u16 {
    let bits = (x as f32).to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

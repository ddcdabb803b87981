//! Rows for the append kernel, and what must then be in the cache.

use crate::desc::{Attention, AttentionDesc, CacheDtype, Dtype};
use crate::fp8;
use crate::problem::{Random, from_bits};

/// What every byte of a cache is before rows are appended: NaN in every type.
pub const POISON: u8 = 0xff;

/// One launch of append.
#[derive(Debug, Clone, PartialEq)]
pub struct AppendProblem {
    /// The request, of a latent.
    pub desc: AttentionDesc,
    /// `[tokens, kv_lora_rank]`.
    pub latent: Vec<f32>,
    /// `[tokens, rope_dim]`, not rotated.
    pub key: Vec<f32>,
    /// `[table_rows, rope_dim / 2]`.
    pub cosines: Vec<f32>,
    /// `[table_rows, rope_dim / 2]`.
    pub sines: Vec<f32>,
    /// `[tokens]`: rows of the tables; those outside belong to tokens that must be left out.
    pub positions: Vec<i32>,
    /// `[tokens]`: rows of the cache; those outside belong to tokens that must be left out.
    pub slots: Vec<i32>,
    /// Pages of the cache.
    pub pages: u32,
    /// Rows of the tables.
    pub table_rows: u32,
}

/// `kv_lora_rank` and `qk_rope_head_dim`; none for grouped queries.
fn widths(desc: &AttentionDesc) -> Option<(usize, usize)> {
    match desc.attention {
        Attention::Latent {
            kv_lora_rank,
            rope_dim,
        } => Some((kv_lora_rank as usize, rope_dim as usize)),
        Attention::Grouped { .. } => None,
    }
}

/// A cached row, as numbers: the scale, and what it multiplies.
struct Row {
    scale: f32,
    latent: Vec<f32>,
    key: Vec<f32>,
}

impl AppendProblem {
    /// `tokens` rows for random places, among them some without a place or a position; none for grouped queries.
    pub fn random(desc: AttentionDesc, tokens: usize, seed: u64) -> Option<Self> {
        let (rank, rope) = widths(&desc)?;
        let mut random = Random::new(seed);
        let pages = (tokens as u32).div_ceil(desc.page) + 1;
        let rows = (pages * desc.page) as i32;
        let table_rows = 50;
        let mut slots: Vec<i32> = (0..rows).collect();
        for i in (1..slots.len()).rev() {
            slots.swap(i, random.below(i as u64 + 1) as usize);
        }
        slots.truncate(tokens);
        let mut positions: Vec<i32> = (0..tokens)
            .map(|_| random.below(u64::from(table_rows)) as i32)
            .collect();
        // Strangers, where there are enough tokens to spare some.
        for (at, slot, position) in [
            (3, -1, 0),
            (5, rows, 0),
            (7, 0, -1),
            (9, 0, table_rows as i32),
        ] {
            if at < tokens {
                slots[at] = if slot == 0 { slots[at] } else { slot };
                positions[at] = if position == 0 {
                    positions[at]
                } else {
                    position
                };
            }
        }
        let mut numbers = |width: usize, least: i32, most: i32| -> Vec<f32> {
            (0..tokens)
                .flat_map(|_| {
                    let size = 2.0_f32.powi(least + random.below((most - least) as u64 + 1) as i32);
                    (0..width)
                        .map(|_| random.eighth() * size)
                        .collect::<Vec<_>>()
                })
                .collect()
        };
        // Latents so small that the key decides about the scale, and so large that they do.
        let latent = numbers(rank, -12, 6);
        let key = numbers(rope, 0, 3);
        let angles: Vec<f32> = (0..table_rows as usize * rope / 2)
            .map(|i| i as f32 * 0.37)
            .collect();
        Some(Self {
            desc,
            latent,
            key,
            cosines: angles.iter().map(|a| a.cos()).collect(),
            sines: angles.iter().map(|a| a.sin()).collect(),
            positions,
            slots,
            pages,
            table_rows,
        })
    }

    /// Bytes of the cache.
    pub fn cache_bytes(&self) -> u64 {
        u64::from(self.pages) * self.desc.page_bytes()
    }

    /// The stretches of the cache that a row takes: latent, key, scale.
    fn places(&self, slot: usize, rank: usize, rope: usize) -> [std::ops::Range<usize>; 3] {
        let page = self.desc.page as usize;
        let first = slot / page * self.desc.page_bytes() as usize;
        let row = slot % page;
        let span = |at: usize, bytes: usize| at..at + bytes;
        match self.desc.cache {
            CacheDtype::Same => {
                let at = first + row * (rank + rope) * 2;
                [
                    span(at, rank * 2),
                    span(at + rank * 2, rope * 2),
                    span(at, 0),
                ]
            }
            CacheDtype::E4m3 => {
                let keys = first + page * rank;
                let scales = keys + page * rope * 2;
                [
                    span(first + row * rank, rank),
                    span(keys + row * rope * 2, rope * 2),
                    span(scales + row * 4, 4),
                ]
            }
        }
    }

    fn row(&self, cache: &[u8], places: &[std::ops::Range<usize>; 3]) -> Row {
        let halves = |dtype: Dtype, bytes: &[u8]| -> Vec<f32> {
            bytes
                .chunks_exact(2)
                .map(|c| from_bits(dtype, u16::from_le_bytes([c[0], c[1]])))
                .collect()
        };
        let [latent, key, scale] = places.clone().map(|place| &cache[place]);
        match self.desc.cache {
            CacheDtype::Same => Row {
                scale: 1.0,
                latent: halves(self.desc.dtype, latent),
                key: halves(self.desc.dtype, key),
            },
            CacheDtype::E4m3 => Row {
                scale: f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]),
                latent: latent.iter().map(|&code| fp8::value(code)).collect(),
                key: halves(Dtype::F16, key),
            },
        }
    }

    /// What is wrong with a cache that was [`POISON`] before, or nothing: every row that was asked for is there within its
    /// rounding, compared in f64, and nothing else was written.
    pub fn complaint(&self, cache: &[u8]) -> Option<String> {
        let (rank, rope) = widths(&self.desc)?;
        if cache.len() as u64 != self.cache_bytes() {
            return Some(format!(
                "{} bytes of cache, expected {}",
                cache.len(),
                self.cache_bytes()
            ));
        }
        for slot in 0..(self.pages * self.desc.page) as usize {
            let places = self.places(slot, rank, rope);
            let asked = (0..self.slots.len()).find(|&token| {
                self.slots[token] == slot as i32
                    && (0..self.table_rows as i32).contains(&self.positions[token])
            });
            let Some(token) = asked else {
                if places
                    .iter()
                    .any(|p| cache[p.clone()].iter().any(|&b| b != POISON))
                {
                    return Some(format!("row {slot} was written, and nobody asked for it"));
                }
                continue;
            };
            let row = self.row(cache, &places);
            if let Some(complaint) = self.differs(token, &row, rank, rope) {
                return Some(format!("row {slot}, token {token}: {complaint}"));
            }
        }
        None
    }

    fn differs(&self, token: usize, row: &Row, rank: usize, rope: usize) -> Option<String> {
        let e4m3 = self.desc.cache == CacheDtype::E4m3;
        let latent = &self.latent[token * rank..(token + 1) * rank];
        let key = &self.key[token * rope..(token + 1) * rope];
        let table = self.positions[token] as usize * rope / 2;
        let turned: Vec<(f64, f64)> = (0..rope)
            .map(|i| {
                let (low, high) = (
                    f64::from(key[i % (rope / 2)]),
                    f64::from(key[i % (rope / 2) + rope / 2]),
                );
                let c = f64::from(self.cosines[table + i % (rope / 2)]);
                let s = f64::from(self.sines[table + i % (rope / 2)]);
                let exact = if i < rope / 2 {
                    low * c - high * s
                } else {
                    high * c + low * s
                };
                // f32 products and their sum.
                (exact, 1e-6 * (low.abs() + high.abs()))
            })
            .collect();
        if e4m3 {
            let single: Vec<f32> = turned.iter().map(|t| t.0 as f32).collect();
            let expected = fp8::scale(latent, &single);
            if row.scale.to_bits() != expected.to_bits() {
                return Some(format!("scale {}, expected {expected}", row.scale));
            }
        }
        let scale = f64::from(row.scale);
        for (i, (&found, &expected)) in row.latent.iter().zip(latent).enumerate() {
            let (found, expected) = (f64::from(found) * scale, f64::from(expected));
            let most = if e4m3 {
                (expected.abs() / 16.0).max(scale / 1024.0)
            } else {
                0.0
            };
            if (found - expected).abs() > most || found.is_nan() {
                return Some(format!(
                    "latent {i}: {found}, expected {expected} within {most}"
                ));
            }
        }
        let half_step = match (e4m3, self.desc.dtype) {
            (false, Dtype::Bf16) => 1.0 / 256.0,
            _ => 1.0 / 2048.0,
        };
        for (i, (expected, slack)) in turned.into_iter().enumerate() {
            let found = f64::from(row.key[i]) * scale;
            // 2^-25: half of a step of f16's subnormals.
            let most = expected.abs() * half_step * 1.001 + slack + scale * 2.0_f64.powi(-25);
            if (found - expected).abs() > most || found.is_nan() {
                return Some(format!(
                    "key {i}: {found}, expected {expected} within {most}"
                ));
            }
        }
        None
    }
}

//! Inputs for a kernel, the naive f64 answer, and the comparison of an answer with it.

use half::{bf16, f16};

use crate::desc::{Attention, AttentionDesc, CacheDtype, Dtype, Mask, PAGE};
use crate::fp8;

/// SplitMix64: small, and the same on every machine.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A stream of its own for every seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound
    }

    /// An eighth of a whole number from -8 to 8: exact in bf16 and f16, and so are f32 sums of products of two of them.
    pub fn eighth(&mut self) -> f32 {
        (self.below(17) as f32 - 8.0) / 8.0
    }
}

/// Rounds to the type.
pub fn round(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
        Dtype::F16 => f16::from_f32(x).to_f32(),
    }
}

/// The bits of a number in the type.
pub fn bits(dtype: Dtype, x: f32) -> u16 {
    match dtype {
        Dtype::Bf16 => bf16::from_f32(x).to_bits(),
        Dtype::F16 => f16::from_f32(x).to_bits(),
    }
}

/// The bytes of numbers in the type, one behind the other.
pub fn half_bytes(dtype: Dtype, numbers: &[f32]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|&x| bits(dtype, x).to_le_bytes())
        .collect()
}

/// The number of these bits.
pub fn from_bits(dtype: Dtype, bits: u16) -> f32 {
    match dtype {
        Dtype::Bf16 => bf16::from_bits(bits).to_f32(),
        Dtype::F16 => f16::from_bits(bits).to_f32(),
    }
}

/// One launch: queries, a paged cache, and everything that decides what is seen.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// The request.
    pub desc: AttentionDesc,
    /// `[batch]`: cached tokens, the query tokens among them.
    pub lengths: Vec<u32>,
    /// `[batch, page_stride]`: pages of the cache; those beyond a request's length are never read.
    pub pages: Vec<i32>,
    /// Longest table of pages.
    pub page_stride: u32,
    /// `[batch, query tokens, query heads, row]`.
    pub q: Vec<f32>,
    /// Latent: `[pages, page, row]`, for an FP8 cache the numbers of codes and keys, in units of the token's scale. Grouped: keys
    /// `[pages, page, KV heads, head size]`. Rows beyond a request's length are NaN.
    pub cache: Vec<f32>,
    /// FP8 cache: `[pages, page]`, each token's scale. Otherwise empty.
    pub scales: Vec<f32>,
    /// Grouped: values, as the keys. Latent: empty.
    pub values: Vec<f32>,
    /// `[query heads]`; empty without sinks.
    pub sinks: Vec<f32>,
    /// `[batch, query tokens]`: bit `j`: sees draft token `j`. Empty without a tree.
    pub tree: Vec<u64>,
    /// Of the scores.
    pub scale: f32,
}

/// A token as a query head meets it: scores are `scale * (q . key)`, outputs of `scale * value`.
#[derive(Debug, Clone, Copy)]
pub struct Cached<'a> {
    /// As many numbers as a query.
    pub key: &'a [f32],
    /// As many numbers as an output.
    pub value: &'a [f32],
    /// 1 unless the cache is FP8.
    pub scale: f32,
}

/// An answer: outputs and log-sum-exp of the scores without the sink.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// `[batch, query tokens, query heads, out row]`.
    pub out: Vec<f32>,
    /// `[batch, query tokens, query heads]`, natural logarithm.
    pub lse: Vec<f32>,
}

impl Problem {
    /// Random inputs. Pages are a random permutation; a tree is random, with every token seeing itself and its ancestors.
    pub fn random(desc: AttentionDesc, lengths: &[u32], seed: u64) -> Self {
        let mut random = Random::new(seed);
        let page_stride = lengths
            .iter()
            .map(|l| l.div_ceil(PAGE))
            .max()
            .unwrap_or(0)
            .max(1);
        let used: u32 = lengths.iter().map(|l| l.div_ceil(PAGE)).sum();
        // One page more than used: page 0 need not be anyone's.
        let mut free: Vec<i32> = (0..=used as i32).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, random.below(i as u64 + 1) as usize);
        }
        let width = match desc.attention {
            Attention::Latent { .. } => desc.row(),
            Attention::Grouped { kv_heads, head_dim } => kv_heads * head_dim,
        } as usize;
        let page_numbers = PAGE as usize * width;
        let mut cache = vec![f32::NAN; free.len() * page_numbers];
        let mut values = match desc.attention {
            Attention::Latent { .. } => Vec::new(),
            Attention::Grouped { .. } => cache.clone(),
        };
        let e4m3 = desc.cache == CacheDtype::E4m3;
        let mut scales = vec![f32::NAN; if e4m3 { free.len() * PAGE as usize } else { 0 }];
        let mut pages = Vec::new();
        for &length in lengths {
            for i in 0..page_stride {
                if i >= length.div_ceil(PAGE) {
                    pages.push(i32::MAX);
                    continue;
                }
                let page = free.pop().unwrap_or(0);
                pages.push(page);
                let rows = (length - i * PAGE).min(PAGE) as usize;
                let first = page as usize * page_numbers;
                let filled = first..first + rows * width;
                cache[filled.clone()].fill_with(|| {
                    // Down to the subnormals of e4m3.
                    let exponent = if e4m3 { random.below(7) } else { 0 };
                    random.eighth() / (1_u32 << exponent) as f32
                });
                if e4m3 {
                    let first = page as usize * PAGE as usize;
                    scales[first..first + rows].fill_with(|| {
                        (8 + random.below(8)) as f32 / 8.0
                            * 2.0_f32.powi(random.below(7) as i32 - 5)
                    });
                }
                if !values.is_empty() {
                    values[filled].fill_with(|| random.eighth());
                }
            }
        }
        let tokens = desc.query_tokens as usize;
        let heads = desc.query_heads as usize;
        let q = (0..lengths.len() * tokens * heads * desc.row() as usize)
            .map(|_| random.eighth())
            .collect();
        let sinks = if desc.sinks {
            (0..heads).map(|_| random.eighth() * 4.0).collect()
        } else {
            Vec::new()
        };
        let mut tree = Vec::new();
        if desc.mask == Mask::Tree {
            for _ in lengths {
                let mut masks: Vec<u64> = Vec::new();
                for token in 0..tokens {
                    let parent = random.below(token as u64 + 1) as usize;
                    let above = if token == 0 || parent == token {
                        0
                    } else {
                        masks[parent]
                    };
                    masks.push(above | 1 << token);
                }
                tree.extend(masks);
            }
        }
        Self {
            desc,
            lengths: lengths.to_vec(),
            pages,
            page_stride,
            q,
            cache,
            scales,
            values,
            sinks,
            tree,
            scale: 1.0 / (desc.row() as f32).sqrt(),
        }
    }

    /// The row of the cache that holds a token.
    pub fn cache_row(&self, request: usize, position: u32) -> usize {
        let page = self.pages[request * self.page_stride as usize + (position / PAGE) as usize];
        page as usize * PAGE as usize + (position % PAGE) as usize
    }

    /// The token that a query head meets at a position.
    pub fn cached(&self, request: usize, head: usize, position: u32) -> Cached<'_> {
        let row = self.cache_row(request, position);
        match self.desc.attention {
            Attention::Latent { .. } => {
                let width = self.desc.row() as usize;
                let key = &self.cache[row * width..(row + 1) * width];
                Cached {
                    key,
                    value: &key[..self.desc.out_row() as usize],
                    scale: self.scales.get(row).copied().unwrap_or(1.0),
                }
            }
            Attention::Grouped { kv_heads, head_dim } => {
                let d = head_dim as usize;
                let group = self.desc.query_heads as usize / kv_heads as usize;
                let at = (row * kv_heads as usize + head / group) * d;
                Cached {
                    key: &self.cache[at..at + d],
                    value: &self.values[at..at + d],
                    scale: 1.0,
                }
            }
        }
    }

    /// The cache as it lies in memory, page after page: numbers of the type, or the planes of [`crate::fp8`].
    pub fn cache_bytes(&self) -> Vec<u8> {
        let desc = &self.desc;
        let (Attention::Latent { kv_lora_rank, .. }, CacheDtype::E4m3) =
            (desc.attention, desc.cache)
        else {
            return half_bytes(desc.dtype, &self.cache);
        };
        let (width, page) = (desc.row() as usize, desc.page as usize);
        let mut bytes = Vec::new();
        for (rows, scales) in self
            .cache
            .chunks_exact(width * page)
            .zip(self.scales.chunks_exact(page))
        {
            for row in rows.chunks_exact(width) {
                let codes = &row[..kv_lora_rank as usize];
                bytes.extend(
                    codes
                        .iter()
                        .map(|x| if x.is_nan() { 0x7f } else { fp8::code(*x) }),
                );
            }
            for row in rows.chunks_exact(width) {
                bytes.extend(half_bytes(Dtype::F16, &row[kv_lora_rank as usize..]));
            }
            bytes.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
        }
        bytes
    }

    /// Whether a query token sees a cached token: the definition, position by position.
    pub fn sees(&self, request: usize, token: usize, position: u32) -> bool {
        let desc = &self.desc;
        let (length, position) = (i64::from(self.lengths[request]), i64::from(position));
        if position >= length {
            return false;
        }
        let first = length - i64::from(desc.query_tokens);
        let own = match desc.mask {
            Mask::Full => length - 1,
            Mask::Causal => first + token as i64,
            Mask::Tree => {
                if first < 0 {
                    return false;
                }
                let word = self.tree[request * desc.query_tokens as usize + token];
                if position >= first && word >> (position - first) & 1 == 0 {
                    return false;
                }
                // The depth in the tree: how many draft tokens it sees, itself among them.
                first + i64::from(word.count_ones()) - 1
            }
        };
        let near = desc.window.is_none_or(|w| own - position < i64::from(w));
        near && (desc.mask != Mask::Causal || position <= own)
    }

    /// The naive answer: two passes in f64.
    pub fn reference(&self) -> Answer {
        let desc = &self.desc;
        let (tokens, heads) = (desc.query_tokens as usize, desc.query_heads as usize);
        let (row, out_row) = (desc.row() as usize, desc.out_row() as usize);
        let mut answer = Answer {
            out: Vec::new(),
            lse: Vec::new(),
        };
        for request in 0..self.lengths.len() {
            for token in 0..tokens {
                for head in 0..heads {
                    let at = (request * tokens + token) * heads + head;
                    let q = &self.q[at * row..(at + 1) * row];
                    let seen: Vec<(f64, Cached)> = (0..self.lengths[request])
                        .filter(|&position| self.sees(request, token, position))
                        .map(|position| {
                            let cached = self.cached(request, head, position);
                            let score: f64 = q
                                .iter()
                                .zip(cached.key)
                                .map(|(&a, &b)| f64::from(a) * f64::from(b))
                                .sum();
                            (
                                score * f64::from(self.scale) * f64::from(cached.scale),
                                cached,
                            )
                        })
                        .collect();
                    let top = seen
                        .iter()
                        .map(|(s, _)| *s)
                        .fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = seen.iter().map(|(s, _)| (s - top).exp()).sum();
                    let sink = self
                        .sinks
                        .get(head)
                        .map_or(0.0, |&sink| (f64::from(sink) - top).exp());
                    let mut out = vec![0.0; out_row];
                    for (score, cached) in &seen {
                        let weight = (score - top).exp() / (sum + sink) * f64::from(cached.scale);
                        for (o, &v) in out.iter_mut().zip(cached.value) {
                            *o += weight * f64::from(v);
                        }
                    }
                    answer.out.extend(out.iter().map(|&x| x as f32));
                    answer.lse.push(if seen.is_empty() {
                        f32::NEG_INFINITY
                    } else {
                        (top + sum.ln()) as f32
                    });
                }
            }
        }
        answer
    }

    /// Relative size of the step from one number of the type to the next.
    fn unit(&self) -> f32 {
        match self.desc.dtype {
            Dtype::Bf16 => 1.0 / 256.0,
            Dtype::F16 => 1.0 / 2048.0,
        }
    }

    /// What an output may differ: the weights are rounded to the factors' type before they meet the values, and the output after.
    pub fn tolerance(&self) -> f32 {
        let unit = self.unit();
        let largest = |numbers: &[f32]| {
            numbers
                .iter()
                .filter(|x| x.is_finite())
                .fold(0.0_f32, |a, x| a.max(x.abs()))
        };
        let value = match self.desc.attention {
            Attention::Latent { .. } if !self.scales.is_empty() => self
                .cache
                .chunks_exact(self.desc.row() as usize)
                .zip(&self.scales)
                .map(|(row, scale)| largest(row) * scale)
                .filter(|x| x.is_finite())
                .fold(0.0, f32::max),
            Attention::Latent { .. } => largest(&self.cache),
            Attention::Grouped { .. } => largest(&self.values),
        };
        1.25 * unit * value.max(f32::MIN_POSITIVE)
    }
}

/// How far an answer is from the reference.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Largest absolute difference of outputs.
    pub max_abs: f32,
    /// Index of it.
    pub worst: usize,
    /// Largest absolute difference of log-sum-exps, over `max(1, |reference|)`.
    pub lse: f32,
    /// Norm of the difference of outputs over the norm of the reference's, which counts as no smaller than that
    /// of outputs of 1e-4; 0 when both are all zeros.
    pub relative: f64,
    /// Outputs or log-sum-exps that are finite in one and not in the other, or NaN.
    pub broken: usize,
}

/// Compares an answer with a reference.
pub fn compare(answer: &Answer, reference: &Answer) -> Difference {
    /// Outputs of values around 1 are smaller only where a sink takes nearly everything; what is left of them may
    /// then be below the smallest number of f16, or of f32's exponential.
    const LEAST_SIZE: f64 = 1e-4;
    let mut difference = Difference {
        max_abs: 0.0,
        worst: 0,
        lse: 0.0,
        relative: 0.0,
        broken: answer.out.len().abs_diff(reference.out.len())
            + answer.lse.len().abs_diff(reference.lse.len()),
    };
    let (mut apart, mut norm) = (0.0, 0.0);
    for (i, (&a, &b)) in answer.out.iter().zip(&reference.out).enumerate() {
        if !a.is_finite() || !b.is_finite() {
            difference.broken += 1;
            continue;
        }
        if (a - b).abs() > difference.max_abs {
            difference.max_abs = (a - b).abs();
            difference.worst = i;
        }
        apart += (f64::from(a) - f64::from(b)).powi(2);
        norm += f64::from(b).powi(2);
    }
    if apart > 0.0 {
        let least = answer.out.len() as f64 * LEAST_SIZE.powi(2);
        difference.relative = (apart / norm.max(least)).sqrt();
    }
    for (&a, &b) in answer.lse.iter().zip(&reference.lse) {
        // Two infinities of one sign have the same bits.
        if a.to_bits() == b.to_bits() {
            continue;
        }
        if !a.is_finite() || !b.is_finite() {
            difference.broken += 1;
            continue;
        }
        difference.lse = difference.lse.max((a - b).abs() / b.abs().max(1.0));
    }
    difference
}

impl Difference {
    /// What is beyond tolerance, or nothing.
    pub fn complaint(&self, problem: &Problem) -> Option<String> {
        let tolerance = problem.tolerance();
        // ex2.approx and lg2.approx are good to 2 units in the last place of f32.
        let lse = 1e-5;
        // Both roundings are off by half a unit at most and by 0.29 on average; a wrong scale of all outputs is not an average.
        let relative = 0.9 * f64::from(problem.unit());
        let bad = self.broken > 0
            || self.max_abs > tolerance
            || self.lse > lse
            || self.relative.is_nan()
            || self.relative > relative;
        bad.then(|| {
            let row = problem.desc.out_row() as usize;
            let heads = problem.desc.query_heads as usize;
            let tokens = problem.desc.query_tokens as usize;
            let at = self.worst / row;
            format!(
                "max abs {} (limit {tolerance}) at request {}, token {}, head {}, column {}; LSE {} (limit {lse}); norm {} \
                 (limit {relative}); {} not finite in one of the two",
                self.max_abs,
                at / heads / tokens,
                at / heads % tokens,
                at % heads,
                self.worst % row,
                self.lse,
                self.relative,
                self.broken
            )
        })
    }
}

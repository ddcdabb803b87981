//! Inputs of one step. Numbers are eighths, exact in every type; whatever must not be read is NaN.

use half::{bf16, f16};
use mlac_kernels::problem::Random;
use mlac_ort::attention::Layout;

/// Type of cached numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// f32.
    F32,
    /// f16.
    F16,
    /// bf16.
    Bf16,
}

impl Kind {
    /// Its name in numpy and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// The nearest number of the type.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }

    /// Half of the step from a number to the next, relative to it; for f32 what sums of so many terms are off by.
    pub fn rounding(self) -> f64 {
        match self {
            Self::F32 => 1e-6,
            Self::F16 => 1.0 / 2048.0,
            Self::Bf16 => 1.0 / 256.0,
        }
    }
}

/// What a problem is like; [`Problem::new`] fills in the numbers.
#[derive(Debug, Clone)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a feature of the operator that a problem has or has not"
)]
pub struct Spec {
    /// Type of cached numbers.
    pub kind: Kind,
    /// Query heads.
    pub heads: usize,
    /// `kv_lora_rank`.
    pub rank: usize,
    /// `qk_rope_head_dim`.
    pub rope: usize,
    /// New tokens.
    pub query_tokens: usize,
    /// Cached tokens of each sequence.
    pub past: Vec<usize>,
    /// Rows of a page; `None`: contiguous.
    pub page: Option<usize>,
    /// Rows of a contiguous cache beyond what is needed; a ring has none.
    pub spare: usize,
    /// Whether a contiguous cache is a ring as small as the window.
    pub ring: bool,
    /// Sliding window.
    pub window: Option<usize>,
    /// Whether there are sinks.
    pub sinks: bool,
    /// Whether the new tokens are a random tree.
    pub tree: bool,
    /// Whether some positions are masked.
    pub key_mask: bool,
    /// Factor on the scores; large ones make the softmax sharp.
    pub scale: f32,
    /// Of the numbers.
    pub seed: u64,
}

impl Default for Spec {
    /// One token of three heads over ten.
    fn default() -> Self {
        Self {
            kind: Kind::F32,
            heads: 3,
            rank: 8,
            rope: 4,
            query_tokens: 1,
            past: vec![10],
            page: None,
            spare: 3,
            ring: false,
            window: None,
            sinks: false,
            tree: false,
            key_mask: false,
            scale: 0.3,
            seed: 1,
        }
    }
}

/// One step with all of its inputs.
#[derive(Debug, Clone)]
pub struct Problem {
    /// What it is like.
    pub spec: Spec,
    /// The cache's layout.
    pub layout: Layout,
    /// `[batch, query_tokens, heads, w]`.
    pub query: Vec<f32>,
    /// `[batch, query_tokens, w]`.
    pub new_rows: Vec<f32>,
    /// Rows of the cached tokens by sequence, also of those that a ring has let go.
    pub history: Vec<Vec<Vec<f32>>>,
    /// As the layout says; NaN where nothing is cached.
    pub cache: Vec<f32>,
    /// `[batch, max_pages]`.
    pub page_table: Option<Vec<i32>>,
    /// `[heads]`.
    pub sinks: Option<Vec<f32>>,
    /// `[batch, query_tokens]`.
    pub tree: Option<Vec<i64>>,
    /// `[batch, mask_length]`.
    pub key_mask: Option<Vec<i64>>,
    /// Columns of the mask.
    pub mask_length: usize,
}

impl Problem {
    /// Random numbers for a spec.
    pub fn new(spec: Spec) -> Self {
        let mut random = Random::new(spec.seed);
        let width = spec.rank + spec.rope;
        let batch = spec.past.len();
        let mut row = || -> Vec<f32> { (0..width).map(|_| random.eighth()).collect() };
        let history: Vec<Vec<Vec<f32>>> = spec
            .past
            .iter()
            .map(|&past| (0..past).map(|_| row()).collect())
            .collect();
        let new_rows: Vec<f32> = (0..batch * spec.query_tokens).flat_map(|_| row()).collect();
        let query = (0..batch * spec.query_tokens * spec.heads)
            .flat_map(|_| row())
            .collect();
        let longest = spec.past.iter().max().copied().unwrap_or(0) + spec.query_tokens;
        let (layout, page_table) = layout(&spec, longest, &mut random);
        let sinks = spec
            .sinks
            .then(|| (0..spec.heads).map(|_| 4.0 * random.eighth()).collect());
        let tree = spec.tree.then(|| trees(&spec, &mut random));
        let mask_length = longest + 2;
        let key_mask = spec.key_mask.then(|| {
            let hidden = |random: &mut Random| i64::from(random.below(4) > 0) * 7;
            (0..batch * mask_length)
                .map(|_| hidden(&mut random))
                .collect()
        });
        let rows = match layout {
            Layout::Contiguous { capacity } => batch * capacity,
            Layout::Paged {
                num_pages,
                page_size,
                ..
            } => num_pages * page_size,
        };
        let mut problem = Self {
            layout,
            query,
            new_rows,
            history: Vec::new(),
            cache: vec![f32::NAN; rows * width],
            page_table,
            sinks,
            tree,
            key_mask,
            mask_length,
            spec,
        };
        for (b, rows) in history.iter().enumerate() {
            let kept = problem
                .capacity()
                .map_or(0, |c| rows.len().saturating_sub(c));
            for (position, row) in rows.iter().enumerate().skip(kept) {
                let at = problem.slot(b, position) * width;
                problem.cache[at..at + width].copy_from_slice(row);
            }
        }
        problem.history = history;
        problem
    }

    /// `r + d_r`.
    pub fn width(&self) -> usize {
        self.spec.rank + self.spec.rope
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.spec.past.len()
    }

    fn capacity(&self) -> Option<usize> {
        match self.layout {
            Layout::Contiguous { capacity } => Some(capacity),
            Layout::Paged { .. } => None,
        }
    }

    /// Where the row of a position lies, as the specification's table has it.
    pub fn slot(&self, b: usize, position: usize) -> usize {
        match self.layout {
            Layout::Contiguous { capacity } => b * capacity + position % capacity,
            Layout::Paged {
                page_size,
                max_pages,
                ..
            } => {
                let table = self.page_table.as_deref().unwrap_or_default();
                table[b * max_pages + position / page_size] as usize * page_size
                    + position % page_size
            }
        }
    }

    /// Shape of the cache.
    pub fn cache_shape(&self) -> [usize; 3] {
        match self.layout {
            Layout::Contiguous { capacity } => [self.batch(), capacity, self.width()],
            Layout::Paged {
                num_pages,
                page_size,
                ..
            } => [num_pages, page_size, self.width()],
        }
    }

    /// A name for messages.
    pub fn name(&self) -> String {
        format!("{:?}", self.spec)
    }
}

fn layout(spec: &Spec, longest: usize, random: &mut Random) -> (Layout, Option<Vec<i32>>) {
    let Some(page_size) = spec.page else {
        let capacity = match spec.window {
            Some(window) if spec.ring => window,
            _ => longest + spec.spare,
        };
        return (Layout::Contiguous { capacity }, None);
    };
    let max_pages = longest.div_ceil(page_size) + 1;
    let needed = |past: usize| (past + spec.query_tokens).div_ceil(page_size);
    let used: usize = spec.past.iter().map(|&past| needed(past)).sum();
    // One page more than used: page 0 need not be anyone's.
    let mut free: Vec<i32> = (0..=used as i32).collect();
    for i in (1..free.len()).rev() {
        free.swap(i, random.below(i as u64 + 1) as usize);
    }
    let mut table = Vec::new();
    for &past in &spec.past {
        for column in 0..max_pages {
            // Beyond the sequence a table may hold anything.
            let page = if column < needed(past) {
                free.pop()
            } else {
                None
            };
            table.push(page.unwrap_or(i32::MAX));
        }
    }
    let layout = Layout::Paged {
        num_pages: used + 1,
        page_size,
        max_pages,
    };
    (layout, Some(table))
}

/// Random trees: a token sees itself and what its parent sees. Bits beyond the tokens are noise.
fn trees(spec: &Spec, random: &mut Random) -> Vec<i64> {
    let tokens = spec.query_tokens;
    let noise = if tokens == 64 { 0 } else { u64::MAX << tokens };
    let mut words = Vec::new();
    for _ in &spec.past {
        let mut tree: Vec<u64> = Vec::new();
        for token in 0..tokens {
            let parent = random.below(token as u64 + 1) as usize;
            let above = tree.get(parent).copied().unwrap_or(0);
            tree.push(above | 1 << token);
        }
        words.extend(
            tree.iter()
                .map(|word| (word | random.bits() & noise) as i64),
        );
    }
    words
}

//! Recipes, line by line, as `kernels/src/launch/recipe.rs` documents them. Numbers are bounded here, so that no later arithmetic on them
//! can overflow.

use crate::refusal::{Refusal, refuse};

/// The tensors that a recipe names; regions of the workspace follow them.
pub(crate) const TENSORS: [&str; 9] = [
    "query",
    "new_rows",
    "cache",
    "past_lengths",
    "page_table",
    "sinks",
    "tree_mask",
    "sums",
    "lse",
];

const HEAD: [&str; 12] = [
    "mlac-recipe",
    "kernel",
    "capability",
    "dtype",
    "heads",
    "query_tokens",
    "kv_lora_rank",
    "rope_dim",
    "mask",
    "window",
    "sinks",
    "page",
];
const FIX: &str = "use the libmlac_ort.so of the mlac that made the kernels";
const MOST_BLOCK: u64 = 4096;
const MOST_BYTES: u64 = 1 << 40;

/// What a pointer points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// One of [`TENSORS`].
    Tensor(usize),
    /// One of the kernel's regions.
    Region(usize),
}

/// A number that the call brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    Batch,
    PageStride,
    CachePages,
    Scale,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    Pointer(Place),
    Number(Number),
    Constant(i32),
}

/// A tensor map of three dimensions, as `cuTensorMapEncodeTiled` wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Map {
    pub(super) place: Place,
    /// Data type, interleave, swizzle, promotion, fill.
    pub(super) words: [i32; 5],
    pub(super) edges: [u32; 3],
    pub(super) extents: [u64; 2],
    pub(super) per_request: u64,
    pub(super) per_page: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Argument {
    /// Bytes, and what lies at which offset; the rest is zero.
    Block(usize, Vec<(usize, Value)>),
    Map(Map),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Launch {
    pub(super) function: String,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
    pub(super) dependent: bool,
    pub(super) fixed: u64,
    pub(super) per_request: u64,
    pub(super) divisor: u64,
    pub(super) arguments: Vec<Argument>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) name: String,
    pub(super) fixed: u64,
    pub(super) per_request: u64,
    pub(super) per_entry: u64,
}

/// A recipe, read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    /// Compute capability: major and minor.
    pub(crate) capability: (u32, u32),
    pub(crate) f16: bool,
    pub(crate) heads: usize,
    pub(crate) query_tokens: usize,
    pub(crate) kv_lora_rank: usize,
    pub(crate) rope_dim: usize,
    pub(crate) tree: bool,
    /// 0: none.
    pub(crate) window: usize,
    pub(crate) sinks: bool,
    pub(crate) page: usize,
    pub(super) regions: Vec<Region>,
    pub(super) launches: Vec<Launch>,
}

/// The words of one line.
struct Line<'a> {
    text: &'a str,
    number: usize,
    key: &'a str,
    words: std::str::SplitAsciiWhitespace<'a>,
}

impl<'a> Line<'a> {
    fn new(text: &'a str, number: usize) -> Self {
        let mut words = text.split_ascii_whitespace();
        Self {
            text,
            number,
            key: words.next().unwrap_or_default(),
            words,
        }
    }

    fn wrong(&self, expected: impl Into<String>) -> Refusal {
        let found: String = self.text.chars().take(80).collect();
        let subject = format!("attribute `kernels`, line {} of a recipe", self.number);
        refuse(&subject, expected, format!("`{found}`"), FIX)
    }

    fn word(&mut self) -> Result<&'a str, Refusal> {
        self.words.next().ok_or_else(|| self.wrong("one more word"))
    }

    fn number(&mut self, least: u64, most: u64) -> Result<u64, Refusal> {
        let word = self.word()?;
        // `parse` alone would take a sign.
        let digits = word.bytes().all(|byte| byte.is_ascii_digit());
        word.parse()
            .ok()
            .filter(|value| digits && (least..=most).contains(value))
            .ok_or_else(|| self.wrong(format!("a number from {least} to {most}")))
    }

    fn small(&mut self, least: u32, most: u32) -> Result<u32, Refusal> {
        self.number(least.into(), most.into()).map(|x| x as u32)
    }

    fn size(&mut self, least: u32, most: u32) -> Result<usize, Refusal> {
        self.number(least.into(), most.into()).map(|x| x as usize)
    }

    fn choice(&mut self, no: &str, yes: &str) -> Result<bool, Refusal> {
        match self.word()? {
            word if word == yes => Ok(true),
            word if word == no => Ok(false),
            _ => Err(self.wrong(format!("{no} or {yes}"))),
        }
    }

    fn end(mut self) -> Result<(), Refusal> {
        match self.words.next() {
            None => Ok(()),
            Some(_) => Err(self.wrong("the end of the line")),
        }
    }
}

impl Kernel {
    /// Reads a recipe.
    pub(super) fn read(text: &str) -> Result<Self, Refusal> {
        let mut kernel = Self::default();
        for (i, line) in text.lines().enumerate() {
            let mut line = Line::new(line, i + 1);
            match HEAD.get(i) {
                Some(key) if *key == line.key => kernel.head(i, &mut line)?,
                Some(key) => return Err(line.wrong(format!("`{key}` here"))),
                None => kernel.body(&mut line)?,
            }
            line.end()?;
        }
        let bare = kernel.launches.iter().find(|l| l.arguments.is_empty());
        if kernel.launches.is_empty() || bare.is_some() {
            return Err(refuse(
                "attribute `kernels`",
                "a recipe with launches, each with arguments",
                bare.map_or_else(
                    || "no launch".to_owned(),
                    |launch| format!("none for {}", launch.function),
                ),
                FIX,
            ));
        }
        Ok(kernel)
    }

    /// Numbers of a cached row.
    pub(crate) fn row(&self) -> usize {
        self.kv_lora_rank + self.rope_dim
    }

    /// Whether another kernel differs in its query tokens only.
    pub(super) fn is_of_layer(&self, other: &Self) -> bool {
        let of = |kernel: &Self| {
            (
                (kernel.capability, kernel.f16, kernel.heads, kernel.tree),
                (kernel.kv_lora_rank, kernel.rope_dim, kernel.window),
                (kernel.sinks, kernel.page),
            )
        };
        of(self) == of(other)
    }

    /// Every fact of the head exactly once, in the order in which recipes are written.
    fn head(&mut self, which: usize, line: &mut Line<'_>) -> Result<(), Refusal> {
        match which {
            0 => {
                line.number(1, 1)?;
            }
            1 => line.word()?.clone_into(&mut self.name),
            2 => self.capability = (line.small(1, 99)?, line.small(0, 9)?),
            3 => self.f16 = line.choice("bf16", "f16")?,
            4 => self.heads = line.size(1, 1024)?,
            5 => self.query_tokens = line.size(1, 64)?,
            6 => self.kv_lora_rank = line.size(1, 4096)?,
            7 => self.rope_dim = line.size(0, 4096)?,
            8 => self.tree = line.choice("causal", "tree")?,
            9 => self.window = line.size(0, 1 << 30)?,
            10 => self.sinks = line.choice("0", "1")?,
            _ => self.page = line.size(1, 1024)?,
        }
        Ok(())
    }

    fn body(&mut self, line: &mut Line<'_>) -> Result<(), Refusal> {
        match line.key {
            "region" => {
                let region = Region {
                    name: line.word()?.to_owned(),
                    fixed: line.number(0, MOST_BYTES)?,
                    per_request: line.number(0, MOST_BYTES >> 16)?,
                    per_entry: line.number(0, 1024)?,
                };
                if !self.launches.is_empty() || self.regions.len() >= 32 {
                    return Err(line.wrong("at most 32 regions, before the first launch"));
                }
                self.regions.push(region);
            }
            "launch" => {
                let launch = Launch {
                    function: line.word()?.to_owned(),
                    threads: line.small(1, 1024)?,
                    shared_bytes: line.small(0, 1 << 20)?,
                    dependent: line.choice("0", "1")?,
                    fixed: line.number(0, 1 << 30)?,
                    per_request: line.number(0, 1 << 30)?,
                    divisor: line.number(1, 1 << 20)?,
                    arguments: Vec::new(),
                };
                if self.launches.len() >= 16 {
                    return Err(line.wrong("at most 16 launches"));
                }
                self.launches.push(launch);
            }
            "block" => {
                let bytes = line.number(4, MOST_BLOCK)? as usize;
                self.argument(line, Argument::Block(bytes, Vec::new()))?;
            }
            "pointer" | "number" | "constant" => self.field(line)?,
            "map" => {
                let place = self.place(line)?;
                let mut words = [0; 5];
                for word in &mut words {
                    *word = line.small(0, 255)? as i32;
                }
                let mut edges = [0; 3];
                for edge in &mut edges {
                    *edge = line.small(1, 256)?;
                }
                let map = Map {
                    place,
                    words,
                    edges,
                    extents: [line.number(1, 1 << 24)?, line.number(1, 1 << 24)?],
                    per_request: line.number(0, 1 << 16)?,
                    per_page: line.number(0, 1 << 16)?,
                };
                self.argument(line, Argument::Map(map))?;
            }
            _ => {
                let expected = "region, launch, block, pointer, number, constant or map";
                return Err(line.wrong(expected));
            }
        }
        Ok(())
    }

    fn argument(&mut self, line: &Line<'_>, argument: Argument) -> Result<(), Refusal> {
        let launch = self.launches.last_mut();
        match launch.filter(|launch| launch.arguments.len() < 16) {
            Some(launch) => {
                launch.arguments.push(argument);
                Ok(())
            }
            None => Err(line.wrong("a launch before its arguments, at most 16")),
        }
    }

    fn place(&self, line: &mut Line<'_>) -> Result<Place, Refusal> {
        let name = line.word()?;
        if let Some(tensor) = TENSORS.iter().position(|tensor| *tensor == name) {
            return Ok(Place::Tensor(tensor));
        }
        let region = self.regions.iter().position(|region| region.name == name);
        region.map(Place::Region).ok_or_else(|| {
            line.wrong("a tensor of mlac::LatentAttention or a region of the workspace")
        })
    }

    fn field(&mut self, line: &mut Line<'_>) -> Result<(), Refusal> {
        let offset = line.number(0, MOST_BLOCK)? as usize;
        let value = match line.key {
            "pointer" => Value::Pointer(self.place(line)?),
            "constant" => Value::Constant(line.small(0, i32::MAX as u32)? as i32),
            _ => Value::Number(match line.word()? {
                "batch" => Number::Batch,
                "page_stride" => Number::PageStride,
                "cache_pages" => Number::CachePages,
                "scale" => Number::Scale,
                _ => return Err(line.wrong("batch, page_stride, cache_pages or scale")),
            }),
        };
        let width = if matches!(value, Value::Pointer(_)) {
            8
        } else {
            4
        };
        let launch = self.launches.last_mut();
        match launch.and_then(|launch| launch.arguments.last_mut()) {
            Some(Argument::Block(bytes, fields)) if offset + width <= *bytes => {
                fields.push((offset, value));
                Ok(())
            }
            _ => Err(line.wrong("a field within the block before it")),
        }
    }
}

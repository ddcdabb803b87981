//! The division of a step's work, as `cuda/common.cuh` and `cuda/plan.cuh` compute it on the device.
//!
//! The device builds it (its inputs, the lengths, live there, and a captured graph must not ask the host); this is the same
//! arithmetic for the emulator, for the sizes of buffers, and for tests.

use crate::config::AttentionConfig;
use crate::desc::{Attention, AttentionDesc, Mask};

/// Tiles `begin..end` of a request's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiles {
    /// First.
    pub begin: u32,
    /// One past the last.
    pub end: u32,
}

/// A piece of a unit that one CTA computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The CTA.
    pub part: u32,
    /// The unit, of all requests.
    pub unit: u32,
    /// Its tiles.
    pub tiles: Tiles,
    /// Where a divided unit's piece is put; none when the unit is whole.
    pub slot: Option<u32>,
}

/// The tiles that any query token of a unit sees; `unit` is of its request.
pub fn unit_tiles(desc: &AttentionDesc, config: &AttentionConfig, length: u32, unit: u32) -> Tiles {
    let tokens = i64::from(desc.query_tokens);
    let (mut first, mut last) = (0, tokens - 1);
    if let Attention::Latent { .. } = desc.attention {
        let head_tiles = i64::from(desc.query_heads.div_ceil(config.head_tile));
        let group = i64::from(config.group);
        first = i64::from(unit) * group / head_tiles;
        last = (tokens - 1).min(((i64::from(unit) + 1) * group - 1) / head_tiles);
    }
    let length = i64::from(length);
    let base = length - tokens;
    let hi = match desc.mask {
        Mask::Causal => (base + last + 1).clamp(0, length),
        Mask::Tree if base < 0 => 0,
        Mask::Tree | Mask::Full => length,
    };
    let lowest = match desc.mask {
        Mask::Full => length - 1,
        Mask::Causal => base + first,
        Mask::Tree => base,
    };
    let lo = desc
        .window
        .map_or(0, |w| (lowest - i64::from(w) + 1).max(0));
    let tile = i64::from(config.tile);
    let begin = lo / tile;
    let end = if hi <= lo {
        begin
    } else {
        (hi + tile - 1) / tile
    };
    Tiles {
        begin: begin as u32,
        end: end as u32,
    }
}

/// The division of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// `[parts + 1]`: first unit and first tile of each part.
    pub bounds: Vec<(u32, u32)>,
    /// `[units]`: first and last part of each unit.
    pub owners: Vec<(u32, u32)>,
    counts: Vec<Tiles>,
    planned: bool,
}

impl Plan {
    /// Divides the work of requests of these lengths among `parts` CTAs.
    pub fn of(desc: &AttentionDesc, config: &AttentionConfig, lengths: &[u32], parts: u32) -> Self {
        let units = config.units(desc);
        let counts: Vec<Tiles> = lengths
            .iter()
            .flat_map(|&length| (0..units).map(move |unit| unit_tiles(desc, config, length, unit)))
            .collect();
        let mut plan = Self {
            bounds: Vec::new(),
            owners: Vec::new(),
            counts,
            planned: config.planned,
        };
        if config.planned {
            plan.divide(parts, i64::from(config.min_split));
        }
        plan
    }

    fn divide(&mut self, parts: u32, min_split: i64) {
        let units = self.counts.len();
        let mut costs = vec![0_i64];
        for tiles in &self.counts {
            costs.push(costs[costs.len() - 1] + i64::from(tiles.end - tiles.begin) + 1);
        }
        let total = costs[units];
        let payload = ((total + i64::from(parts) - 1) / i64::from(parts)).max(min_split);
        for part in 0..=i64::from(parts) {
            let position = part * payload;
            let mut bound = (units, 0);
            if position < total {
                let unit = costs[..units].partition_point(|&cost| cost <= position) - 1;
                let tile = position - costs[unit];
                let count = costs[unit + 1] - costs[unit] - 1;
                bound = if tile < min_split {
                    (unit, 0)
                } else if count - tile < min_split {
                    (unit + 1, 0)
                } else {
                    (unit, tile)
                };
            }
            self.bounds.push((bound.0 as u32, bound.1 as u32));
        }
        let starts = &self.bounds[..parts as usize];
        for unit in 0..units as u32 {
            let first = starts.partition_point(|&bound| bound <= (unit, 0)) - 1;
            let last = starts.partition_point(|&bound| bound.0 <= unit) - 1;
            self.owners.push((first as u32, last as u32));
        }
    }

    /// The pieces in the order of parts and, in a part, of its walk. Undivided work: one piece a unit.
    pub fn pieces(&self) -> Vec<Piece> {
        let units = self.counts.len() as u32;
        if !self.planned {
            return (0..units)
                .map(|unit| Piece {
                    part: unit,
                    unit,
                    tiles: self.counts[unit as usize],
                    slot: None,
                })
                .collect();
        }
        let mut pieces = Vec::new();
        for (part, bounds) in self.bounds.windows(2).enumerate() {
            let ((first, from), (stop, to)) = (bounds[0], bounds[1]);
            for unit in first..=stop.min(units.saturating_sub(1)) {
                if (unit, if unit == first { from } else { 0 }) >= (stop, to) {
                    continue;
                }
                let tiles = self.counts[unit as usize];
                let count = tiles.end - tiles.begin;
                let begin = if unit == first { from } else { 0 };
                let end = if unit == stop { to } else { count };
                if begin == end && count > 0 {
                    continue;
                }
                let split = begin > 0 || end < count;
                pieces.push(Piece {
                    part: part as u32,
                    unit,
                    tiles: Tiles {
                        begin: tiles.begin + begin,
                        end: tiles.begin + end,
                    },
                    slot: split.then_some(2 * part as u32 + u32::from(unit != first)),
                });
            }
        }
        pieces
    }

    /// The slots of a unit's pieces, in the order in which `mlac_combine` adds them; empty when it is whole.
    pub fn slots(&self, unit: u32) -> Vec<u32> {
        let Some(&(first, last)) = self.owners.get(unit as usize) else {
            return Vec::new();
        };
        if first == last {
            return Vec::new();
        }
        (first..=last)
            .filter(|&part| self.bounds[part as usize] != self.bounds[part as usize + 1])
            .map(|part| 2 * part + u32::from(self.bounds[part as usize].0 != unit))
            .collect()
    }

    /// The tiles of a unit of all requests.
    pub fn tiles(&self, unit: u32) -> Tiles {
        self.counts[unit as usize]
    }
}

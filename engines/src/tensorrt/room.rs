//! Memory that engines keep for the caches in place.

use serde::Serialize;

use super::manifest::Manifest;
use crate::ort::cache_layer;

/// Bytes of a number of these caches: the plugin's kernels take f16 only.
const NUMBER_BYTES: usize = 2;

/// The caches that engines with the plugin keep in place, of the profile's largest batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Room {
    /// Rows of each sequence.
    pub rows: usize,
    /// Sequences.
    pub batch: usize,
    /// Bytes of all layers.
    pub bytes: u64,
    /// Layers with a sliding window, which keep all rows too: the plugin has no rings.
    pub windowed_layers: usize,
    /// Bytes of theirs beyond the windows.
    pub beyond_windows: u64,
}

impl Manifest {
    /// What the engines keep in place; `None` when nothing is.
    pub fn room(&self) -> Option<Room> {
        let profiles = self.engines.iter().flat_map(|engine| &engine.profiles);
        let decode = profiles.into_iter().find(|p| p.name == "decode")?;
        let mut found: Option<Room> = None;
        for shapes in &decode.inputs {
            let layer = cache_layer(&shapes.name);
            let layout = self.cache.iter().find(|l| Some(l.layer) == layer);
            let (Some(layout), [_, least, _], [batch, rows, width]) =
                (layout, &*shapes.min, &*shapes.max)
            else {
                continue;
            };
            // A cache that grows begins with no rows.
            if *least == 0 {
                continue;
            }
            let room = found.get_or_insert(Room {
                rows: *rows,
                batch: *batch,
                bytes: 0,
                windowed_layers: 0,
                beyond_windows: 0,
            });
            let bytes = |rows: usize| (batch * rows * width * NUMBER_BYTES) as u64;
            room.bytes += bytes(*rows);
            if let Some(window) = layout.window {
                room.windowed_layers += 1;
                room.beyond_windows += bytes(rows.saturating_sub(window));
            }
        }
        found
    }
}

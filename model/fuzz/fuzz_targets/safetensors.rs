//! A safetensors file and an index: read or refused, and every range inside the file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use mlac_model::checkpoint::safetensors::{read_index, read_layout};

fuzz_target!(|bytes: &[u8]| {
    let file = Path::new("fuzzed");
    if let Ok(layout) = read_layout(bytes, file) {
        let mut end = 0;
        for (info, range) in layout {
            assert!(range.start >= end && range.end <= bytes.len());
            assert_eq!(info.byte_len().ok(), Some(range.len()));
            end = range.end;
        }
    }
    // The same bytes as a header with its length put before it, so that mutations reach the JSON.
    let mut framed = (bytes.len() as u64).to_le_bytes().to_vec();
    framed.extend_from_slice(bytes);
    let _ = read_layout(&framed, file);
    if let Ok(index) = read_index(bytes, file) {
        assert!(index.values().all(|shard| !shard.contains('/')));
    }
});

//! GGUF files that contradict themselves.

use std::{fs, path::Path};

use candle_core::quantized::{
    GgmlDType,
    gguf_file::{self, Value},
};
use proptest::prelude::*;

use super::{
    gguf::{metadata, opened_with, tensors, write},
    refusal,
};
use crate::Checkpoint;

/// The bytes of a good file and where its data begin.
fn good_file() -> (Vec<u8>, usize) {
    let (_around, path) = write(&metadata("llama"), &tensors("llama", GgmlDType::Q8_0));
    let bytes = fs::read(path).unwrap();
    let content = gguf_file::Content::read(&mut std::io::Cursor::new(&bytes)).unwrap();
    (bytes, content.tensor_data_offset as usize)
}

fn open_bytes(folder: &Path, bytes: &[u8]) -> Result<Checkpoint, crate::Error> {
    let path = folder.join("model.gguf");
    fs::write(&path, bytes).unwrap();
    Checkpoint::open(path)
}

#[test]
fn damaged_files_are_refused() {
    let (bytes, data) = good_file();
    let around = tempfile::tempdir().unwrap();
    let open = |bytes: &[u8]| open_bytes(around.path(), bytes);
    assert!(open(&bytes).is_ok());
    for length in (0..data).step_by(7).chain([data, bytes.len() - 1]) {
        let message = refusal(open(&bytes[..length]));
        assert!(message.contains("model.gguf"), "{message}");
    }
    let message = refusal(open(&bytes[..bytes.len() - 1]));
    assert!(
        message.contains("it is cut short") && message.contains(": tensor "),
        "{message}"
    );

    // The info of the second tensor: name, axes, extent, type, offset.
    let name = b"output_norm.weight";
    let at = bytes
        .windows(name.len())
        .position(|window| window == name)
        .unwrap()
        + name.len();
    let changed = |offset: usize, value: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at + offset..at + offset + value.len()].copy_from_slice(value);
        refusal(open(&bytes))
    };
    let axes = changed(0, &9_u32.to_le_bytes());
    assert!(
        axes.contains("tensor output_norm.weight: expected 1 to 4 axes, found 9"),
        "{axes}"
    );
    let extent = changed(4, &u64::MAX.to_le_bytes());
    assert!(
        extent.contains("tensor output_norm.weight: expected a shape"),
        "{extent}"
    );
    let kind = changed(12, &20_u32.to_le_bytes());
    assert!(kind.contains("found type 20 (IQ4_NL)"), "{kind}");
    let overlap = changed(16, &0_u64.to_le_bytes());
    assert!(overlap.contains("they overlap"), "{overlap}");
    let misaligned = changed(16, &1_u64.to_le_bytes());
    assert!(
        misaligned.contains("expected data at a multiple of 32, found offset 1"),
        "{misaligned}"
    );
    let outside = changed(16, &(u64::MAX - 31).to_le_bytes());
    assert!(
        outside.contains("tensor output_norm.weight: expected 1024 bytes"),
        "{outside}"
    );
    let mut huge = bytes.clone();
    huge[8..24].fill(0xFF);
    refusal(open(&huge));
    let mut old = bytes.clone();
    old[4] = 1;
    assert!(refusal(open(&old)).contains("version: expected 2 or 3"));
    let zero = opened_with(
        &[("general.alignment", Value::U32(0))],
        &tensors("llama", GgmlDType::F16),
    );
    assert!(refusal(zero).contains("general.alignment"));
}

static GOOD: std::sync::OnceLock<(Vec<u8>, usize)> = std::sync::OnceLock::new();

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// A damaged header is refused or read, never more than that.
    #[test]
    fn damaged_headers_never_panic(changes in prop::collection::vec((0_usize..3000, any::<u8>()), 1..4)) {
        let (bytes, data) = GOOD.get_or_init(good_file);
        let mut bytes = bytes.clone();
        for (at, byte) in changes {
            bytes[at % data] = byte;
        }
        let around = tempfile::tempdir().unwrap();
        if let Ok(checkpoint) = open_bytes(around.path(), &bytes) {
            let _ = checkpoint.bytes("model.layers.0.self_attn.q_proj.weight");
            let _ = checkpoint.tokenizer();
        }
    }
}

use mlac_model::mxfp4::{self, FP4};

use super::{decode::quads, *};
use crate::ir::{Definition, Initializer};

/// The constant behind a value.
fn constant(b: &GraphBuilder, id: ValueId) -> Vec<f32> {
    match &b.graph().value(id).definition {
        Definition::Initializer(Initializer::Inline(t)) => {
            let word = |c: &[u8]| f32::from_le_bytes(c.try_into().unwrap());
            t.bytes.chunks(4).map(word).collect()
        }
        other => panic!("{other:?}"),
    }
}

/// Blocks of all bytes and all scales, against the reference decoder; the tables are all that the
/// standard form multiplies.
#[test]
fn tables_hold_what_the_reference_decoder_gives() {
    let mut b = GraphBuilder::new("tables");
    quads(&mut b).unwrap();
    let (pairs, _) = b
        .graph()
        .values()
        .find(|(_, v)| v.ty.to_string() == "f32[256, 2]")
        .unwrap();
    let pairs = constant(&b, pairs);
    let blocks: Vec<u8> = (0..=255).collect();
    for scale in 0..255u8 {
        let factor = mxfp4::scale(scale).unwrap();
        let mut expected = vec![0.0; 512];
        if mxfp4::decode(&blocks, &[scale; 16], &mut expected).is_err() {
            assert!(scale >= 253, "{scale}");
            continue;
        }
        for (pair, expected) in pairs.iter().zip(&expected) {
            assert_eq!(
                (pair * factor).to_bits(),
                expected.to_bits(),
                "scale {scale}"
            );
        }
    }
}

/// The formulas of the form for `TensorRT`, in the order of the nodes.
#[test]
fn word_arithmetic_finds_every_digit_and_number() {
    for word in [
        0,
        1,
        -1,
        i32::MIN,
        i32::MAX,
        0x7654_3210,
        0x89ab_cdef_u32 as i32,
    ] {
        for (count, bits) in [(8usize, 4usize), (4, 8)] {
            let negative = 0 > word;
            let positive = if negative {
                word.wrapping_sub(i32::MIN)
            } else {
                word
            };
            for digit in 0..count {
                let quotient = positive / (1 << (digit * bits));
                let mut found = quotient % (1 << bits);
                if negative && digit == count - 1 {
                    found += 1 << (bits - 1);
                }
                let expected = (word as u32 >> (digit * bits)) & ((1 << bits) - 1);
                assert_eq!(found as u32, expected, "{word:x} digit {digit} of {count}");
            }
        }
    }
    for (code, expected) in FP4.iter().enumerate() {
        let n = (code % 8) as f32;
        let size = (n * 0.5).max(n - 2.0).max(n * 2.0 - 8.0);
        let found = if code > 7 { -size } else { size };
        assert_eq!(found.to_bits(), expected.to_bits(), "{code}");
    }
}

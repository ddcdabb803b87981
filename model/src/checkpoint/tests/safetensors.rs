use std::{collections::HashMap, fs, path::Path};

use proptest::prelude::*;
use safetensors as reference;

use super::{refusal, tiny_checkpoint, tiny_config};
use crate::{
    Checkpoint, CheckpointWriter, Dtype, TensorInfo,
    checkpoint::safetensors::{read_index, read_layout},
};

/// A file of a header text and so many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 7);
    bytes
}

#[test]
fn a_good_file_is_laid_out_by_offset() {
    let header = r#"{"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
        "__metadata__":{"format":"pt"},
        "a":{"dtype":"BF16","shape":[],"data_offsets":[8,10]},
        "empty":{"dtype":"I64","shape":[0,3],"data_offsets":[8,8]}}"#;
    let bytes = file(header, 10);
    let base = bytes.len() - 10;
    let layout = read_layout(&bytes, Path::new("f")).unwrap();
    let names: Vec<_> = layout.iter().map(|(info, _)| info.name.as_str()).collect();
    assert_eq!(names, ["b", "empty", "a"]);
    assert_eq!(layout[2].1, base + 8..base + 10);
}

#[test]
fn contradictions_are_refused() {
    let one = |entry: &str, data| file(&format!("{{\"w\":{entry}}}"), data);
    let two = |first: &str, second: &str, data| {
        let entry =
            |offsets: &str| format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}"#);
        file(
            &format!(r#"{{"u":{},"w":{}}}"#, entry(first), entry(second)),
            data,
        )
    };
    let mut long = file("{}", 0);
    long[0] = 200;
    let mut huge = file("{}", 0);
    huge[..8].fill(0xFF);
    let cases = [
        (
            vec![],
            "f: expected 8 bytes of header length, found a file of 0 bytes",
        ),
        (vec![1, 0, 0], "found a file of 3 bytes"),
        (
            long,
            "f: header: expected at most 2 bytes, found a header length of 200",
        ),
        (
            huge,
            "found a header length of 18446744073709551615 in a file of 10 bytes",
        ),
        (
            one(r#"{"dtype":"F4","shape":[2],"data_offsets":[0,1]}"#, 1),
            "tensor w: expected a dtype",
        ),
        (
            one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#, 4),
            "tensor w: expected 8 bytes for F32 [2], found a byte range of 4",
        ),
        (
            one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#, 8),
            "tensor w: expected a byte range that ends after it begins, found 8 to 0",
        ),
        (
            one(
                r#"{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,0]}"#,
                0,
            ),
            "tensor w: expected a shape whose bytes can be counted",
        ),
        (
            one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#, 5),
            "last tensor w: expected 8 bytes of data, as the header says, found 5 bytes: the file is cut short",
        ),
        (
            one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#, 9),
            "found 9 bytes: bytes follow the data",
        ),
        (
            one(r#"{"dtype":"F32","shape":[2],"data_offsets":[4,12]}"#, 12),
            "leaves a gap",
        ),
        (
            two("[0,8]", "[4,12]", 12),
            "tensor w: expected data that begins at byte 8",
        ),
        (
            two("[0,8]", "[4,12]", 12),
            "found byte 4: it overlaps the tensor before it",
        ),
        (two("[0,8]", "[0,8]", 8), "it overlaps"),
        (
            two("[0,8]", "[12,20]", 20),
            "it leaves a gap after the tensor before it",
        ),
    ];
    for (bytes, expected) in cases {
        let message = refusal(read_layout(&bytes, Path::new("f")));
        assert!(message.contains(expected), "{message} / {expected}");
        assert!(
            message.starts_with('f') && message.contains("; fix: "),
            "{message}"
        );
    }
}

#[test]
fn headers_that_are_no_header() {
    let good = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    for (header, expected) in [
        ("[1,2]", "an object of tensors"),
        ("{\"w\":", "EOF"),
        (
            r#"{"w":{"dtype":"F32","shape":[2]}}"#,
            "tensor w: missing field `data_offsets`",
        ),
        (
            r#"{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#,
            "tensor w: invalid value",
        ),
        (
            r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,1e30]}}"#,
            "tensor w: invalid",
        ),
        (
            &format!(r#"{{"w":{good},"w":{good}}}"#),
            "tensor w comes twice",
        ),
    ] {
        let error = read_layout(&file(header, 8), Path::new("dir/f"))
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error} / {expected}");
        assert!(error.starts_with("dir/f: "), "{error}");
    }
}

#[test]
fn every_cut_is_refused() {
    let (_around, folder) = tiny_checkpoint(&tiny_config("llama"), Dtype::BF16, u64::MAX);
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    // Every length near the ends, every 13th between: the header's parts and the data's.
    let ends = (0..200).chain(bytes.len() - 200..bytes.len());
    for length in ends.chain((200..bytes.len() - 200).step_by(13)) {
        assert!(
            read_layout(&bytes[..length], Path::new("f")).is_err(),
            "{length}"
        );
    }
    assert!(read_layout(&bytes, Path::new("f")).is_ok());
}

#[test]
fn index_and_shards_have_to_agree() {
    type Change<'a> = &'a dyn Fn(&Path, &mut serde_json::Value);
    let name = "model.norm.weight";
    let first = "model-00001-of-00003.safetensors";
    let cases: [(Change<'_>, &str); 8] = [
        (
            &|folder, _| fs::remove_file(folder.join(first)).unwrap(),
            "found no such file",
        ),
        (
            &|folder, _| {
                let bytes = fs::read(folder.join(first)).unwrap();
                fs::write(folder.join(first), &bytes[..bytes.len() - 1]).unwrap();
            },
            "the file is cut short",
        ),
        (
            &|_, index| index["weight_map"][name] = first.into(),
            "tensor model.norm.weight: expected the tensor in",
        ),
        (
            &|_, index| index["weight_map"]["ghost"] = first.into(),
            "tensor ghost: expected the tensor in model-00001-of-00003.safetensors, found it in none",
        ),
        (
            &|_, index| {
                index["weight_map"].as_object_mut().unwrap().remove(name);
            },
            "found a tensor that it does not name",
        ),
        (
            &|_, index| index["weight_map"][name] = "../model.safetensors".into(),
            "expected the name of a .safetensors file in the same folder, found \"../model.safetensors\"",
        ),
        (
            &|_, index| index["weight_map"][name] = "/etc/passwd".into(),
            "found \"/etc/passwd\"",
        ),
        (
            &|folder, index| {
                fs::copy(folder.join(first), folder.join("more.safetensors")).unwrap();
                index["weight_map"]["ghost"] = "more.safetensors".into();
            },
            "expected each tensor in one shard",
        ),
    ];
    for (change, expected) in cases {
        let (_around, folder) = tiny_checkpoint(&tiny_config("llama"), Dtype::F32, 8000);
        let file = folder.join("model.safetensors.index.json");
        let mut index = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert!(Checkpoint::open(&folder).is_ok());
        change(&folder, &mut index);
        fs::write(&file, index.to_string()).unwrap();
        let message = refusal(Checkpoint::open(&folder));
        assert!(message.contains(expected), "{message} / {expected}");
    }
    let twice = br#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#;
    let error = read_index(twice, Path::new("i")).unwrap_err().to_string();
    assert!(error.contains("tensor a comes twice"), "{error}");
    let error = read_index(b"{\"weight_map\":[]}", Path::new("i"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("an object of shard names"), "{error}");
}

/// Tensors with all of their bytes, names apart.
fn any_tensors() -> impl Strategy<Value = Vec<(TensorInfo, Vec<u8>)>> {
    let dtypes = [
        Dtype::F64,
        Dtype::F32,
        Dtype::F16,
        Dtype::BF16,
        Dtype::U8,
        Dtype::Bool,
    ];
    let tensor = (
        prop::sample::select(dtypes.to_vec()),
        prop::collection::vec(0_usize..5, 0..4),
        any::<u8>(),
    );
    prop::collection::btree_map("[a-z.\"\\\\é]{1,8}", tensor, 1..9).prop_map(|tensors| {
        tensors
            .into_iter()
            .map(|(name, (dtype, shape, fill))| {
                let info = TensorInfo { name, dtype, shape };
                let length = info.byte_len().unwrap() as u32;
                let bytes = (0..length)
                    .map(|at| (at as u8).wrapping_mul(31) ^ fill)
                    .collect();
                (info, bytes)
            })
            .collect()
    })
}

proptest! {
    /// What is written is what the format's own library reads, and the other way round.
    #[test]
    fn round_trip_through_the_reference(tensors in any_tensors(), limit in 0_u64..200) {
        let around = tempfile::tempdir().unwrap();
        let folder = around.path().join("out");
        let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
        let writer = CheckpointWriter::create(&folder, infos, limit).unwrap();
        for (info, bytes) in tensors.iter().rev() {
            writer.write(&info.name, bytes).unwrap();
        }
        writer.finish().unwrap();
        let mut found = 0;
        for name in super::listing(&folder) {
            if name == "model.safetensors.index.json" {
                continue;
            }
            let path = folder.join(&name);
            let file = fs::read(&path).unwrap();
            let theirs = reference::SafeTensors::deserialize(&file).unwrap();
            for (info, range) in read_layout(&file, &path).unwrap() {
                let view = theirs.tensor(&info.name).unwrap();
                let (_, bytes) = tensors.iter().find(|(other, _)| *other == info).unwrap();
                prop_assert_eq!(view.data(), bytes.as_slice());
                prop_assert_eq!(&file[range.clone()], bytes.as_slice());
                prop_assert_eq!(view.shape(), info.shape.as_slice());
                prop_assert_eq!(range.start % info.dtype.size(), 0);
                found += 1;
            }
            let views: HashMap<String, reference::tensor::TensorView<'_>> =
                theirs.tensors().into_iter().collect();
            let again = reference::serialize(&views, None).unwrap();
            prop_assert_eq!(read_layout(&again, &path).unwrap().len(), views.len());
        }
        prop_assert_eq!(found, tensors.len());
    }

    /// A damaged header is refused or read, never more than that.
    #[test]
    fn damaged_headers_never_panic(
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let header = r#"{"__metadata__":{"format":"pt"},
            "u":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},
            "w":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}}"#;
        let mut bytes = file(header, 14);
        let place = at.index(bytes.len());
        bytes[place] = byte;
        if let Ok(layout) = read_layout(&bytes, Path::new("f")) {
            prop_assert!(layout.iter().all(|(_, range)| range.end <= bytes.len()));
        }
        let _ = read_layout(&bytes[..cut.index(bytes.len())], Path::new("f"));
        let _ = read_index(&bytes, Path::new("f"));
    }
}

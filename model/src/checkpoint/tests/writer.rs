use std::{fs, io, path::Path};

use super::{
    listing, parse, refusal, tensor_bytes, tiny_checkpoint, tiny_config, tiny_tensors,
    write_checkpoint,
};
use crate::{CheckpointWriter, Dtype, Error, TensorInfo, checkpoint::writer::write_error};

fn create(folder: &Path) -> Result<CheckpointWriter, Error> {
    let tensors = vec![
        TensorInfo::new("a", Dtype::U8, [3]),
        TensorInfo::new("b", Dtype::F32, [2]),
        TensorInfo::new("c", Dtype::BF16, [4]),
    ];
    CheckpointWriter::create(folder, tensors, u64::MAX)
}

fn write_all(writer: &CheckpointWriter) {
    writer.write("c", &[4; 8]).unwrap();
    writer.write("a", &[1; 3]).unwrap();
    writer.write("b", &[2; 8]).unwrap();
}

#[test]
fn shards_are_named_and_indexed_as_transformers_does() {
    let raw = tiny_config("llama");
    let (_around, folder) = tiny_checkpoint(&raw, Dtype::F32, 8000);
    assert_eq!(
        listing(&folder),
        [
            "config.json",
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
        ]
    );
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("model.safetensors.index.json")).unwrap())
            .unwrap();
    let tensors = tiny_tensors(&parse(&raw), Dtype::F32);
    let total: usize = tensors.iter().map(|info| info.byte_len().unwrap()).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    assert_eq!(
        index["weight_map"].as_object().unwrap().len(),
        tensors.len()
    );
    assert_eq!(
        index["weight_map"]["model.embed_tokens.weight"],
        "model-00001-of-00003.safetensors"
    );
}

#[test]
fn same_tensors_give_same_bytes() {
    let raw = tiny_config("qwen3");
    let (_one, first) = tiny_checkpoint(&raw, Dtype::BF16, 2000);
    let (_two, second) = tiny_checkpoint(&raw, Dtype::BF16, 2000);
    assert_eq!(listing(&first), listing(&second));
    for name in listing(&first) {
        assert_eq!(
            fs::read(first.join(&name)).unwrap(),
            fs::read(second.join(&name)).unwrap()
        );
    }
}

#[test]
fn many_threads_write_at_once() {
    let raw = tiny_config("llama");
    let tensors = tiny_tensors(&parse(&raw), Dtype::F32);
    let around = tempfile::tempdir().unwrap();
    let (serial, parallel) = (around.path().join("serial"), around.path().join("parallel"));
    write_checkpoint(&serial, &raw, &tensors, 3000);
    let writer = CheckpointWriter::create(&parallel, tensors.clone(), 3000).unwrap();
    std::thread::scope(|scope| {
        for part in tensors.chunks(3) {
            let writer = &writer;
            scope.spawn(move || {
                for info in part {
                    writer.write(&info.name, &tensor_bytes(info)).unwrap();
                }
            });
        }
    });
    writer
        .write_file("config.json", raw.to_string().as_bytes())
        .unwrap();
    writer.finish().unwrap();
    for name in listing(&serial) {
        assert_eq!(
            fs::read(serial.join(&name)).unwrap(),
            fs::read(parallel.join(&name)).unwrap()
        );
    }
}

#[test]
fn nothing_has_its_name_before_it_is_complete() {
    let around = tempfile::tempdir().unwrap();
    let folder = around.path().join("out");
    let writer = create(&folder).unwrap();
    assert_eq!(listing(around.path()), ["out.partial"]);
    write_all(&writer);
    writer.write_file("config.json", b"{}").unwrap();
    let copied = around.path().join("tokenizer.json");
    fs::write(&copied, "tokens").unwrap();
    writer.copy_file(&copied).unwrap();
    assert!(!folder.exists());
    writer.finish().unwrap();
    assert_eq!(listing(around.path()), ["out", "tokenizer.json"]);
    assert_eq!(
        listing(&folder),
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
}

#[test]
fn what_is_not_finished_leaves_nothing() {
    let around = tempfile::tempdir().unwrap();
    let folder = around.path().join("out");
    drop(create(&folder).unwrap());
    assert!(listing(around.path()).is_empty());

    let writer = create(&folder).unwrap();
    writer.write("a", &[1; 3]).unwrap();
    let message = refusal(writer.finish());
    assert!(
        message.contains("out: tensor b: expected every announced tensor written"),
        "{message}"
    );
    assert!(listing(around.path()).is_empty());
}

#[test]
fn a_killed_run_is_run_again() {
    let around = tempfile::tempdir().unwrap();
    let folder = around.path().join("out");
    // A killed process runs no destructors.
    std::mem::forget(create(&folder).unwrap());
    fs::write(around.path().join("out.partial").join("stray"), "x").unwrap();
    let writer = create(&folder).unwrap();
    write_all(&writer);
    writer.finish().unwrap();
    assert_eq!(listing(&folder), ["model.safetensors"]);
    assert_eq!(listing(around.path()), ["out"]);
}

#[test]
fn what_exists_is_never_touched() {
    let around = tempfile::tempdir().unwrap();
    let folder = around.path().join("out");
    fs::create_dir(&folder).unwrap();
    let message = refusal(create(&folder));
    assert!(
        message.contains("out: expected a path where nothing exists yet"),
        "{message}"
    );
    fs::remove_dir(&folder).unwrap();

    let writer = create(&folder).unwrap();
    write_all(&writer);
    fs::create_dir(&folder).unwrap();
    refusal(writer.finish());
    assert!(listing(&folder).is_empty());
    assert_eq!(listing(around.path()), ["out"]);
}

#[test]
fn each_tensor_once_and_whole() {
    let around = tempfile::tempdir().unwrap();
    let writer = create(&around.path().join("out")).unwrap();
    let message = refusal(writer.write("b", &[0; 7]));
    assert!(
        message.contains("tensor b: expected 8 bytes, found 7 bytes"),
        "{message}"
    );
    let message = refusal(writer.write("d", &[0; 7]));
    assert!(
        message.contains("tensor d: expected a tensor that was announced"),
        "{message}"
    );
    writer.write("b", &[0; 8]).unwrap();
    let message = refusal(writer.write("b", &[0; 8]));
    assert!(message.contains("a second write"), "{message}");
    for name in ["", "..", "a/b", "/etc/passwd"] {
        let message = refusal(writer.write_file(name, b""));
        assert!(message.contains("expected a plain file name"), "{message}");
    }
    let tensor = |name| TensorInfo::new(name, Dtype::U8, [1]);
    for tensors in [
        vec![tensor("a"), tensor("a")],
        vec![tensor("__metadata__")],
        vec![tensor("")],
    ] {
        refusal(CheckpointWriter::create(
            &around.path().join("other"),
            tensors,
            1,
        ));
    }
    drop(writer);
    assert!(listing(around.path()).is_empty());
}

#[test]
fn a_full_disk_says_how_much_is_needed() {
    const NO_SPACE: i32 = 28;
    let full = io::Error::from_raw_os_error(NO_SPACE);
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    let message = refusal::<()>(Err(write_error(Path::new("out.partial/m"), 123, full)));
    assert!(
        message.contains("out.partial/m: expected room for 123 bytes"),
        "{message}"
    );
    assert!(
        message.contains("fix: free 123 bytes on this disk or choose another"),
        "{message}"
    );
    let denied = io::Error::from(io::ErrorKind::PermissionDenied);
    let error = write_error(Path::new("out.partial/m"), 123, denied);
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

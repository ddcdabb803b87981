//! The first sessions of a process, opened by many threads at once. Alone in its file: a process has one first time.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::Barrier;
use std::thread;

use mlac_engines::ort::{OrtSession, SessionOptions, load};

#[test]
fn the_first_sessions_do_not_disturb_each_other() {
    load().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/toy/decoder.onnx");
    let start = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                start.wait();
                let options = SessionOptions::default().with_threads(1);
                OrtSession::open(&model, &options).unwrap();
            });
        }
    });
}

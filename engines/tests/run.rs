//! Engines of enterprise TensorRT through mlac's own shim, over a TensorRT and a driver of the tests: what is bound where, which
//! profile runs, lengths, positions, caches in place and caches that grow. Nothing here ran on a GPU.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::doc_markdown,
    clippy::float_cmp,
    unreachable_pub,
    reason = "tests; the fake's numbers are small integers"
)]

mod fake_tensorrt;

use std::fs;
use std::path::Path;

use fake_tensorrt::{Fakes, Layer, Model, inside};
use mlac_engines::tensorrt::{EngineDecoder, Manifest};
use mlac_engines::{Decode, Logits};

fn ids(count: usize, seed: i64) -> Vec<i64> {
    (0..count as i64).map(|i| (i * i + seed) % 89).collect()
}

fn all(logits: &Logits, batch: usize) -> Vec<f32> {
    let [_, seq, _] = logits.shape();
    (0..seq)
        .flat_map(|t| logits.row(batch, t).to_vec())
        .collect()
}

fn refusal(folder: &Path) -> String {
    match EngineDecoder::open(folder) {
        Ok(_) => "opened".into(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn engines_compute_what_the_model_computes_without_a_cache() {
    if !inside() {
        let fakes = Fakes::new();
        return fakes.run(
            "engines_compute_what_the_model_computes_without_a_cache",
            &[],
        );
    }
    for f16 in [true, false] {
        let model = Model {
            f16,
            ..Model::default()
        };
        let folder = model.folder(&[]);
        let mut decoder = EngineDecoder::open(folder.path()).unwrap();
        // Twice: nothing of the first text may be left in the second.
        for seed in [3, 50] {
            let text = ids(30, seed);
            let mut found = all(&decoder.prefill(&text[..11]).unwrap(), 0);
            assert_eq!(decoder.past(), 11);
            for &id in &text[11..16] {
                found.extend(decoder.step(id).unwrap().last(0).iter());
            }
            found.extend(all(&decoder.append(&[&text[16..30]]).unwrap(), 0));
            assert_eq!(
                found,
                model.logits(&text),
                "logits in f16: {f16}, seed {seed}"
            );
            assert_eq!((decoder.batch(), decoder.past()), (1, 30));
            decoder.reset();
        }
    }
}

#[test]
fn sequences_side_by_side_do_not_meet() {
    if !inside() {
        return Fakes::new().run("sequences_side_by_side_do_not_meet", &[]);
    }
    let model = Model::default();
    let folder = model.folder(&[]);
    let mut decoder = EngineDecoder::open(folder.path()).unwrap();
    let texts = [ids(14, 5), ids(14, 29)];
    let mut found = [vec![], vec![]];
    for range in [0..9, 9..10, 10..14] {
        let part = [&texts[0][range.clone()], &texts[1][range.clone()]];
        let logits = decoder.append(&part).unwrap();
        for (b, found) in found.iter_mut().enumerate() {
            found.extend(all(&logits, b));
        }
    }
    for (text, found) in texts.iter().zip(found) {
        assert_eq!(found, model.logits(text));
    }
    // Latents keep every row, windows of the others bound theirs: f16.
    assert_eq!(
        decoder.cache_bytes(),
        2 * 2 * (14 * 5 + 14 * 2 * 2 * 3 + 14 * 2 + 6 * 2 * 4)
    );
    let error = decoder.step(1).err().unwrap().to_string();
    assert!(error.contains("2 sequences, as in the cache"), "{error}");
    assert_eq!(decoder.layouts().len(), 4);
    assert_eq!(decoder.layouts()[2].window, Some(6));
}

#[test]
fn the_context_ends_where_the_profiles_end() {
    if !inside() {
        return Fakes::new().run("the_context_ends_where_the_profiles_end", &[]);
    }
    let model = Model::default();
    let folder = model.folder(&[]);
    let mut decoder = EngineDecoder::open(folder.path()).unwrap();
    let text = ids(64, 7);
    let found = all(&decoder.prefill(&text).unwrap(), 0);
    assert_eq!(found, model.logits(&text));
    let error = decoder.step(1).err().unwrap().to_string();
    assert!(
        error.contains("at most 2 sequences of at most 63 tokens and 1 to 1 more")
            && error.contains("found 1 sequences of 64 tokens and 1 more"),
        "{error}"
    );
    // Nothing was changed by the refusal.
    assert_eq!(decoder.past(), 64);
    decoder.reset();
    let three = [[1_i64].as_slice(); 3];
    let error = decoder.append(&three).err().unwrap().to_string();
    assert!(error.contains("found 3 sequences of 0 tokens"), "{error}");
    assert!(decoder.append(&[&[1, -2]]).is_err());

    decoder.fill_with_zeros(1, 63).unwrap();
    let only = decoder.step(9).unwrap();
    // Zeros weigh nothing, so only the new token's rows are in the sum.
    let row = |layer: usize| (27 + 5 * 63 + 7 * layer) % 97;
    let sum = row(0) + 4 * row(1) + row(2) + 2 * row(3);
    assert_eq!(only.last(0)[0], (sum % 251) as f32);
    assert!(decoder.fill_with_zeros(1, 64).is_err());
}

#[test]
fn a_run_that_fails_says_why_and_forgets_what_it_began() {
    const NAME: &str = "a_run_that_fails_says_why_and_forgets_what_it_began";
    if !inside() {
        return Fakes::new().run(NAME, &[("MLAC_FAKE_STOP", "8")]);
    }
    let model = Model::default();
    let folder = model.folder(&[]);
    let mut decoder = EngineDecoder::open(folder.path()).unwrap();
    let text = ids(20, 1);
    let error = decoder.prefill(&text).err().unwrap().to_string();
    assert!(
        error.contains("run with profile 0") && error.contains("fake: told to fail"),
        "{error}"
    );
    assert_eq!((decoder.batch(), decoder.past()), (0, 0));
    // One that fails at once leaves everything as it was.
    let mut found = all(&decoder.prefill(&text[..8]).unwrap(), 0);
    assert!(decoder.step(text[8]).is_err());
    assert_eq!(decoder.past(), 8);
    found.truncate(8 * model.vocab);
    assert_eq!(found, model.logits(&text[..8]));
}

#[test]
fn two_folders_share_a_plugin_and_no_other_is_taken() {
    if !inside() {
        return Fakes::new().run("two_folders_share_a_plugin_and_no_other_is_taken", &[]);
    }
    let model = Model {
        layers: vec![Layer::Latent {
            width: 3,
            window: None,
        }],
        ..Model::default()
    };
    let (a, b) = (Model::default().folder(&[]), model.folder(&[]));
    let mut one = EngineDecoder::open(a.path()).unwrap();
    let mut other = EngineDecoder::open(b.path()).unwrap();
    let text = ids(6, 2);
    assert_eq!(
        all(&one.prefill(&text).unwrap(), 0),
        Model::default().logits(&text)
    );
    assert_eq!(all(&other.prefill(&text).unwrap(), 0), model.logits(&text));

    // The same library with a byte more is another file.
    let library = b.path().join("libmlac_trt.so");
    let mut bytes = fs::read(&library).unwrap();
    bytes.push(0);
    fs::write(&library, &bytes).unwrap();
    change(b.path(), |manifest| {
        manifest["plugin"]["sha256"] = mlac_kernels::cache::digest(&bytes).into();
    });
    let error = refusal(b.path());
    assert!(
        error.contains("expected the one that is registered") && error.contains("another file"),
        "{error}"
    );
}

fn change(folder: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join("manifest.json");
    let mut manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut manifest);
    fs::write(path, manifest.to_string()).unwrap();
}

type Edit = fn(&Path);

#[test]
fn what_does_not_fit_is_refused_before_it_runs() {
    if !inside() {
        return Fakes::new().run("what_does_not_fit_is_refused_before_it_runs", &[]);
    }
    let cases: [(&str, Edit); 8] = [
        (
            "engines of TensorRT for RTX 1.7.1, which mlac only builds",
            |folder| {
                change(folder, |m| m["runtime"] = "TensorRT for RTX 1.7.1".into());
            },
        ),
        (
            "expected TensorRT 11.3.0, found TensorRT 11.4.0",
            |folder| {
                change(folder, |m| m["runtime"] = "TensorRT 11.3.0".into());
            },
        ),
        (
            "expected engines for sm90, which is the GPU here (Fake GPU), found engines for sm100",
            |folder| {
                change(folder, |m| {
                    m["targets"] = serde_json::json!(["sm100"]);
                    m["engines"][0]["targets"] = serde_json::json!(["sm100"]);
                });
            },
        ),
        ("config.json: expected sha256", |folder| {
            fs::write(folder.join("config.json"), "{ }").unwrap();
        }),
        ("decoder.sm90.engine: expected sha256", |folder| {
            let path = folder.join("decoder.sm90.engine");
            let text = fs::read_to_string(&path).unwrap();
            fs::write(path, text.replace("vocab 11", "vocab 12")).unwrap();
        }),
        ("engine and manifest are of two builds", |folder| {
            change(folder, |m| {
                m["engines"][0]["profiles"][1]["inputs"][3]["max"][1] = 128.into();
            });
        }),
        ("expected 1 profiles, found 2", |folder| {
            change(folder, |m| {
                m["engines"][0]["profiles"].as_array_mut().unwrap().pop();
            });
        }),
        ("fake: no engine", |folder| {
            fs::write(folder.join("decoder.sm90.engine"), "other").unwrap();
            change(folder, |m| {
                m["engines"][0]["sha256"] = mlac_kernels::cache::digest(b"other").into();
            });
        }),
    ];
    for (expected, edit) in cases {
        let folder = Model::default().folder(&[("config.json", b"{}".to_vec())]);
        edit(folder.path());
        let error = refusal(folder.path());
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let whole = Model::default().folder(&[("config.json", b"{}".to_vec())]);
    assert_eq!(refusal(whole.path()), "opened");
}

#[test]
fn windows_are_told_to_keep_every_row() {
    let folder = Model::default().folder(&[]);
    let room = Manifest::read(folder.path()).unwrap().room().unwrap();
    // Two sequences of 64 rows of 5 and of 2 numbers in f16; the second layer's window is 6.
    assert_eq!((room.rows, room.batch, room.bytes), (64, 2, 2 * 64 * 7 * 2));
    assert_eq!(
        (room.windowed_layers, room.beyond_windows),
        (1, 2 * (64 - 6) * 2 * 2)
    );
    let grows = Layer::Grows {
        heads: 1,
        width: 4,
        window: Some(6),
    };
    let without = Model {
        layers: vec![grows],
        ..Model::default()
    };
    let folder = without.folder(&[]);
    assert_eq!(Manifest::read(folder.path()).unwrap().room(), None);
}

#[test]
fn another_gpu_is_named() {
    if !inside() {
        return Fakes::new().run("another_gpu_is_named", &[("MLAC_FAKE_CAPABILITY", "8.0")]);
    }
    let folder = Model::default().folder(&[]);
    let error = refusal(folder.path());
    assert!(
        error.contains(
            "expected engines for sm80, which is the GPU here (Fake GPU), found engines for sm90"
        ) && error.contains("--target sm80"),
        "{error}"
    );
}

#[test]
fn another_major_version_is_refused() {
    if !inside() {
        return Fakes::new().run(
            "another_major_version_is_refused",
            &[("MLAC_FAKE_VERSION", "120000")],
        );
    }
    let error = refusal(Model::default().folder(&[]).path());
    assert!(
        error.contains("expected libnvinfer.so.11") && error.contains("version 12.0.0"),
        "{error}"
    );
}

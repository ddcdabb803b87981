//! Every fixture's checkpoint opens, and so does the MLA form made from it by definition: same
//! tensors, same numbers as the safetensors crate reads.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mlac_model::{Checkpoint, MlaEncoder};
use mlac_tests::cases::Cases;
use mlac_tests::fixtures::{self, MODELS};
use mlac_tests::{Outcome, python, text};
use safetensors::{Dtype, SafeTensors};

type Numbers = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// All tensors of a folder, widened to f32.
fn read(folder: &Path) -> Outcome<Numbers> {
    let mut found = Numbers::new();
    for entry in fs::read_dir(folder).map_err(text)? {
        let path = entry.map_err(text)?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if !(name.starts_with("model") && name.ends_with(".safetensors")) {
            continue;
        }
        let bytes = fs::read(&path).map_err(text)?;
        for (name, tensor) in SafeTensors::deserialize(&bytes).map_err(text)?.tensors() {
            let word = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]);
            let data = tensor.data();
            let numbers = match tensor.dtype() {
                Dtype::F32 => data
                    .chunks(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
                Dtype::BF16 => data
                    .chunks(2)
                    .map(|pair| f32::from_bits(u32::from(word(pair)) << 16))
                    .collect(),
                Dtype::F16 => data.chunks(2).map(|pair| half(word(pair))).collect(),
                Dtype::U8 => data.iter().map(|&byte| f32::from(byte)).collect(),
                other => return Err(format!("{name} is {other}")),
            };
            found.insert(name, (tensor.shape().to_vec(), numbers));
        }
    }
    Ok(found)
}

/// An IEEE half, by its definition.
fn half(bits: u16) -> f32 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = ((bits >> 10) & 31, f32::from(bits & 1023) / 1024.0);
    match exponent {
        0 => sign * fraction * 2f32.powi(-14),
        _ => sign * (1.0 + fraction) * 2f32.powi(i32::from(exponent) - 15),
    }
}

fn check(folder: &Path) -> Outcome<Checkpoint> {
    let checkpoint = Checkpoint::open(folder).map_err(text)?;
    let expected = read(folder)?;
    if expected.is_empty() || expected.len() != checkpoint.tensors().len() {
        return Err(format!(
            "{} tensors, expected {}",
            checkpoint.tensors().len(),
            expected.len()
        ));
    }
    for (name, (shape, numbers)) in &expected {
        let info = checkpoint.info(name).map_err(text)?;
        let found = if info.dtype == mlac_model::Dtype::U8 && info.shape == *shape {
            let bytes = checkpoint.bytes(name).map_err(text)?;
            bytes.iter().map(|&byte| f32::from(byte)).collect()
        } else {
            checkpoint.f32(name, shape).map_err(text)?
        };
        if found != *numbers {
            return Err(format!("{name} has other numbers"));
        }
    }
    Ok(checkpoint)
}

#[test]
fn fixtures_and_their_mla_forms_open() {
    let models = fixtures::models().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let place = |name: &str, kind: &str| scratch.path().join(format!("{name}.{kind}"));
    let triples: Vec<(PathBuf, PathBuf, &str)> = models
        .iter()
        .flat_map(|model| {
            ["exact", "random"].map(|kind| (model.folder.clone(), place(&model.name, kind), kind))
        })
        .collect();
    python::synthetic_mla(&triples).unwrap();
    let mut cases = Cases::new();
    for model in &models {
        cases.run(&model.name, || {
            let checkpoint = check(&model.folder)?;
            match checkpoint.config().mla {
                None => Ok(()),
                Some(_) => Err("it has MLA layers".into()),
            }
        });
        for (kind, first) in [("exact", 0), ("random", 1)] {
            cases.run(format!("{} {kind}", model.name), || {
                let checkpoint = check(&place(&model.name, kind))?;
                let config = checkpoint.config();
                let Some(mla) = &config.mla else {
                    return Err("no MLA layers".into());
                };
                let layers: Vec<usize> = mla.layers.keys().copied().collect();
                let expected: Vec<usize> = (first..config.num_hidden_layers).collect();
                let encoder = match model.name.split('_').next() {
                    Some("qwen3") => MlaEncoder::NormedKey,
                    Some("gpt") => MlaEncoder::KeptQuery,
                    _ => MlaEncoder::Hidden,
                };
                if layers != expected || mla.layers.values().any(|layer| layer.encoder != encoder) {
                    return Err(format!(
                        "layers {:?}, expected {expected:?} {encoder:?}",
                        mla.layers
                    ));
                }
                Ok(())
            });
        }
    }
    cases.finish(3 * MODELS);
}

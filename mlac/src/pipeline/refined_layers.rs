//! The layers a refinement has done, beside the output until the whole conversion is done: a run
//! that was killed takes them up when it is repeated.
//!
//! One safetensors file a layer, `layer-7.safetensors`, with the layer's new tensors in f32. Its
//! metadata hold a key, the SHA-256 of the tensors, and the figures of the layer's report. The key
//! is the SHA-256 of everything the layer depends on: this build of mlac, recipe, options, calibration
//! tokens, and the source's tensors and planned ranks of this layer and all below it. A file with
//! another key, or whose numbers are not those that were written, is not used.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use mlac_converter::{LayerReport, LayerWeights, MlaTensors, RankChoice, RefineReport};
use mlac_model::Checkpoint;
use mlac_model::tensor::f32_from_bytes;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::convert::{LayerPlan, hex};
use crate::error::Error;
use crate::staging::write_file;

/// Keys of the metadata.
const KEY: &str = "key";
const DIGEST: &str = "sha256";
const FIGURES: &str = "figures";

/// A layer that was refined before.
pub struct Kept {
    /// The layer's tensors.
    pub tensors: MlaTensors,
    /// What the converter reported.
    pub report: LayerReport,
    /// What refining it gave.
    pub refined: RefineReport,
}

#[derive(Serialize, Deserialize)]
struct Figures {
    report: LayerReport,
    refined: RefineReport,
}

/// The folder, and the key as far as the walk has come.
pub struct RefinedLayers {
    folder: PathBuf,
    below: String,
}

impl RefinedLayers {
    /// Layers that depend on `foundation`.
    pub fn new(folder: &Path, foundation: &str) -> Self {
        Self {
            folder: folder.to_path_buf(),
            below: hex(&Sha256::digest(foundation.as_bytes())),
        }
    }

    /// The key of the next layer; all below it have been asked for.
    pub fn key(
        &mut self,
        checkpoint: &Checkpoint,
        layer: usize,
        plan: Option<&LayerPlan>,
    ) -> Result<String, Error> {
        let mut text = format!("{}\nlayer {layer}\n", self.below);
        if let Some(RankChoice {
            kv_lora_rank,
            qk_rope_head_dim,
        }) = plan.map(|p| p.ranks)
        {
            let _ = writeln!(text, "converted to {kv_lora_rank} + {qk_rope_head_dim}");
        }
        let prefix = format!("model.layers.{layer}.");
        let mut names: Vec<&str> = (checkpoint.tensors().iter())
            .map(|info| info.name.as_str())
            .filter(|name| name.starts_with(&prefix))
            .collect();
        names.sort_unstable();
        for name in names {
            let _ = writeln!(text, "{name} {}", checkpoint.sha256(name)?);
        }
        self.below = hex(&Sha256::digest(text.as_bytes()));
        Ok(self.below.clone())
    }

    fn path(&self, layer: usize) -> PathBuf {
        self.folder.join(format!("layer-{layer}.safetensors"))
    }

    /// Keeps a layer.
    pub fn write(
        &self,
        layer: usize,
        key: &str,
        tensors: &MlaTensors,
        report: &LayerReport,
        refined: &RefineReport,
    ) -> Result<(), Error> {
        let named = tensors.named();
        let mut views = Vec::new();
        for (name, shape, data) in &named {
            let bytes = bytemuck::cast_slice(data);
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            views.push((*name, view.map_err(|e| failed(&self.path(layer), e))?));
        }
        let figures = Figures {
            report: report.clone(),
            refined: refined.clone(),
        };
        let mut figures =
            serde_json::to_value(&figures).map_err(|e| Error::json("figures of a layer", e))?;
        spell(&mut figures);
        let figures = figures.to_string();
        let metadata = HashMap::from([
            (KEY.to_owned(), key.to_owned()),
            (DIGEST.to_owned(), digest(&named, &figures)),
            (FIGURES.to_owned(), figures),
        ]);
        let bytes = safetensors::serialize(views, Some(metadata))
            .map_err(|e| failed(&self.path(layer), e))?;
        fs::create_dir_all(&self.folder).map_err(|e| Error::io(&self.folder, e))?;
        write_file(&self.path(layer), &bytes)
    }

    /// A layer kept under `key`; none when there is no file; why a file is not used.
    pub fn read(
        &self,
        weights: &LayerWeights,
        ranks: RankChoice,
        key: &str,
    ) -> Result<Option<Kept>, String> {
        let path = self.path(weights.layer);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(format!("{} cannot be read ({e})", path.display())),
        };
        let damaged = || format!("{} is damaged", path.display());
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|_| damaged())?;
        let metadata = header.metadata().as_ref().ok_or_else(damaged)?;
        if metadata.get(KEY).map(String::as_str) != Some(key) {
            return Err(format!(
                "{} belongs to another source or request",
                path.display()
            ));
        }
        let content = SafeTensors::deserialize(&bytes).map_err(|_| damaged())?;
        let tensors = MlaTensors::from_named(weights, ranks, |name, shape| {
            let view = content.tensor(name).ok()?;
            let fits = view.dtype() == Dtype::F32 && view.shape() == shape;
            fits.then(|| f32_from_bytes(mlac_model::Dtype::F32, view.data()))
                .flatten()
        })
        .map_err(|_| damaged())?;
        let text = metadata.get(FIGURES).ok_or_else(damaged)?;
        if metadata.get(DIGEST) != Some(&digest(&tensors.named(), text)) {
            return Err(damaged());
        }
        let mut figures: Value = serde_json::from_str(text).map_err(|_| damaged())?;
        unspell(&mut figures);
        let figures: Figures = serde_json::from_value(figures).map_err(|_| damaged())?;
        Ok(Some(Kept {
            tensors,
            report: figures.report,
            refined: figures.refined,
        }))
    }
}

/// Removes the refined layers of a conversion that is done.
pub fn remove(folder: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(folder, e)),
        _ => Ok(()),
    }
}

fn failed(path: &Path, e: safetensors::SafeTensorError) -> Error {
    Error::io(path, std::io::Error::other(e))
}

/// SHA-256 of names, shapes, numbers and figures.
fn digest(named: &[(&'static str, Vec<usize>, &[f32])], figures: &str) -> String {
    let mut hasher = Sha256::new();
    for (name, shape, data) in named {
        hasher.update(format!("{name} {shape:?}\n"));
        hasher.update(bytemuck::cast_slice::<f32, u8>(data));
    }
    hasher.update(figures);
    hex(&hasher.finalize())
}

/// In front of a number that is written as text: JSON readers may round the last digit.
const MARK: char = '#';

/// Fractions as text from which they come back to the last bit.
fn spell(value: &mut Value) {
    visit(value, &|v| {
        if let Some(x) = v.as_f64().filter(|_| v.is_f64()) {
            *v = Value::String(format!("{MARK}{x:?}"));
        }
    });
}

fn unspell(value: &mut Value) {
    visit(value, &|v| {
        let number = v.as_str().and_then(|s| s.strip_prefix(MARK));
        if let Some(x) = number.and_then(|s| s.parse::<f64>().ok()) {
            *v = x.into();
        }
    });
}

fn visit(value: &mut Value, change: &impl Fn(&mut Value)) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(|v| visit(v, change)),
        Value::Object(map) => map.values_mut().for_each(|v| visit(v, change)),
        leaf => change(leaf),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_come_back_to_the_last_bit() {
        let list: [f64; 6] = [0.1 + 0.2, 1e-300, 5e-324, 123_456_789.123_456_78, -0.0, 1.0];
        let mut value = serde_json::json!({"a": list, "b": [3, "#note", "0.5"], "c": null});
        let whole = value.clone();
        spell(&mut value);
        let text = value.to_string();
        let mut back: Value = serde_json::from_str(&text).unwrap();
        unspell(&mut back);
        assert_eq!(back, whole);
        for (x, y) in list.iter().zip(back["a"].as_array().unwrap()) {
            assert_eq!(x.to_bits(), y.as_f64().unwrap().to_bits());
        }
    }
}

//! `--gradients FILE`: the gradients' metrics in a file, for further conversions of the same model with the same
//! calibration windows and for runs that were killed.
//!
//! A safetensors file with one f32 matrix `[2*G*d, 2*G*d]` a layer, `layer-7`. Its metadata hold a key, the
//! SHA-256 of everything the gradients depend on (this build of mlac, the source's tensors and configuration, calibration
//! tokens, seed, layers), and the SHA-256 of the matrices. A file with another key is refused, not overwritten; a damaged one too.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use mlac_converter::Matrix;
use mlac_model::tensor::f32_from_bytes;
use mlac_model::{Checkpoint, Refusal};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

use super::convert::{hex, program_digest};
use super::gradients::Gradients;
use crate::error::Error;
use crate::staging::write_file;

const KEY: &str = "key";
const DIGEST: &str = "sha256";

/// Everything that gradients depend on, as one digest.
pub fn key(
    checkpoint: &Checkpoint,
    windows: &[&[u32]],
    layers: &[usize],
    seed: u64,
) -> Result<String, Error> {
    let mut text = format!(
        "mlac {}\nconfig {}\nseed {seed}\nlayers {layers:?}\n",
        program_digest()?,
        checkpoint.raw_config()
    );
    for info in checkpoint.tensors() {
        let _ = writeln!(text, "{} {}", info.name, checkpoint.sha256(&info.name)?);
    }
    let mut hasher = Sha256::new();
    hasher.update(text);
    for window in windows {
        hasher.update(window.len().to_le_bytes());
        hasher.update(bytemuck::cast_slice::<u32, u8>(window));
    }
    Ok(hex(&hasher.finalize()))
}

/// Writes the file beside its name and renames it.
pub fn write(path: &Path, key: &str, gradients: &Gradients) -> Result<(), Error> {
    let mut matrices = Vec::new();
    for layer in gradients.layers() {
        if let Some(metric) = gradients.of(layer)? {
            matrices.push((name(layer), metric.cast::<f32>()));
        }
    }
    let views: Result<Vec<_>, _> = matrices
        .iter()
        .map(|(name, matrix)| {
            let shape = vec![matrix.rows(), matrix.cols()];
            let bytes = bytemuck::cast_slice(matrix.data());
            Ok((name.as_str(), TensorView::new(Dtype::F32, shape, bytes)?))
        })
        .collect();
    let metadata = HashMap::from([
        (KEY.to_owned(), key.to_owned()),
        (DIGEST.to_owned(), digest(&matrices)),
    ]);
    let bytes = views
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|e| Error::io(path, std::io::Error::other(e)))?;
    write_file(path, &bytes)
}

/// The gradients of `layers` `[width, width]` kept under `key`; none where there is no file.
pub fn read(
    path: &Path,
    key: &str,
    layers: &[usize],
    width: usize,
) -> Result<Option<Gradients>, Error> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
    };
    let refused = |found: &str| {
        let subject = format!("--gradients {}", path.display());
        Refusal::new(
            subject,
            "gradients of this model on these calibration windows, taken by this build of mlac",
            found,
            "remove the file or give another name; the gradients are then taken anew",
        )
    };
    let damaged = || refused("a damaged file");
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|_| damaged())?;
    let metadata = header.metadata().as_ref().ok_or_else(damaged)?;
    if metadata.get(KEY).map(String::as_str) != Some(key) {
        return Err(refused("those of another model, text, choice of layers or build").into());
    }
    let content = SafeTensors::deserialize(&bytes).map_err(|_| damaged())?;
    let mut matrices = Vec::new();
    for &layer in layers {
        let name = name(layer);
        let view = content.tensor(&name).map_err(|_| damaged())?;
        if view.dtype() != Dtype::F32 || view.shape() != [width, width] {
            return Err(damaged().into());
        }
        let data = f32_from_bytes(mlac_model::Dtype::F32, view.data()).ok_or_else(damaged)?;
        matrices.push((name, Matrix::from_vec(width, width, data)));
    }
    if metadata.get(DIGEST) != Some(&digest(&matrices)) {
        return Err(damaged().into());
    }
    let mut gradients = Gradients::empty(layers.len(), width)?;
    for (&layer, (_, matrix)) in layers.iter().zip(&matrices) {
        gradients.push(layer, &matrix.cast())?;
    }
    Ok(Some(gradients))
}

fn name(layer: usize) -> String {
    format!("layer-{layer}")
}

fn digest(matrices: &[(String, Matrix<f32>)]) -> String {
    let mut hasher = Sha256::new();
    for (name, matrix) in matrices {
        hasher.update(name);
        hasher.update(bytemuck::cast_slice::<f32, u8>(matrix.data()));
    }
    hex(&hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradients() -> Gradients {
        let mut gradients = Gradients::empty(2, 4).unwrap();
        for layer in [5, 3] {
            let metric = Matrix::from_fn(4, 4, |i, j| (layer * 16 + i * j) as f64 / 7.0);
            gradients.push(layer, &metric).unwrap();
        }
        gradients
    }

    #[test]
    fn gradients_come_back_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gradients.safetensors");
        assert!(read(&path, "key", &[3, 5], 4).unwrap().is_none());
        let taken = gradients();
        write(&path, "key", &taken).unwrap();
        let back = read(&path, "key", &[3, 5], 4).unwrap().unwrap();
        for layer in [3, 5] {
            assert_eq!(back.of(layer).unwrap(), taken.of(layer).unwrap());
        }
        assert!(back.of(4).unwrap().is_none());
    }

    #[test]
    fn other_keys_and_any_changed_byte_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gradients.safetensors");
        write(&path, "key", &gradients()).unwrap();
        let refusal = |key: &str| read(&path, key, &[3, 5], 4).err().unwrap().to_string();
        assert!(refusal("other").contains("another model"));
        let whole = fs::read(&path).unwrap();
        for at in (0..whole.len()).step_by(11) {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            fs::write(&path, changed).unwrap();
            assert!(refusal("key").contains("--gradients"), "byte {at}");
        }
        for length in [0, 7, 100, whole.len() - 1] {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(refusal("key").contains("--gradients"), "{length} bytes");
        }
    }
}

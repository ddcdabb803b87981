//! Checkpoint to ONNX folder: graphs over one external data file, configuration, tokenizer.

use std::path::Path;

use mlac_graph::ValidGraph;
use mlac_graph::builders::{
    CacheProduct, DecoderOptions, GqaForm, MlaForm, Runtime, decoder_graph, decoder_graph_as_stored,
};
use mlac_graph::ir::DType;
use mlac_graph::onnx::write_folder;
use mlac_model::Checkpoint;
use serde::Serialize;

use super::convert::pretty;
use crate::error::Error;
use crate::progress::Progress;
use crate::staging::Staging;

/// The one external data file of a folder.
const DATA: &str = "decoder.onnx.data";

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportOptions {
    /// Activations and cache, and weights that the checkpoint does not have in 16 bits.
    pub dtype: DType,
    /// Form of layers that are not converted.
    pub gqa_form: GqaForm,
    /// Which runtime's operators.
    pub runtime: Runtime,
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct Exported {
    /// Files with their sizes in bytes.
    pub files: Vec<(String, u64)>,
    /// Seconds it took.
    pub seconds: f64,
}

/// Writes `output`: `decoder.onnx` (absorbed in MLA layers, right for any length), for an MLA model
/// `prefill.onnx` (expanded heads) too unless it is `mlac::LatentAttention` that serves both, `decoder.onnx.data`, `config.json`, the tokenizer.
pub fn export(
    checkpoint: &Checkpoint,
    output: &Path,
    options: ExportOptions,
    progress: Progress,
) -> Result<Exported, Error> {
    let staging = Staging::create(output)?;
    let graphs = graphs(checkpoint, options)?;
    let named: Vec<(&str, &ValidGraph)> =
        graphs.iter().map(|(name, graph)| (*name, graph)).collect();
    let stage = progress.stage("writing ONNX (MiB)", 0);
    let report = write_folder(staging.path(), &named, DATA, checkpoint, &mut |at| {
        stage.of(at.total >> 20);
        stage.doing(at.tensor);
        stage.at(at.done >> 20);
    })?;
    let seconds = stage.seconds();
    drop(stage);
    write_side_files(checkpoint, staging.path())?;
    let files = report
        .files
        .iter()
        .map(|file| {
            let size = std::fs::metadata(file)
                .map_err(|e| Error::io(file, e))?
                .len();
            let name = file
                .file_name()
                .map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            Ok((name, size))
        })
        .collect::<Result<_, Error>>()?;
    staging.finish()?;
    Ok(Exported { files, seconds })
}

fn graphs(
    checkpoint: &Checkpoint,
    options: ExportOptions,
) -> Result<Vec<(&'static str, ValidGraph)>, Error> {
    let config = checkpoint.config();
    // ONNX Runtime casts 16-bit weights when it loads them; TensorRT is given its own type.
    let graph = |mla_form| {
        let options = DecoderOptions {
            dtype: options.dtype,
            mla_form,
            gqa_form: options.gqa_form,
            runtime: options.runtime,
            product: CacheProduct::default(),
        };
        match options.runtime {
            Runtime::Standard | Runtime::OnnxRuntime => {
                decoder_graph_as_stored(config, &options, checkpoint)
            }
            Runtime::TensorRt | Runtime::TensorRtPlugin => decoder_graph(config, &options),
        }
    };
    let mut graphs = vec![("decoder.onnx", graph(MlaForm::Absorbed)?)];
    // LatentAttention serves prompts too.
    if config.mla.is_some() && !options.runtime.has_latent_attention() {
        graphs.push(("prefill.onnx", graph(MlaForm::Expanded)?));
    }
    Ok(graphs)
}

/// Configuration and tokenizer beside the graphs.
fn write_side_files(checkpoint: &Checkpoint, folder: &Path) -> Result<(), Error> {
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).map_err(|e| Error::io(path, e))
    };
    write("config.json", pretty(checkpoint.raw_config())?.as_bytes())?;
    for (name, bytes) in checkpoint.side_contents()? {
        write(&name, &bytes)?;
    }
    Ok(())
}

//! Checkpoint to ONNX folder: graphs over one external data file, configuration, tokenizer.

use std::path::Path;

use mlac_graph::ValidGraph;
use mlac_graph::builders::{
    CacheProduct, DecoderOptions, GqaForm, LayerKernels, MlaForm, Runtime, decoder_graph,
    decoder_graph_as_stored, decoder_graph_with_kernels,
};
use mlac_graph::ir::DType;
use mlac_graph::onnx::write_folder;
use mlac_kernels::Arch;
use mlac_kernels::layer::{self, parts_without_a_gpu};
use mlac_model::{Checkpoint, ModelConfig};
use serde::Serialize;

use super::convert::pretty;
use super::purpose::Purpose;
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
    /// GPU whose kernels the nodes bring, for [`Runtime::OnnxRuntimeCuda`].
    pub arch: Option<Arch>,
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
/// `prefill.onnx` (expanded heads) too unless it is `mlac::LatentAttention` that serves both, `decoder.onnx.data`, `config.json`, the tokenizer, and
/// where not every ONNX Runtime runs it `mlac.json`.
pub fn export(
    checkpoint: &Checkpoint,
    output: &Path,
    options: ExportOptions,
    progress: Progress,
) -> Result<Exported, Error> {
    let staging = Staging::create(output)?;
    let graphs = graphs(checkpoint, options, progress)?;
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
    if let Some(arch) = options.arch {
        Purpose::cuda(arch).write(staging.path())?;
    }
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
    progress: Progress,
) -> Result<Vec<(&'static str, ValidGraph)>, Error> {
    let config = checkpoint.config();
    let kernels = match options.arch {
        Some(arch) if options.dtype == DType::F16 => kernels_of(config, arch, progress)?,
        // The graph refuses another type before it misses kernels.
        _ => LayerKernels::new(),
    };
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
            Runtime::OnnxRuntimeCuda => {
                decoder_graph_with_kernels(config, &options, kernels.clone())
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

/// What the nodes of the converted layers bring: layers are looked at before anything is compiled.
fn kernels_of(config: &ModelConfig, arch: Arch, progress: Progress) -> Result<LayerKernels, Error> {
    let layers: Vec<usize> = config
        .mla
        .iter()
        .flat_map(|mla| mla.layers.keys().copied())
        .collect();
    for &layer in &layers {
        layer::describe(config, layer, arch)?;
    }
    if layers.is_empty() {
        // The graph says why there cannot be one.
        return Ok(LayerKernels::new());
    }
    let mut compiler = layer::LayerKernels::open(arch)?;
    let stage = progress.stage("compiling kernels", layers.len() as u64);
    layers
        .into_iter()
        .map(|layer| {
            stage.doing(format!("layer {layer}"));
            let parts = |desc: &_, choice: &_, _: &[u8]| Ok(parts_without_a_gpu(desc, choice));
            let bytes = compiler.of_layer(config, layer, parts)?;
            stage.step();
            Ok((layer, bytes))
        })
        .collect()
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

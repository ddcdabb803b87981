//! Checkpoints written as ONNX folders, with the graph crate alone.

use std::fs;
use std::path::Path;

use mlac_graph::ValidGraph;
use mlac_graph::builders::{
    DecoderOptions, GqaForm, MlaForm, Runtime, decoder_graph, decoder_graph_as_stored,
};
use mlac_graph::onnx::write_folder;
use mlac_model::Checkpoint;

use crate::{Outcome, text};

/// Options of an export in f32 for any runtime, everything else as the product has it: weights that
/// the checkpoint has in 16 bits keep them.
pub fn standard() -> DecoderOptions {
    DecoderOptions::default()
}

/// The same with layers that are not converted in this form.
pub fn with_gqa(gqa_form: GqaForm) -> DecoderOptions {
    DecoderOptions {
        gqa_form,
        ..standard()
    }
}

/// Writes `checkpoint` as `decoder.onnx`, absorbed in MLA layers, and for an MLA model
/// `prefill.onnx`, expanded, over one data file.
pub fn export(checkpoint: &Path, folder: &Path, options: DecoderOptions) -> Outcome {
    let form = |mla_form| DecoderOptions {
        mla_form,
        ..options
    };
    let files = [
        ("decoder.onnx", form(MlaForm::Absorbed)),
        ("prefill.onnx", form(MlaForm::Expanded)),
    ];
    write(checkpoint, folder, &files)
}

/// Writes `checkpoint` as one `decoder.onnx`.
pub fn export_one(checkpoint: &Path, folder: &Path, options: DecoderOptions) -> Outcome {
    write(checkpoint, folder, &[("decoder.onnx", options)])
}

fn write(checkpoint: &Path, folder: &Path, files: &[(&str, DecoderOptions)]) -> Outcome {
    let checkpoint = Checkpoint::open(checkpoint).map_err(text)?;
    let config = checkpoint.config();
    // The forms differ in MLA layers only.
    let files = if config.mla.is_some() {
        files
    } else {
        &files[..1]
    };
    let graphs: Vec<(&str, ValidGraph)> = files
        .iter()
        .map(|(name, options)| {
            let graph = match options.runtime {
                Runtime::Standard | Runtime::OnnxRuntime => {
                    decoder_graph_as_stored(config, options, &checkpoint)
                }
                Runtime::OnnxRuntimeCuda | Runtime::TensorRt | Runtime::TensorRtPlugin => {
                    decoder_graph(config, options)
                }
            };
            Ok((*name, graph.map_err(text)?))
        })
        .collect::<Outcome<_>>()?;
    let named: Vec<(&str, &ValidGraph)> =
        graphs.iter().map(|(name, graph)| (*name, graph)).collect();
    fs::create_dir_all(folder).map_err(text)?;
    let data = "decoder.onnx.data";
    write_folder(folder, &named, data, &checkpoint, &mut |_| {}).map_err(text)?;
    Ok(())
}

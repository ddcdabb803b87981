//! Checkpoints written as ONNX folders, with the graph crate alone.

use std::fs;
use std::path::Path;

use mlac_graph::ValidGraph;
use mlac_graph::builders::{DecoderOptions, GqaForm, MlaForm, Runtime, decoder_graph};
use mlac_graph::ir::DType;
use mlac_graph::onnx::write_folder;
use mlac_model::Checkpoint;

use crate::{Outcome, text};

/// The forms a layer that is not converted can take, in standard operators and in the fused one.
pub const GQA_FORMS: [GqaForm; 2] = [GqaForm::Primitives, GqaForm::GroupQueryAttention];

/// Writes `checkpoint` in f32 as `decoder.onnx`, absorbed in MLA layers, and for an MLA model
/// `prefill.onnx`, expanded, over one data file.
pub fn export(checkpoint: &Path, folder: &Path, gqa_form: GqaForm) -> Outcome {
    write(
        checkpoint,
        folder,
        gqa_form,
        &[
            ("decoder.onnx", MlaForm::Absorbed),
            ("prefill.onnx", MlaForm::Expanded),
        ],
    )
}

/// Writes `checkpoint` in f32 as one `decoder.onnx` in this form.
pub fn export_one(checkpoint: &Path, folder: &Path, mla_form: MlaForm) -> Outcome {
    write(
        checkpoint,
        folder,
        GqaForm::Primitives,
        &[("decoder.onnx", mla_form)],
    )
}

fn write(
    checkpoint: &Path,
    folder: &Path,
    gqa_form: GqaForm,
    files: &[(&str, MlaForm)],
) -> Outcome {
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
        .map(|&(name, mla_form)| {
            let options = DecoderOptions {
                dtype: DType::F32,
                mla_form,
                gqa_form,
                runtime: Runtime::Standard,
                ..DecoderOptions::default()
            };
            let graph = decoder_graph(config, &options).map_err(text)?;
            Ok((name, graph))
        })
        .collect::<Outcome<_>>()?;
    let named: Vec<(&str, &ValidGraph)> =
        graphs.iter().map(|(name, graph)| (*name, graph)).collect();
    fs::create_dir_all(folder).map_err(text)?;
    write_folder(
        folder,
        &named,
        "decoder.onnx.data",
        &checkpoint,
        &mut |_| {},
    )
    .map_err(text)?;
    Ok(())
}

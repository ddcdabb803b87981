//! The two ends of a decoder: token embedding and language model head.

use mlac_model::ModelConfig;

use super::{check, norm::rms_norm};
use crate::{
    error::{Error, NodeError},
    ir::{DType, Dim, GraphBuilder, Op, Transform, ValueId, WeightRef},
    validate::ValidGraph,
};

/// The embedding `[vocab, D]` as it lies in the checkpoint.
fn embedding(cfg: &ModelConfig, tensor: &str, dtype: DType) -> WeightRef {
    let shape = vec![cfg.vocab_size, cfg.hidden_size];
    WeightRef {
        name: tensor.to_owned(),
        source_shape: shape.clone(),
        transform: Transform::AsIs,
        dtype,
        shape,
    }
}

/// Token ids i64 `[batch, seq]` to `[batch, seq, D]`.
pub(super) fn embed(
    b: &mut GraphBuilder,
    cfg: &ModelConfig,
    ids: ValueId,
    dtype: DType,
) -> Result<ValueId, NodeError> {
    let table = b.stored_weight(embedding(cfg, "model.embed_tokens.weight", dtype));
    let rows = b.node("embed", Op::Gather { axis: 0 }, &[table, ids])?;
    b.cast("embed.cast", rows, dtype)
}

/// The residual stream `[batch, seq, D]` to logits `[batch, seq, vocab]`: final norm, then the head.
/// A tied head multiplies by the embedding in the layout that the lookup reads, so that both share it.
pub(super) fn head(
    b: &mut GraphBuilder,
    cfg: &ModelConfig,
    hidden: ValueId,
) -> Result<ValueId, NodeError> {
    let dtype = b.ty(hidden).dtype;
    let x = rms_norm(b, "norm", hidden, "model.norm", cfg.rms_norm_eps)?;
    let tensor = if cfg.tie_word_embeddings {
        "model.embed_tokens.weight"
    } else {
        "lm_head.weight"
    };
    if b.multiplies_stored(tensor, dtype) {
        let (vocab, hidden) = (cfg.vocab_size, cfg.hidden_size);
        let layer = tensor.trim_end_matches(".weight");
        return b.linear("lm_head", x, layer, vocab, hidden, false);
    }
    let table = b.cast_weight(embedding(cfg, tensor, dtype))?;
    let mut shape = b.shape(x).to_vec();
    let rows = Dim::product(&shape[..2]);
    let x = b.reshape("lm_head.rows", x, &[rows, cfg.hidden_size.into()])?;
    let logits = b.node("lm_head.product", Op::Gemm { trans_b: true }, &[x, table])?;
    shape[2] = cfg.vocab_size.into();
    b.reshape("lm_head", logits, &shape)
}

/// `input_ids` i64 `[batch, seq]` to `hidden` f32 `[batch, seq, D]`.
pub fn embed_graph(cfg: &ModelConfig) -> Result<ValidGraph, Error> {
    check::config(cfg)?;
    let mut b = GraphBuilder::new("embed");
    let ids = b.input("input_ids", DType::I64, vec!["batch".into(), "seq".into()]);
    let hidden = embed(&mut b, cfg, ids, DType::F32)?;
    b.output("hidden", hidden);
    b.finish()
}

/// `hidden` f32 `[batch, seq, D]` to `logits` f32 `[batch, seq, vocab]`: final norm and head.
pub fn head_graph(cfg: &ModelConfig) -> Result<ValidGraph, Error> {
    check::config(cfg)?;
    let mut b = GraphBuilder::new("head");
    let shape = vec!["batch".into(), "seq".into(), cfg.hidden_size.into()];
    let hidden = b.input("hidden", DType::F32, shape);
    let logits = head(&mut b, cfg, hidden)?;
    b.output("logits", logits);
    b.finish()
}

//! Lowering of `mlac::Mxfp4Experts` to standard operators, for runtimes without it.

use super::rewrite::rewrite;
use crate::{builders, error::Error, ir::Op, validate::ValidGraph};

/// `graph` with every `Mxfp4Experts` as the builders' standard form has it.
///
/// # Errors
/// Blocks that are not a weight of the graph are refused: standard operators need them two bytes at a time.
pub fn lower_mxfp4_experts(graph: &ValidGraph) -> Result<ValidGraph, Error> {
    let mut quads = None;
    rewrite(graph, |b, node, inputs| match node.op {
        Op::Mxfp4Experts { .. } => {
            builders::standard_experts(b, node, inputs, &mut quads).map(|out| Some(vec![out]))
        }
        _ => Ok(None),
    })
}

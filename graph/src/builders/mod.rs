//! From a configuration to graphs: one file per part of a decoder.
//!
//! Letters in shapes: `batch`, `seq` (new tokens), `past` (cached tokens), `total = past + seq`,
//! `cached` (rows of the cache: `past`, or with a window W at most W of them), `rows = cached + seq`,
//! `D` hidden size, `H` query heads, `G` KV heads, `d` head size, `r` latent size, `d_r` rotary key
//! size, `w = r + d_r` cached numbers per token of an MLA layer, `E` experts, `K` of them chosen per token, `I`
//! width of one.

mod attention;
mod check;
mod context;
mod decoder;
mod head;
mod layer;
mod mask;
mod mlp;
mod moe;
mod norm;
mod rope;
mod step;

pub use context::{CacheProduct, GqaForm, LayerKernels, MlaForm, Runtime};
pub use decoder::{
    DecoderOptions, block_graph, decoder_graph, decoder_graph_as_stored,
    decoder_graph_with_kernels, latent_attention_graph,
};
pub use head::{embed_graph, head_graph};
pub use layer::{
    LayerOptions, Tap, layer_graph, layer_graph_as_stored, rest_of_layer_graph,
    rest_of_layer_graph_as_stored,
};
pub(crate) use moe::standard as standard_experts;
pub use step::{StepForm, StepOptions, experts_graph, step_graph};

/// Name of the past input of a GQA layer; `part` is `key` or `value`.
pub fn past_kv_name(layer: usize, part: &str) -> String {
    format!("past_key_values.{layer}.{part}")
}

/// Name of the present output of a GQA layer; `part` is `key` or `value`.
pub fn present_kv_name(layer: usize, part: &str) -> String {
    format!("present.{layer}.{part}")
}

/// Name of the past input of an MLA layer.
pub fn past_latent_name(layer: usize) -> String {
    format!("past_latent.{layer}")
}

/// Name of the present output of an MLA layer.
pub fn present_latent_name(layer: usize) -> String {
    format!("present_latent.{layer}")
}

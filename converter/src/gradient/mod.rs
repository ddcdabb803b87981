//! How much the model's loss feels an error of a key or a value: gradients of the original model.
//!
//! The expected second moment of the gradient of the log likelihood of the model's own predictions is
//! the Fisher information, which is the curvature of their Kullback-Leibler divergence. For the stacked
//! vector `s = [k ; v]` of a token with the gradient `g = d loss / d s`, an error e of s costs about
//! `(g^T e)^2 / 2` nats. [`TokenGradients`] makes the metric of the joint low rank of it
//! ([`crate::steps::lowrank`]): it knows how keys and values weigh against each other, which of their errors
//! cancel, and which directions of the residual stream later layers read. As in K-FAC (Martens and Grosse
//! 2015, arXiv 1503.05671) directions and tokens are taken apart.
//!
//! [`head_gradient`] starts at the logits, [`DecoderLayer::backward`] goes down one layer, a token window
//! at a time; nothing of a layer is kept but sums. Labels are drawn from the model's own predictions, so
//! the text's labels are not needed and not learnt.

mod attention;
mod experts;
mod gated;
mod head;
mod layer;
mod metric;
mod rows;
#[cfg(test)]
mod tests;

pub use experts::{Expert, Experts};
pub use gated::GatedMlp;
pub use head::head_gradient;
pub use layer::{DecoderLayer, LayerGradients, Mlp};
pub use metric::TokenGradients;

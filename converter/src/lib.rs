//! The mathematics of GQA to MLA: weights and statistics in, factorised weights out.
//!
//! No files, no graphs, no printing. Everything happens per layer on the stacked key/value vector
//! `s = [k (G*d) ; v (G*d)]` (after biases and key norm, before rotation) and the query heads.
//!
//! 1. Gather [`LayerStatistics`] window by window (or [`prior_statistics`] from weights alone).
//! 2. Convert: [`methods::recipe::convert_layer`] gives [`LayerFactors`] and a [`LayerReport`].
//! 3. Optionally refit `o_proj` with [`OutputRefit`] on the converted layer's head outputs.
//! 4. Optionally [`refine`] the new matrices by gradient steps.
//! 5. [`compose`] builds the tensors of the MLA checkpoint.
//!
//! [`rank`] turns a budget into ranks and [`plan`] into bytes, before any work.

pub mod allocate;
mod attention;
mod error;
pub mod error_eval;
pub mod gradient;
mod layer;
pub mod linalg;
pub mod methods;
pub mod plan;
pub mod rank;
pub mod refine;
mod report;
pub mod statistics;
pub mod steps;

pub use allocate::{CurvePoint, LayerCurve};
pub use error::Error;
pub use error_eval::{LayerEvaluator, layer_error};
pub use layer::{
    Attention, AttentionShape, Component, LayerFactors, LayerWeights, Projection, RankChoice,
    Rotary,
};
pub use linalg::Matrix;
pub use methods::recipe::{Recipe, convert_layer};
pub use methods::svd::convert_layer_svd;
pub use methods::transmla::{TransMla, convert_layer_transmla};
pub use plan::{CachePlan, LayerCache};
pub use rank::{Budget, RankPlan};
pub use refine::{RefineOptions, RefineReport, RefineWindows};
pub use report::LayerReport;
pub use statistics::{
    DistancePrior, LayerStatistics, StatisticsOptions, WindowActivations, prior_statistics,
};
pub use steps::compose::{MlaTensors, compose};
pub use steps::refit::{OutputRefit, RefitOptions, Refitted};

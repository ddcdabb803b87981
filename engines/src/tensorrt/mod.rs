//! TensorRT for RTX: serialized engines from an ONNX folder, built without a GPU.
//!
//! In layers: `sys` holds the shim's C functions, `library` loads and checks the libraries,
//! `builder` is the safe object over them, `scan` keeps foreign nodes away from the parser,
//! `folder` builds all engines of an ONNX folder and writes their [`Manifest`].

mod builder;
mod folder;
mod library;
mod manifest;
mod profile;
mod scan;
mod sys;
mod target;

pub use builder::{Attention, Builder, Engine, InputShapes, NetworkTensor};
pub use folder::{BuildOptions, BuildProgress, BuildReport, EngineReport, build_engines};
pub use library::TensorRtRtx;
pub use manifest::{EngineRecord, Manifest, ProfileRecord, SourceRecord, Stale};
pub use profile::{Profile, Profiles, Range};
pub use scan::{Node, nodes};
pub use target::Target;

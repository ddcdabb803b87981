//! TensorRT: serialized engines from an ONNX folder. TensorRT for RTX builds them without a GPU; enterprise TensorRT for the GPU
//! it runs on, with the plugin of `mlac::LatentAttention`.
//!
//! In layers: `sys` holds the shim's C functions, `library` loads and checks the libraries,
//! `builder` is the safe object over them, `scan` keeps foreign nodes away from the parser of TensorRT for RTX,
//! `attach` gives plugin nodes their kernels, which `latent` compiles, `plugin` looks at the plugin library before TensorRT loads it, `enterprise` puts these together,
//! `folder` builds all engines of an ONNX folder and writes their [`Manifest`], `run` runs those of enterprise TensorRT.

mod attach;
mod builder;
mod enterprise;
mod folder;
mod latent;
mod library;
mod log;
mod manifest;
mod plugin;
mod profile;
mod room;
mod run;
mod scan;
mod sys;
mod target;

pub use builder::{Attention, Builder, Engine, InputShapes, NetworkTensor};
pub use folder::{BuildOptions, BuildProgress, BuildReport, EngineReport, build_engines};
pub use library::{Product, TensorRt};
pub use manifest::{EngineRecord, Manifest, ProfileRecord, SourceRecord, Stale};
pub use plugin::{PluginLibrary, PluginRecord};
pub use profile::{Profile, Profiles, Range};
pub use room::Room;
pub use run::{EngineDecoder, is_engine_folder};
pub use scan::{Node, nodes};
pub use target::Target;

//! Filling the folder, and checking it without a GPU.

use std::fs;
use std::path::Path;

use mlac_model::Refusal;
use serde::{Deserialize, Serialize};

use super::peers::FILES as PEERS;
use super::{requests, split_requests};
use crate::cache::{Cache, digest};
use crate::config::AttentionConfig;
use crate::desc::AttentionDesc;
use crate::emulate::emulate;
use crate::error::{KernelError, Result};
use crate::matmul::Matmul;
use crate::problem::{Problem, compare};
use crate::toolchain::Toolchain;
use crate::{Arch, Compiler, CompilerName, Report};

const LIST: &str = "pack.json";
pub(super) const PROGRAM: &str = "mlac-gpu-check";

/// What is in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pack {
    /// The compiler.
    pub compiler: String,
    /// Version of the program that packed it.
    pub version: String,
    /// The cubins.
    pub kernels: Vec<Packed>,
    /// The same with other smallest pieces of a divided cache.
    pub splits: Vec<Packed>,
    /// The dense product of each architecture.
    pub products: Vec<PackedProduct>,
}

/// The cubin of a dense product.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedProduct {
    /// File in the folder.
    pub file: String,
    /// SHA-256 of it.
    pub sha256: String,
    /// The GPU.
    pub arch: Arch,
    /// Registers and instructions.
    pub report: Report,
}

/// A cubin of a pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packed {
    /// File in the folder.
    pub file: String,
    /// SHA-256 of it.
    pub sha256: String,
    /// The request.
    pub desc: AttentionDesc,
    /// The choice.
    pub config: AttentionConfig,
    /// Registers and instructions.
    pub report: Report,
}

pub(super) fn pack(folder: &Path, archs: &[Arch]) -> Result<Pack> {
    let toolchain = Toolchain::find()?;
    let compiler = Compiler::load(&toolchain, CompilerName::Nvrtc)?;
    let scratch =
        tempfile::tempdir().map_err(KernelError::io(folder, "make a temporary folder for"))?;
    let cache = Cache::at(scratch.path());
    fs::create_dir_all(folder).map_err(KernelError::io(folder, "create the folder"))?;
    let mut pack = Pack {
        compiler: compiler.identity().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernels: Vec::new(),
        splits: Vec::new(),
        products: Vec::new(),
    };
    let add = |desc: AttentionDesc, config: AttentionConfig, file: String| -> Result<Packed> {
        let cubin = cache.get_with(&desc, config, &compiler)?;
        let report = Report::of(&toolchain, &cubin.path)?;
        passed(
            &desc.slug(),
            &report.complaints(&desc, &cubin.entry.config, &cubin.entry.log),
        )?;
        let path = folder.join(&file);
        fs::write(&path, &cubin.bytes).map_err(KernelError::io(&path, "write"))?;
        Ok(Packed {
            file,
            sha256: cubin.entry.sha256,
            desc,
            config: cubin.entry.config,
            report,
        })
    };
    for &arch in archs {
        for desc in requests(arch) {
            let config = AttentionConfig::choose(&desc)?;
            pack.kernels
                .push(add(desc, config, format!("{}.cubin", desc.slug()))?);
        }
        let (descs, sizes) = split_requests(arch);
        for desc in descs {
            for tokens in sizes {
                let config = AttentionConfig::choose(&desc)?.with_min_split(tokens);
                let file = format!("{}-pieces-of-{tokens}.cubin", desc.slug());
                pack.splits.push(add(desc, config, file)?);
            }
        }
        pack.products
            .push(product(folder, arch, &compiler, &toolchain)?);
    }
    for (name, text) in PEERS {
        let path = folder.join(name);
        fs::write(&path, text).map_err(KernelError::io(&path, "write"))?;
    }
    let program = std::env::current_exe().map_err(KernelError::io(folder, "find this program"))?;
    let copy = folder.join(PROGRAM);
    fs::copy(&program, &copy).map_err(KernelError::io(&copy, "copy this program to"))?;
    let list = folder.join(LIST);
    let text = serde_json::to_vec_pretty(&pack)
        .map_err(|error| KernelError::io(&list, "write")(error.into()))?;
    fs::write(&list, text).map_err(KernelError::io(&list, "write"))?;
    Ok(pack)
}

fn passed(kernel: &str, complaints: &[String]) -> Result<()> {
    if complaints.is_empty() {
        return Ok(());
    }
    Err(Refusal::new(
        kernel,
        "a cubin that passes the static checks",
        complaints.join("; "),
        "run `cargo test -p mlac-kernels`",
    )
    .into())
}

/// Compiles an architecture's dense product into the folder.
fn product(
    folder: &Path,
    arch: Arch,
    compiler: &Compiler,
    toolchain: &Toolchain,
) -> Result<PackedProduct> {
    let matmul = Matmul::of(arch);
    let name = format!("matmul-{arch}");
    let compiled = compiler.compile(&name, &matmul.source(), arch)?;
    let file = format!("{name}.cubin");
    let path = folder.join(&file);
    fs::write(&path, &compiled.cubin).map_err(KernelError::io(&path, "write"))?;
    let report = Report::of(toolchain, &path)?;
    let complaints = report.against(
        &[Matmul::FUNCTION],
        matmul.threads,
        matmul.expected_instructions(),
        &compiled.log,
    );
    passed(&name, &complaints)?;
    Ok(PackedProduct {
        file,
        sha256: digest(&compiled.cubin),
        arch,
        report,
    })
}

impl Pack {
    /// Reads a folder's list.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(LIST);
        let bytes = fs::read(&path).map_err(KernelError::io(&path, "read"))?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Refusal::new(
                path.display().to_string(),
                "the list that `cargo xtask gpu-check` wrote",
                error.to_string(),
                "pack the folder again",
            )
            .into()
        })
    }

    /// A cubin's bytes, as they were packed.
    ///
    /// # Errors
    /// When the file is missing or another one.
    pub fn cubin(&self, folder: &Path, packed: &Packed) -> Result<Vec<u8>> {
        Self::bytes(folder, &packed.file, &packed.sha256)
    }

    /// A file's bytes, if their digest is this one.
    pub(super) fn bytes(folder: &Path, file: &str, sha256: &str) -> Result<Vec<u8>> {
        let path = folder.join(file);
        let bytes = fs::read(&path).map_err(KernelError::io(&path, "read"))?;
        let found = digest(&bytes);
        if found == sha256 {
            return Ok(bytes);
        }
        Err(Refusal::new(
            path.display().to_string(),
            format!("sha256 {sha256}"),
            found,
            "pack the folder again, or copy it whole",
        )
        .into())
    }
}

/// Whether the driver of an architecture would take the file: a CUDA ELF of that architecture with these functions.
fn loadable(bytes: &[u8], arch: Arch, report: &Report) -> std::result::Result<(), String> {
    // ELF header: class and byte order at 4 and 5, machine at 18, flags at 48.
    if bytes.len() < 64 || !bytes.starts_with(b"\x7fELF\x02\x01") {
        return Err("not a 64-bit little-endian ELF file".into());
    }
    let machine = u16::from_le_bytes([bytes[18], bytes[19]]);
    if machine != 190 {
        return Err(format!("ELF machine {machine}, expected 190 (CUDA)"));
    }
    let flags = u32::from_le_bytes([bytes[48], bytes[49], bytes[50], bytes[51]]);
    let (major, minor) = arch.capability();
    // Since CUDA 13 the architecture is in bits 8 to 15 of the flags; before, in bits 0 to 7.
    let number = major * 10 + minor;
    if flags >> 8 & 0xff != number && flags & 0xff != number {
        return Err(format!("ELF flags {flags:#x} are not of {arch}"));
    }
    for function in &report.functions {
        let name = &function.name;
        let section = format!(".text.{name}\0");
        if !bytes
            .windows(section.len())
            .any(|w| w == section.as_bytes())
        {
            return Err(format!("no section .text.{name}"));
        }
    }
    Ok(())
}

/// Checks a folder on the CPU: digests, ELF headers, the choice made again, and the tile order against the f64 reference.
///
/// # Errors
/// The first thing that is not as it must be.
pub fn self_test(folder: &Path) -> Result<String> {
    let pack = Pack::open(folder)?;
    let mut seen = 0;
    for packed in pack.kernels.iter().chain(&pack.splits) {
        let refuse = |expected: &str, found: String| {
            KernelError::from(Refusal::new(
                packed.file.clone(),
                expected,
                found,
                "pack the folder again with this version",
            ))
        };
        let bytes = pack.cubin(folder, packed)?;
        loadable(&bytes, packed.desc.arch, &packed.report)
            .map_err(|found| refuse("a cubin that a driver loads", found))?;
        let mut choice = AttentionConfig::choose(&packed.desc)?;
        if choice.min_split != packed.config.min_split {
            choice = choice.with_min_split(packed.config.min_split * packed.config.tile);
        }
        if choice != packed.config {
            return Err(refuse(
                "the choice that this program makes",
                packed.config.to_string(),
            ));
        }
        let problem = Problem::random(packed.desc, &[0, 65, 700], seen + 1);
        let answer = emulate(&problem, &packed.config, 3);
        if let Some(complaint) = compare(&answer, &problem.reference()).complaint(&problem) {
            return Err(refuse(
                "the reference's answer from the emulator",
                complaint,
            ));
        }
        seen += 1;
    }
    for packed in &pack.products {
        let bytes = Pack::bytes(folder, &packed.file, &packed.sha256)?;
        loadable(&bytes, packed.arch, &packed.report).map_err(|found| {
            Refusal::new(
                packed.file.clone(),
                "a cubin that a driver loads",
                found,
                "pack the folder again with this version",
            )
        })?;
    }
    if seen == 0 {
        return Err(Refusal::new(
            folder.join(LIST).display().to_string(),
            "at least one kernel",
            "none",
            "pack the folder again",
        )
        .into());
    }
    Ok(format!(
        "{seen} cubins: digests, ELF headers, choices and emulator parity hold; {} dense products: digests and ELF headers; \
         not run on a GPU",
        pack.products.len()
    ))
}

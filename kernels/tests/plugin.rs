//! The TensorRT plugin, driven by a host of ours through every virtual function that TensorRT calls (`plugin/main.cpp`).
//!
//! Library and host are compiled with the address and undefined-behaviour sanitizers. A `libcuda.so.1` of ours stands in for the
//! driver (`plugin/fake_cuda.cpp`): it runs the kernels' own sources on the CPU, so what the plugin launches is compared with the
//! naive f64 answer, and every block of arguments with what the Rust launch path computes.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test that cannot go on says why by panicking"
)]
#![expect(
    unsafe_code,
    reason = "addresses that a log names are described as regions, and never followed"
)]

mod common;
#[path = "common/step.rs"]
mod step;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use common::run_compiler;
use mlac_kernels::bundle::bundle;
use mlac_kernels::config::AttentionConfig;
use mlac_kernels::launch::{Call, Recipe, Region};
use mlac_kernels::params::{DecodeParams, PlanParams, StoreParams};
use mlac_kernels::problem::{Answer, Problem, bits, compare, from_bits};
use mlac_kernels::{
    Arch, AttentionDesc, Cache, Compiler, CompilerName, Dtype, Mask, Source, Toolchain,
};
use step::{empty_cubin, fake_driver, make_contiguous, new_rows};

const SANITIZE: [&str; 4] = [
    "-g1",
    "-O1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
];

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// TensorRT's headers, and the stand-in for CUDA's that comes with them.
fn includes() -> [String; 2] {
    let headers = std::env::var_os("MLAC_RUNTIME_DIR")
        .filter(|value| !value.is_empty())
        .map_or_else(|| here("../target/runtime"), PathBuf::from)
        .join("tensorrt_headers");
    assert!(
        headers.join("enterprise/NvInferRuntime.h").is_file(),
        "TensorRT headers: found none in {}, needed NvInferRuntime.h of TensorRT 11, fix: run `cargo xtask setup`",
        headers.display()
    );
    ["enterprise", "cuda"].map(|set| format!("-isystem{}", headers.join(set).display()))
}

struct Programs {
    folder: tempfile::TempDir,
}

impl Programs {
    fn host(&self) -> PathBuf {
        self.folder.path().join("host")
    }

    fn library(&self) -> PathBuf {
        self.folder.path().join("libmlac_trt.so")
    }
}

/// Library and host, compiled once for all tests.
fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let programs = Programs {
            folder: tempfile::tempdir().unwrap(),
        };
        let includes = includes();
        let mut flags = SANITIZE.to_vec();
        flags.extend(["-Wall", "-Wextra", "-Werror"]);
        flags.extend(includes.iter().map(String::as_str));
        let host: Vec<PathBuf> = ["main.cpp", "hostile.cpp"]
            .iter()
            .map(|file| here("tests/plugin").join(file))
            .collect();
        run_compiler(&flags, &host, &programs.host());
        let mut sources: Vec<PathBuf> = fs::read_dir(here("plugin"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "cpp"))
            .collect();
        sources.sort();
        flags.extend(["-shared", "-fPIC", "-fvisibility=hidden"]);
        run_compiler(&flags, &sources, &programs.library());
        programs
    })
}

/// A step of the operator in a folder: its kernels, its call, what it must come to.
struct Step {
    folder: tempfile::TempDir,
    desc: AttentionDesc,
    config: AttentionConfig,
    parts: u32,
    problem: Problem,
    paged: bool,
    with_lse: bool,
    /// Rows of the cache before the step, `[rows, row]`; where the new ones will be, NaN.
    before: Vec<u16>,
    after: Vec<u16>,
}

impl Step {
    fn new(desc: AttentionDesc, lengths: &[u32], parts: u32, paged: bool, with_lse: bool) -> Self {
        let mut config = AttentionConfig::choose(&desc).unwrap();
        // Short caches are divided too.
        config.min_split = 1;
        let mut problem = Problem::random(desc, lengths, 77);
        if !paged {
            make_contiguous(&mut problem);
        }
        let after: Vec<u16> = problem.cache.iter().map(|&x| bits(desc.dtype, x)).collect();
        let mut step = Self {
            folder: tempfile::tempdir().unwrap(),
            desc,
            config,
            parts,
            problem,
            paged,
            with_lse,
            before: after.clone(),
            after,
        };
        let row = desc.row() as usize;
        for at in step.new_rows() {
            step.before[at * row..(at + 1) * row].fill(0x7fff);
        }
        step.write();
        step
    }

    /// Rows of the cache that the new tokens take, in the order of requests and tokens.
    fn new_rows(&self) -> Vec<usize> {
        new_rows(&self.problem)
    }

    fn optional_inputs(&self) -> u32 {
        u32::from(self.paged)
            | u32::from(self.desc.sinks) << 1
            | u32::from(self.desc.mask == Mask::Tree) << 2
    }

    fn recipe(&self) -> Recipe {
        Recipe::of(&self.desc, &self.config, self.parts).unwrap()
    }

    fn bundle_with(&self, cubin: Vec<u8>) {
        let bytes = bundle(&[(self.recipe(), cubin)]).unwrap();
        fs::write(self.path("bundle"), bytes).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self) {
        let (desc, problem) = (&self.desc, &self.problem);
        let (batch, row) = (problem.lengths.len() as u32, desc.row());
        let rows = self.after.len() as u32 / row;
        let (first, second) = if self.paged {
            (rows / desc.page, desc.page)
        } else {
            (batch, rows / batch)
        };
        let mut file = Vec::new();
        for number in [
            batch,
            desc.query_tokens,
            desc.query_heads,
            row,
            desc.out_row(),
            u32::from(desc.dtype == Dtype::F16),
            first,
            second,
            problem.page_stride,
            self.optional_inputs(),
            u32::from(self.with_lse),
            desc.window.unwrap_or(0),
            problem.scale.to_bits(),
        ] {
            file.extend(number.to_le_bytes());
        }
        let mut halves = |numbers: &[u16]| {
            for number in numbers {
                file.extend(number.to_le_bytes());
            }
        };
        let query: Vec<u16> = problem.q.iter().map(|&x| bits(desc.dtype, x)).collect();
        halves(&query);
        for at in self.new_rows() {
            halves(&self.after[at * row as usize..(at + 1) * row as usize]);
        }
        halves(&self.before);
        for length in &problem.lengths {
            file.extend((length - desc.query_tokens).to_le_bytes());
        }
        if self.paged {
            for page in &problem.pages {
                file.extend(page.to_le_bytes());
            }
        }
        for sink in &problem.sinks {
            file.extend(sink.to_le_bytes());
        }
        for word in &problem.tree {
            // Bits beyond the query tokens count for nothing.
            file.extend((word | 1 << 63 | 1 << desc.query_tokens).to_le_bytes());
        }
        fs::write(self.path("call"), file).unwrap();
        self.bundle_with(empty_cubin(desc.arch));
    }

    /// Compiles the driver that runs this step's kernels on the CPU.
    fn fake_driver(&self) {
        let folder = self.path("driver");
        fs::create_dir(&folder).unwrap();
        // Fibers end without unwinding their stacks.
        let flags = ["-fsanitize=address", "--param=asan-stack=0"];
        fake_driver(&self.desc, &self.config, &folder, &flags);
    }

    /// Runs the host; what it said, and whether it was content.
    fn host(&self, mode: &str, last: &str, settings: &[(&str, &str)]) -> (bool, String) {
        let programs = programs();
        let (major, minor) = self.desc.arch.capability();
        let output = Command::new(programs.host())
            .arg(mode)
            .arg(programs.library())
            .arg(self.path("bundle"))
            .arg(self.path("call"))
            .arg(last)
            .env("LD_LIBRARY_PATH", self.path("driver"))
            .env("MLAC_FAKE_CAPABILITY", format!("{major}.{minor}"))
            .envs(settings.iter().copied())
            .output()
            .unwrap();
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        (output.status.success(), text)
    }

    /// Drives the step, compares its answer with the reference and its launches with the Rust launch path.
    fn check(&self) {
        self.fake_driver();
        let (answer, log) = (self.path("answer"), self.path("log"));
        let settings = [("MLAC_FAKE_LOG", log.to_str().unwrap())];
        let (good, text) = self.host("drive", answer.to_str().unwrap(), &settings);
        assert!(
            good && text.contains("drive: done"),
            "{}: {text}",
            self.desc
        );
        self.check_answer(&fs::read(answer).unwrap());
        self.check_launches(&fs::read_to_string(log).unwrap());
    }

    fn check_answer(&self, bytes: &[u8]) {
        let (desc, problem) = (&self.desc, &self.problem);
        let reference = problem.reference();
        let (sums, rest) = bytes.split_at(reference.out.len() * 2);
        let (cache, lse) = rest.split_at(self.after.len() * 2);
        let halves = |bytes: &[u8]| -> Vec<u16> {
            bytes
                .chunks_exact(2)
                .map(|c| u16::from_le_bytes([c[0], c[1]]))
                .collect()
        };
        assert_eq!(halves(cache), self.after, "{desc}: the cache");
        let answer = Answer {
            out: halves(sums)
                .into_iter()
                .map(|x| from_bits(desc.dtype, x))
                .collect(),
            lse: if self.with_lse {
                lse.chunks_exact(4)
                    .map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]))
                    .collect()
            } else {
                assert!(lse.is_empty());
                reference.lse.clone()
            },
        };
        if let Some(complaint) = compare(&answer, &reference).complaint(problem) {
            panic!("{desc}: {complaint}");
        }
    }

    /// Two runs, each with the launches that [`Call::check`] computes for the same memory.
    fn check_launches(&self, log: &str) {
        let launches: Vec<Launch> = log.lines().map(Launch::read).collect();
        let names: Vec<&str> = launches.iter().map(|l| l.name.as_str()).collect();
        let run: &[&str] = if self.config.planned {
            &["mlac_store", "mlac_plan", "mlac_decode", "mlac_combine"]
        } else {
            &["mlac_store", "mlac_decode"]
        };
        assert_eq!(names, run.repeat(2));
        let known = Source::of(&self.desc, &self.config).functions;
        assert!(run.iter().all(|name| known.contains(name)));
        for launches in launches.chunks(run.len()) {
            self.check_run(launches);
        }
    }

    fn check_run(&self, launches: &[Launch]) {
        let (desc, config, problem) = (&self.desc, &self.config, &self.problem);
        let batch = problem.lengths.len() as u32;
        let find = |name: &str| launches.iter().find(|l| l.name == name).unwrap();
        let (store, decode) = (find("mlac_store"), find("mlac_decode"));
        let params = decode_params(&decode.block);
        let stored = store_params(&store.block);
        let at = |address: u64, bytes: u64| {
            // SAFETY: described only; nothing is launched.
            unsafe { Region::from_raw(address, bytes) }
        };
        let rows = u64::from(batch * desc.query_tokens * desc.query_heads);
        let when = |there: bool, bytes: u64| if there { bytes } else { 0 };
        let call = Call {
            q: at(params.q, rows * u64::from(desc.row()) * 2),
            cache: at(params.cache, self.after.len() as u64 * 2),
            values: Region::default(),
            out: at(params.out, rows * u64::from(desc.out_row()) * 2),
            lse: at(params.lse, rows * 4),
            sinks: at(
                params.sinks,
                when(desc.sinks, u64::from(desc.query_heads) * 4),
            ),
            lengths: at(params.lengths, u64::from(batch) * 4),
            pages: at(params.pages, u64::from(batch * problem.page_stride) * 4),
            tree: at(
                params.tree,
                when(
                    desc.mask == Mask::Tree,
                    u64::from(batch * desc.query_tokens) * 8,
                ),
            ),
            workspace: at(params.bounds, 1 << 40),
            batch,
            page_stride: problem.page_stride,
            scale: problem.scale,
        };
        let grids = call.check(desc, config, self.parts).unwrap();
        assert_eq!(params, grids.decode, "{desc}: decode");
        let dependent = config.planned && desc.arch.has_wgmma();
        let shape = (
            grids.decode_blocks,
            config.threads,
            config.shared_bytes,
            dependent,
        );
        assert_eq!(decode.shape, shape, "{desc}: decode");
        assert_eq!(
            stored,
            StoreParams {
                rows: stored.rows,
                cache: params.cache,
                past: stored.past,
                table: if self.paged { params.pages } else { 0 },
                lengths: params.lengths,
                // Made by the kernel, or the table, which it leaves alone.
                pages: params.pages,
                batch: batch as i32,
                page_stride: problem.page_stride as i32,
                cache_pages: grids.cache_pages as i32,
            },
            "{desc}: store"
        );
        let tokens = batch * desc.query_tokens;
        assert_eq!(store.shape, (tokens.div_ceil(4), 128, 0, false));
        if config.planned {
            let (plan, combine) = (find("mlac_plan"), find("mlac_combine"));
            assert_eq!(plan_params(&plan.block), grids.plan, "{desc}: plan");
            assert_eq!(plan.shape, (1, 1024, 0, false));
            assert_eq!(combine.block, decode.block);
            assert_eq!(combine.shape, (grids.combine_blocks, 256, 0, dependent));
        }
    }
}

/// A line of the fake driver's log.
struct Launch {
    name: String,
    /// CTAs, threads, shared bytes, whether it may start early.
    shape: (u32, u32, u32, bool),
    block: Vec<u8>,
}

impl Launch {
    fn read(line: &str) -> Self {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words[i].parse::<u32>().unwrap();
        Self {
            name: words[0].to_owned(),
            shape: (number(1), number(2), number(3), number(4) == 1),
            block: (0..words[5].len() / 2)
                .map(|i| u8::from_str_radix(&words[5][2 * i..2 * i + 2], 16).unwrap())
                .collect(),
        }
    }
}

/// The pointers of a block, then its numbers.
fn fields<const P: usize, const N: usize>(block: &[u8]) -> ([u64; P], [i32; N]) {
    let pointer = |i: usize| u64::from_le_bytes(block[8 * i..8 * i + 8].try_into().unwrap());
    let number = |i: usize| {
        let at = 8 * P + 4 * i;
        i32::from_le_bytes(block[at..at + 4].try_into().unwrap())
    };
    (std::array::from_fn(pointer), std::array::from_fn(number))
}

fn store_params(block: &[u8]) -> StoreParams {
    let ([rows, cache, past, table, lengths, pages], [batch, page_stride, cache_pages]) =
        fields(block);
    StoreParams {
        rows,
        cache,
        past,
        table,
        lengths,
        pages,
        batch,
        page_stride,
        cache_pages,
    }
}

fn plan_params(block: &[u8]) -> PlanParams {
    let ([lengths, bounds, owners, costs], [batch, parts]) = fields(block);
    PlanParams {
        lengths,
        bounds,
        owners,
        costs,
        batch,
        parts,
    }
}

fn decode_params(block: &[u8]) -> DecodeParams {
    let (
        [
            q,
            cache,
            values,
            out,
            lse,
            out_part,
            lse_part,
            sinks,
            lengths,
            pages,
            tree,
            bounds,
            owners,
        ],
        [batch, page_stride, parts, scale],
    ) = fields(block);
    DecodeParams {
        q,
        cache,
        values,
        out,
        lse,
        out_part,
        lse_part,
        sinks,
        lengths,
        pages,
        tree,
        bounds,
        owners,
        batch,
        page_stride,
        parts,
        scale: f32::from_bits(scale as u32),
    }
}

fn gpt_oss() -> AttentionDesc {
    AttentionDesc {
        sinks: true,
        ..AttentionDesc::latent(64, 128, 64, Arch::Sm90a)
    }
}

#[test]
fn pages_and_sinks_with_a_real_cubin_on_hopper() {
    let step = Step::new(gpt_oss(), &[1, 64, 200], 3, true, true);
    let toolchain = Toolchain::find().unwrap_or_else(|refusal| panic!("{refusal}"));
    let compiler =
        Compiler::load(&toolchain, CompilerName::Nvrtc).unwrap_or_else(|error| panic!("{error}"));
    let cubin = Cache::at(step.folder.path())
        .get(&step.desc, &compiler)
        .unwrap_or_else(|error| panic!("{error}"));
    step.bundle_with(cubin.bytes);
    step.check();
}

#[test]
fn a_tree_of_tokens_on_a_contiguous_cache_without_the_lse() {
    let desc = AttentionDesc {
        query_tokens: 3,
        mask: Mask::Tree,
        dtype: Dtype::F16,
        window: Some(100),
        ..AttentionDesc::latent(9, 64, 16, Arch::Sm89)
    };
    Step::new(desc, &[130, 3, 64], 3, false, false).check();
}

#[test]
fn an_undivided_window_of_causal_tokens() {
    let desc = AttentionDesc {
        query_tokens: 2,
        window: Some(128),
        ..AttentionDesc::latent(16, 64, 32, Arch::Sm90a)
    };
    Step::new(desc, &[2, 300], 5, false, true).check();
}

#[test]
fn without_a_driver_the_error_is_plain() {
    let step = Step::new(gpt_oss(), &[64], 3, true, true);
    // A file of that name that is no library: what a machine has does not matter.
    fs::create_dir(step.path("driver")).unwrap();
    fs::write(step.path("driver/libcuda.so.1"), "no library").unwrap();
    let (good, text) = step.host("no-driver", "", &[]);
    assert!(good, "{text}");
    assert!(
        text.contains("expected libcuda.so.1 of an NVIDIA driver for CUDA 13.0")
            && text.contains("fix: install the NVIDIA driver"),
        "{text}"
    );
}

#[test]
fn what_the_driver_refuses_is_told() {
    let step = Step::new(gpt_oss(), &[64], 3, true, true);
    step.fake_driver();
    for (setting, expected) in [
        (
            ("MLAC_FAKE_CAPABILITY", "8.9"),
            "expected a GPU of compute capability 9.0, found one of 8.9",
        ),
        (
            ("MLAC_FAKE_CONTEXT", "0"),
            "CUDA context: expected one that is current",
        ),
        (
            ("MLAC_FAKE_FAIL", "cuModuleLoadData"),
            "cannot load the cubin: CUDA_ERROR_UNKNOWN (999)",
        ),
        (
            ("MLAC_FAKE_FAIL", "cuModuleGetFunction"),
            "cannot find a function of the cubin",
        ),
        (
            ("MLAC_FAKE_FAIL", "cuTensorMapEncodeTiled"),
            "cannot describe a tensor",
        ),
        (
            ("MLAC_FAKE_FAIL", "cuLaunchKernelEx"),
            "cannot launch mlac_store",
        ),
        (("MLAC_FAKE_FAIL", "cuInit"), "CUDA driver: cannot start"),
    ] {
        let (good, text) = step.host("fails", expected, &[setting]);
        assert!(good, "{setting:?}: {text}");
    }
    // A host that expects another error is not content: the test can fail.
    let (good, text) = step.host("fails", "something else", &[("MLAC_FAKE_CONTEXT", "0")]);
    assert!(!good && text.contains("another error"), "{text}");
}

#[test]
fn hostile_inputs_are_refused_and_nothing_crashes() {
    for paged in [true, false] {
        let step = Step::new(gpt_oss(), &[64, 70], 3, paged, paged);
        let (good, text) = step.host("hostile", "", &[]);
        assert!(good && text.contains("hostile: done"), "{text}");
    }
}

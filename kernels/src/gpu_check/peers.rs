//! Other people's kernels on the same problems and shapes: `peers/run_peers.py` runs them, this writes what they get and judges what
//! they answer.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use mlac_model::Refusal;
use serde::{Deserialize, Serialize};

use super::bench::{Shape, rates};
use super::run::Options;
use crate::Arch;
use crate::desc::{Attention, AttentionDesc, Mask};
use crate::error::{KernelError, Result};
use crate::problem::{Answer, Problem, bits, compare};

/// The scripts that are packed beside the program.
pub(super) const FILES: [(&str, &str); 2] = [
    ("fetch_peers.py", include_str!("../../peers/fetch_peers.py")),
    ("run_peers.py", include_str!("../../peers/run_peers.py")),
];

/// What a peer showed: a comparison (without a time), or a time.
#[derive(Debug, Clone, Serialize)]
pub struct Peer {
    /// The peer and the request.
    pub name: String,
    /// The request.
    #[serde(skip)]
    pub desc: AttentionDesc,
    /// Requests.
    pub batch: u32,
    /// Cached tokens of each, or of the longest.
    pub context: u32,
    /// Median of the repeats.
    pub microseconds: Option<f64>,
    /// Cache, queries and outputs, once each.
    pub gigabytes_per_second: f64,
    /// Multiplications and additions of scores and outputs.
    pub teraflops: f64,
    /// What is beyond tolerance, or what the peer said.
    pub complaint: Option<String>,
}

/// A problem as `run_peers.py` reads it.
#[derive(Debug, Serialize)]
struct Case {
    peer: &'static str,
    file: String,
    timed: bool,
    grouped: bool,
    batch: u32,
    query_tokens: u32,
    query_heads: u32,
    kv_heads: u32,
    row: u32,
    out_row: u32,
    window: Option<u32>,
    mask: Mask,
    scale: f32,
    sinks: Vec<f32>,
    lengths: Vec<u32>,
    most: u32,
    pages: Vec<i32>,
    #[serde(skip)]
    problem: Problem,
}

#[derive(Debug, Serialize)]
struct Problems<'a> {
    cases: &'a [Case],
    shapes: &'a [(u32, u32)],
}

/// What `run_peers.py` leaves.
#[derive(Debug, Deserialize)]
struct Answers {
    torch: String,
    failures: BTreeMap<String, String>,
    times: Vec<Time>,
}

#[derive(Debug, Deserialize)]
struct Time {
    file: String,
    batch: u32,
    context: u32,
    microseconds: Option<f64>,
}

/// Which peer takes which request.
fn requests() -> Vec<(&'static str, AttentionDesc)> {
    let latent = |rank| AttentionDesc {
        sinks: true,
        ..AttentionDesc::latent(64, rank, 64, Arch::Sm90a)
    };
    let grouped = AttentionDesc {
        sinks: true,
        ..AttentionDesc::grouped(64, 8, 64, Arch::Sm90a)
    };
    vec![
        ("flashmla", latent(512)),
        ("fa3-latent", latent(512)),
        ("fa3-latent", latent(256)),
        ("fa3-grouped", grouped),
        (
            "fa3-grouped",
            AttentionDesc {
                window: Some(128),
                ..grouped
            },
        ),
        (
            "fa3-grouped",
            AttentionDesc {
                query_tokens: 4,
                ..grouped
            },
        ),
        (
            "fa3-grouped",
            AttentionDesc {
                sinks: false,
                ..AttentionDesc::grouped(32, 8, 128, Arch::Sm90a)
            },
        ),
        // PyTorch's own attention has no sinks, and no log-sum-exp to correct it by.
        (
            "sdpa-grouped",
            AttentionDesc {
                sinks: false,
                ..grouped
            },
        ),
        (
            "sdpa-grouped",
            AttentionDesc::grouped(32, 8, 128, Arch::Sm90a),
        ),
    ]
}

/// Peers want at least the query tokens in every cache.
const LENGTHS: [&[u32]; 2] = [&[4, 63, 64, 65, 777], &[4096, 130, 65, 2000]];

/// Writes the problems of all peers.
fn write(work: &Path, seed: u64, shapes: &[(u32, u32)]) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (peer, desc) in requests() {
        for (i, lengths) in LENGTHS.iter().enumerate() {
            let mut problem = Problem::random(desc, lengths, seed + i as u64);
            // Ours must not read what lies beyond a request; theirs may.
            for number in problem.cache.iter_mut().chain(&mut problem.values) {
                if number.is_nan() {
                    *number = 0.0;
                }
            }
            let file = format!("{peer}-{}-{i}", desc.slug());
            for (name, numbers) in [
                ("q", &problem.q),
                ("cache", &problem.cache),
                ("values", &problem.values),
            ] {
                let path = work.join(format!("{file}.{name}"));
                let bytes: Vec<u8> = numbers
                    .iter()
                    .flat_map(|&x| bits(desc.dtype, x).to_le_bytes())
                    .collect();
                fs::write(&path, bytes).map_err(KernelError::io(&path, "write"))?;
            }
            cases.push(Case {
                peer,
                file,
                timed: i == 0,
                grouped: matches!(desc.attention, Attention::Grouped { .. }),
                batch: lengths.len() as u32,
                query_tokens: desc.query_tokens,
                query_heads: desc.query_heads,
                kv_heads: desc.kv_heads(),
                row: desc.row(),
                out_row: desc.out_row(),
                window: desc.window,
                mask: desc.mask,
                scale: problem.scale,
                sinks: problem.sinks.clone(),
                lengths: lengths.to_vec(),
                most: lengths.iter().copied().max().unwrap_or(0),
                pages: problem
                    .pages
                    .iter()
                    .map(|&p| if p == i32::MAX { 0 } else { p })
                    .collect(),
                problem,
            });
        }
    }
    let path = work.join("problems.json");
    let text = serde_json::to_vec(&Problems {
        cases: &cases,
        shapes,
    })
    .map_err(|error| KernelError::io(&path, "write")(error.into()))?;
    fs::write(&path, text).map_err(KernelError::io(&path, "write"))?;
    Ok(cases)
}

fn floats(path: &Path) -> Result<Vec<f32>> {
    let bytes = fs::read(path).map_err(KernelError::io(path, "read"))?;
    Ok(bytes
        .chunks_exact(4)
        .map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]))
        .collect())
}

/// Compares the answers with the f64 reference, and gives the times their figures.
fn judge(work: &Path, cases: &[Case]) -> Result<Vec<Peer>> {
    let path = work.join("answers.json");
    let bytes = fs::read(&path).map_err(KernelError::io(&path, "read"))?;
    let answers: Answers = serde_json::from_slice(&bytes).map_err(|error| {
        Refusal::new(
            path.display().to_string(),
            "what run_peers.py writes",
            error.to_string(),
            "use the run_peers.py of the same folder",
        )
    })?;
    let mut peers = Vec::new();
    for case in cases {
        let name = format!(
            "{} {} (torch {})",
            case.peer,
            case.problem.desc.slug(),
            answers.torch
        );
        let complaint = if let Some(failure) = answers.failures.get(&case.file) {
            Some(failure.clone())
        } else {
            let reference = case.problem.reference();
            let lse = work.join(format!("{}.lse", case.file));
            let answer = Answer {
                out: floats(&work.join(format!("{}.out", case.file)))?,
                // A peer that joins the sink by itself gives another log-sum-exp, and leaves it out.
                lse: if lse.exists() {
                    floats(&lse)?
                } else {
                    reference.lse.clone()
                },
            };
            compare(&answer, &reference).complaint(&case.problem)
        };
        let failed = complaint.is_some();
        peers.push(Peer {
            name: name.clone(),
            desc: case.problem.desc,
            batch: case.batch,
            context: case.most,
            microseconds: None,
            gigabytes_per_second: 0.0,
            teraflops: 0.0,
            complaint,
        });
        // A wrong answer's time is no figure to compare with.
        if failed {
            continue;
        }
        for time in answers.times.iter().filter(|t| t.file == case.file) {
            let Some(microseconds) = time.microseconds else {
                continue;
            };
            let shape = Shape {
                batch: time.batch,
                context: time.context,
            };
            let (gigabytes_per_second, teraflops) = rates(&case.problem.desc, shape, microseconds);
            peers.push(Peer {
                name: name.clone(),
                desc: case.problem.desc,
                batch: time.batch,
                context: time.context,
                microseconds: Some(microseconds),
                gigabytes_per_second,
                teraflops,
                complaint: None,
            });
        }
    }
    Ok(peers)
}

/// Runs the peers of `extensions` by the script in `folder`, with the Python of `MLAC_PYTHON` or `python3`.
///
/// # Errors
/// When the script cannot be run, or ends before it has answers.
pub(super) fn run(
    folder: &Path,
    extensions: &Path,
    options: &Options,
    shapes: &[(u32, u32)],
    tell: &mut impl FnMut(&str),
) -> Result<Vec<Peer>> {
    let work =
        tempfile::tempdir().map_err(KernelError::io(folder, "make a temporary folder for"))?;
    let cases = write(work.path(), options.seed, shapes)?;
    let python = std::env::var_os("MLAC_PYTHON")
        .filter(|value| !value.is_empty())
        .unwrap_or_else(|| "python3".into());
    let script = folder.join("run_peers.py");
    let output = Command::new(&python)
        .arg(&script)
        .arg(extensions)
        .arg(work.path())
        .arg(options.repeats.to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(KernelError::io(Path::new(&python), "run"))?;
    if !output.status.success() {
        return Err(Refusal::new(
            format!("{} {}", Path::new(&python).display(), script.display()),
            "Python with PyTorch 2.11 and the extensions that fetch_peers.py fetches",
            format!(
                "{}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ),
            "set MLAC_PYTHON to a Python that has PyTorch 2.11, or leave --peers out",
        )
        .into());
    }
    let peers = judge(work.path(), &cases)?;
    for peer in peers.iter().filter(|p| p.microseconds.is_none()) {
        tell(&format!(
            "{:<60} {}",
            peer.name,
            peer.complaint
                .as_deref()
                .map_or_else(|| "ok".to_owned(), |c| format!("FAILED: {c}"))
        ));
    }
    Ok(peers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AttentionConfig;
    use crate::emulate::emulate;

    #[test]
    fn answers_are_judged_and_failures_told() {
        let work = tempfile::tempdir().unwrap();
        let cases = write(work.path(), 5, &[(1, 4096)]).unwrap();
        let bytes =
            |numbers: &[f32]| -> Vec<u8> { numbers.iter().flat_map(|x| x.to_le_bytes()).collect() };
        let (wrong, refused) = (cases[2].file.clone(), cases[4].file.clone());
        // The long problems take their time; the short ones show the same.
        let cases: Vec<Case> = cases.into_iter().step_by(2).collect();
        for case in &cases {
            let config = AttentionConfig::choose(&case.problem.desc).unwrap();
            let mut answer = emulate(&case.problem, &config, 3);
            if case.file == wrong {
                answer.out[7] += 1.0;
            }
            fs::write(
                work.path().join(format!("{}.out", case.file)),
                bytes(&answer.out),
            )
            .unwrap();
            if !case.grouped {
                fs::write(
                    work.path().join(format!("{}.lse", case.file)),
                    bytes(&answer.lse),
                )
                .unwrap();
            }
        }
        let times: Vec<String> = cases
            .iter()
            .map(|c| {
                format!(
                    "{{\"file\":\"{}\",\"batch\":1,\"context\":4096,\"microseconds\":10.0}}",
                    c.file
                )
            })
            .collect();
        let text = format!(
            "{{\"torch\":\"2.11.0\",\"failures\":{{\"{refused}\":\"RuntimeError: no\"}},\"times\":[{}]}}",
            times.join(",")
        );
        fs::write(work.path().join("answers.json"), text).unwrap();
        let peers = judge(work.path(), &cases).unwrap();
        for case in &cases {
            let mine: Vec<&Peer> = peers
                .iter()
                .filter(|p| {
                    p.name
                        .starts_with(&format!("{} {} ", case.peer, case.problem.desc.slug()))
                })
                .collect();
            if case.file == wrong {
                assert!(
                    mine.len() == 1 && mine[0].complaint.as_ref().unwrap().contains("column 7")
                );
            } else if case.file == refused {
                assert_eq!(mine[0].complaint.as_deref(), Some("RuntimeError: no"));
                assert_eq!(mine.len(), 1);
            } else {
                assert_eq!((mine.len(), mine[0].complaint.clone()), (2, None));
                assert!(mine[1].gigabytes_per_second > 0.0);
            }
        }
    }
}

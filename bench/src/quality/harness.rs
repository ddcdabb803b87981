//! Running jobs: each leaves one small file in the work folder, named after all that its figures
//! depend on, and a job whose file is there is not run again.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::jobs::{Job, Names, Windows, convert_args, eval_args};
use super::request::{Request, file_name};
use crate::results::{commit, machine};

/// A command that was run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    /// The command.
    pub command: String,
    /// How long it took.
    pub seconds: f64,
    /// Maximum resident set size, where GNU time is installed.
    pub peak_bytes: Option<u64>,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}

/// An evaluation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measured {
    /// What was asked for.
    pub windows: Windows,
    /// The command.
    pub step: Step,
    /// Perplexity, unless it failed.
    pub perplexity: Option<f64>,
    /// Mean loss of each window.
    pub losses: Vec<f64>,
}

/// What is kept of a job.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// The job.
    pub job: Job,
    /// The commit of mlac.
    pub commit: String,
    /// The machine.
    pub machine: String,
    /// The conversion, if there was one.
    pub convert: Option<Step>,
    /// r and `d_r` of each converted layer, as the conversion says.
    pub ranks: Vec<(u64, u64)>,
    /// Evaluations; none when the conversion failed.
    pub measured: Vec<Measured>,
}

impl Entry {
    /// The evaluation on windows of a length, or why there is none.
    pub fn on(&self, length: usize) -> Result<&Measured, &str> {
        if let Some(failure) = self.convert.as_ref().and_then(|s| s.failure.as_deref()) {
            return Err(failure);
        }
        let measured = self.measured.iter().find(|m| m.windows.length == length);
        let measured = measured.ok_or("not evaluated")?;
        match &measured.step.failure {
            Some(failure) => Err(failure),
            None => Ok(measured),
        }
    }

    /// Numbers that converted layers cache of a token.
    pub fn cached(&self) -> u64 {
        self.ranks.iter().map(|(r, d)| r + d).sum()
    }

    /// The first failure of any of its commands.
    pub fn failure(&self) -> Option<&str> {
        let steps = self
            .convert
            .iter()
            .chain(self.measured.iter().map(|m| &m.step));
        steps.into_iter().find_map(|s| s.failure.as_deref())
    }
}

/// A step and what it printed on standard output.
pub type Ran = (Step, String);

/// Runs `mlac` with arguments.
pub trait Runner {
    /// Runs it; a command that fails is a step with a failure, not an error.
    fn run(&self, args: &[String]) -> io::Result<Ran>;
}

/// The built `mlac`, copied so that a build that goes on meanwhile changes nothing.
#[derive(Debug)]
pub struct Mlac {
    program: PathBuf,
    runtime: Option<PathBuf>,
    gnu_time: Option<PathBuf>,
    digest: u64,
}

impl Mlac {
    /// Copies the `mlac` that lies beside this program into `work`.
    pub fn beside(work: &Path) -> Result<Self, String> {
        let me = std::env::current_exe().map_err(|e| format!("this program's place: {e}"))?;
        let source = me.with_file_name("mlac");
        let digest = digest_of(&source).map_err(|e| {
            format!(
                "{}: expected mlac built beside this program, found none ({e}); fix: cargo build --release -p mlac",
                source.display()
            )
        })?;
        let program = work.join(format!("mlac-{digest:016x}"));
        if !program.exists() {
            let partial = program.with_extension("partial");
            fs::copy(&source, &partial)
                .and_then(|_| fs::rename(&partial, &program))
                .map_err(|e| format!("{}: {e}", program.display()))?;
        }
        // Where mlac itself looks, which the copy has left behind.
        let runtime = (std::env::var_os("MLAC_RUNTIME_DIR").is_none())
            .then(|| {
                me.ancestors()
                    .find(|a| a.file_name() == Some("target".as_ref()))
            })
            .flatten()
            .map(|target| target.join("runtime"))
            .filter(|folder| folder.is_dir());
        let is_gnu = Command::new("time")
            .arg("--version")
            .output()
            .is_ok_and(|out| {
                [out.stdout, out.stderr]
                    .concat()
                    .windows(3)
                    .any(|w| w == b"GNU")
            });
        Ok(Self {
            program,
            runtime,
            gnu_time: is_gnu.then(|| work.join("time.txt")),
            digest,
        })
    }

    /// Whether peak memory is measured.
    pub fn measures_memory(&self) -> bool {
        self.gnu_time.is_some()
    }
}

impl Runner for Mlac {
    fn run(&self, args: &[String]) -> io::Result<Ran> {
        let mut command = match &self.gnu_time {
            Some(file) => {
                let mut command = Command::new("time");
                command.args(["-f", "%M", "-o"]).arg(file);
                command.arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        if let Some(runtime) = &self.runtime {
            command.env("MLAC_RUNTIME_DIR", runtime);
        }
        let started = Instant::now();
        let out = command.args(args).output()?;
        let seconds = started.elapsed().as_secs_f64();
        let said = match &self.gnu_time {
            Some(file) => fs::read_to_string(file).unwrap_or_default(),
            None => String::new(),
        };
        let failure = (!out.status.success()).then(|| {
            let how = said.lines().find(|l| l.starts_with("Command "));
            reason(
                &String::from_utf8_lossy(&out.stderr),
                how.unwrap_or(&out.status.to_string()),
            )
        });
        let step = Step {
            command: shell_line(args),
            seconds,
            peak_bytes: peak(&said),
            failure,
        };
        Ok((step, String::from_utf8_lossy(&out.stdout).into_owned()))
    }
}

/// Kibibytes on the last line of what GNU time says.
fn peak(said: &str) -> Option<u64> {
    let kib: u64 = said.lines().last()?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Why a command failed: its line of error, else its last line, else how it ended.
fn reason(stderr: &str, ended: &str) -> String {
    let mut lines = stderr
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .rev();
    let last = lines.clone().next();
    match lines.find_map(|l| l.strip_prefix("error: ")).or(last) {
        Some(line) => line.to_owned(),
        None => ended.to_owned(),
    }
}

/// A command as one would type it.
pub fn shell_line(args: &[String]) -> String {
    let quoted = args.iter().map(|arg| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./+=,:@%".contains(c);
        if !arg.is_empty() && arg.chars().all(plain) {
            arg.clone()
        } else {
            format!("'{}'", arg.replace('\'', r"'\''"))
        }
    });
    std::iter::once("mlac".to_owned())
        .chain(quoted)
        .collect::<Vec<_>>()
        .join(" ")
}

/// What all runs share.
#[derive(Debug)]
pub struct Harness<'a, R> {
    request: &'a Request,
    runner: R,
    /// Numbers a layer of the original caches.
    pub width: usize,
    /// The commit.
    pub commit: String,
    /// Digest of mlac, the model and the texts.
    inputs: u64,
    real: Names,
    /// File names for what is printed.
    pub shown: Names,
}

impl<'a> Harness<'a, Mlac> {
    /// Looks at mlac, the model and the texts.
    pub fn open(request: &'a Request, mlac: Mlac) -> Result<Self, String> {
        let named = |e: io::Error, path: &Path| format!("{}: {e}", path.display());
        let inputs = [
            mlac.digest,
            stamp_of(&request.model).map_err(|e| named(e, &request.model))?,
            digest_of(&request.calib).map_err(|e| named(e, &request.calib))?,
            digest_of(&request.eval).map_err(|e| named(e, &request.eval))?,
        ];
        let inputs = Fnv::of(&inputs.map(u64::to_le_bytes).concat());
        Self::with(request, mlac, commit(), inputs)
    }
}

impl<'a, R: Runner> Harness<'a, R> {
    /// With a runner and the identity of its inputs.
    fn with(request: &'a Request, runner: R, commit: String, inputs: u64) -> Result<Self, String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let output = format!("converted-{}", std::process::id());
        let real = Names {
            model: text(&request.model),
            calib: text(&request.calib),
            eval: text(&request.eval),
            output: text(&request.work.join(output)),
        };
        let shown = Names {
            model: file_name(&real.model),
            calib: file_name(&real.calib),
            eval: file_name(&real.eval),
            output: "mla".to_owned(),
        };
        let plan = ["plan", &real.model, "--budget", "0.5", "--json"].map(str::to_owned);
        let (step, printed) = runner
            .run(&plan)
            .map_err(|e| format!("mlac cannot be started: {e}"))?;
        if let Some(failure) = step.failure {
            return Err(format!("{}: {failure}", step.command));
        }
        let width = layer_width(&printed)
            .ok_or_else(|| format!("{}: no width of a layer in {printed}", step.command))?;
        Ok(Self {
            request,
            runner,
            width,
            commit,
            inputs,
            real,
            shown,
        })
    }

    /// The file of a job.
    pub fn file(&self, job: &Job) -> PathBuf {
        let words = match &job.conversion {
            None => format!("original-{}", job.windows[0].length),
            Some(c) => format!(
                "{}-{}+{}-seed{}{}",
                c.method.name(),
                c.size.latent,
                c.size.rotary,
                c.seed,
                c.without
                    .as_ref()
                    .map_or_else(String::new, |s| format!("-without-{s}"))
            ),
        };
        let commit: String = self
            .commit
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || *c == '+')
            .collect();
        let all = format!("{:016x} {:?}", self.inputs, self.commands(job, &self.shown));
        self.request.work.join(format!(
            "{words}-{commit}-{:016x}.json",
            Fnv::of(all.as_bytes())
        ))
    }

    /// The commands of a job: the conversion's and the evaluations'.
    pub fn commands(&self, job: &Job, names: &Names) -> Vec<Vec<String>> {
        let convert = job
            .conversion
            .iter()
            .map(|c| convert_args(self.request, c, self.width, names));
        let model = match job.conversion {
            Some(_) => &names.output,
            None => &names.model,
        };
        let evals = job.windows.iter().map(|&w| eval_args(model, w, names));
        convert.chain(evals).collect()
    }

    /// What is kept of a job, if it was run.
    pub fn kept(&self, job: &Job) -> Option<Entry> {
        let text = fs::read_to_string(self.file(job)).ok()?;
        // A file that is damaged is as good as none.
        serde_json::from_str(&text).ok()
    }

    /// Runs a job and keeps what came out.
    pub fn run(&self, job: &Job) -> io::Result<Entry> {
        self.clear()?;
        let mut entry = Entry {
            job: job.clone(),
            commit: self.commit.clone(),
            machine: machine(),
            convert: None,
            ranks: Vec::new(),
            measured: Vec::new(),
        };
        let mut commands = self.commands(job, &self.real).into_iter();
        if job.conversion.is_some()
            && let Some(args) = commands.next()
        {
            let (step, printed) = self.runner.run(&args)?;
            entry.ranks = converted_ranks(&printed);
            entry.convert = Some(step);
        }
        if entry.failure().is_none() {
            for (&windows, args) in job.windows.iter().zip(commands) {
                let ran = self.runner.run(&args)?;
                entry.measured.push(measured(windows, ran));
            }
        }
        self.clear()?;
        let file = self.file(job);
        let partial = file.with_extension("json.partial");
        fs::write(&partial, serde_json::to_string_pretty(&entry)? + "\n")?;
        fs::rename(&partial, &file)?;
        Ok(entry)
    }

    /// Removes converted folders, also those of runs that were killed.
    fn clear(&self) -> io::Result<()> {
        for found in fs::read_dir(&self.request.work)? {
            let found = found?;
            let name = found.file_name();
            if name.to_string_lossy().starts_with("converted-") && found.file_type()?.is_dir() {
                fs::remove_dir_all(found.path())?;
            }
        }
        Ok(())
    }

    /// A failure for the section: files by their names.
    pub fn shown_failure(&self, failure: &str) -> String {
        let mut text = failure.to_owned();
        for (real, shown) in [
            (&self.real.output, &self.shown.output),
            (&self.real.model, &self.shown.model),
            (&self.real.calib, &self.shown.calib),
            (&self.real.eval, &self.shown.eval),
        ] {
            text = text.replace(real.as_str(), shown);
        }
        text
    }
}

/// The numbers a converted layer cached before: what all layers cache now, less the converted ones, is
/// what the others always cached.
fn layer_width(printed: &str) -> Option<usize> {
    let plan: serde_json::Value = serde_json::from_str(printed).ok()?;
    let layers = plan["layers"].as_array()?;
    let now = layers.iter().try_fold(0, |sum, layer| {
        let ranks = &layer[1];
        Some(sum + ranks["kv_lora_rank"].as_u64()? + ranks["qk_rope_head_dim"].as_u64()?)
    })?;
    let others = plan["mla_numbers_per_token"].as_u64()?.checked_sub(now)?;
    let before = plan["gqa_numbers_per_token"]
        .as_u64()?
        .checked_sub(others)?;
    let count = layers.len() as u64;
    (count > 0 && before > 0 && before.is_multiple_of(count)).then(|| (before / count) as usize)
}

/// The layers' ranks, of the record that `convert` prints.
fn converted_ranks(printed: &str) -> Vec<(u64, u64)> {
    let record: serde_json::Value = serde_json::from_str(printed).unwrap_or_default();
    let layers = record["layers"].as_array().map_or(&[][..], Vec::as_slice);
    let ranks = |layer: &serde_json::Value| {
        let rotary = layer["qk_rope_head_dim"].as_u64()?;
        Some((layer["kv_lora_rank"].as_u64()?, rotary))
    };
    layers.iter().filter_map(ranks).collect()
}

fn measured(windows: Windows, (mut step, printed): Ran) -> Measured {
    let value: serde_json::Value = serde_json::from_str(&printed).unwrap_or_default();
    // JSON has no infinity: a perplexity that is not finite arrives as null.
    let perplexity = value["perplexity"].as_f64();
    let losses = value["losses"].as_array().map_or_else(Vec::new, |all| {
        all.iter().filter_map(serde_json::Value::as_f64).collect()
    });
    if step.failure.is_none() && perplexity.is_none() {
        step.failure = Some("the perplexity is not a finite number".to_owned());
    }
    Measured {
        windows,
        perplexity: perplexity.filter(|_| step.failure.is_none()),
        step,
        losses,
    }
}

/// FNV-1a: tells files apart, stands up to nobody.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn of(bytes: &[u8]) -> u64 {
        let mut hash = Self::new();
        hash.add(bytes);
        hash.0
    }
}

/// A file's bytes.
fn digest_of(file: &Path) -> io::Result<u64> {
    let mut file = fs::File::open(file)?;
    let mut hash = Fnv::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hash.0),
            n => hash.add(&piece[..n]),
        }
    }
}

/// A model's files by name, size and time: its bytes may be many.
fn stamp_of(model: &Path) -> io::Result<u64> {
    let mut files = if model.is_dir() {
        fs::read_dir(model)?
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<Vec<_>>>()?
    } else {
        vec![model.to_path_buf()]
    };
    files.sort();
    let mut hash = Fnv::new();
    for file in files {
        let about = fs::metadata(&file)?;
        let name = file_name(&file.to_string_lossy());
        hash.add(format!("{name} {} {:?}", about.len(), about.modified()?).as_bytes());
    }
    Ok(hash.0)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::RefCell;
    use std::path::Path;

    use super::super::jobs::{Conversion, jobs};
    use super::super::request::Method;
    use super::*;

    /// Stands for mlac: plans SmolLM2, converts to an empty folder, refuses what it is told to refuse.
    pub(crate) struct Fake {
        pub(crate) refuses: Option<&'static str>,
        pub(crate) ran: RefCell<Vec<String>>,
    }

    impl Fake {
        pub(crate) fn new(refuses: Option<&'static str>) -> Self {
            Self {
                refuses,
                ran: RefCell::default(),
            }
        }
    }

    impl Runner for Fake {
        fn run(&self, args: &[String]) -> io::Result<Ran> {
            let line = shell_line(args);
            let refused = self.refuses.is_some_and(|word| line.contains(word));
            let printed = match args[0].as_str() {
                _ if refused => String::new(),
                "plan" => r#"{"layers": [[1, {"kv_lora_rank": 128, "qk_rope_head_dim": 64}], [3, {"kv_lora_rank": 128,
                    "qk_rope_head_dim": 64}]], "gqa_numbers_per_token": 1536, "mla_numbers_per_token": 1152}"#
                    .to_owned(),
                "convert" => {
                    fs::create_dir(&args[3])?;
                    self.ran.borrow_mut().push(line.clone());
                    r#"{"layers": [{"kv_lora_rank": 96,
                    "qk_rope_head_dim": 64}, {"kv_lora_rank": 160, "qk_rope_head_dim": 64}]}"#
                        .to_owned()
                }
                _ => {
                    let converted = args[1].contains("converted-");
                    assert_eq!(converted, Path::new(&args[1]).is_dir());
                    self.ran.borrow_mut().push(line.clone());
                    let perplexity = if converted { 22.0 } else { 20.0 };
                    let loss = f64::ln(perplexity);
                    format!(r#"{{"perplexity": {perplexity}, "losses": [{}, {}]}}"#, loss - 0.1, loss + 0.1)
                }
            };
            let step = Step {
                command: line,
                seconds: 2.0,
                peak_bytes: Some(1 << 30),
                failure: refused.then(|| format!("{}: no | thanks", args[1])),
            };
            Ok((step, printed))
        }
    }

    pub(crate) fn request(work: &Path, extra: &str) -> Request {
        let text = format!(
            "--model /models/SmolLM2.gguf --calib /t/train.txt --eval /t/test.txt --work {} {extra}",
            work.display()
        );
        let args: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        Request::parse(&args).unwrap()
    }

    pub(crate) fn harness(request: &Request, fake: Fake) -> Harness<'_, Fake> {
        Harness::with(request, fake, "0123456789+".into(), 7).unwrap()
    }

    const SMALL: &str = "--sizes 128+64 --seeds 0,1 --windows-list 512 --ablation none";

    #[test]
    fn an_interrupted_run_goes_on_where_it_was() {
        let work = tempfile::tempdir().unwrap();
        let request = request(work.path(), SMALL);
        let all = jobs(&request, &[]);
        let first = harness(&request, Fake::new(None));
        assert_eq!(first.width, 384, "the layers that stay do not count");
        for job in &all[..3] {
            assert!(first.kept(job).is_none());
            first.run(job).unwrap();
        }
        // The next one was killed: a folder is left, and half a file under a name that does not count.
        fs::create_dir(work.path().join("converted-1.partial")).unwrap();
        fs::write(first.file(&all[3]).with_extension("json.partial"), "{").unwrap();

        let second = harness(&request, Fake::new(None));
        let entries: Vec<Entry> = all
            .iter()
            .map(|job| second.kept(job).unwrap_or_else(|| second.run(job).unwrap()))
            .collect();
        let converted = |h: &Harness<'_, Fake>| {
            let ran = h.runner.ran.borrow();
            ran.iter().filter(|l| l.starts_with("mlac convert")).count()
        };
        assert_eq!((converted(&first), converted(&second)), (1, 4));
        assert!(
            entries
                .iter()
                .all(|e| e.on(2048).is_ok() || e.on(512).is_ok())
        );
        let left: Vec<String> = fs::read_dir(work.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        assert!(
            !left.iter().any(|n| n.starts_with("converted-")),
            "{left:?}"
        );
        assert!(all.iter().all(|job| second.file(job).is_file()));
        assert_eq!(all.len(), 2 + 4 + 1);
    }

    #[test]
    fn a_file_is_named_after_everything_its_figures_depend_on() {
        let work = tempfile::tempdir().unwrap();
        let first = request(work.path(), SMALL);
        let job = |r: &Request| {
            let size = "128+64".parse().unwrap();
            Job::of(r, Conversion::plain(r, Method::Recipe, size))
        };
        let base = harness(&first, Fake::new(None)).file(&job(&first));
        let name = base.file_name().unwrap().to_string_lossy().into_owned();
        assert!(
            name.starts_with("recipe-128+64-seed0-0123456789+-"),
            "{name}"
        );
        let others = [
            Harness::with(&first, Fake::new(None), "other".into(), 7),
            Harness::with(&first, Fake::new(None), "0123456789+".into(), 8),
        ];
        for other in others {
            assert_ne!(other.unwrap().file(&job(&first)), base);
        }
        for extra in [
            "--eval-windows 4",
            "--calib-windows 4",
            "--windows-list none",
        ] {
            let with = request(work.path(), &format!("--sizes 128+64 {extra}"));
            assert_ne!(
                harness(&with, Fake::new(None)).file(&job(&with)),
                base,
                "{extra}"
            );
        }
    }

    #[test]
    fn failures_are_kept_with_their_reason() {
        let work = tempfile::tempdir().unwrap();
        let request = request(work.path(), SMALL);
        for (word, evaluations) in [("convert", 0), ("512", 2)] {
            let harness = harness(&request, Fake::new(Some(word)));
            let job = &jobs(&request, &[])[2];
            let entry = harness.run(job).unwrap();
            assert_eq!(entry.measured.len(), evaluations);
            assert!(entry.failure().unwrap().contains("no | thanks"));
            assert_eq!(entry.on(2048).is_ok(), word == "512");
            assert!(harness.kept(job).unwrap().on(512).is_err());
            let shown = harness.shown_failure(entry.failure().unwrap());
            assert!(shown == "SmolLM2.gguf: no | thanks" || shown == "mla: no | thanks");
        }
        let nan = measured(
            Windows {
                length: 4,
                count: 1,
            },
            {
                let (step, _) = Fake::new(None).run(&["plan".to_owned()]).unwrap();
                (step, r#"{"perplexity": null, "losses": []}"#.to_owned())
            },
        );
        assert!(nan.step.failure.unwrap().contains("finite"));
    }

    #[test]
    fn the_reason_is_the_line_of_error() {
        assert_eq!(
            reason(
                "error: unexpected argument '--x'\n\n  tip: y\n\nUsage: z\n",
                "exit 2"
            ),
            "unexpected argument '--x'"
        );
        assert_eq!(
            reason("converting\nthread panicked\n", "exit 101"),
            "thread panicked"
        );
        assert_eq!(reason("\n", "signal 9"), "signal 9");
        assert_eq!(
            peak("Command exited with non-zero status 2\n3456\n"),
            Some(3456 * 1024)
        );
        assert_eq!(peak(""), None);
        assert_eq!(
            shell_line(&["eval".into(), "it's".into()]),
            r"mlac eval 'it'\''s'"
        );
    }
}

//! Running jobs: each leaves one small file in the work folder, named after all that its figures
//! depend on, and a job whose file is there is not run again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::digest::{digest, digest_of, stamp_of};
use super::jobs::{Job, Names, Windows, convert_args, eval_args};
use super::mlac::{Mlac, Ran, Runner};
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
        let inputs = digest(&inputs.map(u64::to_le_bytes).concat());
        Self::with(request, mlac, commit(), inputs)
    }
}

impl<'a, R: Runner> Harness<'a, R> {
    /// With a runner and the identity of its inputs.
    fn with(request: &'a Request, runner: R, commit: String, inputs: u64) -> Result<Self, String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let output = format!("converted-{}", std::process::id());
        // The same build on the same windows: other gradients would be refused.
        let windows = format!("{:?} {:?}", request.calib_windows, request.calib_window);
        let windows = digest(windows.as_bytes());
        let gradients = format!("gradients-{inputs:016x}-{windows:016x}");
        let real = Names {
            model: text(&request.model),
            calib: text(&request.calib),
            eval: text(&request.eval),
            output: text(&request.work.join(output)),
            gradients: text(&request.work.join(gradients)),
        };
        let shown = Names {
            model: file_name(&real.model),
            calib: file_name(&real.calib),
            eval: file_name(&real.eval),
            output: "mla".to_owned(),
            gradients: "gradients".to_owned(),
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
                match c.without.as_slice() {
                    [] => String::new(),
                    steps => format!("-without-{}", steps.join("-")),
                }
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
            digest(all.as_bytes())
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

#[cfg(test)]
pub(crate) mod tests;

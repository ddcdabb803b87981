//! What is asked for: the command line of `quality`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use mlac::cli::units;
use serde::{Deserialize, Serialize};

/// How it is called.
pub const USAGE: &str = "\
Usage: quality --model MODEL --calib TEXT --eval TEXT --work DIR [options]

  --methods LIST       recipe,recipe-refined,recipe-uniform,transmla,svd
  --refine N           gradient steps of recipe-refined: 200
  --sizes LIST         cached numbers of a converted layer: 224+64,128+64,80+64,64+32,16+32
  --middle SIZE        where seeds and window lengths are compared [default: the middle one of the sizes by cache]
  --seeds LIST         which calibration windows: 0,1,2; those after the first for the recipe at the middle size
  --all-seeds          every seed for every method and size
  --eval-window N      tokens in an evaluation window: 2048
  --eval-windows N     evaluation windows: 8
  --windows-list LIST  window lengths compared at the middle size on as many tokens: 512,2048,8192, or none
  --ablation SIZE      where each step of the recipe is left out: 128+64, or none
  --calib-windows N    calibration windows [default: mlac's]
  --calib-window N     tokens in one [default: mlac's]
  --retry              run again what failed before
  --no-runs            write the section from what the work folder has
  --output DIR         folder for RESULTS.md and quality.svg [default: bench/ and docs/ of the repository]";

/// Numbers a converted layer caches of a token, `r + d_r`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Numbers in the latent, r.
    pub latent: usize,
    /// Numbers in the rotary key, `d_r`.
    pub rotary: usize,
}

impl Size {
    /// r + `d_r`.
    pub fn width(self) -> usize {
        self.latent + self.rotary
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split_once('+')
            .and_then(|(r, d)| {
                Some(Self {
                    latent: r.trim().parse().ok().filter(|n| *n > 0)?,
                    rotary: d.trim().parse().ok().filter(|n| *n > 0)?,
                })
            })
            .ok_or_else(|| format!("expected a size such as 128+64, found {text:?}"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} + {}", self.latent, self.rotary)
    }
}

/// A way to convert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// The recipe, the budget distributed over the layers.
    Recipe,
    /// The same, and gradient steps on every layer: not free of training.
    RecipeRefined,
    /// The recipe with the same ranks in every layer.
    RecipeUniform,
    /// TransMLA.
    Transmla,
    /// Low rank of the weights, which needs no calibration text.
    Svd,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Recipe,
        Self::RecipeRefined,
        Self::RecipeUniform,
        Self::Transmla,
        Self::Svd,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recipe => "recipe",
            Self::RecipeRefined => "recipe-refined",
            Self::RecipeUniform => "recipe-uniform",
            Self::Transmla => "transmla",
            Self::Svd => "svd",
        }
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|m| m.name() == text)
            .ok_or_else(|| {
                let known = Self::ALL.map(Self::name).join(", ");
                format!("expected a method among {known}, found {text:?}")
            })
    }
}

/// The command line, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Checkpoint folder or GGUF file.
    pub model: PathBuf,
    /// Calibration text.
    pub calib: PathBuf,
    /// Evaluation text.
    pub eval: PathBuf,
    /// Where conversions go while they are measured, and what was measured.
    pub work: PathBuf,
    /// Methods, in the order of the columns.
    pub methods: Vec<Method>,
    /// Sizes, in the order of the rows.
    pub sizes: Vec<Size>,
    /// The size where seeds and window lengths are compared.
    pub middle: Size,
    /// Calibration seeds; the first is that of all tables but the seeds' own.
    pub seeds: Vec<u64>,
    /// Every seed for every method and size.
    pub all_seeds: bool,
    /// Gradient steps of [`Method::RecipeRefined`].
    pub refine: usize,
    /// Tokens in an evaluation window.
    pub eval_window: usize,
    /// Evaluation windows.
    pub eval_windows: usize,
    /// Window lengths compared at the middle size.
    pub windows_list: Vec<usize>,
    /// The size where steps are left out.
    pub ablation: Option<Size>,
    /// Calibration windows, where not mlac's default.
    pub calib_windows: Option<usize>,
    /// Tokens in a calibration window, where not mlac's default.
    pub calib_window: Option<usize>,
    /// Run again what failed.
    pub retry: bool,
    /// Run nothing.
    pub no_runs: bool,
    /// Where the section and the chart go, where not into the repository.
    pub output: Option<PathBuf>,
    /// The options as given, without paths to them: for the section.
    pub command: String,
}

impl Request {
    /// Reads the arguments after the program's name.
    pub fn parse(args: &[String]) -> Result<Self, String> {
        let mut given = Given { args, seen: vec![] };
        let path = |value: Option<&str>, name: &str| {
            value
                .map(PathBuf::from)
                .ok_or_else(|| format!("expected {name}, found none"))
        };
        let sizes = list(
            given.value("--sizes")?,
            "224+64,128+64,80+64,64+32,16+32",
            str::parse::<Size>,
        )?;
        let middle = given.value("--middle")?.map(str::parse).transpose()?;
        let ablation = match given.value("--ablation")?.unwrap_or("128+64") {
            "none" => None,
            size => Some(size.parse()?),
        };
        let windows_list = match given.value("--windows-list")? {
            Some("none") => Vec::new(),
            lengths => list(lengths, "512,2048,8192", units::tokens)?,
        };
        let tokens = |value: Option<&str>| value.map(units::tokens).transpose();
        let request = Self {
            model: path(given.value("--model")?, "--model MODEL")?,
            calib: path(given.value("--calib")?, "--calib TEXT")?,
            eval: path(given.value("--eval")?, "--eval TEXT")?,
            work: path(given.value("--work")?, "--work DIR")?,
            methods: list(
                given.value("--methods")?,
                "recipe,recipe-refined,recipe-uniform,transmla,svd",
                str::parse,
            )?,
            middle: middle.unwrap_or_else(|| middle_of(&sizes)),
            sizes,
            seeds: list(given.value("--seeds")?, "0,1,2", |text| {
                text.parse()
                    .map_err(|_| format!("expected a seed such as 1, found {text:?}"))
            })?,
            all_seeds: given.flag("--all-seeds"),
            refine: tokens(given.value("--refine")?)?.unwrap_or(200),
            eval_window: tokens(given.value("--eval-window")?)?.unwrap_or(2048),
            eval_windows: tokens(given.value("--eval-windows")?)?.unwrap_or(8),
            windows_list,
            ablation,
            calib_windows: tokens(given.value("--calib-windows")?)?,
            calib_window: tokens(given.value("--calib-window")?)?,
            retry: given.flag("--retry"),
            no_runs: given.flag("--no-runs"),
            output: given.value("--output")?.map(PathBuf::from),
            command: shown_command(args),
        };
        given.refuse_unknown()?;
        Ok(request)
    }
}

/// The size in the middle by its width.
fn middle_of(sizes: &[Size]) -> Size {
    let mut sorted = sizes.to_vec();
    sorted.sort_by_key(|s| s.width());
    sorted[sorted.len() / 2]
}

/// Reads a list with commas, each entry once; never empty.
fn list<T: PartialEq>(
    value: Option<&str>,
    default: &str,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    let mut entries = Vec::new();
    for text in value.unwrap_or(default).split(',') {
        let entry = read(text.trim())?;
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    Ok(entries)
}

/// Options that say where things lie on one machine.
const PATHS: [&str; 3] = ["--model", "--calib", "--eval"];

fn shown_command(args: &[String]) -> String {
    let mut shown = vec!["cargo run --release -p mlac-bench --bin quality --".to_owned()];
    let mut i = 0;
    while i < args.len() {
        let (name, value) = (args[i].as_str(), args.get(i + 1));
        match (name, value) {
            ("--work", Some(_)) => shown.push("--work DIR".to_owned()),
            ("--output", Some(_)) => {}
            (name, Some(path)) if PATHS.contains(&name) => {
                shown.push(format!("{name} {}", file_name(path)));
            }
            _ => {
                if !matches!(name, "--retry" | "--no-runs") {
                    shown.push(name.to_owned());
                }
                i += 1;
                continue;
            }
        }
        i += 2;
    }
    shown.join(" ")
}

/// The last part of a path.
pub fn file_name(path: &str) -> String {
    std::path::Path::new(path)
        .file_name()
        .map_or_else(|| path.to_owned(), |n| n.to_string_lossy().into_owned())
}

/// Arguments and which of them were read.
struct Given<'a> {
    args: &'a [String],
    seen: Vec<usize>,
}

impl<'a> Given<'a> {
    fn flag(&mut self, name: &str) -> bool {
        let at = self.args.iter().position(|a| a == name);
        self.seen.extend(at);
        at.is_some()
    }

    fn value(&mut self, name: &str) -> Result<Option<&'a str>, String> {
        let Some(at) = self.args.iter().position(|a| a == name) else {
            return Ok(None);
        };
        let value = self
            .args
            .get(at + 1)
            .filter(|v| !v.starts_with("--"))
            .ok_or_else(|| format!("expected a value after {name}, found none"))?;
        self.seen.extend([at, at + 1]);
        Ok(Some(value))
    }

    fn refuse_unknown(&self) -> Result<(), String> {
        match (0..self.args.len()).find(|i| !self.seen.contains(i)) {
            Some(i) => Err(format!(
                "expected each option once, found {:?}",
                self.args[i]
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(extra: &str) -> Result<Request, String> {
        let text = format!(
            "--model /a/model.gguf --calib /a/train.txt --eval /a/test.txt --work /a/w {extra}"
        );
        let args: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        Request::parse(&args)
    }

    #[test]
    fn defaults_are_those_of_the_usage() {
        let request = parse("").unwrap();
        assert_eq!(request.methods, Method::ALL);
        assert_eq!(request.sizes.len(), 5);
        assert_eq!(request.middle, "80+64".parse().unwrap());
        assert_eq!(request.seeds, [0, 1, 2]);
        assert_eq!(
            (
                request.eval_window,
                request.eval_windows,
                &request.windows_list[..]
            ),
            (2048, 8, &[512, 2048, 8192][..])
        );
        assert_eq!(request.ablation, Some("128+64".parse().unwrap()));
        for line in USAGE.lines().filter(|l| l.starts_with("  --")) {
            let option = line.split_whitespace().next().unwrap();
            let value = if line.trim().split("  ").next().unwrap().contains(' ') {
                "1"
            } else {
                ""
            };
            let refusal = parse(&format!("{option} {value}"))
                .err()
                .unwrap_or_default();
            assert!(!refusal.contains("each option once"), "{option}: {refusal}");
        }
    }

    #[test]
    fn options_are_read_and_paths_do_not_reach_the_section() {
        let request = parse(
            "--methods svd,recipe --sizes 64+32,32+16,64+32 --seeds 3 --windows-list none --ablation none \
             --eval-window 1K --middle 32+16 --all-seeds --retry",
        )
        .unwrap();
        assert_eq!(request.methods, [Method::Svd, Method::Recipe]);
        assert_eq!(request.sizes.len(), 2, "each size once");
        assert_eq!(request.middle.width(), 48);
        assert_eq!((request.eval_window, request.seeds[0]), (1024, 3));
        assert!(request.windows_list.is_empty() && request.ablation.is_none());
        assert!(request.all_seeds && request.retry && !request.no_runs);
        assert_eq!(
            parse("--seeds 0 --output /b --no-runs").unwrap().command,
            "cargo run --release -p mlac-bench --bin quality -- --model model.gguf --calib train.txt \
             --eval test.txt --work DIR --seeds 0"
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for (extra, words) in [
            ("--sizes 128", "128+64"),
            ("--sizes 0+4", "128+64"),
            ("--methods best", "recipe-uniform"),
            ("--seeds x", "seed"),
            ("--eval-windows 0", "positive"),
            ("--seeds --retry", "value after --seeds"),
            ("--nonsense", "--nonsense"),
            ("--retry --retry", "once"),
        ] {
            let refusal = parse(extra).unwrap_err();
            assert!(refusal.contains(words), "{extra}: {refusal}");
        }
        assert!(Request::parse(&[]).unwrap_err().contains("--model"));
    }
}

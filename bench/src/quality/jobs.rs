//! The conversions and evaluations of a request, and the commands they are.

use serde::{Deserialize, Serialize};

use super::request::{Method, Request, Size};

/// The step that distributes a budget over the layers; given ranks leave it nothing to do.
pub const ALLOCATION: &str = "allocation";

/// The step whose result makes [`BALANCE`] needless.
const GRADIENT: &str = "gradient";

/// The step that searches the balance of keys and values.
const BALANCE: &str = "balance";

/// A conversion.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conversion {
    /// How.
    pub method: Method,
    /// To which cache.
    pub size: Size,
    /// Which calibration windows.
    pub seed: u64,
    /// The steps of the recipe that are left out.
    pub without: Vec<String>,
}

impl Conversion {
    /// The method at `size` with the first seed and every step.
    pub fn plain(request: &Request, method: Method, size: Size) -> Self {
        Self {
            method,
            size,
            seed: request.seeds[0],
            without: Vec::new(),
        }
    }

    /// A name for people.
    pub fn label(&self) -> String {
        let without = match self.without.as_slice() {
            [] => String::new(),
            steps => format!(" without {}", steps.join(" and ")),
        };
        format!(
            "{} {}, seed {}{without}",
            self.method.name(),
            self.size,
            self.seed
        )
    }
}

/// Evaluation windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Windows {
    /// Tokens in one.
    pub length: usize,
    /// How many.
    pub count: usize,
}

impl Windows {
    /// Those of the main table.
    pub fn main(request: &Request) -> Self {
        Self {
            length: request.eval_window,
            count: request.eval_windows,
        }
    }

    /// Windows of `length` with as many tokens as the main table's.
    pub fn of_length(request: &Request, length: usize) -> Self {
        Self {
            length,
            count: (request.eval_window * request.eval_windows / length).max(1),
        }
    }

    /// The main ones and those of the list.
    fn all(request: &Request) -> Vec<Self> {
        let mut all = vec![Self::main(request)];
        for &length in &request.windows_list {
            let windows = Self::of_length(request, length);
            if !all.contains(&windows) {
                all.push(windows);
            }
        }
        all
    }
}

/// What is run and kept as one: a conversion and its evaluations, or one evaluation of the original.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The conversion; the original has none.
    pub conversion: Option<Conversion>,
    /// What it is evaluated on.
    pub windows: Vec<Windows>,
}

impl Job {
    /// The original on `windows`.
    pub fn original(windows: Windows) -> Self {
        Self {
            conversion: None,
            windows: vec![windows],
        }
    }

    /// A conversion, on several window lengths where these are compared.
    pub fn of(request: &Request, conversion: Conversion) -> Self {
        let compared = conversion.size == request.middle
            && conversion.seed == request.seeds[0]
            && conversion.without.is_empty()
            && request.methods.contains(&conversion.method);
        Self {
            conversion: Some(conversion),
            windows: if compared {
                Windows::all(request)
            } else {
                vec![Windows::main(request)]
            },
        }
    }

    /// A name for people.
    pub fn label(&self) -> String {
        match &self.conversion {
            Some(conversion) => conversion.label(),
            None => format!("original, windows of {}", self.windows[0].length),
        }
    }
}

/// Whether the ablation has a row for a step: with given ranks there is no budget to distribute.
pub fn can_be_left_out(step: &str) -> bool {
    step != ALLOCATION
}

/// The steps that an ablation row leaves out for one: gradients tell the balance, so that it is searched, or
/// not, only without them.
fn left_out(step: &str) -> Vec<String> {
    let steps = match step {
        BALANCE => vec![GRADIENT, BALANCE],
        step => vec![step],
    };
    steps.into_iter().map(str::to_owned).collect()
}

/// Everything the section needs, each job once: the original, the main table, seeds, steps left out.
pub fn jobs(request: &Request, steps: &[&str]) -> Vec<Job> {
    let mut jobs: Vec<Job> = Windows::all(request)
        .into_iter()
        .map(Job::original)
        .collect();
    let mut add = |conversion| {
        let job = Job::of(request, conversion);
        if !jobs.contains(&job) {
            jobs.push(job);
        }
    };
    let mut sizes = request.sizes.clone();
    if !sizes.contains(&request.middle) {
        sizes.push(request.middle);
    }
    for &size in &sizes {
        for &method in &request.methods {
            add(Conversion::plain(request, method, size));
        }
    }
    for conversion in seeded(request) {
        add(conversion);
    }
    if let Some(size) = request.ablation {
        for conversion in ablation(request, size, steps) {
            add(conversion);
        }
    }
    jobs
}

/// Conversions with seeds after the first.
fn seeded(request: &Request) -> Vec<Conversion> {
    let mut all = Vec::new();
    for &seed in &request.seeds[1..] {
        if request.all_seeds {
            for &size in &request.sizes {
                for &method in &request.methods {
                    // The weights alone know no seed.
                    if method != Method::Svd {
                        let conversion = Conversion::plain(request, method, size);
                        all.push(Conversion { seed, ..conversion });
                    }
                }
            }
        } else {
            let conversion = Conversion::plain(request, Method::Recipe, request.middle);
            all.push(Conversion { seed, ..conversion });
        }
    }
    all
}

/// The full recipe at `size`, first with uniform ranks and then, where the budget can be distributed,
/// so; and with uniform ranks without each of the other steps.
pub fn ablation(request: &Request, size: Size, steps: &[&str]) -> Vec<Conversion> {
    let full = Conversion::plain(request, Method::RecipeUniform, size);
    let mut all = vec![full.clone()];
    if steps.contains(&ALLOCATION) {
        all.push(Conversion::plain(request, Method::Recipe, size));
    }
    all.extend(
        steps
            .iter()
            .filter(|s| can_be_left_out(s))
            .map(|&step| Conversion {
                without: left_out(step),
                ..full.clone()
            }),
    );
    all
}

/// What the commands call the files: paths to run them, file names to print them.
#[derive(Debug, Clone)]
pub struct Names {
    /// The original.
    pub model: String,
    /// Calibration text.
    pub calib: String,
    /// Evaluation text.
    pub eval: String,
    /// The converted folder.
    pub output: String,
    /// Beginning of the names of the files that keep gradients, one a seed.
    pub gradients: String,
}

/// Arguments of `mlac convert`; `width` is a layer's GQA cache.
pub fn convert_args(
    request: &Request,
    conversion: &Conversion,
    width: usize,
    names: &Names,
) -> Vec<String> {
    let mut args: Vec<String> = ["convert", &names.model, "-o", &names.output, "--calib"]
        .map(str::to_owned)
        .to_vec();
    let calibrated = conversion.method != Method::Svd;
    args.push(if calibrated {
        names.calib.clone()
    } else {
        "none".to_owned()
    });
    let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
    if let Method::Transmla | Method::Svd = conversion.method {
        add("--method", conversion.method.name().to_owned());
    }
    if let Method::Recipe | Method::RecipeRefined = conversion.method {
        let fraction = conversion.size.width() as f64 / width as f64;
        add("--budget", fraction.to_string());
    } else {
        add("--kv-lora-rank", conversion.size.latent.to_string());
        add("--rope-dim", conversion.size.rotary.to_string());
    }
    if conversion.method == Method::RecipeRefined {
        add("--refine", request.refine.to_string());
    }
    if calibrated {
        if conversion.seed != 0 {
            add("--calib-seed", conversion.seed.to_string());
        }
        if let Some(windows) = request.calib_windows {
            add("--calib-windows", windows.to_string());
        }
        if let Some(window) = request.calib_window {
            add("--calib-window", window.to_string());
        }
    }
    let recipe = !matches!(conversion.method, Method::Transmla | Method::Svd);
    if recipe && !conversion.without.iter().any(|step| step == GRADIENT) {
        let file = format!("{}-{}.safetensors", names.gradients, conversion.seed);
        args.extend(["--gradients".to_owned(), file]);
    }
    if !conversion.without.is_empty() {
        args.push(format!("--steps=-{}", conversion.without.join(",-")));
    }
    args.push("--json".to_owned());
    args
}

/// Arguments of `mlac eval` of `model`.
pub fn eval_args(model: &str, windows: Windows, names: &Names) -> Vec<String> {
    [
        "eval",
        model,
        "--text",
        &names.eval,
        "--window",
        &windows.length.to_string(),
        "--windows",
        &windows.count.to_string(),
        "--json",
    ]
    .map(str::to_owned)
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(extra: &str) -> Request {
        let text = format!("--model m --calib c --eval e --work w {extra}");
        let args: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        Request::parse(&args).unwrap()
    }

    fn names() -> Names {
        Names {
            model: "m".into(),
            calib: "c".into(),
            eval: "e".into(),
            output: "o".into(),
            gradients: "g".into(),
        }
    }

    #[test]
    fn each_conversion_is_run_once() {
        let steps = ["basis", "refit", ALLOCATION];
        let all = jobs(&request(""), &steps);
        // Three windows of the original, 5 sizes x 5 methods, two more seeds, two steps left out: the full
        // recipe is in the main table already.
        assert_eq!(all.len(), 3 + 25 + 2 + 2);
        for (i, job) in all.iter().enumerate() {
            assert!(!all[..i].contains(job), "{} twice", job.label());
        }
        let compared = all.iter().filter(|j| j.windows.len() == 3).count();
        assert_eq!(compared, 5, "every method at the middle size");
        let alone = jobs(
            &request("--methods svd --sizes 80+64 --seeds 0 --windows-list none --ablation 128+64"),
            &steps,
        );
        assert_eq!(
            alone.len(),
            1 + 1 + 4,
            "the ablation brings its own full recipe"
        );
        let seeds = jobs(&request("--all-seeds --ablation none"), &steps);
        assert_eq!(seeds.len(), 3 + 25 + 2 * 5 * 4);
    }

    #[test]
    fn windows_of_other_lengths_hold_as_many_tokens() {
        let request = request("");
        let counts = [512, 2048, 8192, 1 << 20].map(|l| Windows::of_length(&request, l).count);
        assert_eq!(counts, [32, 8, 2, 1]);
    }

    #[test]
    fn commands_have_the_options_of_their_method() {
        let request = request("--seeds 5 --calib-window 64");
        let args = |method, without: &[&str]| {
            let conversion = Conversion {
                without: without.iter().map(|&s| s.to_owned()).collect(),
                ..Conversion::plain(&request, method, "128+64".parse().unwrap())
            };
            convert_args(&request, &conversion, 384, &names()).join(" ")
        };
        assert_eq!(
            args(Method::Recipe, &[]),
            "convert m -o o --calib c --budget 0.5 --calib-seed 5 --calib-window 64 --gradients g-5.safetensors \
             --json"
        );
        assert_eq!(
            args(Method::RecipeRefined, &[]),
            "convert m -o o --calib c --budget 0.5 --refine 200 --calib-seed 5 --calib-window 64 \
             --gradients g-5.safetensors --json"
        );
        assert_eq!(
            args(Method::RecipeUniform, &["gradient", "balance"]),
            "convert m -o o --calib c --kv-lora-rank 128 --rope-dim 64 --calib-seed 5 --calib-window 64 \
             --steps=-gradient,-balance --json"
        );
        assert_eq!(
            args(Method::Transmla, &[]),
            "convert m -o o --calib c --method transmla --kv-lora-rank 128 --rope-dim 64 --calib-seed 5 \
             --calib-window 64 --json"
        );
        assert_eq!(
            args(Method::Svd, &[]),
            "convert m -o o --calib none --method svd --kv-lora-rank 128 --rope-dim 64 --json"
        );
        assert_eq!(
            eval_args("o", Windows::main(&request), &names()).join(" "),
            "eval o --text e --window 2048 --windows 8 --json"
        );
    }
}

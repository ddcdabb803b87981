use std::cell::RefCell;
use std::path::Path;

use super::super::jobs::{Conversion, jobs};
use super::super::mlac::{peak, reason, shell_line};
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
    assert_eq!((converted(&first), converted(&second)), (1, 5));
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
    assert_eq!(all.len(), 2 + 5 + 1);
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

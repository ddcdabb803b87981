//! `--gradients FILE`: taken once, read afterwards, refused where they belong to something else.

mod common;

use std::fs;

use common::{Bench, Run, contents};

fn convert(bench: &Bench, output: &str, text: &str, more: &[&str]) -> Run {
    let model = bench.model();
    let mut args = vec![
        "convert",
        model.to_str().expect("a path of the test"),
        "-o",
        output,
        "--layers",
        "all",
        "--calib",
        text,
    ];
    args.extend(["--calib-windows", "4", "--calib-window", "64"]);
    args.extend(["--gradients", "kept.safetensors"]);
    args.extend(more);
    bench.run(&args)
}

#[test]
fn gradients_are_taken_once_and_refused_for_another_text() {
    for name in ["llama_tied_bias", "gpt_oss_mxfp4"] {
        let bench = Bench::with(name);
        bench.text("text.txt", 6000);
        bench.text("other.txt", 5000);
        let first = convert(&bench, "first", "text.txt", &["--budget", "0.5"]);
        first.succeeds();
        assert!(
            first.err().contains("gradients of the loss ended"),
            "{}",
            first.err()
        );
        let kept = fs::read(bench.path("kept.safetensors")).unwrap();
        let again = convert(&bench, "again", "text.txt", &["--budget", "0.5"]);
        again.succeeds();
        assert!(
            again
                .err()
                .contains("gradients of the loss read from kept.safetensors"),
            "{}",
            again.err()
        );
        assert!(
            contents(&bench.path("first")) == contents(&bench.path("again")),
            "{name}"
        );
        // Another size of the same takes them too.
        convert(&bench, "smaller", "text.txt", &["--budget", "0.25"]).succeeds();

        let other = convert(&bench, "other", "other.txt", &["--budget", "0.5"]);
        other.refuses(&["--gradients kept.safetensors", "remove the file"]);
        assert!(!bench.path("other").exists());
        assert!(
            fs::read(bench.path("kept.safetensors")).unwrap() == kept,
            "never overwritten"
        );
    }
}

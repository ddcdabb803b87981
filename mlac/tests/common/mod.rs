//! Tiny models and runs of the command for the tests of the command line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder for one test, removed at its end, with a copy of a fixture model that has a tokenizer.
pub(crate) struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    /// Copies the fixture `name` and gives it a tokenizer of one token per ASCII character.
    pub(crate) fn with(name: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let source = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/fixtures")
            .join(name);
        let model = folder.path().join("model");
        fs::create_dir(&model).expect("the model's folder");
        for entry in fs::read_dir(&source).expect("the fixture") {
            let path = entry.expect("an entry").path();
            let file = path.file_name().expect("a name");
            if file != "io.safetensors" {
                fs::copy(&path, model.join(file)).expect("a copy");
            }
        }
        fs::write(model.join("tokenizer.json"), tokenizer()).expect("the tokenizer");
        Self { folder }
    }

    /// A path in the test's folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The model.
    pub(crate) fn model(&self) -> PathBuf {
        self.path("model")
    }

    /// Writes a text of `characters` characters (one token each) and returns its path.
    pub(crate) fn text(&self, name: &str, characters: usize) -> PathBuf {
        let words = "the shelf holds a jar of nails, two maps; and 31 letters (unread)\n";
        let text: String = words.chars().cycle().take(characters).collect();
        let path = self.path(name);
        fs::write(&path, text).expect("the text");
        path
    }

    /// Runs `mlac` in the test's folder.
    pub(crate) fn run(&self, args: &[&str]) -> Run {
        let output = self.command(args).output().expect("mlac runs");
        Run(output)
    }

    /// The command, not yet started.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mlac"));
        command.args(args).current_dir(self.folder.path());
        command
    }
}

/// What a run printed and how it ended.
pub(crate) struct Run(pub(crate) Output);

impl Run {
    /// The exit code.
    pub(crate) fn code(&self) -> i32 {
        self.0.status.code().unwrap_or(-1)
    }

    /// Standard output.
    pub(crate) fn out(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }

    /// Standard error.
    pub(crate) fn err(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }

    /// Fails the test unless the run ended well.
    #[track_caller]
    pub(crate) fn succeeds(&self) -> String {
        assert_eq!(
            self.code(),
            0,
            "stderr: {}\nstdout: {}",
            self.err(),
            self.out()
        );
        self.out()
    }

    /// Fails the test unless the run was refused with exit code 2 and says all of `words`.
    #[track_caller]
    pub(crate) fn refuses(&self, words: &[&str]) {
        let err = self.err();
        assert_eq!(self.code(), 2, "stderr: {err}\nstdout: {}", self.out());
        for word in words.iter().chain(&["expected", "found", "fix"]) {
            assert!(err.contains(word), "no {word:?} in: {err}");
        }
    }
}

/// A `tokenizer.json` with one token for each of 96 ASCII characters.
fn tokenizer() -> String {
    let vocabulary: serde_json::Map<String, serde_json::Value> = (32_u8..127)
        .chain([b'\n'])
        .enumerate()
        .map(|(id, byte)| (char::from(byte).to_string(), id.into()))
        .collect();
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocabulary, "merges": []
        }
    })
    .to_string()
}

/// Every file below `folder` with its bytes, by relative path.
pub(crate) fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(at) = open.pop() {
        for entry in fs::read_dir(&at).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path
                    .strip_prefix(folder)
                    .expect("a path below the folder")
                    .to_path_buf();
                files.push((name, fs::read(&path).expect("a file")));
            }
        }
    }
    files.sort();
    files
}

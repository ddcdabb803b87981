//! The medians that criterion left in `target/criterion`.

use std::fs;
use std::path::PathBuf;

/// Median of a bench in seconds.
pub fn median_seconds(group: &str, id: &str) -> Result<f64, String> {
    let file = criterion_folder()
        .join(group)
        .join(id)
        .join("new/estimates.json");
    let text = fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| format!("{}: {e}", file.display()))?;
    json["median"]["point_estimate"]
        .as_f64()
        .map(|ns| ns * 1e-9)
        .ok_or_else(|| {
            format!(
                "{}: expected median.point_estimate, found none",
                file.display()
            )
        })
}

fn criterion_folder() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target"),
        PathBuf::from,
    );
    target.join("criterion")
}

/// Whether cargo only checks that the bench runs (`cargo test --benches`).
pub fn is_test_run() -> bool {
    std::env::args().any(|a| a == "--test")
}

//! `mlac doctor`.

use std::fmt::Write as _;

use super::Context;
use crate::error::Error;

pub(super) fn run(context: Context) -> Result<bool, Error> {
    let parts = mlac_engines::doctor::examine();
    let mut text = String::new();
    for part in &parts {
        let _ = writeln!(text, "{}", part.component);
        let _ = writeln!(
            text,
            "  found:  {}",
            part.found.as_deref().unwrap_or("nothing")
        );
        let _ = writeln!(text, "  needed: {}", part.needed);
        if let Some(fix) = &part.fix {
            let _ = writeln!(text, "  fix:    {fix}");
        }
    }
    context.show(&parts, &text)?;
    Ok(parts.iter().all(|p| p.found.is_some() || !p.required))
}

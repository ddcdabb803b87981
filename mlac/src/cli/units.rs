//! Numbers with units on the command line: token counts such as `4K`, byte sizes such as `2GiB`.

use std::fmt::Write as _;

/// Parses a token count: `2048`, `4K` (1024s) or `1M`.
pub fn tokens(text: &str) -> Result<usize, String> {
    let (digits, factor) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1024),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 1024 * 1024),
        _ => (text, 1),
    };
    let value: usize = digits
        .parse()
        .map_err(|_| format!("expected a number of tokens such as 2048 or 4K, found {text:?}"))?;
    match value.checked_mul(factor) {
        Some(v) if v > 0 => Ok(v),
        _ => Err(format!(
            "expected a positive number of tokens, found {text:?}"
        )),
    }
}

/// Parses a byte size: `512MiB`, `5GiB`, `1000000`.
pub fn bytes(text: &str) -> Result<u64, String> {
    let units = [
        ("KiB", 1_u64 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("B", 1),
    ];
    let (digits, factor) = units
        .iter()
        .find_map(|(u, f)| text.strip_suffix(u).map(|d| (d.trim(), *f)))
        .unwrap_or((text, 1));
    let value: u64 = digits
        .parse()
        .map_err(|_| format!("expected a size such as 512MiB or 5GiB, found {text:?}"))?;
    value
        .checked_mul(factor)
        .filter(|v| *v > 0)
        .ok_or_else(|| format!("expected a positive size below 16 EiB, found {text:?}"))
}

/// Parses a share of the GQA cache: `0.5` or `50%`. Whether it is in range is the converter's to say.
pub fn fraction(text: &str) -> Result<f64, String> {
    let (digits, divisor) = match text.strip_suffix('%') {
        Some(d) => (d.trim(), 100.0),
        None => (text, 1.0),
    };
    let value: f64 = digits.parse().map_err(|_| {
        format!("expected a share of the GQA cache such as 0.5 or 50%, found {text:?}")
    })?;
    Ok(value / divisor)
}

/// A byte count for people: `1.5 MiB`.
pub fn show_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {unit}")
    }
}

/// A token count for people: `4K`.
pub fn show_tokens(tokens: usize) -> String {
    if tokens >= 1024 && tokens.is_multiple_of(1024) {
        format!("{}K", tokens / 1024)
    } else {
        tokens.to_string()
    }
}

/// A table with aligned columns, the first to the left, the others to the right.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..head.len())
        .map(|c| {
            rows.iter()
                .map(|r| r[c].chars().count())
                .chain([head[c].chars().count()])
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut out = String::new();
    let mut line = |cells: &[String]| {
        for (c, cell) in cells.iter().enumerate() {
            let pad = widths[c] - cell.chars().count();
            if c == 0 {
                let _ = write!(out, "{cell}{}", " ".repeat(pad));
            } else {
                let _ = write!(out, "  {}{cell}", " ".repeat(pad));
            }
        }
        while out.ends_with(' ') {
            out.pop();
        }
        out.push('\n');
    };
    line(&head.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>());
    for row in rows {
        line(row);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read_and_nonsense_is_refused() {
        assert_eq!(tokens("2048"), Ok(2048));
        assert_eq!(tokens("4K"), Ok(4096));
        assert!(tokens("0").is_err() && tokens("x").is_err() && tokens("").is_err());
        assert!(tokens("99999999999999999999K").is_err());
        assert_eq!(bytes("512MiB"), Ok(512 << 20));
        assert!(bytes("99999999999GiB").is_err() && bytes("many").is_err());
        assert!((fraction("50%").unwrap() - 0.5).abs() < 1e-12);
        assert!(fraction("half").is_err());
        assert_eq!(show_bytes(1536), "1.5 KiB");
        assert_eq!(show_tokens(32768), "32K");
    }

    #[test]
    fn tables_align() {
        let t = table(&["a", "bb"], &[vec!["xx".into(), "1".into()]]);
        assert_eq!(t, "a   bb\nxx   1\n");
    }
}

//! GPU architectures that an engine can be built for.

use std::fmt;
use std::str::FromStr;

use mlac_model::Refusal;

use crate::find::{self, Library};

/// A compute capability, as 10 x major + minor: 89 for Ada, 120 for consumer Blackwell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target(u32);

/// What TensorRT for RTX 1.7 builds for.
const RTX: [u32; 6] = [75, 80, 86, 89, 120, 121];

impl Target {
    /// Every architecture that TensorRT for RTX 1.7 builds for.
    pub const ALL: [Self; RTX.len()] =
        [Self(75), Self(80), Self(86), Self(89), Self(120), Self(121)];

    /// `sm89` and the like; whether an engine can be built for it is for [`check`](Self::check).
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        text.parse()
    }

    /// 10 x major + minor.
    pub fn number(self) -> u32 {
        self.0
    }

    /// Checks that the engine builder of this machine can build for it.
    ///
    /// # Errors
    /// Datacenter parts other than sm80 need enterprise TensorRT: found / needed / fix.
    pub fn check(self) -> Result<(), Refusal> {
        if RTX.contains(&self.0) {
            return Ok(());
        }
        let expected = format!(
            "one of {}, which TensorRT for RTX builds for",
            list(&Self::ALL)
        );
        if !matches!(self.0, 87 | 90 | 100 | 101 | 103 | 110) {
            return Err(Refusal::new(
                format!("target {self}"),
                expected,
                "an unknown architecture",
                "choose one of those",
            ));
        }
        let enterprise = find::library(Library::TensorRtEnterprise)?;
        let found = match enterprise.found {
            Some(found) => format!(
                "{self}, which needs enterprise TensorRT; {} is there",
                found.path.display()
            ),
            None => format!(
                "{self}, which needs enterprise TensorRT 11 (libnvinfer.so.11): not installed"
            ),
        };
        Err(Refusal::new(
            format!("target {self}"),
            expected,
            found,
            "choose one of those, or build on that GPU with --backend tensorrt",
        ))
    }
}

fn list(targets: &[Target]) -> String {
    targets
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm{}", self.0)
    }
}

impl FromStr for Target {
    type Err = Refusal;

    /// `sm89`.
    fn from_str(text: &str) -> Result<Self, Refusal> {
        text.strip_prefix("sm")
            .filter(|digits| {
                (2..=3).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
            })
            .and_then(|digits| digits.parse().ok())
            .map(Self)
            .ok_or_else(|| {
                Refusal::new(
                    format!("target `{text}`"),
                    format!("one of {}", list(&Self::ALL)),
                    "no such name",
                    "write it as sm89 (Ada) or sm120 (Blackwell)",
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_nonsense_is_refused() {
        for target in Target::ALL {
            assert_eq!(target.to_string().parse::<Target>().unwrap(), target);
            target.check().unwrap();
        }
        for text in [
            "", "sm", "89", "sm9", "sm8x", "sm1200", "SM89", "sm+9", "sm 89",
        ] {
            let error = text.parse::<Target>().unwrap_err().to_string();
            assert!(
                error.contains("sm75, sm80, sm86, sm89, sm120, sm121"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn datacenter_gpus_are_told_what_they_need() {
        for name in ["sm90", "sm100"] {
            let error = name
                .parse::<Target>()
                .unwrap()
                .check()
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("enterprise TensorRT") && error.contains("fix: choose"),
                "{error}"
            );
        }
        let error = "sm77"
            .parse::<Target>()
            .unwrap()
            .check()
            .unwrap_err()
            .to_string();
        assert!(error.contains("unknown architecture"), "{error}");
    }
}
